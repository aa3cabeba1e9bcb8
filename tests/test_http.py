"""HTTP over raw sockets: invalid requests, applications that fail, and a proxy in front.

The rules are those of RFC 9110 and 9112. Each request in the table is followed by a valid one for /next. If the first
is invalid, or its end is ambiguous, the server must close the connection: what follows may be a smuggled request.
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

# Applications by path. Those in the first table fail before they have sent anything.
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
# Any other path is answered with what the application got.
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
# One thread: if a test kills it, the next request gets no response.
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
    # Content-Length, RFC 9112, 6.3 (5): 400 and close; a list of equal lengths may be accepted.
    "two lengths": (post(b"Content-Length: 5", b"Content-Length: 6"), [400]),
    "the same length twice": (post(b"Content-Length: 5", b"Content-Length: 5"), [400]),
    "a list of lengths": (post(b"Content-Length: 5, 5"), [400]),
    "a length with a sign": (post(b"Content-Length: +5"), [400]),
    "a negative length": (post(b"Content-Length: -5"), [400]),
    "a hexadecimal length": (post(b"Content-Length: 0x5"), [400]),
    "an empty length": (post(b"Content-Length:"), [400]),
    "a length of 5000 digits": (post(b"Content-Length: " + b"5" * 5000), [400]),
    "a length": (post(b"Content-Length: 5"), [200, 200]),
    # Transfer-Encoding, 6.1 and 6.3 (3, 4): chunked must be last and occur once, else 400. An unknown coding is 501.
    # Together with a length it may be refused. HTTP/1.0 has none.
    "length and encoding": (post(b"Content-Length: 5", CHUNKED, body=HELLO), [400]),
    "encoding and length": (post(CHUNKED, b"Content-Length: 5", body=HELLO), [400]),
    "length and encoding in any case": (post(b"content-length: 5", b"tRANSFER-eNCODING: CHUNKED", body=HELLO), [400]),
    "encoding twice": (post(CHUNKED, CHUNKED, body=HELLO), [400]),
    "chunked twice": (post(b"Transfer-Encoding: chunked, chunked", body=HELLO), [400]),
    "chunked not last": (post(b"Transfer-Encoding: chunked, identity", body=HELLO), [400]),
    "an encoding without chunked": (post(b"Transfer-Encoding: br", body=HELLO), [400]),
    "almost chunked": (post(b"Transfer-Encoding: xchunked", body=HELLO), [400]),
    "chunked after a control character": (post(b"Transfer-Encoding: \x0bchunked", body=HELLO), [400]),
    "an empty encoding": (post(b"Transfer-Encoding:", b"Content-Length: 5"), [400]),
    "an empty encoding element": (post(b"Transfer-Encoding: , chunked", b"Content-Length: 5", body=HELLO), [400]),
    "an unknown coding": (post(b"Transfer-Encoding: gzip, chunked", body=HELLO), [501]),
    "encoding in HTTP/1.0": (post(CHUNKED, line=b"POST / HTTP/1.0", body=HELLO), [400]),
    "chunked": (post(CHUNKED, body=HELLO), [200, 200]),
    # Chunks, 7.1: extensions must be ignored, trailers may be.
    "chunk extensions": (post(CHUNKED, body=b"5;a=b;c\r\nhello\r\n0;d\r\n\r\n"), [200, 200]),
    "a quoted extension": (post(CHUNKED, body=b'5;a="b c"\r\nhello\r\n0\r\n\r\n'), [200, 200]),
    "spaces in an extension": (post(CHUNKED, body=b'5 ; a = "b"\r\nhello\r\n0\r\n\r\n'), [200, 200]),
    "a trailer": (post(CHUNKED, body=b"5\r\nhello\r\n0\r\nHost: b\r\n\r\n"), [200, 200]),
    "an empty extension": (post(CHUNKED, body=b"5;\r\nhello\r\n0\r\n\r\n"), [400]),
    "a space after a chunk size": (post(CHUNKED, body=b"5 \r\nhello\r\n0\r\n\r\n"), [400]),
    "an invalid extension name": (post(CHUNKED, body=b"5;bad[=x\r\nhello\r\n0\r\n\r\n"), [400]),
    "NUL in an extension": (post(CHUNKED, body=b"5;\x00\r\nhello\r\n0\r\n\r\n"), [400]),
    "LF after an extension": (post(CHUNKED, body=b"5;a\nhello\r\n0\r\n\r\n"), [400]),
    "LF after a chunk size": (post(CHUNKED, body=b"5\nhello\r\n0\r\n\r\n"), [400]),
    "a chunk size with 0x": (post(CHUNKED, body=b"0x5\r\nhello\r\n0\r\n\r\n"), [400]),
    "a negative chunk size": (post(CHUNKED, body=b"-5\r\nhello\r\n0\r\n\r\n"), [400]),
    "a space before a chunk size": (post(CHUNKED, body=b" 5\r\nhello\r\n0\r\n\r\n"), [400]),
    "a chunk longer than its size": (post(CHUNKED, body=b"5\r\nhelloX\r\n0\r\n\r\n"), [400]),
    "no CR LF after a chunk": (post(CHUNKED, body=b"5\r\nhello0\r\n\r\n"), [400]),
    "LF CR LF after a chunk size": (post(CHUNKED, body=b"5\n\r\nhello\r\n0\r\n\r\n"), [400]),
    "an empty line before a chunk size": (post(CHUNKED, body=b"\r\n5\r\nhello\r\n0\r\n\r\n"), [400]),
    "LF in a trailer": (post(CHUNKED, body=b"5\r\nhello\r\n0\r\nA: b\nC: d\r\n\r\n"), [400]),
    "NUL in a trailer": (post(CHUNKED, body=b"5\r\nhello\r\n0\r\nA: b\x00\r\n\r\n"), [400]),
    "a request in place of a trailer": (post(CHUNKED, body=b"0\r\nGET /next HTTP/1.1\r\n\r\n"), [400]),
    "the longest extension": (post(CHUNKED, body=b"5;" + b"a" * 8188 + b"\r\nhello\r\n0\r\n\r\n"), [200, 200]),
    "an extension one byte too long": (post(CHUNKED, body=b"5;" + b"a" * 8189 + b"\r\nhello\r\n0\r\n\r\n"), [400]),
    "a long trailer": (post(CHUNKED, body=b"0\r\n" + b"A: b\r\n" * 2000 + b"\r\n"), [200, 200]),
    "a trailer that is too long": (post(CHUNKED, body=b"0\r\n" + b"A: b\r\n" * 2100 + b"\r\n"), [400]),
    # Lines end with CR LF (2.2; LF alone may be accepted), have no space before the colon (5.1) and are not folded
    # (5.2: 400, or unfold them). A value has no CR, LF or NUL (RFC 9110, 5.5).
    "LF after the request line": (b"GET / HTTP/1.1\nHost: a\r\n\r\n", [400]),
    "LF between headers": (get(b"A: b\nC: d"), [400]),
    "CR in a value": (get(b"A: b\rC: d"), [400]),
    "a folded header": (get(b"A: b", b" c"), [400]),
    "a header folded with a tab": (get(b"A: b", b"\tc"), [400]),
    "a space before the first header": (get(host=b" Host: a\r\n"), [400]),
    "a space before the colon": (post(b"Content-Length : 5"), [400]),
    "a tab before the colon": (post(b"Transfer-Encoding\t: chunked", body=HELLO), [400]),
    "two Content-Types": (get(b"Content-Type: text/plain", b"Content-Type: text/html"), [400]),
    "a header without a colon": (get(b"no colon"), [400]),
    "a header without a name": (get(b": value"), [400]),
    "NUL in a value": (get(b"A: b\x00c"), [400]),
    "NUL in a name": (get(b"A\x00: b"), [400]),
    "ESC in a value": (get(b"A: \x1b[2J"), [400]),
    # Host, 3.2: 400 if it is missing (in HTTP/1.1), repeated or invalid. Empty is valid.
    "no Host": (get(host=b""), [400]),
    "two Hosts": (get(b"Host: b"), [400]),
    "two Hosts and an encoding": (post(CHUNKED, b"Host: a", body=HELLO), [400]),
    "a list of Hosts": (get(host=b"Host: a, b\r\n"), [400]),
    "a path in Host": (get(host=b"Host: a/b\r\n"), [400]),
    "a user in Host": (get(host=b"Host: user@a\r\n"), [400]),
    "a non-numeric port in Host": (get(host=b"Host: a:http\r\n"), [400]),
    "an empty Host": (get(host=b"Host:\r\n"), [200, 200]),
    "an IPv6 Host": (get(host=b"Host: [::1]:5000\r\n"), [200, 200]),
    "no Host in HTTP/1.0": (get(line=b"GET / HTTP/1.0", host=b""), [200]),
    "absolute form without Host": (get(line=b"GET http://b/ HTTP/1.1", host=b""), [400]),
    "absolute form without a host": (get(line=b"GET http:///path HTTP/1.1"), [400]),
    # Connection, RFC 9110, 7.6.1: a list.
    "close in a list": (get(b"Connection: TE, Close"), [200]),
    # Request line, 3: 400 if it is invalid. RFC 9110, 15.6.6: 505 for another version.
    "HTTP/0.9": (b"GET /\r\n", [400]),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", [505]),
    "HTTP/1.2": (post(CHUNKED, line=b"POST / HTTP/1.2", body=HELLO), [505]),
    "http/1.1 in lower case": (get(line=b"GET / http/1.1"), [400]),
    "a method in lower case": (get(line=b"get / HTTP/1.1"), [400]),
    "an unknown method": (get(line=b"ACL / HTTP/1.1"), [200, 200]),
    "two spaces in the request line": (get(line=b"GET  / HTTP/1.1"), [400]),
    "a space after the request line": (get(line=b"GET / HTTP/1.1 "), [400]),
    "tabs in the request line": (get(line=b"GET\t/\tHTTP/1.1"), [400]),
    "a space in the target": (get(line=b"GET /a b HTTP/1.1"), [400]),
    "NUL in the target": (get(line=b"GET /\x00 HTTP/1.1"), [400]),
    "ESC in the target": (get(line=b"GET /\x1b[2J HTTP/1.1"), [400]),
    "UTF-8 in the target": (get(line=b"GET /\xc3\xb8 HTTP/1.1"), [400]),
    "UTF-8 after two slashes": (get(line=b"GET //\xc3\xb8 HTTP/1.1"), [400]),
    "UTF-8 in absolute form": (get(line=b"GET http://a/\xc3\xb8 HTTP/1.1"), [400]),
    "an empty line before the request": (b"\r\n" + get(), [200, 200]),
    "LF before the request": (b"\n" + get(), [400]),
    "a space before the request": (b" " + get(), [400]),
    "control characters before the request": (b"\x0b\x0c" + get(), [400]),
    "a space alone": (b" \r\n\r\n", [400]),
    # Targets, 3.2: only CONNECT has an authority, only OPTIONS an asterisk.
    "authority form": (get(line=b"GET example.com:80 HTTP/1.1"), [400]),
    "CONNECT": (get(line=b"CONNECT example.com:80 HTTP/1.1"), [501]),
    "asterisk form with GET": (get(line=b"GET * HTTP/1.1"), [400]),
    "asterisk form with POST": (post(b"Content-Length: 5", line=b"POST * HTTP/1.1"), [400]),
    "OPTIONS *": (get(line=b"OPTIONS * HTTP/1.1"), [200, 200]),
    "absolute form": (get(line=b"GET http://b/ HTTP/1.1"), [200, 200]),
    "absolute form in capitals": (get(line=b"GET HTTP://b/ HTTP/1.1"), [200, 200]),
    "absolute form with a user": (get(line=b"GET http://u:p@b/ HTTP/1.1"), [400]),
    "absolute form with half an IPv6 address": (get(line=b"GET http://[::1/ HTTP/1.1"), [400]),
    "absolute form with a non-numeric port": (get(line=b"GET http://b:8x\\y/ HTTP/1.1"), [400]),
    "another scheme": (get(line=b"GET file:///etc/passwd HTTP/1.1"), [400]),
    # Not HTTP.
    "a TLS handshake": (bytes.fromhex("16030100c8010000c40303") + bytes(200), [400]),
    "bytes that are not ASCII": (b"\xff\xfe\r\n\r\n", [400]),
    # Pipelining, RFC 9112, 9.3.2: responses in order, none after a refusal.
    "an invalid second request": (get() + get(b"A: b\x00c"), [200, 400]),
    "an ambiguous second request": (get() + post(b"Content-Length: 5", CHUNKED, body=HELLO), [200, 400]),
    # Expect, RFC 9110, 10.1.1: no 100 if the final status is known, or if there is no body.
    "100-continue for a large body": (post(b"Expect: 100-continue", b"Content-Length: 9999999"), [413]),
    "100-continue without a body": (get(b"Expect: 100-continue"), [200, 200]),
    "100-continue in HTTP/1.0": (get(b"Expect: 100-continue", line=b"GET / HTTP/1.0"), [200]),
    # Limits: request line and headers 16 KiB (RFC 6585, 5: 431), body 1 MiB (RFC 9110, 15.5.14: 413).
    "the longest target": (get(line=b"GET /" + b"a" * (16383 - 27) + b" HTTP/1.1"), [200, 200]),
    "a target one byte too long": (get(line=b"GET /" + b"a" * (16384 - 27) + b" HTTP/1.1"), [431]),
    "a request line without an end": (b"GET /" + b"a" * 99000, [431]),
    "a long header after an empty line": (b"\r\n" + get(b"A: " + b"b" * 17000), [431]),
    "many headers": (get(*[b"A: b"] * 5000), [431]),
    "a large body": (post(b"Content-Length: 1048577"), [413]),
}


@pytest.mark.parametrize(("sent", "expected"), REQUESTS.values(), ids=REQUESTS)
def test_request(running: Server, sent: bytes, expected: list[int]) -> None:
    """Sent whole or byte by byte, a request gets the statuses in the table; a second 200 there is that of /next."""
    for whole in (True, False) if len(sent) < 2000 else (True,):
        with running.connect() as connection:
            if whole:
                connection.sendall(sent + NEXT)
            else:
                with suppress(OSError):  # the request has already been refused
                    for byte in sent if expected == [200] else sent + NEXT:  # after a close, sending risks a reset
                        connection.send(bytes([byte]))
            responses = rest(connection)
        assert statuses(responses) == expected
        assert (b"/next" in responses) == (expected[-2:] == [200, 200])
        for response in re.split(rb"^(?=HTTP/1\.[01] [0-9])", responses, flags=re.MULTILINE)[1:]:
            assert response.lower().count(b"x-content-type-options: nosniff\r\n") == 1
            assert response.lower().count(b"x-request-id: ") == 1
            assert b"server:" not in response.lower()
            assert response.partition(b"\r\n\r\n")[2].count(b"\n") == 1
        if expected[-1] >= 400:
            assert b"\r\nconnection: close\r\n" in responses.lower()


@pytest.mark.parametrize(
    ("target", "path", "host"),
    [(b"http://b:80/path?query", "/path", "b:80"), (b"HTTP://b?query", "/", "b"), (b"//b/path", "/b/path", "a")],
)
def test_host_of_the_target(running: Server, target: bytes, path: str, host: str) -> None:
    """The host of an absolute target replaces the Host header (RFC 9112, 3.2.2); a path with // has no host."""
    assert running.exchange(LAST % target).endswith(f"{['GET', path, host, b'']}\n".encode())


