"""Requests, as they arrive: what waitress takes and a careful server refuses (RFC 9110 and 9112)."""

import os
import re
import time
from contextlib import suppress

from waitress.adjustments import Adjustments
from waitress.parser import HTTPRequestParser, ParsingError
from waitress.utilities import Error

# RFC 9112, section 3: the parts of the request line stand between single spaces, and a target has no control character.
# Bytes from 0x80 on do not belong there either, but `curl localhost:5000/Jørgen` sends them, and they mislead nobody.
REQUEST_LINE = re.compile(rb"([!#$%&'*+\-.^_`|~0-9A-Z]+) ([^\x00-\x20\x7f]+) HTTP/([0-9]\.[0-9])")
TARGET = re.compile(rb"/|https?://[^/?#@]+(?:[/?]|$)")
# Where a request line may still be on its way: a TLS handshake is none, nor is what does not begin with a method.
BEGINNING = re.compile(rb"(?:\r\n)*\r?(?:[!#$%&'*+\-.^_`|~0-9A-Z]|$)")
# RFC 9112, section 3, asks for at least 8000 bytes.
LONGEST_LINE = 8190
# RFC 9110, section 5.5. And so many blanks in a row that waitress, whose pattern for a header tries each beginning of
# them with each end, would be busy with one header for a second.
HARMFUL = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|[ \t]{128}")
CODINGS = re.compile(rb"\r\ntransfer-encoding:[ \t]*([^\r\n]*)", re.IGNORECASE)
LENGTH = re.compile(rb"\r\ncontent-length:", re.IGNORECASE)
FOLD = re.compile(rb"\r\n[ \t]")
# RFC 9110, section 7.2: uri-host [ ":" port ]. A comma is what waitress puts between two Host lines, with a space.
HOST = re.compile(r"(?:\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9\-._~%!$&'()*+,;=]*)(?::[0-9]*)?")
CLOSE = re.compile(r"(?:^|,)[ \t]*close[ \t]*(?:,|$)", re.IGNORECASE)
# RFC 9112, section 7.1: a chunk's size, with extensions that mean nothing here; a field of the trailer, likewise.
SIZE = re.compile(rb"([0-9A-Fa-f]{1,16})[ \t]*(?:;[\t\x20-\x7e\x80-\xff]*)?")
FIELD = re.compile(rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]+:[\t\x20-\x7e\x80-\xff]*")
LONGEST_SIZE = 256
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


def refusal(code: int, reason: str, why: str) -> Error:
    """Return what waitress answers a request with that it does not pass on."""
    error = Error(why)
    error.code, error.reason = code, reason
    return error


def refused_line(line: bytes) -> Error | None:
    """Return what a request line is refused with, if it is."""
    if len(line) > LONGEST_LINE:
        return refusal(414, "URI Too Long", f"a request line has at most {LONGEST_LINE} bytes")
    if not (match := REQUEST_LINE.fullmatch(line)):
        return refusal(400, "Bad Request", "a request line is METHOD, target and HTTP/1.1, with a space between each")
    method, target, version = match.groups()
    # What waitress takes for 1.0, whatever framing the client had in mind.
    if version not in {b"1.0", b"1.1"}:
        return refusal(505, "HTTP Version Not Supported", "this server speaks HTTP/1.1 and HTTP/1.0")
    if method == b"CONNECT":
        return refusal(501, "Not Implemented", "this server is no proxy")
    if not (TARGET.match(target) or (method, target) == (b"OPTIONS", b"*")):
        return refusal(400, "Bad Request", "a target is a path that begins with /, or an http URL")
    return None


