"""Requests as they should not be, over raw sockets: what RFC 9110 and 9112 want, and what is done.

Each is followed on its connection by a good request for /next. Where the end of the first is in doubt, or it is no
request, the connection has to be closed before that is answered: it may be a part of the first, from somebody else.
"""

import re
import socket
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.support import Server, rest, statuses, wait_until

APPLICATION = """
def app(environ, start_response):
    if environ["PATH_INFO"] == "/nothing":
        start_response("204 No Content", [])
        return []
    if environ["PATH_INFO"] == "/unchanged":
        start_response("304 Not Modified", [])
        return []
    if environ["PATH_INFO"] == "/parts":
        start_response("200 OK", [])
        return iter([b"one", b"two"])
    start_response("200 OK", [("Content-Type", "text/plain")])
    body = environ["wsgi.input"].read()
    facts = [environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_HOST"), body]
    return [(repr(facts) + "\\n").encode()]
"""

NEXT = b"GET /next HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


def get(*headers: bytes, line: bytes = b"GET / HTTP/1.1", host: bytes = b"Host: a\r\n") -> bytes:
    """Return a request without a body."""
    return line + b"\r\n" + host + b"".join(header + b"\r\n" for header in headers) + b"\r\n"


def post(*headers: bytes, body: bytes = b"hello", line: bytes = b"POST / HTTP/1.1") -> bytes:
    """Return a request with a body."""
    return get(*headers, line=line) + body


