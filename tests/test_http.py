"""HTTP over raw sockets: requests as they should not be, applications that fail, and a proxy in front.

The rules are those of RFC 9110 and 9112. After each request a good one for /next is sent. If the first is invalid, or
its end is in doubt, the connection has to close instead: what follows may be a request that somebody has smuggled in.
"""

import json
import os
import pathlib
import re
import socket
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from tests.support import GET, LAST, Server, request_id, rest, statuses, wait_until

# Applications by their path. Those of the first table fail before they have sent anything.
FAILING = {
    "raises": "raise RuntimeError('secret')",
    "raises_os_error": "raise FileNotFoundError('secret')",
    "raises_after_start": "start_response('200 OK', [('X-Mine', '1')]); raise RuntimeError('secret')",
    "raises_in_iteration": "start_response('200 OK', []); return (1 / 0 for _ in 'x')",
    "exits": "sys.exit('secret')",
    "interrupts": "raise KeyboardInterrupt",
    "gives_none": "start_response('200 OK', []); return None",
    "gives_list_of_text": "start_response('200 OK', [('Content-Length', '2')]); return ['ok']",
    "starts_nothing": "return [b'ok']",
    "status_without_number": "start_response('fine', []); return [b'ok']",
    "status_of_two_lines": r"start_response('200 OK\r\nX: y', []); return [b'ok']",
    "header_of_two_lines": r"start_response('200 OK', [('X', 'y\r\nSet-Cookie: z')]); return [b'ok']",
    "header_not_latin_1": "start_response('200 OK', [('X', '\u674e')]); return [b'ok']",
    "connection_header": "start_response('200 OK', [('Connection', 'close')]); return [b'ok']",
}
OTHERS = {
    "raises_after_part": "start_response('200 OK', []); yield b'part'; raise RuntimeError('secret')",
    "raises_in_close": "start_response('200 OK', [('Content-Length', '2')]); return Closes([b'ok'])",
    "too_few": "start_response('200 OK', [('Content-Length', '9')]); return [b'ok']",
    "too_many": "start_response('200 OK', [('Content-Length', '2')]); return [b'ok and more']",
    "large": "start_response('200 OK', [('Content-Length', '90000000')]); return [bytes(1_000_000)] * 90",
    "file": "start_response('200 OK', [('Content-Length', '30000000')]); "
    "return environ['wsgi.file_wrapper'](open('file', 'rb'))",
    "nothing": "start_response('204 No Content', []); return []",
    "unchanged": "start_response('304 Not Modified', []); return [b'body']",
    "parts": "start_response('200 OK', []); return iter([b'one', b'two'])",
    "waits": "wait(); start_response('200 OK', [('Content-Length', '2')]); return [b'ok']",
}
# Any other path is answered with what was asked.
APPLICATION = """
import pathlib
import sys
import time

class Closes(list):
    def close(self):
        raise RuntimeError("secret")

def wait():
    pathlib.Path("began").touch()
    while not pathlib.Path("go").exists():
        time.sleep(0.01)

def facts(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    facts = [environ["REQUEST_METHOD"], environ["PATH_INFO"], environ.get("HTTP_HOST"), environ["wsgi.input"].read()]
    return [(repr(facts) + "\\n").encode()]

def app(environ, start_response):
    return globals().get(environ["PATH_INFO"][1:], facts)(environ, start_response)
""" + "".join(f"\n\ndef {name}(environ, start_response):\n    {code}\n" for name, code in (FAILING | OTHERS).items())
# One thread: what that does not survive, the next request shows.
VARIABLES = {"WAITRESS_THREADS": "1"}

NEXT = LAST % b"/next"
CHUNKED = b"Transfer-Encoding: chunked"
HELLO = b"5\r\nhello\r\n0\r\n\r\n"


def get(*headers: bytes, line: bytes = b"GET / HTTP/1.1", host: bytes = b"Host: a\r\n") -> bytes:
    """Return a request without a body."""
    return line + b"\r\n" + host + b"".join(header + b"\r\n" for header in headers) + b"\r\n"