def refused_framing(header: bytes) -> Error | None:
    """Return what a header is refused with whose end, or whose body's end, another server may see elsewhere."""
    if HARMFUL.search(header):
        return refusal(400, "Bad Request", "a header has no control characters, and not so many blanks in a row")
    # RFC 9112, section 5.2. waitress would join the lines.
    if FOLD.search(header):
        return refusal(400, "Bad Request", "a header is one line, not folded")
    if not (lines := CODINGS.findall(header)):
        return None
    codings = [coding.strip(b" \t").lower() for coding in b",".join(lines).split(b",")]
    # RFC 9112, sections 6.1 and 6.3. waitress takes "chunked" twice, does not look at it in HTTP/1.0, and lets both
    # lengths stand: it goes by one of them and serves what follows, which may be a body, as the next request.
    if codings[-1] != b"chunked" or codings.count(b"chunked") > 1:
        return refusal(400, "Bad Request", "Transfer-Encoding ends with chunked, and has it once")
    if len(codings) > 1:
        return refusal(501, "Not Implemented", "the only Transfer-Encoding known here is chunked")
    if header.partition(b"\r\n")[0].endswith(b"1.0"):
        return refusal(400, "Bad Request", "HTTP/1.0 has no Transfer-Encoding")
    if LENGTH.search(header):
        return refusal(400, "Bad Request", "Transfer-Encoding and Content-Length exclude each other")
    return None


def refused_unfinished(header: bytes) -> Error | None:
    """Return what the beginning of a header is refused with, if it can be told already."""
    if header.count(b"\n") != header.count(b"\r\n"):
        return refusal(400, "Bad Request", "a line ends with CR LF")
    line, end, _ = header.lstrip(b"\r\n").partition(b"\r\n")
    return refused_line(line) if end or len(line) > LONGEST_LINE + 1 else None


class Parser(HTTPRequestParser):
    """One request, as it arrives. waitress makes one at the request's first byte and feeds it until it is completed.

    Relied upon: received() calls parse_header() with the line and all headers, once they are there, and sets `error` to
    what ParsingError says; a request is handed over, to be answered with its error, when it is `completed`.
    """

    version = "1.1"  # in which a request that cannot be read is answered
    command = request_uri = path = None
    environ = None  # the application's, after waitress has looked at a proxy's headers
    refused = None

    def __init__(self, adj: Adjustments) -> None:
        """Begin with the first byte."""
        super().__init__(adj)
        self.began = time.monotonic()
        self.id = os.urandom(16).hex()

    def received(self, data: bytes) -> int:
        """Take what has arrived; return how many bytes of it belong to this request."""
        if not self.headers_finished and not BEGINNING.match(self.header_plus + data):
            # Here, because waitress strips whatever blanks a header begins with.
            self.refused = refusal(400, "Bad Request", "this is not HTTP")
            consumed = len(data)
        else:
            consumed = self.parse(data)
        if self.refused:
            self.error = self.refused
            self.completed = True
        if self.completed:
            # Else waitress asks for the body of a request that it refuses, or that has none, and waits for it.
            self.expect_continue = False
        return consumed

    def parse(self, data: bytes) -> int:
        """Have waitress take what has arrived; return how many bytes of it belong to this request."""
        try:
            consumed = super().received(data)
        except OSError:  # what waitress keeps of a body in a file has found no room
            self.refused = refusal(503, "Service Unavailable", "there is no room for the body")
            return len(data)
        if not self.headers_finished:
            if self.completed:  # too long; waitress has put a request for / in its place
                self.command = self.request_uri = None
                self.version = Parser.version
                self.header_plus += data
            self.refused = refused_unfinished(self.header_plus)
        return consumed

    def parse_header(self, header_plus: bytes) -> None:
        """Read a whole header; raises ParsingError for what is refused."""
        line = header_plus.partition(b"\r\n")[0]
        self.refused = refused_line(line) or refused_framing(header_plus)
        if self.refused:
            if match := REQUEST_LINE.fullmatch(line):  # for the log
                self.command, self.request_uri = (part.decode("latin-1") for part in match.groups()[:2])
            raise ParsingError(self.refused.body)
        try:
            super().parse_header(header_plus)
        except ValueError as error:  # a length of thousands of digits, a URL with half an IPv6 address
            raise ParsingError("Invalid header") from error
        # RFC 9112, section 3.2. Two of them waitress has joined with ", ".
        host = self.headers.get("HOST", None if self.version == "1.1" else "")
        if host is None or not HOST.fullmatch(host) or not HOST.fullmatch(self.proxy_netloc):
            self.refused = refusal(400, "Bad Request", "a request has one Host header, with a host and port")
            raise ParsingError(self.refused.body)
        if self.proxy_netloc:
            # RFC 9112, section 3.2.2: the host of an absolute target takes the place of the Host header's.
            self.headers["HOST"] = self.proxy_netloc
            self.path = self.path or "/"
        if CLOSE.search(
            self.headers.get("CONNECTION", "")
        ):  # a list (RFC 9110, section 7.6.1); waitress wants it alone
            self.headers["CONNECTION"] = "close"
        given = self.headers.get("X_REQUEST_ID")
        if given and REQUEST_ID.fullmatch(given):
            self.id = given
        if self.chunked:
            self.body_rcv = Chunks(self.body_rcv.getbuf(), self.adj.max_request_header_size)

    def close(self) -> None:
        """Throw the body away, which is a file that may find no room even for its last bytes."""
        with suppress(OSError):
            super().close()