CHUNKED = b"Transfer-Encoding: chunked"
HELLO = b"5\r\nhello\r\n0\r\n\r\n"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for all tests here, with an application that tells what it was asked."""
    folder = tmp_path_factory.mktemp("requests")
    (folder / "app.py").write_text(APPLICATION)
    with Server(folder, READ_TIMEOUT="2") as running:
        yield running


@pytest.mark.parametrize(
    ("sent", "wanted"),
    [
        # Content-Length: RFC 9112, 6.3 (5), wants 400 and the connection closed; a list of the same may count as one.
        pytest.param(post(b"Content-Length: 5", b"Content-Length: 6"), [400], id="two lengths"),
        pytest.param(post(b"Content-Length: 5", b"Content-Length: 5"), [400], id="the same length twice"),
        pytest.param(post(b"Content-Length: 5, 5"), [400], id="a list of lengths"),
        pytest.param(post(b"Content-Length: +5"), [400], id="a length with a sign"),
        pytest.param(post(b"Content-Length: -5"), [400], id="a negative length"),
        pytest.param(post(b"Content-Length: 0x5"), [400], id="a hexadecimal length"),
        pytest.param(post(b"Content-Length:"), [400], id="an empty length"),
        pytest.param(post(b"Content-Length: " + b"5" * 5000), [400], id="a length of 5000 digits"),
        pytest.param(post(b"Content-Length: 5"), [200, 200], id="a length"),
        # Transfer-Encoding: 6.1 and 6.3 (3, 4). With a length it may be refused; it ends with chunked, which is there
        # once, or the answer is 400; a coding that is not known is answered 501; HTTP/1.0 has none.
        pytest.param(post(b"Content-Length: 5", CHUNKED, body=HELLO), [400], id="length and encoding"),
        pytest.param(post(CHUNKED, b"Content-Length: 5", body=HELLO), [400], id="encoding and length"),
        pytest.param(post(b"content-length: 5", b"tRANSFER-eNCODING: CHUNKED", body=HELLO), [400], id="in any case"),
        pytest.param(post(CHUNKED, CHUNKED, body=HELLO), [400], id="encoding twice"),
        pytest.param(post(b"Transfer-Encoding: chunked, chunked", body=HELLO), [400], id="chunked twice"),
        pytest.param(post(b"Transfer-Encoding: chunked, identity", body=HELLO), [400], id="chunked not last"),
        pytest.param(post(b"Transfer-Encoding: gzip", body=HELLO), [400], id="not chunked"),
        pytest.param(post(b"Transfer-Encoding: xchunked", body=HELLO), [400], id="almost chunked"),
        pytest.param(post(b"Transfer-Encoding: \x0bchunked", body=HELLO), [400], id="chunked after a control"),
        pytest.param(post(b"Transfer-Encoding:", b"Content-Length: 5"), [400], id="an empty encoding"),
        pytest.param(
            post(b"Transfer-Encoding: , chunked", b"Content-Length: 5", body=HELLO), [400], id="an empty element"
        ),
        pytest.param(post(b"Transfer-Encoding: gzip, chunked", body=HELLO), [501], id="an unknown coding"),
        pytest.param(post(CHUNKED, line=b"POST / HTTP/1.0", body=HELLO), [400], id="encoding in HTTP/1.0"),
        pytest.param(post(CHUNKED, body=HELLO), [200, 200], id="chunked"),
        # Chunks: 7.1. Extensions have to be ignored, trailers may be.
        pytest.param(post(CHUNKED, body=b"5;a=b;c\r\nhello\r\n0;d\r\n\r\n"), [200, 200], id="chunk extensions"),
        pytest.param(post(CHUNKED, body=b'5;a="b c"\r\nhello\r\n0\r\n\r\n'), [200, 200], id="a quoted extension"),
        pytest.param(post(CHUNKED, body=b'5 ; a = "b"\r\nhello\r\n0\r\n\r\n'), [200, 200], id="blanks in an extension"),
        pytest.param(post(CHUNKED, body=b"5\r\nhello\r\n0\r\nHost: b\r\n\r\n"), [200, 200], id="a trailer"),
        pytest.param(post(CHUNKED, body=b"5;\r\nhello\r\n0\r\n\r\n"), [400], id="an empty extension"),
        pytest.param(post(CHUNKED, body=b"5 \r\nhello\r\n0\r\n\r\n"), [400], id="a space after a size"),
        pytest.param(post(CHUNKED, body=b"5;bad[=x\r\nhello\r\n0\r\n\r\n"), [400], id="an extension that is no word"),
        pytest.param(post(CHUNKED, body=b"5;\x00\r\nhello\r\n0\r\n\r\n"), [400], id="NUL in an extension"),
        pytest.param(post(CHUNKED, body=b"5;a\nhello\r\n0\r\n\r\n"), [400], id="LF after an extension"),
        pytest.param(post(CHUNKED, body=b"5\nhello\r\n0\r\n\r\n"), [400], id="LF after a size"),
        pytest.param(post(CHUNKED, body=b"0x5\r\nhello\r\n0\r\n\r\n"), [400], id="a size with 0x"),
        pytest.param(post(CHUNKED, body=b"-5\r\nhello\r\n0\r\n\r\n"), [400], id="a negative size"),
        pytest.param(post(CHUNKED, body=b" 5\r\nhello\r\n0\r\n\r\n"), [400], id="a space before a size"),
        pytest.param(post(CHUNKED, body=b"5\r\nhelloX\r\n0\r\n\r\n"), [400], id="more than the size"),
        pytest.param(post(CHUNKED, body=b"5\r\nhello0\r\n\r\n"), [400], id="no CR LF after a chunk"),
        pytest.param(post(CHUNKED, body=b"5\n\r\nhello\r\n0\r\n\r\n"), [400], id="LF before CR LF after a size"),
        pytest.param(post(CHUNKED, body=b"5;a\n\r\nhello\r\n0\r\n\r\n"), [400], id="the same after an extension"),
        pytest.param(post(CHUNKED, body=b"\r\n5\r\nhello\r\n0\r\n\r\n"), [400], id="an empty line before a size"),
        pytest.param(post(CHUNKED, body=b"5\r\nhello\r\n0\r\nA: b\nC: d\r\n\r\n"), [400], id="LF in a trailer"),
        pytest.param(post(CHUNKED, body=b"5\r\nhello\r\n0\r\nA: b\x00\r\n\r\n"), [400], id="NUL in a trailer"),
        pytest.param(post(CHUNKED, body=b"0\r\nGET /next HTTP/1.1\r\n\r\n"), [400], id="a request for a trailer"),
        pytest.param(post(CHUNKED, body=b"5;" + b"a" * 20000), [400], id="an extension without an end"),
        pytest.param(post(CHUNKED, body=b"0\r\n" + b"A: b\r\n" * 5000), [400], id="a trailer without an end"),
        # Lines: 2.2 wants CR LF (LF alone may be taken for it), 5.1 no space before the colon, 5.2 no folding (400, or
        # unfolded); RFC 9110, 5.5, no CR, LF or NUL in a value.
        pytest.param(b"GET / HTTP/1.1\nHost: a\r\n\r\n", [400], id="LF after the line"),
        pytest.param(get(b"A: b\nC: d"), [400], id="LF between headers"),
        pytest.param(b"GET / HTTP/1.1\nHost: a\n\n", [400], id="LF throughout"),
        pytest.param(get(b"A: b\rC: d"), [400], id="CR in a value"),
        pytest.param(get(b"A: b", b" c"), [400], id="a folded header"),
        pytest.param(get(b"A: b", b"\tc"), [400], id="a header folded with a tab"),
        pytest.param(get(host=b" Host: a\r\n"), [400], id="a space before the first header"),
        pytest.param(post(b"Content-Length : 5"), [400], id="a space before the colon"),
        pytest.param(post(b"Transfer-Encoding\t: chunked", body=HELLO), [400], id="a tab before the colon"),
        pytest.param(get(b"Content-Type: text/plain", b"Content-Type: text/html"), [400], id="two types"),
        pytest.param(get(b"no colon"), [400], id="no colon"),
        pytest.param(get(b": value"), [400], id="no name"),
        pytest.param(get(b"A: b\x00c"), [400], id="NUL in a value"),
        pytest.param(get(b"A\x00: b"), [400], id="NUL in a name"),
        pytest.param(get(b"A: \x1b[2J"), [400], id="escape in a value"),
        # Host: 3.2 wants 400 where it is missing (HTTP/1.1), twice there or invalid. Empty is valid.
        pytest.param(get(host=b""), [400], id="no Host"),
        pytest.param(get(b"Host: b"), [400], id="two Hosts"),
        pytest.param(get(b"Host: a"), [400], id="the same Host twice"),
        pytest.param(get(b"Host: a", line=b"GET / HTTP/1.0"), [400], id="two Hosts in HTTP/1.0"),
        pytest.param(get(host=b"Host: a, b\r\n"), [400], id="a list of Hosts"),
        pytest.param(get(host=b"Host: a/b\r\n"), [400], id="a path in Host"),
        pytest.param(get(host=b"Host: user@a\r\n"), [400], id="a user in Host"),
        pytest.param(get(host=b"Host: a:http\r\n"), [400], id="a word for a port"),
        pytest.param(get(host=b"Host:\r\n"), [200, 200], id="an empty Host"),
        pytest.param(get(host=b"Host: [::1]:5000\r\n"), [200, 200], id="an IPv6 Host"),
        pytest.param(get(line=b"GET / HTTP/1.0", host=b""), [200], id="no Host in HTTP/1.0"),
        pytest.param(get(line=b"GET http://b/ HTTP/1.1", host=b""), [400], id="absolute form without Host"),
        pytest.param(get(b"Host: a", line=b"GET http://b/ HTTP/1.1"), [400], id="absolute form with two Hosts"),
        pytest.param(get(line=b"GET http:///path HTTP/1.1"), [400], id="absolute form without a host"),
        # Connection, RFC 9110, 7.6.1, is a list.
        pytest.param(get(b"Connection: TE, Close"), [200], id="close in a list"),
        # The line: 3 wants 400 where it is invalid; RFC 9110, 15.6.6, 505 for another version.
        pytest.param(b"GET /\r\n", [400], id="HTTP/0.9"),
        pytest.param(b"GET /\r\n\r\n", [400], id="HTTP/0.9 with an empty line"),
        pytest.param(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [505], id="HTTP/2"),
        pytest.param(post(CHUNKED, line=b"POST / HTTP/1.2", body=HELLO), [505], id="HTTP/1.2"),
        pytest.param(get(line=b"GET / http/1.1"), [400], id="http/1.1"),
        pytest.param(get(line=b"get / HTTP/1.1"), [400], id="a method in small letters"),
        pytest.param(get(line=b"GET  / HTTP/1.1"), [400], id="two spaces"),
        pytest.param(get(line=b"GET / HTTP/1.1 "), [400], id="a space at the end"),
        pytest.param(get(line=b"GET\t/\tHTTP/1.1"), [400], id="tabs"),
        pytest.param(get(line=b"GET /a b HTTP/1.1"), [400], id="a space in the target"),
        pytest.param(get(line=b"GET /\x00 HTTP/1.1"), [400], id="NUL in the target"),
        pytest.param(get(line=b"GET /\x1b[2J HTTP/1.1"), [400], id="escape in the target"),
        pytest.param(get(line=b"GET /\xc3\xb8 HTTP/1.1"), [400], id="bytes in the target"),
        pytest.param(get(line=b"GET //\xc3\xb8 HTTP/1.1"), [400], id="bytes after two slashes"),
        pytest.param(get(line=b"GET http://a/\xc3\xb8 HTTP/1.1"), [400], id="bytes in absolute form"),
        pytest.param(b"\r\n" + get(), [200, 200], id="an empty line before it"),
        pytest.param(b"\n" + get(), [400], id="LF before it"),
        pytest.param(b" " + get(), [400], id="a space before it"),
        pytest.param(b"\x0b\x0c" + get(), [400], id="controls before it"),
        pytest.param(b" \r\n\r\n", [400], id="a line of a space"),
        # Targets: 3.2. Only CONNECT has an authority, only OPTIONS an asterisk.
        pytest.param(get(line=b"GET example.com:80 HTTP/1.1"), [400], id="authority form"),
        pytest.param(get(line=b"CONNECT example.com:80 HTTP/1.1"), [501], id="CONNECT"),
        pytest.param(get(line=b"GET * HTTP/1.1"), [400], id="asterisk form"),
        pytest.param(get(line=b"OPTIONS * HTTP/1.1"), [200, 200], id="OPTIONS *"),
        pytest.param(get(line=b"GET http://b/ HTTP/1.1"), [200, 200], id="absolute form"),
        pytest.param(get(line=b"GET HTTP://b/ HTTP/1.1"), [200, 200], id="absolute form in capitals"),
        pytest.param(get(line=b"GET http://u:p@b/ HTTP/1.1"), [400], id="absolute form with a user"),
        pytest.param(get(line=b"GET http://[::1/ HTTP/1.1"), [400], id="absolute form with half an address"),
        pytest.param(get(line=b"GET http://b:8x\\y/ HTTP/1.1"), [400], id="absolute form with a word for a port"),
        pytest.param(get(line=b"GET file:///etc/passwd HTTP/1.1"), [400], id="another scheme"),
        # Something else altogether.
        pytest.param(bytes.fromhex("16030100c8010000c40303") + bytes(200), [400], id="a TLS handshake"),
        pytest.param(b"\xff\xfe\r\n\r\n", [400], id="bytes"),
        # Pipelining, RFC 9112, 9.3.2: answers in order; nothing after one that is refused.
        pytest.param(get() + get(b"A: b\x00c"), [200, 400], id="a bad second request"),
        pytest.param(get() + post(b"Content-Length: 5", CHUNKED, body=HELLO), [200, 400], id="an ambiguous second"),
        # Expect, RFC 9110, 10.1.1: no 100 where the answer is known, or where there is no body.
        pytest.param(post(b"Expect: 100-continue", b"Content-Length: 9999999"), [413], id="100-continue for too much"),
        pytest.param(get(b"Expect: 100-continue"), [200, 200], id="100-continue without a body"),
        pytest.param(get(b"Expect: 100-continue", line=b"GET / HTTP/1.0"), [200], id="100-continue in HTTP/1.0"),
        # Limits: 16 KiB of line and headers, RFC 6585, 5; 1 MiB of body, RFC 9110, 15.5.
        pytest.param(get(line=b"GET /" + b"a" * 15000 + b" HTTP/1.1"), [200, 200], id="a long target"),
        pytest.param(get(line=b"GET /" + b"a" * 99000 + b" HTTP/1.1"), [431], id="a very long target"),
        pytest.param(get(b"A: " + b"b" * 17000), [431], id="a long header"),
        pytest.param(get(*[b"A: b"] * 5000), [431], id="many headers"),
        pytest.param(post(b"Content-Length: 1048577"), [413], id="a large body"),
    ],
)
@pytest.mark.parametrize("whole", [True, False], ids=["whole", "in pieces"])
def test_request(running: Server, sent: bytes, wanted: list[int], *, whole: bool) -> None:
    """It is answered as the table says, at once, and /next only where there is no doubt that it is a request."""
    with running.connect() as connection:
        if whole or len(sent) > 2000:
            connection.sendall(sent + NEXT)
        else:
            # To send on after having asked to close is to risk the answer.
            with suppress(OSError):  # it has been refused already
                for byte in sent if wanted == [200] else sent + NEXT:
                    connection.send(bytes([byte]))
        answers = rest(connection)
    assert statuses(answers) == wanted
    assert (b"/next" in answers) == (wanted[-2:] == [200, 200])
    for answer in re.split(rb"^(?=HTTP/1\.[01] [0-9])", answers, flags=re.MULTILINE)[1:]:
        assert answer.lower().count(b"x-content-type-options: nosniff\r\n") == 1
        assert answer.lower().count(b"x-request-id: ") == 1
        assert b"server:" not in answer.lower()
        assert answer.partition(b"\r\n\r\n")[2].count(b"\n") == 1
    if wanted[-1] >= 400:
        assert b"\r\nconnection: close\r\n" in answers.lower()


def test_body(running: Server) -> None:
    """The application gets the body without chunks, extensions and trailers, and no header from a trailer."""
    body = b"3;a=b\r\nhel\r\n2\r\nlo\r\n0\r\nHost: b\r\n\r\n"
    answer = running.exchange(post(CHUNKED, b"Connection: close", body=body))
    assert answer.endswith(b"['POST', '/', 'a', b'hello']\n")


@pytest.mark.parametrize(
    ("target", "facts"),
    [
        (b"http://b:80/path?query", b"['GET', '/path', 'b:80', b'']\n"),
        (b"http://b", b"['GET', '/', 'b', b'']\n"),
        (b"HTTP://b/path", b"['GET', '/path', 'b', b'']\n"),
        (b"//b/path", b"['GET', '/b/path', 'a', b'']\n"),
    ],
)
def test_absolute_form(running: Server, target: bytes, facts: bytes) -> None:
    """The host in an absolute target takes the place of the Host header's (RFC 9112, 3.2.2)."""
    answer = running.exchange(get(b"Connection: close", line=b"GET " + target + b" HTTP/1.1"))
    assert answer.endswith(facts)