def post(*headers: bytes, body: bytes = b"hello", line: bytes = b"POST / HTTP/1.1") -> bytes:
    """Return a request with a body."""
    return get(*headers, line=line) + body


REQUESTS = {
    # Content-Length: RFC 9112, 6.3 (5), wants 400 and the connection closed; a list of the same may count as one.
    "two lengths": (post(b"Content-Length: 5", b"Content-Length: 6"), [400]),
    "the same length twice": (post(b"Content-Length: 5", b"Content-Length: 5"), [400]),
    "a list of lengths": (post(b"Content-Length: 5, 5"), [400]),
    "a length with a sign": (post(b"Content-Length: +5"), [400]),
    "a negative length": (post(b"Content-Length: -5"), [400]),
    "a hexadecimal length": (post(b"Content-Length: 0x5"), [400]),
    "an empty length": (post(b"Content-Length:"), [400]),
    "a length of 5000 digits": (post(b"Content-Length: " + b"5" * 5000), [400]),
    "a length": (post(b"Content-Length: 5"), [200, 200]),
    # Transfer-Encoding: 6.1 and 6.3 (3, 4). With a length it may be refused; it ends with chunked, which is there
    # once, or the answer is 400; a coding that is not known is answered 501; HTTP/1.0 has none.
    "length and encoding": (post(b"Content-Length: 5", CHUNKED, body=HELLO), [400]),
    "encoding and length": (post(CHUNKED, b"Content-Length: 5", body=HELLO), [400]),
    "in any case": (post(b"content-length: 5", b"tRANSFER-eNCODING: CHUNKED", body=HELLO), [400]),
    "encoding twice": (post(CHUNKED, CHUNKED, body=HELLO), [400]),
    "chunked twice": (post(b"Transfer-Encoding: chunked, chunked", body=HELLO), [400]),
    "chunked not last": (post(b"Transfer-Encoding: chunked, identity", body=HELLO), [400]),
    "not chunked": (post(b"Transfer-Encoding: br", body=HELLO), [400]),
    "almost chunked": (post(b"Transfer-Encoding: xchunked", body=HELLO), [400]),
    "chunked after a control": (post(b"Transfer-Encoding: \x0bchunked", body=HELLO), [400]),
    "an empty encoding": (post(b"Transfer-Encoding:", b"Content-Length: 5"), [400]),
    "an empty element": (post(b"Transfer-Encoding: , chunked", b"Content-Length: 5", body=HELLO), [400]),
    "an unknown coding": (post(b"Transfer-Encoding: gzip, chunked", body=HELLO), [501]),
    "encoding in HTTP/1.0": (post(CHUNKED, line=b"POST / HTTP/1.0", body=HELLO), [400]),
    "chunked": (post(CHUNKED, body=HELLO), [200, 200]),
    # Chunks: 7.1. Extensions have to be ignored, trailers may be.
    "chunk extensions": (post(CHUNKED, body=b"5;a=b;c\r\nhello\r\n0;d\r\n\r\n"), [200, 200]),
    "a quoted extension": (post(CHUNKED, body=b'5;a="b c"\r\nhello\r\n0\r\n\r\n'), [200, 200]),
    "blanks in an extension": (post(CHUNKED, body=b'5 ; a = "b"\r\nhello\r\n0\r\n\r\n'), [200, 200]),
    "a trailer": (post(CHUNKED, body=b"5\r\nhello\r\n0\r\nHost: b\r\n\r\n"), [200, 200]),
    "an empty extension": (post(CHUNKED, body=b"5;\r\nhello\r\n0\r\n\r\n"), [400]),
    "a space after a size": (post(CHUNKED, body=b"5 \r\nhello\r\n0\r\n\r\n"), [400]),
    "an extension that is no word": (post(CHUNKED, body=b"5;bad[=x\r\nhello\r\n0\r\n\r\n"), [400]),
    "NUL in an extension": (post(CHUNKED, body=b"5;\x00\r\nhello\r\n0\r\n\r\n"), [400]),
    "LF after an extension": (post(CHUNKED, body=b"5;a\nhello\r\n0\r\n\r\n"), [400]),
    "LF after a size": (post(CHUNKED, body=b"5\nhello\r\n0\r\n\r\n"), [400]),
    "a size with 0x": (post(CHUNKED, body=b"0x5\r\nhello\r\n0\r\n\r\n"), [400]),
    "a negative size": (post(CHUNKED, body=b"-5\r\nhello\r\n0\r\n\r\n"), [400]),
    "a space before a size": (post(CHUNKED, body=b" 5\r\nhello\r\n0\r\n\r\n"), [400]),
    "more than the size": (post(CHUNKED, body=b"5\r\nhelloX\r\n0\r\n\r\n"), [400]),
    "no CR LF after a chunk": (post(CHUNKED, body=b"5\r\nhello0\r\n\r\n"), [400]),
    "LF before CR LF after a size": (post(CHUNKED, body=b"5\n\r\nhello\r\n0\r\n\r\n"), [400]),
    "an empty line before a size": (post(CHUNKED, body=b"\r\n5\r\nhello\r\n0\r\n\r\n"), [400]),
    "LF in a trailer": (post(CHUNKED, body=b"5\r\nhello\r\n0\r\nA: b\nC: d\r\n\r\n"), [400]),
    "NUL in a trailer": (post(CHUNKED, body=b"5\r\nhello\r\n0\r\nA: b\x00\r\n\r\n"), [400]),
    "a request for a trailer": (post(CHUNKED, body=b"0\r\nGET /next HTTP/1.1\r\n\r\n"), [400]),
    "the longest extension": (post(CHUNKED, body=b"5;" + b"a" * 8188 + b"\r\nhello\r\n0\r\n\r\n"), [200, 200]),
    "a byte more of it": (post(CHUNKED, body=b"5;" + b"a" * 8189 + b"\r\nhello\r\n0\r\n\r\n"), [400]),
    "a long trailer": (post(CHUNKED, body=b"0\r\n" + b"A: b\r\n" * 2000 + b"\r\n"), [200, 200]),
    "a trailer that is too long": (post(CHUNKED, body=b"0\r\n" + b"A: b\r\n" * 2100 + b"\r\n"), [400]),
    # Lines: 2.2 wants CR LF (LF alone may be taken for it), 5.1 no space before the colon, 5.2 no folding (400, or
    # unfolded); RFC 9110, 5.5, no CR, LF or NUL in a value.
    "LF after the line": (b"GET / HTTP/1.1\nHost: a\r\n\r\n", [400]),
    "LF between headers": (get(b"A: b\nC: d"), [400]),
    "CR in a value": (get(b"A: b\rC: d"), [400]),
    "a folded header": (get(b"A: b", b" c"), [400]),
    "a header folded with a tab": (get(b"A: b", b"\tc"), [400]),
    "a space before the first header": (get(host=b" Host: a\r\n"), [400]),
    "a space before the colon": (post(b"Content-Length : 5"), [400]),
    "a tab before the colon": (post(b"Transfer-Encoding\t: chunked", body=HELLO), [400]),
    "two types": (get(b"Content-Type: text/plain", b"Content-Type: text/html"), [400]),
    "no colon": (get(b"no colon"), [400]),
    "no name": (get(b": value"), [400]),
    "NUL in a value": (get(b"A: b\x00c"), [400]),
    "NUL in a name": (get(b"A\x00: b"), [400]),
    "escape in a value": (get(b"A: \x1b[2J"), [400]),
    # Host: 3.2 wants 400 where it is missing (HTTP/1.1), twice there or invalid. Empty is valid.
    "no Host": (get(host=b""), [400]),
    "two Hosts": (get(b"Host: b"), [400]),
    "two Hosts and an encoding": (post(CHUNKED, b"Host: a", body=HELLO), [400]),
    "a list of Hosts": (get(host=b"Host: a, b\r\n"), [400]),
    "a path in Host": (get(host=b"Host: a/b\r\n"), [400]),
    "a user in Host": (get(host=b"Host: user@a\r\n"), [400]),
    "a word for a port": (get(host=b"Host: a:http\r\n"), [400]),
    "an empty Host": (get(host=b"Host:\r\n"), [200, 200]),
    "an IPv6 Host": (get(host=b"Host: [::1]:5000\r\n"), [200, 200]),
    "no Host in HTTP/1.0": (get(line=b"GET / HTTP/1.0", host=b""), [200]),
    "absolute form without Host": (get(line=b"GET http://b/ HTTP/1.1", host=b""), [400]),
    "absolute form without a host": (get(line=b"GET http:///path HTTP/1.1"), [400]),
    # Connection, RFC 9110, 7.6.1, is a list.
    "close in a list": (get(b"Connection: TE, Close"), [200]),
    # The line: 3 wants 400 where it is invalid; RFC 9110, 15.6.6, 505 for another version.
    "HTTP/0.9": (b"GET /\r\n", [400]),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [505]),
    "HTTP/1.2": (post(CHUNKED, line=b"POST / HTTP/1.2", body=HELLO), [505]),
    "http/1.1": (get(line=b"GET / http/1.1"), [400]),
    "a method in small letters": (get(line=b"get / HTTP/1.1"), [400]),
    "a method of one's own": (get(line=b"ACL / HTTP/1.1"), [200, 200]),
    "two spaces": (get(line=b"GET  / HTTP/1.1"), [400]),
    "a space at the end": (get(line=b"GET / HTTP/1.1 "), [400]),
    "tabs": (get(line=b"GET\t/\tHTTP/1.1"), [400]),
    "a space in the target": (get(line=b"GET /a b HTTP/1.1"), [400]),
    "NUL in the target": (get(line=b"GET /\x00 HTTP/1.1"), [400]),
    "escape in the target": (get(line=b"GET /\x1b[2J HTTP/1.1"), [400]),
    "bytes in the target": (get(line=b"GET /\xc3\xb8 HTTP/1.1"), [400]),
    "bytes after two slashes": (get(line=b"GET //\xc3\xb8 HTTP/1.1"), [400]),
    "bytes in absolute form": (get(line=b"GET http://a/\xc3\xb8 HTTP/1.1"), [400]),
    "an empty line before it": (b"\r\n" + get(), [200, 200]),
    "LF before it": (b"\n" + get(), [400]),
    "a space before it": (b" " + get(), [400]),
    "controls before it": (b"\x0b\x0c" + get(), [400]),
    "a line of a space": (b" \r\n\r\n", [400]),
    # Targets: 3.2. Only CONNECT has an authority, only OPTIONS an asterisk.
    "authority form": (get(line=b"GET example.com:80 HTTP/1.1"), [400]),
    "CONNECT": (get(line=b"CONNECT example.com:80 HTTP/1.1"), [501]),
    "asterisk form": (get(line=b"GET * HTTP/1.1"), [400]),
    "asterisk form of another method": (post(b"Content-Length: 5", line=b"POST * HTTP/1.1"), [400]),
    "OPTIONS *": (get(line=b"OPTIONS * HTTP/1.1"), [200, 200]),
    "absolute form": (get(line=b"GET http://b/ HTTP/1.1"), [200, 200]),
    "absolute form in capitals": (get(line=b"GET HTTP://b/ HTTP/1.1"), [200, 200]),
    "absolute form with a user": (get(line=b"GET http://u:p@b/ HTTP/1.1"), [400]),
    "absolute form with half an address": (get(line=b"GET http://[::1/ HTTP/1.1"), [400]),
    "absolute form with a word for a port": (get(line=b"GET http://b:8x\\y/ HTTP/1.1"), [400]),
    "another scheme": (get(line=b"GET file:///etc/passwd HTTP/1.1"), [400]),
    # Something else altogether.
    "a TLS handshake": (bytes.fromhex("16030100c8010000c40303") + bytes(200), [400]),
    "bytes": (b"\xff\xfe\r\n\r\n", [400]),
    # Pipelining, RFC 9112, 9.3.2: answers in order; nothing after one that is refused.
    "a bad second request": (get() + get(b"A: b\x00c"), [200, 400]),
    "an ambiguous second": (get() + post(b"Content-Length: 5", CHUNKED, body=HELLO), [200, 400]),
    # Expect, RFC 9110, 10.1.1: no 100 where the answer is known, or where there is no body.
    "100-continue for too much": (post(b"Expect: 100-continue", b"Content-Length: 9999999"), [413]),
    "100-continue without a body": (get(b"Expect: 100-continue"), [200, 200]),
    "100-continue in HTTP/1.0": (get(b"Expect: 100-continue", line=b"GET / HTTP/1.0"), [200]),
    # Limits: 16 KiB of line and headers, RFC 6585, 5; 1 MiB of body, RFC 9110, 15.5.
    "the longest target": (get(line=b"GET /" + b"a" * (16383 - 27) + b" HTTP/1.1"), [200, 200]),
    "a byte more": (get(line=b"GET /" + b"a" * (16384 - 27) + b" HTTP/1.1"), [431]),
    "a line without an end": (b"GET /" + b"a" * 99000, [431]),
    "a long header after an empty line": (b"\r\n" + get(b"A: " + b"b" * 17000), [431]),
    "many headers": (get(*[b"A: b"] * 5000), [431]),
    "a large body": (post(b"Content-Length: 1048577"), [413]),
}


