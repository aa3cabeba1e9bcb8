"""Responses: what the application answers, what is answered in its place, the line in the access log."""

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
OURS = {"connection", "x-content-type-options", "x-request-id"}  # set here, whatever the application or waitress says

http_date = lru_cache(maxsize=1)(build_http_date)  # cached, because it is the same for all in a second


class Response(WSGITask):
    """The response to one request, made in a worker thread.

    waitress's execute() asks get_environment() for the environ, calls the application and gives write() each part of
    the body. For a wsgi.file_wrapper it calls write(b"") and gives the file to the channel's write_soon() itself.
    """

    body_sent = 0  # bytes, with what chunks add

    def make(self) -> None:
        """Make the response and send it, whatever the application does; put it on record."""
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
        except BaseException:  # sys.exit() too: the server goes on
            log.exception("Exception while serving %s", self.request.path)
            self.close_on_finish = True
            if not self.wrote_header:
                why = "The server encountered an unexpected internal server error"
                if self.channel.adj.expose_tracebacks:
                    why = traceback.format_exc()
                with suppress(ClientDisconnected):
                    self.refuse(refusal(why, 500, "Internal Server Error"))
        if self.channel.server.access_log:
            with suppress(Exception):  # of an application that puts something else in the place of a text
                self.record()
        request_id.set(None)

    def refuse(self, error: Error) -> None:
        """Answer in one line of text in place of the application, and close the connection."""
        # Cut at the first double quote: after it waitress's messages quote the client.
        why = error.body if error.code == 500 else error.body.partition('"')[0].strip()
        body = f"{error.code} {error.reason}: {why}\n".encode(errors="backslashreplace")
        self.status = f"{error.code} {error.reason}"
        self.response_headers = [("Content-Type", "text/plain; charset=utf-8")]
        self.content_length, self.content_bytes_written = len(body), 0
        self.chunked_response, self.complete, self.close_on_finish = False, True, True
        self.write(body)

    def get_environment(self) -> dict:
        """Return the WSGI environ, with the request's id and whether the server is about to stop."""
        environ = self.request.environ = super().get_environment()
        environ["wsgi.errors"] = ERRORS
        environ["serve.draining"] = self.channel.server.draining
        return environ

    @property
    def has_body(self) -> bool:
        """Whether it has a body. One sent with HEAD, 204 or 304 would be read as the next response (RFC 9112, 6.3)."""
        return self.request.command != "HEAD" and not self.status.startswith(("204", "304"))

    def write(self, data: bytes) -> None:
        """Send a part of the body. The header goes with the first: one system call and one packet less."""
        if not self.complete:
            raise RuntimeError("start_response() was not called before the body")
        header = b"" if self.wrote_header else self.build_response_header()
        size = len(data)
        if not self.has_body:
            data = b""
            self.content_bytes_written += size  # else waitress misses them
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
        """End the body; send the header if there was none to send it with."""
        if not self.wrote_header:
            self.write(b"")
        if self.chunked_response:
            self.channel.write_soon(b"0\r\n\r\n")

    def build_response_header(self) -> bytes:
        """Return status line and headers; raises ValueError for a status that is none."""
        if not STATUS.match(self.status):
            raise ValueError(f"the application answers with status {self.status!r}")
        headers = [header for header in self.response_headers if header[0].lower() not in OURS]
        given = {name.lower() for name, _ in headers}
        if self.status.startswith(("204", "304")):
            headers = [header for header in headers if header[0].lower() != "content-length"]
        elif "content-length" not in given:
            if self.content_length is not None:
                headers.append(("Content-Length", str(self.content_length)))
            elif self.version == "1.0":
                self.close_on_finish = True  # by which the client knows where the body ends
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
        """Tell whether the connection ends with this response."""
        options = {option.strip(" \t") for option in self.request.headers.get("CONNECTION", "").lower().split(",")}
        return (
            self.close_on_finish
            or "close" in options
            or (self.version == "1.0" and "keep-alive" not in options)
            or (self.channel.server.closing and len(self.channel.requests) == 1 and not self.channel.unread)
        )

    def record(self) -> None:
        """Write the request to the access log, a successful probe excepted."""
        request = self.request
        # As it was sent, without the query: that is where people put what nobody should read.
        path = request.request_uri and request.request_uri.partition("?")[0]
        status = self.status[:3] if self.wrote_header else "null"  # the client left before
        if (path, status) == ("/health", "200"):
            return
        duration = (time.monotonic() - request.began) * 1000
        # By hand, because json.dumps() of a dict takes several times as long.
        self.channel.server.access_log.write(
            f'{{"time": "{timestamp(time.time())}", "method": {quoted(request.command)}, "path": {quoted(path)}, '
            f'"status": {status}, "bytes": {self.body_sent}, "duration_ms": {duration:.3f}, '
            f'"remote_addr": {quoted(self.client())}, "request_id": "{request.id}", '
            f'"user_agent": {quoted(request.headers.get("USER_AGENT"))}}}\n'
        )

    def client(self) -> str:
        """Return the client's address: what a trusted proxy says, or where the connection comes from."""
        if self.request.environ:
            return str(self.request.environ.get("REMOTE_ADDR"))  # in which waitress has put what a proxy says
        # Refused, so waitress's middleware for proxies has not run.
        adj, address = self.channel.adj, self.channel.addr[0]
        environ = {f"HTTP_{name}": value for name, value in self.request.headers.items()}
        environ |= {"REMOTE_ADDR": address, "wsgi.url_scheme": "http"}
        if adj.trusted_proxy in {"*", address}:
            with suppress(Exception):  # it raises anything: an IndexError for ":1.2"
                parse_proxy_headers(environ, adj.trusted_proxy_count, adj.trusted_proxy_headers)
        return environ["REMOTE_ADDR"]
