"""Requests, as they arrive. Stricter than waitress: we and any proxy must agree where each one ends."""

import random
import re
import time
from contextlib import suppress

from waitress.adjustments import Adjustments
from waitress.parser import HTTPRequestParser
from waitress.receiver import ChunkedReceiver
from waitress.utilities import Error

# RFC 9112, section 3: the parts of the request line stand between single spaces, and a target is visible ASCII.
REQUEST_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Z]+) ([!-~]+) HTTP/([0-9]\.[0-9])")
TARGET = re.compile(rb"/|https?://[^/?#@]+(?:[/?]|$)", re.IGNORECASE)
# A head (request line and headers), as far as it has arrived: lines end with CR LF, not one of them alone (RFC 9112,
# section 2.2), begin with no blank (5.2: no folded lines), and have no control characters (RFC 9110, section 5.5).
# At most 127 blanks in a row, because waitress's pattern takes quadratic time for them.
LINE = rb"[!-~\x80-\xff]++(?:[ \t]{1,127}+[!-~\x80-\xff]++)*+[ \t]{0,127}+"
HEAD = re.compile(rb"(?:%b\r\n)*+(?:%b)?(?:\r\n?)?" % (LINE, LINE))
EMPTY_LINES = re.compile(rb"(?:\r\n)*+")
FRAMING = re.compile(rb"\r\n(content-length|content-type|host|transfer-encoding):([^\r]*)", re.IGNORECASE)
# RFC 9110, section 7.2: uri-host [ ":" port ].
HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9\-._~%!$&'()*+,;=]*)(?::[0-9]*)?")
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
IDS = random.Random()  # noqa: S311 (no secret, so without a system call; our own, as an application may seed the other)

# RFC 9112, section 7.1: a chunk's size and its extensions, of which nothing is used; a field of the trailer, likewise.
TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
QUOTED = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
EXTENSION = rb"[ \t]*;[ \t]*%b(?:[ \t]*=[ \t]*(?:%b|%b))?" % (TOKEN, TOKEN, QUOTED)
SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:%b)*" % EXTENSION)
FIELD = re.compile(TOKEN + rb":[\t -~\x80-\xff]*")
MAX_CHUNK_LINE = 2**13  # bytes; of the whole trailer too


def refusal(why: str, code: int = 400, reason: str = "Bad Request") -> Error:
    """Return the error to answer a request with, in place of the application."""
    error = Error(why)
    error.code, error.reason = code, reason
    return error


class Request(HTTPRequestParser):
    """One request, as it arrives: give it to received() until it is `completed`.

    Then it has an `error` to be answered, or is the application's: waitress has read its headers into `headers`,
    `command`, `path` and so on, and its body into a buffer.
    """

    version = "1.1"  # to answer a request that cannot be read
    command = request_uri = path = None
    environ: dict | None = None  # the application's, where waitress notes what a trusted proxy says
    began = 0.0  # when its first byte came, by time.monotonic()

    def __init__(self, adj: Adjustments) -> None:
        """Be ready for the first byte."""
        super().__init__(adj)
        self.head = b""
        self.id = f"{IDS.getrandbits(128):032x}"

    def received(self, data: bytes) -> int:
        """Take what has arrived; return how many bytes of it belong to this request."""
        consumed = self.receive_body(data) if self.headers_finished else self.receive_head(data)
        self.completed = self.completed or bool(self.error)
        return consumed

    def receive_head(self, data: bytes) -> int:
        """Take a part of the request line and headers."""
        head = self.head + data
        head = head[EMPTY_LINES.match(head).end() :]
        if not self.began and head not in {b"", b"\r"}:  # empty lines do not count (RFC 9112, section 2.2)
            self.began = time.monotonic()
        start, end, rest = head.partition(b"\r\n\r\n")
        self.head = head = start + end
        line, whole, _ = head.partition(b"\r\n")
        if whole:
            with suppress(ValueError):  # for the log, whatever is wrong
                self.command, self.request_uri, _ = line.decode("latin-1").split(" ")
        most = self.adj.max_request_header_size
        if len(head) >= most:
            self.error = refusal(
                f"line and headers have less than {most} bytes", 431, "Request Header Fields Too Large"
            )
        elif not HEAD.fullmatch(head):
            self.error = refusal(
                "a header has no control character, bare CR or LF, folded line, or 128 blanks in a row"
            )
        else:
            self.error = (whole and check_request_line(line)) or (end and self.parse_head(head)) or None
        return len(data) - len(rest)

    def parse_head(self, head: bytes) -> Error | None:
        """Have waitress read a whole head; return what is wrong with it, if anything is."""
        if error := check_framing(head):
            return error
        try:
            super().received(head)
        except ValueError:  # a length of thousands of digits, a URL with half an IPv6 address
            return refusal("invalid Content-Length or URL")
        if self.error:
            return self.error
        host = self.headers.get("HOST", None if self.version == "1.1" else "")
        if host is None or not (HOST.fullmatch(host) and HOST.fullmatch(self.proxy_netloc)):
            return refusal("HTTP/1.1 needs exactly one valid Host header")
        if self.proxy_netloc:
            # RFC 9112, section 3.2.2: the host of an absolute target takes the place of the Host header's.
            self.headers["HOST"] = self.proxy_netloc
            self.path = self.path or "/"
        if REQUEST_ID.fullmatch(self.headers.get("X_REQUEST_ID", "")):
            self.id = self.headers["X_REQUEST_ID"]
        self.headers["X_REQUEST_ID"] = self.id
        if self.chunked:
            self.body_rcv = ChunkedBody(self.body_rcv.getbuf())
        return None

    def receive_body(self, data: bytes) -> int:
        """Take a part of the body."""
        try:
            return super().received(data)
        except OSError:  # waitress keeps the larger part in a file, whose disk may be full
            self.error = refusal("there is no room for the body", 503, "Service Unavailable")
            return len(data)

    def close(self) -> None:
        """Throw the body away. Even that may fail, if its file has found no room for the last bytes."""
        with suppress(OSError):
            super().close()