@pytest.mark.parametrize(("sent", "wanted"), REQUESTS.values(), ids=REQUESTS)
def test_request(running: Server, sent: bytes, wanted: list[int]) -> None:
    """Sent whole or byte by byte, each gets the statuses of the table; /next is answered only where they say so."""
    for whole in (True, False) if len(sent) < 2000 else (True,):
        with running.connect() as connection:
            if whole:
                connection.sendall(sent + NEXT)
            else:
                with suppress(OSError):  # it has been refused already
                    for byte in sent if wanted == [200] else sent + NEXT:  # after `close`, to send more risks a reset
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


@pytest.mark.parametrize(
    ("target", "path", "host"),
    [(b"http://b:80/path?query", "/path", "b:80"), (b"HTTP://b?query", "/", "b"), (b"//b/path", "/b/path", "a")],
)
def test_host_of_the_target(running: Server, target: bytes, path: str, host: str) -> None:
    """The host of an absolute target takes the place of the Host header's (RFC 9112, 3.2.2)."""
    assert running.exchange(LAST % target).endswith(f"{['GET', path, host, b'']}\n".encode())


@pytest.mark.parametrize(("target", "status"), [(b"/nothing", 204), (b"/unchanged", 304), (b"/parts", 200)])
def test_next_request(running: Server, target: bytes, status: int) -> None:
    """An answer whose end can be told without its length keeps the connection (RFC 9112, 9.3)."""
    answers = running.exchange(GET % target + NEXT)
    assert statuses(answers) == [status, 200]
    assert answers.lower().count(b"connection: close") == 1


