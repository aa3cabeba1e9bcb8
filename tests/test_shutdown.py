"""Shutdown: signals, draining, requests in flight, the timeout."""

import os
import pathlib
import signal
import socket
import struct
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from tests.support import GET, Server, ask, errors_while_stopping, listens, rest, statuses, wait_until

# /slow and /stream wait for the file that the query names, /stream after its first part.
APPLICATION = """
import os
import pathlib
import time

here = pathlib.Path(__file__).parent

def app(environ, start_response):
    path, query = environ["PATH_INFO"], environ["QUERY_STRING"]
    start_response("503 Draining" if path == "/health" and environ["serve.draining"] else "200 OK", [])
    if path == "/upload":
        return [b"%d bytes" % len(environ["wsgi.input"].read())]
    if path == "/parts":
        return [bytes(120_000)] * int(query)
    if path == "/stream":
        return stream(query)
    if path == "/slow":
        wait(query)
    if path == "/fork":
        if not (child := os.fork()):
            time.sleep(600)
        return [b"%d" % child]
    return [b"ok"]

def stream(name):
    yield b"first"
    wait(name)
    yield b"last"

def wait(name):
    (here / f"{name}.began").touch()
    while not (here / name).exists():
        time.sleep(0.01)
"""

HALF_AN_UPLOAD = b"POST /upload HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n01234"


def until_waiting(folder: pathlib.Path, name: str = "go") -> None:
    """Wait until the application waits for the file `name`."""
    wait_until((folder / f"{name}.began").exists, 10, f"the application to wait for {name}")


def close_listeners(running: Server) -> None:
    """Tell the server to stop; return when it has closed its listeners."""
    running.stop()
    running.until_said("Closing")


def both_addresses(running: Server) -> list[tuple[str, int]]:
    """Return the addresses of a server with BIND=*: IPv4, then IPv6."""
    ports = [int(url.rpartition(":")[2]) for url in running.listening(addresses=2)]
    return list(zip(("127.0.0.1", "::1"), ports, strict=True))