@pytest.mark.parametrize(("target", "status"), [(b"/nothing", 204), (b"/unchanged", 304), (b"/parts", 200)])
def test_connection_is_kept(running: Server, target: bytes, status: int) -> None:
    """A response without Content-Length keeps the connection if its end is clear (RFC 9112, 9.3)."""
    responses = running.exchange(GET % target + NEXT)
    assert statuses(responses) == [status, 200]
    assert responses.lower().count(b"connection: close") == 1


def test_response_without_length_in_http_1_0(running: Server) -> None:
    """In HTTP/1.0 a response without Content-Length is not chunked: it ends when the connection is closed."""
    response = running.exchange(get(b"Connection: keep-alive", line=b"GET /parts HTTP/1.0"))
    assert response.endswith(b"\r\n\r\nonetwo")
    assert b"keep-alive" not in response.lower()


@pytest.mark.parametrize("sent", [post(b"Content-Length: 9"), post(CHUNKED, body=b"5\r\nhel"), b"G"])
def test_half_a_request(running: Server, sent: bytes) -> None:
    """A client that stops sending in the middle of a request is disconnected without a response."""
    with running.connect() as connection:
        connection.sendall(sent)
        connection.shutdown(socket.SHUT_WR)
        assert rest(connection) == b""


def test_chunk_longer_than_its_size(running: Server) -> None:
    """A chunk longer than its size is refused at once, without waiting for the end of its line."""
    assert statuses(running.exchange(post(CHUNKED, body=b"5\r\nhellogarbage"))) == [400]


