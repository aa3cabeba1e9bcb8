"""Answers: the headers that each of them has, what one that is no application's looks like, the access log."""

import re
import time
from contextlib import suppress

from waitress.channel import ClientDisconnected
from waitress.proxy_headers import MalformedProxyHeader, parse_proxy_headers
from waitress.task import ErrorTask, WSGITask

from serve.log import ErrorStream, json_line, timestamp

NOSNIFF = ("X-Content-Type-Options", "nosniff")
OURS = {"x-request-id", "x-content-type-options"}
ERRORS = ErrorStream()
STATUS = re.compile(r"[2-5][0-9]{2}(?: |$)")


class Answer:
    """What both kinds of waitress's tasks have in common here: a task makes the answer to one request, in a thread.

    Relied upon: service() makes the answer and raises what the application raises; it calls build_response_header()
    when the answer begins, with all the application's headers in response_headers, and finish() when it is made; the
    request in work is the first of the channel's `requests`, also while waitress answers 500 to a copy of it.
    """

    def service(self) -> None:
        """Make the answer, and put the request on record."""
        try:
            super().service()
        except Exception as failure:
            if self.channel.header:  # nothing is sent yet, so there can be another answer
                self.channel.header = b""
                self.wrote_header = False
            if self.wrote_header or isinstance(failure, ClientDisconnected):
                self.record()  # else waitress answers 500 next, and that is put on record
            raise
        self.record()

    def build_response_header(self) -> bytes:
        """Leave the header, with what every answer has, to the channel; return none, for waitress to send none."""
        channel = self.channel
        if channel.state.closing:
            with channel.requests_lock:  # under which several that arrive at once are added
                last = len(channel.requests) == 1
            if last:
                # waitress answers `Connection: close` and closes. What else has arrived is answered before that.
                self.request.headers["CONNECTION"] = "close"
                channel.lingers = True
        theirs = [header for header in self.response_headers if header[0].lower() not in OURS]
        self.response_headers = [*theirs, ("X-Request-ID", channel.requests[0].id), NOSNIFF]
        if not STATUS.match(self.status):
            raise ValueError(f"the application answers with status {self.status!r}")
        channel.header = super().build_response_header()
        channel.body_sent = 0
        # RFC 9112, section 6.3 (1). waitress sends it after HEAD, and files always; it would be the next answer.
        channel.bodiless = channel.requests[0].command == "HEAD" or self.status[:3] in {"204", "304"}
        return b""

    def finish(self) -> None:
        """End the answer, which may have no body to send the header with."""
        super().finish()
        self.channel.send_header()

    def record(self) -> None:
        """Write the request to the access log, a successful probe excepted."""
        channel, request = self.channel, self.channel.requests[0]
        if not channel.state.access_log:
            return
        path = request.request_uri and request.request_uri.partition("?")[0]
        status = int(self.status[:3]) if self.wrote_header else None
        if path == "/health" and status == 200:
            return
        entry = {
            "time": timestamp(time.time()),
            "method": request.command,
            # As it was sent, without the query: that is where people put what nobody should read.
            "path": path,
            # null: the client was gone before it could be answered.
            "status": status,
            "bytes": channel.body_sent if self.wrote_header else 0,
            "duration_ms": round((time.monotonic() - request.began) * 1000, 3),
            "remote_addr": self.remote_address(),
            "request_id": request.id,
            "user_agent": request.headers.get("USER_AGENT"),
        }
        channel.state.access_log.write(json_line(entry))

    def remote_address(self) -> str:
        """Return the client's address; a trusted proxy's own where the headers could not even be read."""
        channel, request = self.channel, self.channel.requests[0]
        if request.environ:
            return request.environ["REMOTE_ADDR"]
        # Refused, so waitress has not looked at what a proxy says: only the application's environ passes there.
        environ = {f"HTTP_{name}": value for name, value in request.headers.items()}
        environ |= {"REMOTE_ADDR": channel.addr[0], "wsgi.url_scheme": "http"}
        if channel.adj.trusted_proxy in {"*", channel.addr[0]}:
            with suppress(MalformedProxyHeader):
                parse_proxy_headers(environ, channel.adj.trusted_proxy_count, channel.adj.trusted_proxy_headers)
        return environ["REMOTE_ADDR"]


class Application(Answer, WSGITask):
    """An answer that the application makes.

    Relied upon: get_environment() makes HTTP_X_REQUEST_ID of the header X_REQUEST_ID; waitress keeps the environ that
    it returns, and changes that where a trusted proxy's headers say so.
    """

    def execute(self) -> None:
        """Call the application.

        What is no Exception, sys.exit() say, waitress leaves without an answer on an open connection; it may take
        OSError for the client's leaving.
        """
        try:
            super().execute()
        except BaseException as failure:
            if isinstance(failure, Exception) and not isinstance(failure, OSError):
                raise
            raise RuntimeError(f"the application raised {failure!r}") from failure

    def get_environment(self) -> dict:
        """Return the WSGI environ, with the request's id and whether the server is about to stop."""
        self.request.headers["X_REQUEST_ID"] = self.request.id
        environ = self.request.environ = super().get_environment()
        environ["wsgi.errors"] = ERRORS
        environ["serve.draining"] = self.channel.state.draining
        return environ


class ErrorAnswer(Answer, ErrorTask):
    """An answer that waitress makes by itself: to a request that it refuses, or where the application has failed.

    Relied upon: execute() writes the answer to request.error, and waitress closes the connection after it.
    """

    def execute(self) -> None:
        """Answer in one line of text."""
        self.channel.lingers = True
        error = self.request.error
        # A traceback, where WAITRESS_EXPOSE_TRACEBACKS asks for one, keeps its lines. What waitress says before a quote
        # is its own, what comes after it the client's.
        why = error.body if error.code == 500 else error.body.partition('"')[0].strip()
        body = f"{error.code} {error.reason}: {why}\n".encode()
        self.status = f"{error.code} {error.reason}"
        self.response_headers.append(("Content-Type", "text/plain; charset=utf-8"))
        self.set_close_on_finish()
        self.content_length = len(body)
        self.write(body)