# ---- Signals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ends_on_a_signal(start: Callable, number: signal.Signals) -> None:
    """SIGTERM and SIGINT stop an idle server at once, with exit code 0; the log names each step."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a shell's background jobs
    try:
        running = start()
    finally:
        signal.signal(signal.SIGINT, before)
    with running:
        running.listening()
        running.process.send_signal(number)
        assert running.process.wait(7) == 0  # an idle server that misses the signal sleeps on for 10 s
        assert [entry["message"] for entry in running.logged()][1:] == [
            "Draining: accepting connections for 0 s more",
            "Closing: waiting at most 8 s; requests in flight: 0",
            "Stopped",
        ]


@pytest.mark.parametrize(("delay", "message"), [("0", "Closing"), ("600", "Draining")])
def test_second_signal(start: Callable, tmp_path: pathlib.Path, delay: str, message: str) -> None:
    """A second signal stops the server at once, with exit code 1: while requests finish, or during SHUTDOWN_DELAY."""
    with start(SHUTDOWN_DELAY=delay, SHUTDOWN_TIMEOUT="600") as running, running.connect() as connection:
        connection.sendall(GET % b"/slow?go")
        until_waiting(tmp_path)
        running.stop()
        running.until_said(message)
        running.process.send_signal(signal.SIGINT)
        assert running.ended() == 1
        assert running.messages() == ["Abandoned requests: 1"]


# ---- Requests that are still answered --------------------------------------------------------------------------------


def test_health_is_503_during_the_delay(start: Callable) -> None:
    """During SHUTDOWN_DELAY only /health changes: all listeners accept, and connections are kept alive."""
    with start(BIND="*", SHUTDOWN_DELAY="600") as running, ExitStack() as clients:
        addresses = both_addresses(running)
        old = [clients.enter_context(socket.create_connection(address, 10)) for address in addresses]
        assert [statuses(ask(connection, b"/health")) for connection in old] == [[200], [200]]
        running.stop()
        running.until_said("Draining")
        new = [clients.enter_context(socket.create_connection(address, 10)) for address in addresses]
        for connection in old + new:
            assert statuses(ask(connection, b"/health")) == [503]
            response = ask(connection)
            assert statuses(response) == [200]
            assert b"connection:" not in response.lower()


def test_requests_in_flight(start: Callable, tmp_path: pathlib.Path) -> None:
    """After SHUTDOWN_DELAY listeners close and requests in flight finish; later headers say `Connection: close`."""
    requests = {
        "http11": GET % b"/slow?http11",
        "http10": b"GET /slow?http10 HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
        "stream": GET % b"/stream?stream",
    }
    with start(BIND="*", SHUTDOWN_DELAY="1.2") as running, ExitStack() as clients:
        ipv4, ipv6 = addresses = both_addresses(running)
        connections = [clients.enter_context(socket.create_connection(address, 30)) for address in (ipv4, ipv6, ipv4)]
        for connection, (name, request) in zip(connections, requests.items(), strict=True):
            connection.sendall(request)
            until_waiting(tmp_path, name)
        began = time.monotonic()
        close_listeners(running)
        assert time.monotonic() - began >= 1.2  # more than the second that idle clients get from now on
        assert [listens(address) for address in addresses] == [False, False]
        for name in requests:
            (tmp_path / name).touch()
        *whole, streamed = [rest(connection) for connection in connections]
        for response in whole:
            assert statuses(response) == [200]
            assert response.endswith(b"\r\n\r\nok")
            assert response.lower().count(b"\r\nconnection:") == response.lower().count(b"\r\nconnection: close") == 1
        assert streamed.endswith(b"first\r\n4\r\nlast\r\n0\r\n\r\n")  # the header was sent before the signal
        assert running.ended() == 0


@pytest.mark.parametrize("lookahead", ["0", "1"])
def test_queued_requests(start: Callable, tmp_path: pathlib.Path, lookahead: str) -> None:
    """Requests that wait for a thread are answered too, as are those pipelined behind them."""
    with (
        start(WAITRESS_THREADS="1", WAITRESS_CHANNEL_REQUEST_LOOKAHEAD=lookahead) as running,
        running.connect() as first,
        running.connect() as second,
        running.connect() as third,
    ):
        first.sendall(GET % b"/slow?go")
        until_waiting(tmp_path)
        second.sendall(GET % b"/" * 3)
        third.sendall(b"BAD\r\n\r\n")
        close_listeners(running)
        (tmp_path / "go").touch()
        assert statuses(rest(first)) == [200]
        responses = rest(second)
        assert statuses(responses) == [200, 200, 200]
        assert responses.lower().count(b"connection: close") == 1
        assert statuses(rest(third)) == [400]
        assert running.ended() == 0


def test_clients_that_continue(start: Callable) -> None:
    """An upload may finish, and an idle connection send one more request: both get `Connection: close`."""
    with start() as running, running.connect() as uploading, running.connect() as idle:
        uploading.sendall(HALF_AN_UPLOAD)
        ask(idle)  # by now the server has read the half upload
        close_listeners(running)
        uploading.sendall(b"56789")
        idle.sendall(GET % b"/")
        for connection, body in ((uploading, b"10 bytes"), (idle, b"ok")):
            response = rest(connection)
            assert response.endswith(b"\r\n\r\n" + body)
            assert b"\r\nconnection: close\r\n" in response.lower()
        assert running.ended() == 0


def test_clients_that_stall(start: Callable) -> None:
    """Idle connections are closed and unfinished requests get 408 long before any timeout; none counts as abandoned."""
    expected = {b"": [], b"\r\n\r\n": [], b"GET / HT": [408], HALF_AN_UPLOAD: [408]}
    with start(READ_TIMEOUT="60", SHUTDOWN_TIMEOUT="60") as running, ExitStack() as clients:
        connections = [clients.enter_context(running.connect()) for _ in expected]
        for connection, sent in zip(connections, expected, strict=True):
            connection.sendall(sent)
        with running.connect() as used:
            assert statuses(ask(used)) == [200]  # by now the server has read the others
            running.stop()
            assert rest(used) == b""
        assert [statuses(rest(connection)) for connection in connections] == list(expected.values())
        assert running.ended() == 0
        assert running.messages() == []


def test_unread_requests(start: Callable) -> None:
    """Requests sent before the signal, but not yet read, are answered, even on connections not yet accepted."""
    with start() as running, ExitStack() as clients:
        connections = [clients.enter_context(running.connect()) for _ in range(20)]
        for connection in connections:
            ask(connection)
        time.sleep(1.6)  # at the stop, connections idle for over a second are closed at once
        # As on a busy machine: the server sleeps meanwhile, and sees the signal before the requests.
        running.process.send_signal(signal.SIGSTOP)
        time.sleep(0.4)  # by then its select() has timed out
        connections += [clients.enter_context(running.connect()) for _ in range(20)]
        for connection in connections:
            connection.sendall(GET % b"/")
        running.stop()
        running.process.send_signal(signal.SIGCONT)
        for connection in connections:
            assert statuses(rest(connection)) == [200]  # ConnectionResetError: closed with the request unread
        assert running.ended() == 0


@pytest.mark.parametrize(("parts", "header"), [(1, b""), (1, b"Connection: close\r\n"), (40, b"")])
def test_response_not_yet_received(start: Callable, parts: int, header: bytes) -> None:
    """The server waits until the client has received everything: the container's send buffers end with it."""
    with start(SHUTDOWN_TIMEOUT="60") as running, running.connect(receive_buffer=2**15) as connection:
        # One part fits into the kernel's send buffer; of 40, the server itself holds most.
        connection.sendall(b"GET /parts?%d HTTP/1.1\r\nHost: a\r\n%b\r\n" % (parts, header))
        received = connection.recv(1000)
        if parts == 1:
            running.requests(1)
        close_listeners(running)
        with pytest.raises(subprocess.TimeoutExpired):
            running.process.wait(1.8)  # an idle or half-closed connection is closed after a second
        received += rest(connection)
        assert received.count(b"\0") == parts * 120_000
        assert running.ended() == 0