def test_continue(running: Server) -> None:
    """A client that waits for 100 Continue gets it; the application gets the body without chunk framing and trailer."""
    with running.connect() as connection:
        connection.sendall(post(b"Expect: 100-continue", CHUNKED, b"Connection: close", body=b""))
        assert connection.recv(1000) == b"HTTP/1.1 100 Continue\r\n\r\n"
        connection.sendall(b"3;a=b\r\nhel\r\n1a\r\nlo and a word more of that\r\n0\r\nHost: b\r\n\r\n")
        assert rest(connection).endswith(b"['POST', '/', 'a', b'hello and a word more of that']\n")


@pytest.mark.parametrize("header", [CHUNKED, b"Content-Length: 8388608"])
def test_refusal_arrives_while_the_client_sends(running: Server, header: bytes) -> None:
    """A client that sends all of an 8 MiB body before it reads still receives the 413."""
    with running.connect() as connection:
        connection.sendall(post(header, body=b""))
        for _ in range(128):
            connection.sendall(b"10000\r\n" + bytes(65536) + b"\r\n" if header == CHUNKED else bytes(65536))
        assert statuses(rest(connection)) == [413]


def test_refused_client_that_keeps_sending(running: Server) -> None:
    """A client that keeps sending after a refusal is disconnected within a few seconds."""
    with running.connect() as connection, pytest.raises(ConnectionError):
        connection.sendall(post(b"Content-Length: 8388608"))
        for _ in range(2000):
            connection.sendall(bytes(1024))
            time.sleep(0.01)