def test_chunk_that_goes_on(running: Server) -> None:
    """A chunk longer than it says is refused at once: no line end, nor the end of the time, is waited for."""
    assert statuses(running.exchange(post(CHUNKED, body=b"5\r\nhellogarbage"))) == [400]


@pytest.mark.parametrize("pipelined", [True, False])
@pytest.mark.parametrize(
    ("target", "status", "end"),
    [(b"/nothing", 204, b"\r\n\r\n"), (b"/unchanged", 304, b"\r\n\r\n"), (b"/parts", 200, b"\r\n0\r\n\r\n")],
)
def test_next_request(running: Server, target: bytes, status: int, end: bytes, *, pipelined: bool) -> None:
    """An answer whose end can be told without its length keeps the connection (RFC 9112, 9.3)."""
    with running.connect() as connection:
        sent = get(line=b"GET " + target + b" HTTP/1.1")
        connection.sendall(sent + NEXT if pipelined else sent)
        first = b""
        while not pipelined and not first.endswith(end):
            part = connection.recv(1000)
            assert part, f"closed after {first}"
            first += part
        if not pipelined:
            connection.sendall(NEXT)
        answers = first + rest(connection)
    assert statuses(answers) == [status, 200]
    assert answers.lower().count(b"connection: close") == 1