def check_request_line(line: bytes) -> Error | None:
    """Return what is wrong with a request line, if anything is."""
    if not (match := REQUEST_LINE.fullmatch(line)):
        return refusal("a request line is METHOD, target and HTTP/1.1, with a space between each")
    method, target, version = match.groups()
    if version not in {b"1.0", b"1.1"}:  # waitress takes all others for 1.0
        return refusal("this server speaks HTTP/1.1 and HTTP/1.0", 505, "HTTP Version Not Supported")
    if method == b"CONNECT":
        return refusal("this server is no proxy", 501, "Not Implemented")
    if not (TARGET.match(target) or (method, target) == (b"OPTIONS", b"*")):
        return refusal("a target is a path that begins with /, or an http URL")
    return None


def check_framing(head: bytes) -> Error | None:
    """Return what could make servers disagree about where this request ends, if anything does."""
    fields = [(name.lower(), value) for name, value in FRAMING.findall(head)]
    lines = [value for name, value in fields if name == b"transfer-encoding"]
    names = {name for name, _ in fields}
    if len(fields) - len(lines) > len(names - {b"transfer-encoding"}):
        return refusal("Content-Length, Content-Type and Host must not be repeated")
    if not lines:
        return None
    # RFC 9112, sections 6.1 and 6.3, and RFC 9110, section 5.6.1: empty elements of a list count for nothing.
    codings = [coding for part in b",".join(lines).split(b",") if (coding := part.strip(b" \t").lower())]
    if codings[-1:] != [b"chunked"] or codings.count(b"chunked") > 1:
        return refusal("chunked must be the last transfer coding, and occur once")
    if b"content-length" in names or head.partition(b"\r\n")[0].endswith(b"1.0"):
        return refusal("Transfer-Encoding goes neither with Content-Length nor with HTTP/1.0")
    return None


class ChunkedBody(ChunkedReceiver):
    """A body in chunks (RFC 9112, section 7.1).

    waitress's own accepts LF alone in places and anything as a trailer, and it appends each chunk by itself: a second
    for 100 KB in chunks of a byte. waitress calls received() until `completed` or `error` is set.
    """

    left = 0  # bytes still to come of this chunk and its CR LF
    line = b""  # the beginning of a line
    trailer = None  # bytes of it; None before it

    def received(self, data: bytes) -> int:
        """Take what has arrived; return how many bytes of it belong to this body."""
        taken, content = 0, []
        while taken < len(data) and not (self.completed or self.error):
            if self.left > 2:
                content.append(data[taken : taken + self.left - 2])
                taken += len(content[-1])
                self.left -= len(content[-1])
            elif self.left:
                if data[taken] != (13 if self.left == 2 else 10):
                    self.error = refusal("a chunk must end with CR LF where its size says")
                taken += 1
                self.left -= 1
            else:
                end = data.find(b"\n", taken) + 1 or len(data)
                self.line += data[taken:end]
                taken = end
                self.error = self.take_line()
        if content:
            self.buf.append(b"".join(content))
        return taken

    def take_line(self) -> Error | None:
        """Take a chunk's size or a line of the trailer, if it is whole; return what is wrong with it."""
        line, whole, _ = self.line.partition(b"\r\n")
        if len(self.line) + (self.trailer or 0) > MAX_CHUNK_LINE or (self.line.endswith(b"\n") and not whole):
            return refusal("a line of a chunked body is too long, or does not end with CR LF")
        if not whole:
            return None
        self.line = b""
        if self.trailer is None:
            if not (match := SIZE.fullmatch(line)):
                return refusal("a chunk begins with its size in hexadecimal digits")
            size = int(match[1], 16)
            self.left, self.trailer = (size + 2, None) if size else (0, 0)
        else:
            self.trailer += len(line)
            self.completed = not line
            if line and not FIELD.fullmatch(line):
                return refusal("invalid trailer")
        return None