# ---- Applications that fail or hang ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAILING)
def test_failure_before_the_first_byte(running: Server, name: str) -> None:
    """If the application fails before the first byte, the response is a one-line 500; only the log says why."""
    response = running.exchange(GET % f"/{name}".encode())
    assert statuses(response) == [500]
    header, _, body = response.partition(b"\r\n\r\n")
    assert body == b"500 Internal Server Error: The server encountered an unexpected internal server error\n"
    assert b"x-mine" not in header.lower()
    assert statuses(running.exchange()) == [200]
    [failed] = running.entries(request_id(response))
    assert (failed["path"], failed["status"], failed["bytes"]) == (f"/{name}", 500, len(body))
    [logged] = running.entries(request_id(response), log=running.log)
    assert logged["message"] == f"Exception while serving /{name}"
    assert "exception" in logged


@pytest.mark.parametrize(
    ("name", "body"),
    [("raises_after_part", b"4\r\npart\r\n"), ("too_few", b"ok"), ("raises_in_close", b"ok")],
)
def test_failure_after_the_first_byte(running: Server, name: str, body: bytes) -> None:
    """If the application fails after the first byte, the connection is closed and the failure logged once."""
    response = running.exchange(GET % f"/{name}".encode())
    assert statuses(response) == [200]
    assert response.partition(b"\r\n\r\n")[2] == body
    assert statuses(running.exchange()) == [200]
    assert len(running.entries(request_id(response), log=running.log)) == 1