class Chunks:
    """A body in chunks (RFC 9112, section 7.1), in the place of waitress's ChunkedReceiver.

    That one takes some lines that end with LF alone, anything for a trailer, and either without an end; and it writes
    each chunk by itself, which with chunks of a byte is a second's work for some 100 KB.

    Relied upon: the parser calls received() until `completed` or `error` is set, and the rest here as it is.
    """

    completed = False
    error: Error | None = None

    def __init__(self, buffer: object, trailer_limit: int) -> None:
        """Collect the body in one of waitress's buffers; a trailer may have so many bytes."""
        self.buffer = buffer
        self.trailer_left = trailer_limit
        self.chunk_left = 0  # bytes
        self.line = b""  # as much of it as there is
        self.take_line = self.take_size

    def received(self, data: bytes) -> int:
        """Take what has arrived; return how many bytes of it belong to this body."""
        taken, content = 0, []
        while taken < len(data) and not (self.completed or self.error):
            if self.chunk_left:
                content.append(data[taken : taken + self.chunk_left])
                taken += len(content[-1])
                self.chunk_left -= len(content[-1])
                continue
            end = data.find(b"\n", taken) + 1 or len(data)
            self.line += data[taken:end]
            taken = end
            if self.line.endswith(b"\r\n"):
                line, self.line = self.line[:-2], b""
                self.take_line(line)
            elif self.line.endswith(b"\n") or len(self.line) > self.trailer_left:
                self.refuse("a line of a chunked body ends with CR LF, and is not too long")
        if content:
            self.buffer.append(b"".join(content))
        return taken

    def take_size(self, line: bytes) -> None:
        """Begin a chunk."""
        match = SIZE.fullmatch(line)
        if not match or len(line) > LONGEST_SIZE:
            self.refuse("a chunk begins with its size in hexadecimal digits")
            return
        self.chunk_left = int(match[1], 16)
        self.take_line = self.take_end if self.chunk_left else self.take_field

    def take_end(self, line: bytes) -> None:
        """End a chunk."""
        if line:
            self.refuse("a chunk is as long as it says")
        self.take_line = self.take_size

    def take_field(self, line: bytes) -> None:
        """Take a line of the trailer, of which nothing is used; an empty one is the last."""
        self.trailer_left -= len(line)
        if not line:
            self.completed = True
        elif not FIELD.fullmatch(line):
            self.refuse("a trailer is made of headers")

    def refuse(self, why: str) -> None:
        """Take no more."""
        self.error = refusal(400, "Bad Request", why)

    def __len__(self) -> int:
        """Return how many bytes the body has so far."""
        return len(self.buffer)

    def getfile(self) -> object:
        """Return the body to be read."""
        return self.buffer.getfile()

    def getbuf(self) -> object:
        """Return the buffer."""
        return self.buffer
