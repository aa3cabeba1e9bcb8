"""Parses requests, more strictly than waitress: any proxy and this server must agree where each request ends."""

import random
import re
import time
from contextlib import suppress

from waitress.adjustments import Adjustments
from waitress.parser import HTTPRequestParser
from waitress.receiver import ChunkedReceiver
from waitress.utilities import Error

# RFC 9112, section 3: single spaces between the parts of the request line, and a target in visible ASCII.
REQUEST_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Z]+) ([!-~]+) HTTP/([0-9]\.[0-9])")
TARGET = re.compile(rb"/|https?://[^/?#@]+(?:[/?]|$)", re.IGNORECASE)
# Request line and headers, as far as they have arrived. RFC 9112: lines end with CR LF, not CR or LF alone (section
# 2.2), and are not folded (5.2). RFC 9110, section 5.5: no control characters.
# At most 127 blanks in a row, because waitress's header pattern takes quadratic time for them.
LINE = rb"[!-~\x80-\xff]++(?:[ \t]{1,127}+[!-~\x80-\xff]++)*+[ \t]{0,127}+"
HEAD = re.compile(rb"(?:%b\r\n)*+(?:%b)?(?:\r\n?)?" % (LINE, LINE))
EMPTY_LINES = re.compile(rb"(?:\r\n)*+")
FRAMING = re.compile(rb"\r\n(content-length|content-type|host|transfer-encoding):([^\r]*)", re.IGNORECASE)
# RFC 9110, section 7.2: uri-host [ ":" port ].
HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9\-._~%!$&'()*+,;=]*)(?::[0-9]*)?")
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
IDS = random.Random()  # noqa: S311 (ids are not secret; our own, because the application may seed random's)

# RFC 9112, section 7.1: a chunk's size with its extensions, and a trailer field. Both are checked, then ignored.
TOKEN = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+"
QUOTED = rb'"(?:[\t !#-\[\]-~\x80-\xff]|\\[\t -~\x80-\xff])*"'
EXTENSION = rb"[ \t]*;[ \t]*%b(?:[ \t]*=[ \t]*(?:%b|%b))?" % (TOKEN, TOKEN, QUOTED)
SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})(?:%b)*" % EXTENSION)
FIELD = re.compile(TOKEN + rb":[\t -~\x80-\xff]*")
MAX_CHUNK_LINE = 2**13  # bytes; for the whole trailer too


def refusal(why: str, code: int = 400, reason: str = "Bad Request") -> Error:
    """Return the error to send in place of the application's response; `why` is its text, in one line."""
    error = Error(why)
    error.code, error.reason = code, reason
    return error


class Request(HTTPRequestParser):
    """One request. Pass what arrives to received() until it is `completed`.

    Then either `error` is set, or it is ready for the application: waitress has parsed its headers into `headers`,
    `command`, `path` and so on, and stored its body in a buffer.
    """

    version = "1.1"  # for the response to a request that cannot be parsed
    command = request_uri = path = None
    environ: dict | None = None  # the application's; waitress adds what a trusted proxy says
    began = 0.0  # time.monotonic() at its first byte

    def __init__(self, adj: Adjustments) -> None:
        super().__init__(adj)
        self.head = b""
        self.id = f"{IDS.getrandbits(128):032x}"

    def received(self, data: bytes) -> int:
        """Parse `data`; return how many of its bytes belong to this request."""
        consumed = self.receive_body(data) if self.headers_finished else self.receive_head(data)
        self.completed = self.completed or bool(self.error)
        return consumed

    def receive_head(self, data: bytes) -> int:
        """Parse a part of the request line and headers; return how many bytes belong to them."""
        head = self.head + data
        head = head[EMPTY_LINES.match(head).end() :]
        if not self.began and head not in {b"", b"\r"}:  # empty lines before it do not count (RFC 9112, section 2.2)
            self.began = time.monotonic()
        start, end, rest = head.partition(b"\r\n\r\n")
        self.head = head = start + end
        line, whole, _ = head.partition(b"\r\n")
        if whole:
            with suppress(ValueError):  # for the log, even if the line is invalid
                self.command, self.request_uri, _ = line.decode("latin-1").split(" ")
        limit = self.adj.max_request_header_size
        if len(head) >= limit:
            self.error = refusal(
                f"request line and headers must be shorter than {limit} bytes", 431, "Request Header Fields Too Large"
            )
        elif not HEAD.fullmatch(head):
            self.error = refusal(
                "headers must not contain control characters, bare CR or LF, folded lines, or 128 blanks in a row"
            )
        else:
            self.error = (whole and check_request_line(line)) or (end and self.parse_head(head)) or None
        return len(data) - len(rest)

    def parse_head(self, head: bytes) -> Error | None:
        """Have waitress parse the complete request line and headers; return an error if they are invalid."""
        if error := check_framing(head):
            return error
        try:
            super().received(head)
        except ValueError:  # a length of thousands of digits, or a URL with half an IPv6 address
            return refusal("invalid Content-Length or URL")
        if self.error:
            return self.error
        host = self.headers.get("HOST", None if self.version == "1.1" else "")
        if host is None or not (HOST.fullmatch(host) and HOST.fullmatch(self.proxy_netloc)):
            return refusal("HTTP/1.1 needs exactly one valid Host header")
        if self.proxy_netloc:
            # RFC 9112, section 3.2.2: the host of an absolute target replaces the Host header.
            self.headers["HOST"] = self.proxy_netloc
            self.path = self.path or "/"
        if REQUEST_ID.fullmatch(self.headers.get("X_REQUEST_ID", "")):
            self.id = self.headers["X_REQUEST_ID"]
        self.headers["X_REQUEST_ID"] = self.id
        if self.chunked:
            self.body_rcv = ChunkedBody(self.body_rcv.getbuf())
        return None

    def receive_body(self, data: bytes) -> int:
        """Store a part of the body; return how many bytes belong to it."""
        try:
            return super().received(data)
        except OSError:  # waitress stores large bodies in a file; the disk may be full
            self.error = refusal("there is no room for the body", 503, "Service Unavailable")
            return len(data)

    def close(self) -> None:
        """Discard the body. Closing its file flushes it, which fails on a full disk."""
        with suppress(OSError):
            super().close()