def test_body_longer_than_content_length(running: Server) -> None:
    """A body is cut at its Content-Length, so that the rest is not read as the next response; the log says so."""
    response = running.exchange(GET % b"/too_many" + NEXT)
    assert statuses(response) == [200, 200]
    assert b"more" not in response
    [logged] = running.entries(request_id(response), log=running.log)
    assert "exceeded the number of bytes specified by Content-Length" in logged["message"]


def test_client_gone_during_the_response(start: Callable) -> None:
    """A client that disconnects during its response is logged with the bytes it was sent; the server goes on."""
    with start(WAITRESS_THREADS="1") as running:
        with running.connect() as connection:
            connection.sendall(GET % b"/large")
            assert statuses(connection.recv(100)) == [200]
        assert statuses(running.exchange()) == [200]
        assert 0 < running.requests(2)[0]["bytes"] < 90_000_000
        assert running.messages() == ["Client disconnected while serving /large"]


def test_file_that_shrinks(start: Callable, tmp_path: pathlib.Path) -> None:
    """If a file shrinks while it is sent, the connection is closed: no other response may fill its place."""
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
    """The response to HEAD, or a 304, has no body (RFC 9112, 6.3), whatever the application returns."""
    response = running.exchange(get(b"Connection: close", line=line + b" HTTP/1.1"))
    assert response.endswith(b"\r\n\r\n")
    assert response.count(b"\r\n\r\n") == 1