def test_end_of_an_answer_in_http_1_0(running: Server) -> None:
    """An answer without a length has no chunks in HTTP/1.0: it ends when the connection is closed."""
    answer = running.exchange(get(b"Connection: keep-alive", line=b"GET /parts HTTP/1.0"))
    assert answer.endswith(b"\r\n\r\nonetwo")
    assert b"keep-alive" not in answer.lower()


@pytest.mark.parametrize("sent", [post(b"Content-Length: 9"), post(CHUNKED, body=b"5\r\nhel"), b"G"])
def test_half_a_request(running: Server, sent: bytes) -> None:
    """A client that hangs up in the middle of a request is closed at once, without an answer."""
    with running.connect() as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        assert rest(connection) == b""


def test_chunk_that_goes_on(running: Server) -> None:
    """A chunk longer than it says is refused at once: no line end, nor the end of the time, is waited for."""
    assert statuses(running.exchange(post(CHUNKED, body=b"5\r\nhellogarbage"))) == [400]


def test_continue(running: Server) -> None:
    """A client that waits is told to continue; the application gets its body without chunks, extensions and trailer."""
    with running.connect() as connection:
        connection.sendall(post(b"Expect: 100-continue", CHUNKED, b"Connection: close", body=b""))
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"3;a=b\r\nhel\r\n1a\r\nlo and a word more of that\r\n0\r\nHost: b\r\n\r\n")
        assert rest(connection).endswith(b"['POST', '/', 'a', b'hello and a word more of that']\n")