def test_end_of_an_answer_in_http_1_0(running: Server) -> None:
    """An answer without a length has no chunks in HTTP/1.0: it ends when the connection is closed."""
    answer = running.exchange(get(b"Connection: keep-alive", line=b"GET /parts HTTP/1.0"))
    assert answer.endswith(b"\r\n\r\nonetwo")
    assert b"keep-alive" not in answer.lower()


@pytest.mark.parametrize(
    "sent",
    [
        b"GET / HTTP/1.1\r\nHost: a\r\n",
        b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhel",
        b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhel",
        b"\x16",
        b"G",
    ],
)
def test_half_a_request(running: Server, sent: bytes) -> None:
    """A client that hangs up after half a request gets an error or nothing, and its connection is closed."""
    with running.connect() as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        assert statuses(rest(connection)) in ([], [400], [408])


def test_continue_never_followed_up(running: Server) -> None:
    """A client that is told to continue, and does not, is answered 408 when its time is over."""
    with running.connect() as connection:
        connection.sendall(get(b"Expect: 100-continue", b"Content-Length: 5", line=b"POST / HTTP/1.1"))
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        assert statuses(rest(connection)) == [408]


def test_continue(running: Server) -> None:
    """A client that waits to be told to continue is, and its body arrives."""
    with running.connect() as connection:
        headers = [b"Expect: 100-continue", b"Content-Length: 5", b"Connection: close"]
        connection.sendall(get(*headers, line=b"POST / HTTP/1.1"))
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"hello")
        assert rest(connection).endswith(b"b'hello']\n")


@pytest.mark.parametrize("chunked", [True, False])
def test_refusal_arrives_while_the_client_sends(running: Server, *, chunked: bool) -> None:
    """A client that sends a body of 8 MiB without looking up gets to see the 413."""
    with running.connect() as connection:
        headers = [CHUNKED] if chunked else [b"Content-Length: 8388608"]
        connection.sendall(get(*headers, line=b"POST / HTTP/1.1"))
        block = b"10000\r\n" + bytes(65536) + b"\r\n" if chunked else bytes(65536)
        for _ in range(128):
            connection.sendall(block)
        assert statuses(rest(connection)) == [413]


def test_refused_clients_do_not_stay(running: Server) -> None:
    """Who goes on sending after a refusal is listened to for a moment only."""
    with running.connect() as connection:
        connection.sendall(get(b"Content-Length: 8388608", line=b"POST / HTTP/1.1"))

        def refused() -> bool:
            try:
                connection.sendall(bytes(1024))
            except OSError:
                return True
            return False

        wait_until(refused, 20, "the server to hang up")