def test_all_threads_busy(start: Callable, tmp_path: pathlib.Path) -> None:
    """While all threads are busy, the log reports that requests wait for one; they are answered in the end."""
    with start(WAITRESS_THREADS="1") as running, running.connect() as busy, running.connect() as waiting:
        busy.sendall(LAST % b"/waits")
        wait_until((tmp_path / "began").exists, 10, "the thread to be busy")
        waiting.sendall(LAST % b"/")
        running.until_said("Requests seen waiting for one of 1 threads")
        (tmp_path / "go").touch()
        assert statuses(rest(busy)) == statuses(rest(waiting)) == [200]


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
PROXY = "127.0.0.2"  # other clients connect from 127.0.0.1
TRUST = {
    "WAITRESS_TRUSTED_PROXY": PROXY,
    "WAITRESS_TRUSTED_PROXY_HEADERS": "x-forwarded-for x-forwarded-proto x-forwarded-host",
    "WAITRESS_URL_PREFIX": "/shop",
}
FORWARDED = [b"X-Forwarded-For: 192.0.2.1", b"X-Forwarded-Proto: https", b"X-Forwarded-Host: shop.example"]


def seen_by(running: Server, *headers: bytes, path: bytes = b"/shop/where", source: str = PROXY) -> list:
    """Return what the application sees: client, URL, a link, X-Forwarded-For; and the client address in the log."""
    with socket.create_connection(running.address(), 10, source_address=(source, 0)) as connection:
        connection.sendall(get(b"Connection: close", *headers, line=b"GET " + path + b" HTTP/1.1"))
        response = rest(connection)
    assert statuses(response) == [200]
    facts = json.loads(response.partition(b"\r\n\r\n")[2])
    return [*facts, running.entries(request_id(response))[0]["remote_addr"]]


def test_behind_a_proxy(start: Callable) -> None:
    """Forwarded headers from the trusted proxy set the client address and the URL; from others they are ignored."""
    with start(WHERE, **TRUST) as running:
        url = "https://shop.example/shop/where"
        assert seen_by(running, *FORWARDED) == ["192.0.2.1", url, url, "192.0.2.1", "192.0.2.1"]
        others = ["127.0.0.1", "http://a/shop/where", "http://a/shop/where", None, "127.0.0.1"]
        assert seen_by(running, *FORWARDED, b"Forwarded: for=6.6.6.6", source="127.0.0.1") == others
        assert seen_by(running, path=b"/where")[0] == PROXY  # without the prefix, as the health check asks


def test_several_hops(start: Callable) -> None:
    """With two trusted proxies, the second address from the right is the client, also if the request is refused."""
    chain = b"X-Forwarded-For: 6.6.6.6, 192.0.2.1, 192.0.2.2"
    with start(WHERE, **TRUST | {"WAITRESS_TRUSTED_PROXY": "*", "WAITRESS_TRUSTED_PROXY_COUNT": "2"}) as running:
        client, *_, logged = seen_by(running, chain)
        refused = running.exchange(post(chain, b"Content-Length: 9999999"))
        [entry] = running.entries(request_id(refused))
        assert client == logged == entry["remote_addr"] == "192.0.2.1"


def test_forwarded_garbage(start: Callable) -> None:
    """A refused request is logged even if the trusted proxy forwards an invalid address."""
    with start(WHERE, **TRUST | {"WAITRESS_TRUSTED_PROXY": "*"}) as running:
        running.exchange(post(b"X-Forwarded-For: :1.2", b"Content-Length: 9999999"))
        assert running.requests(1)[0]["status"] == 413