@pytest.mark.parametrize("header", [CHUNKED, b"Content-Length: 8388608"])
def test_refusal_arrives_while_the_client_sends(running: Server, header: bytes) -> None:
    """A client that sends a body of 8 MiB without looking up gets to see the 413."""
    with running.connect() as connection:
        connection.sendall(post(header, body=b""))
        for _ in range(128):
            connection.sendall(b"10000\r\n" + bytes(65536) + b"\r\n" if header == CHUNKED else bytes(65536))
        assert statuses(rest(connection)) == [413]


def test_refused_clients_do_not_stay(running: Server) -> None:
    """A client that goes on sending after a refusal is cut off after a moment."""
    with running.connect() as connection, pytest.raises(ConnectionError):
        connection.sendall(post(b"Content-Length: 8388608"))
        for _ in range(2000):
            connection.sendall(bytes(1024))
            time.sleep(0.01)


# ---- Applications that fail, hang or return garbage ------------------------------------------------------------------


@pytest.mark.parametrize("what", FAILING)
def test_nothing_sent_yet(running: Server, what: str) -> None:
    """An application that fails before its first byte is answered 500 in one line; only the log says why."""
    answered = running.exchange(GET % f"/{what}".encode())
    assert statuses(answered) == [500]
    header, _, body = answered.partition(b"\r\n\r\n")
    assert body == b"500 Internal Server Error: The server encountered an unexpected internal server error\n"
    assert b"x-mine" not in header.lower()
    assert statuses(running.exchange()) == [200]
    [failed] = running.entries(request_id(answered))
    assert (failed["path"], failed["status"], failed["bytes"]) == (f"/{what}", 500, len(body))
    [logged] = running.entries(request_id(answered), log=running.log)
    assert logged["message"] == f"Exception while serving /{what}"
    assert "exception" in logged