def test_clients_that_reconnect(start: Callable) -> None:
    """Clients that send requests without a pause, and reconnect when told to close, always get a response."""
    with start() as running:
        assert errors_while_stopping(running.address(), running.stop) == []
        assert running.ended() == 0


# ---- What it waits for -----------------------------------------------------------------------------------------------


def test_timeout(start: Callable, tmp_path: pathlib.Path) -> None:
    """After SHUTDOWN_TIMEOUT the server logs how many requests it abandons, and ends with exit code 1."""
    with start(SHUTDOWN_TIMEOUT="0.5", WAITRESS_THREADS="1") as running, ExitStack() as clients:
        receiving, working, queued, arriving = [clients.enter_context(running.connect(2**15)) for _ in range(4)]
        receiving.sendall(GET % b"/parts?1")
        running.requests(1)  # the response is made, but not received in full
        working.sendall(GET % b"/slow?go")
        until_waiting(tmp_path)
        queued.sendall(GET % b"/" * 2)
        arriving.sendall(b"GET / HTTP/1.1\r\n")  # not a whole request, so not counted
        running.stop()
        assert running.ended() == 1
    assert "Abandoned requests: 4" in running.messages()


def test_client_gone(start: Callable, tmp_path: pathlib.Path) -> None:
    """The server waits for the application to finish even if the client has disconnected."""
    with start(SHUTDOWN_TIMEOUT="60") as running:
        with running.connect() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() sends RST
            connection.sendall(GET % b"/slow?go")
            until_waiting(tmp_path)
        with running.connect() as connection:
            ask(connection)  # by now the server has seen the reset
        running.stop()
        with pytest.raises(subprocess.TimeoutExpired):
            running.process.wait(0.5)
        (tmp_path / "go").touch()
        assert running.ended() == 0


def test_forked_child(start: Callable) -> None:
    """A child that the application forked keeps neither the port nor connections open."""
    with start() as running, running.connect() as connection:
        address = running.address()
        child = int(ask(connection, b"/fork").split()[-1])
        try:
            running.end()
            assert not listens(address)
            assert rest(connection) == b""
        finally:
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize(
    ("statement", "code", "printed", "messages"),
    [
        ("atexit.register(print, 'bye')", 0, "bye\n", []),
        (
            "threading.Thread(target=time.sleep, args=[600]).start()",
            1,
            "",
            ["Ended with threads or atexit functions of the application still running"],
        ),
    ],
    ids=["atexit", "thread"],
)
def test_atexit_and_threads(start: Callable, statement: str, code: int, printed: str, messages: list[str]) -> None:
    """Functions registered with atexit run; a thread that the application leaves running makes the exit code 1."""
    with start(f"import atexit, threading, time\n{statement}\n" + APPLICATION) as running:
        running.listening()
        running.stop()
        assert running.ended() == code
        assert (running.access_log.read_text(), running.messages()) == (printed, messages)
