"""Sends responses, the application's or our own errors, and writes the access log."""

import re
import time
import traceback
from contextlib import suppress
from functools import lru_cache

from waitress.channel import ClientDisconnected
from waitress.proxy_headers import parse_proxy_headers
from waitress.task import WSGITask
from waitress.utilities import Error, build_http_date

from serve.http import refusal
from serve.log import ErrorStream, log, quoted, request_id, timestamp

ERRORS = ErrorStream()
STATUS = re.compile(r"[2-5][0-9]{2}(?: |$)")
OUR_HEADERS = {"connection", "x-content-type-options", "x-request-id"}  # set here; the application's are dropped

http_date = lru_cache(maxsize=1)(build_http_date)  # cached, because it changes once a second


class Response(WSGITask):
    """The response to one request.

    waitress's execute() gets the environ from get_environment(), calls the application and passes each part of the body
    to write(). For a wsgi.file_wrapper it calls write(b"") and then passes the file to the channel's write_soon().
    """

    body_sent = 0  # bytes, including the framing of chunks

    def make(self) -> None:
        """Send a response, whatever the application does, and log the request."""
        request_id.set(self.request.id)
        try:
            if self.channel.closed:
                raise ClientDisconnected
            if self.request.error:
                self.refuse(self.request.error)
            else:
                self.execute()
            self.finish()
        except ClientDisconnected:
            log.info("Client disconnected while serving %s", self.request.path)
            self.close_on_finish = True
        except BaseException:  # sys.exit() too: it must not end the worker
            log.exception("Exception while serving %s", self.request.path)
            self.close_on_finish = True
            if not self.wrote_header:
                why = "The server encountered an unexpected internal server error"
                if self.channel.adj.expose_tracebacks:
                    why = traceback.format_exc()
                with suppress(ClientDisconnected):
                    self.refuse(refusal(why, 500, "Internal Server Error"))
        if self.channel.server.access_log:
            with suppress(Exception):  # the application may have put anything into the environ
                self.record()
        request_id.set(None)

    def refuse(self, error: Error) -> None:
        """Send `error` as plain text in place of the application's response, and close the connection."""
        # Cut at the first double quote: there waitress's messages begin to quote the client.
        why = error.body if error.code == 500 else error.body.partition('"')[0].strip()
        body = f"{error.code} {error.reason}: {why}\n".encode(errors="backslashreplace")
        self.status = f"{error.code} {error.reason}"
        self.response_headers = [("Content-Type", "text/plain; charset=utf-8")]
        self.content_length, self.content_bytes_written = len(body), 0
        self.chunked_response, self.complete, self.close_on_finish = False, True, True
        self.write(body)

    def get_environment(self) -> dict:
        """Return the WSGI environ, with our own wsgi.errors and serve.draining: whether the server is about to stop."""
        environ = self.request.environ = super().get_environment()
        environ["wsgi.errors"] = ERRORS
        environ["serve.draining"] = self.channel.server.draining
        return environ

    @property
    def has_body(self) -> bool:
        """Whether to send a body. After HEAD, 204 or 304 it would be read as a new response (RFC 9112, section 6.3)."""
        return self.request.command != "HEAD" and not self.status.startswith(("204", "304"))

    def write(self, data: bytes) -> None:
        """Send a part of the body, the first with the header: that saves a system call and a packet."""
        if not self.complete:
            raise RuntimeError("start_response() was not called before the body")
        header = b"" if self.wrote_header else self.build_response_header()
        size = len(data)
        if not self.has_body:
            data = b""
            self.content_bytes_written += size  # otherwise waitress would report too few
        elif self.chunked_response:
            data = b"%X\r\n%b\r\n" % (size, data) if data else b""
        elif self.content_length is not None:
            data = data[: self.content_length - self.content_bytes_written]
            self.content_bytes_written += len(data)
            if len(data) < size and not self.logged_write_excess:
                self.logged_write_excess = True
                log.warning("The application exceeded the number of bytes specified by Content-Length")
        self.channel.write_soon(header, data)
        self.wrote_header = True

    def finish(self) -> None:
        """End the body; send the header if it has not been sent with a body."""
        if not self.wrote_header:
            self.write(b"")
        if self.chunked_response:
            self.channel.write_soon(b"0\r\n\r\n")

    def build_response_header(self) -> bytes:
        """Return the status line and headers. Raises ValueError for an invalid status."""
        if not STATUS.match(self.status):
            raise ValueError(f"status must begin with a code from 200 to 599, not {self.status!r}")
        headers = [header for header in self.response_headers if header[0].lower() not in OUR_HEADERS]
        given = {name.lower() for name, _ in headers}
        if self.status.startswith(("204", "304")):
            headers = [header for header in headers if header[0].lower() != "content-length"]
        elif "content-length" not in given:
            if self.content_length is not None:
                headers.append(("Content-Length", str(self.content_length)))
            elif self.version == "1.0":
                self.close_on_finish = True  # this is how the client knows where the body ends
            elif self.has_body:
                headers.append(("Transfer-Encoding", "chunked"))
                self.chunked_response = True
        if "date" not in given:
            headers.append(("Date", http_date(int(time.time()))))
        ident = self.channel.adj.ident
        if ident and "server" not in given:
            headers.append(("Server", ident))
        headers += [("X-Request-ID", self.request.id), ("X-Content-Type-Options", "nosniff")]
        if self.closes():
            self.close_on_finish = True
            headers.append(("Connection", "close"))
        elif self.version == "1.0":
            headers.append(("Connection", "Keep-Alive"))
        lines = [f"HTTP/{self.version} {self.status}", *[f"{name}: {value}" for name, value in headers]]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")

    def closes(self) -> bool:
        """Return whether the connection closes after this response (RFC 9112, section 9.3)."""
        options = {option.strip(" \t") for option in self.request.headers.get("CONNECTION", "").lower().split(",")}
        return (
            self.close_on_finish
            or "close" in options
            or (self.version == "1.0" and "keep-alive" not in options)
            or (self.channel.server.closing and len(self.channel.requests) == 1 and not self.channel.unparsed)
        )

    def record(self) -> None:
        """Write the request to the access log, unless it is a successful health check."""
        request = self.request
        # As sent, but without the query, which may hold secrets.
        path = request.request_uri and request.request_uri.partition("?")[0]
        status = self.status[:3] if self.wrote_header else "null"  # the client left before the response
        if (path, status) == ("/health", "200"):
            return
        duration = (time.monotonic() - request.began) * 1000
        # Formatted by hand, because json.dumps() of a dict takes several times as long.
        self.channel.server.access_log.write(
            f'{{"time": "{timestamp(time.time())}", "method": {quoted(request.command)}, "path": {quoted(path)}, '
            f'"status": {status}, "bytes": {self.body_sent}, "duration_ms": {duration:.3f}, '
            f'"remote_addr": {quoted(self.client_address())}, "request_id": "{request.id}", '
            f'"user_agent": {quoted(request.headers.get("USER_AGENT"))}}}\n'
        )

    def client_address(self) -> str:
        """Return the client's address: from a trusted proxy, else from the connection."""
        if self.request.environ:
            return str(self.request.environ.get("REMOTE_ADDR"))  # waitress has put a trusted proxy's value there
        # The request was refused, so waitress's proxy middleware has not run.
        adj, address = self.channel.adj, self.channel.addr[0]
        environ = {f"HTTP_{name}": value for name, value in self.request.headers.items()}
        environ |= {"REMOTE_ADDR": address, "wsgi.url_scheme": "http"}
        if adj.trusted_proxy in {"*", address}:
            with suppress(Exception):  # it may raise anything, such as IndexError for ":1.2"
                parse_proxy_headers(environ, adj.trusted_proxy_count, adj.trusted_proxy_headers)
        return environ["REMOTE_ADDR"]