def check_request_line(line: bytes) -> Error | None:
    """Return an error if the request line is invalid (RFC 9112, section 3)."""
    if not (match := REQUEST_LINE.fullmatch(line)):
        return refusal("the request line must be METHOD, target and HTTP/1.1, separated by single spaces")
    method, target, version = match.groups()
    if version not in {b"1.0", b"1.1"}:  # waitress would treat any other as 1.0
        return refusal("this server speaks HTTP/1.1 and HTTP/1.0", 505, "HTTP Version Not Supported")
    if method == b"CONNECT":
        return refusal("this server is not a proxy", 501, "Not Implemented")
    if not (TARGET.match(target) or (method, target) == (b"OPTIONS", b"*")):
        return refusal("the target must be a path that begins with /, or an http URL")
    return None


def check_framing(head: bytes) -> Error | None:
    """Return an error if servers could read the headers differently, above all where the request ends."""
    fields = [(name.lower(), value) for name, value in FRAMING.findall(head)]
    lines = [value for name, value in fields if name == b"transfer-encoding"]
    names = {name for name, _ in fields}
    if len(fields) - len(lines) > len(names - {b"transfer-encoding"}):
        return refusal("Content-Length, Content-Type and Host must not be repeated")
    if not lines:
        return None
    # RFC 9112, sections 6.1 and 6.3. Empty list elements do not count (RFC 9110, section 5.6.1).
    codings = [coding for part in b",".join(lines).split(b",") if (coding := part.strip(b" \t").lower())]
    if codings[-1:] != [b"chunked"] or codings.count(b"chunked") > 1:
        return refusal("chunked must be the last transfer coding, and occur once")
    if b"content-length" in names or head.partition(b"\r\n")[0].endswith(b"1.0"):
        return refusal("Transfer-Encoding is not allowed with Content-Length or in HTTP/1.0")
    return None


class ChunkedBody(ChunkedReceiver):
    """A chunked body (RFC 9112, section 7.1). waitress calls received() until `completed` or `error` is set.

    waitress's own class accepts a bare LF in places and anything as a trailer. It also appends chunks one by one, which
    takes a second for 100 KB in one-byte chunks.
    """

    left = 0  # bytes of this chunk still to come, with its CR LF
    line = b""  # the part of a line that has arrived
    trailer_size = None  # bytes so far; None until the last chunk

    def received(self, data: bytes) -> int:
        """Parse `data`; return how many of its bytes belong to this body."""
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
                self.error = self.parse_line()
        if content:
            self.buf.append(b"".join(content))
        return taken

    def parse_line(self) -> Error | None:
        """Parse a chunk's size or a trailer line, if complete; return an error if it is invalid."""
        line, whole, _ = self.line.partition(b"\r\n")
        if len(self.line) + (self.trailer_size or 0) > MAX_CHUNK_LINE or (self.line.endswith(b"\n") and not whole):
            return refusal("a line of a chunked body is too long, or does not end with CR LF")
        if not whole:
            return None
        self.line = b""
        if self.trailer_size is None:
            if not (match := SIZE.fullmatch(line)):
                return refusal("a chunk must begin with its size in hexadecimal, then optional extensions")
            size = int(match[1], 16)
            self.left, self.trailer_size = (size + 2, None) if size else (0, 0)
        else:
            self.trailer_size += len(line)
            self.completed = not line
            if line and not FIELD.fullmatch(line):
                return refusal("a trailer line must be a header field")
        return None