@pytest.mark.parametrize(
    ("what", "body"),
    [("raises_after_part", b"4\r\npart\r\n"), ("too_few", b"ok"), ("raises_in_close", b"ok")],
)
def test_after_the_first_byte(running: Server, what: str, body: bytes) -> None:
    """An application that fails later is cut short: the client sees that something is missing, and the log says why."""
    answered = running.exchange(GET % f"/{what}".encode())
    assert statuses(answered) == [200]
    assert answered.partition(b"\r\n\r\n")[2] == body
    assert statuses(running.exchange()) == [200]
    assert len(running.entries(request_id(answered), log=running.log)) == 1


def test_more_than_promised(running: Server) -> None:
    """What an application sends beyond its Content-Length does not become the beginning of the next answer."""
    answered = running.exchange(GET % b"/too_many" + NEXT)
    assert statuses(answered) == [200, 200]
    assert b"more" not in answered
    [logged] = running.entries(request_id(answered), log=running.log)
    assert "exceeded the number of bytes specified by Content-Length" in logged["message"]


def test_client_gone_in_the_middle(start: Callable) -> None:
    """A client that leaves in the middle of its answer costs the server that answer, no more."""
    with start(WAITRESS_THREADS="1") as running:
        with running.connect() as connection:
            connection.sendall(GET % b"/large")
            assert statuses(connection.recv(100)) == [200]
        assert statuses(running.exchange()) == [200]
        assert 0 < running.requests(2)[0]["bytes"] < 90_000_000
        assert running.messages() == ["Client disconnected while serving /large"]


def test_file_that_becomes_shorter(start: Callable, tmp_path: pathlib.Path) -> None:
    """If a file ends before the length that was promised, no other answer takes the place of the rest."""
    (tmp_path / "file").write_bytes(bytes(30_000_000))
    with start() as running, running.connect() as connection:
        connection.sendall(GET % b"/file" + NEXT)
        assert statuses(connection.recv(100)) == [200]
        os.truncate(tmp_path / "file", 8_000_000)
        received = rest(connection)
    assert len(received) < 30_000_000
    assert statuses(received) == []


@pytest.mark.parametrize("line", [b"HEAD /too_many", b"HEAD /parts", b"HEAD /raises_after_part", b"GET /unchanged"])
def test_no_body(running: Server, line: bytes) -> None:
    """Where an answer has no body (RFC 9112, 6.3), what an application gives does not become the next answer."""
    answered = running.exchange(get(b"Connection: close", line=line + b" HTTP/1.1"))
    assert answered.endswith(b"\r\n\r\n")
    assert answered.count(b"\r\n\r\n") == 1


def test_threads_all_stuck(start: Callable, tmp_path: pathlib.Path) -> None:
    """While every thread is stuck the log says that requests wait for one; they are answered in the end."""
    with start(WAITRESS_THREADS="1") as running, running.connect() as stuck, running.connect() as waits:
        stuck.sendall(LAST % b"/waits")
        wait_until((tmp_path / "began").exists, 10, "the thread to be stuck")
        waits.sendall(LAST % b"/")
        running.until_said("Requests seen waiting for one of 1 threads")
        (tmp_path / "go").touch()
        assert statuses(rest(stuck)) == statuses(rest(waits)) == [200]


# ---- Behind a proxy --------------------------------------------------------------------------------------------------

WHERE = """
import json

from flask import Flask, request, url_for

app = Flask(__name__)

@app.route("/where", methods=["GET", "POST"])
def where():
    link = url_for("where", _external=True)
    return json.dumps([request.remote_addr, request.url, link, request.headers.get("X-Forwarded-For")])
"""
PROXY = "127.0.0.2"  # it connects from another address than other clients
TRUST = {
    "WAITRESS_TRUSTED_PROXY": PROXY,
    "WAITRESS_TRUSTED_PROXY_HEADERS": "x-forwarded-for x-forwarded-proto x-forwarded-host",
    "WAITRESS_URL_PREFIX": "/shop",
}
FORWARDED = [b"X-Forwarded-For: 192.0.2.1", b"X-Forwarded-Proto: https", b"X-Forwarded-Host: shop.example"]


def told(running: Server, *headers: bytes, path: bytes = b"/shop/where", source: str = PROXY) -> list:
    """Return what the application believes: client, URL, a link, X-Forwarded-For; and the address in the log."""
    with socket.create_connection(running.address(), 10, source_address=(source, 0)) as connection:
        connection.sendall(get(b"Connection: close", *headers, line=b"GET " + path + b" HTTP/1.1"))
        answered = rest(connection)
    assert statuses(answered) == [200]
    facts = json.loads(answered.partition(b"\r\n\r\n")[2])
    return [*facts, running.entries(request_id(answered))[0]["remote_addr"]]


def test_behind_a_proxy(start: Callable) -> None:
    """A trusted proxy says who the client is, and by which URL it asks; what any other client says goes unheard."""
    with start(WHERE, **TRUST) as running:
        url = "https://shop.example/shop/where"
        assert told(running, *FORWARDED) == ["192.0.2.1", url, url, "192.0.2.1", "192.0.2.1"]
        others = ["127.0.0.1", "http://a/shop/where", "http://a/shop/where", None, "127.0.0.1"]
        assert told(running, *FORWARDED, b"Forwarded: for=6.6.6.6", source="127.0.0.1") == others
        assert told(running, path=b"/where")[0] == PROXY  # without the prefix, as the probe asks


def test_several_hops(start: Callable) -> None:
    """Of a chain of addresses only those count that trusted proxies have added; where a request is refused, too."""
    chain = b"X-Forwarded-For: 6.6.6.6, 192.0.2.1, 192.0.2.2"
    with start(WHERE, **TRUST | {"WAITRESS_TRUSTED_PROXY": "*", "WAITRESS_TRUSTED_PROXY_COUNT": "2"}) as running:
        client, *_, logged = told(running, chain)
        refused = running.exchange(post(chain, b"Content-Length: 9999999"))
        [entry] = running.entries(request_id(refused))
        assert client == logged == entry["remote_addr"] == "192.0.2.1"


def test_forwarded_garbage(start: Callable) -> None:
    """What a trusted proxy forwards may be no address: a refused request is on record all the same."""
    with start(WHERE, **TRUST | {"WAITRESS_TRUSTED_PROXY": "*"}) as running:
        running.exchange(post(b"X-Forwarded-For: :1.2", b"Content-Length: 9999999"))
        assert running.requests(1)[0]["status"] == 413
