"""How the server ends: on which signals, what it still answers, what it tells clients, how long it waits."""

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

from tests.support import GET, Server, ask, listens, rest, statuses, unanswered_until_gone, wait_until

# /slow and /stream wait for a file named after the query; /stream does so after its first part.
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
    """Wait until the application waits for a file of that name."""
    wait_until((folder / f"{name}.began").exists, 10, f"the application to wait for {name}")


def until_closed(running: Server) -> None:
    """Stop the server; wait until it has closed its listeners."""
    running.stop()
    running.until_said("Closing")


def two_listeners(running: Server) -> list[tuple[str, int]]:
    """Return where a server with BIND=* listens: with IPv4, and with IPv6."""
    ports = [int(url.rpartition(":")[2]) for url in running.listening(addresses=2)]
    return list(zip(("127.0.0.1", "::1"), ports, strict=True))


# ---- The signals ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ends_on_a_signal(start: Callable, number: signal.Signals) -> None:
    """SIGTERM and SIGINT end an idle server at once, with exit code 0, and the log says how."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as the background jobs of a shell inherit it
    try:
        running = start()
    finally:
        signal.signal(signal.SIGINT, before)
    with running:
        running.listening()
        running.process.send_signal(number)
        assert running.process.wait(7) == 0  # an idle server that misses the signal sleeps for 10 s
        assert [entry["message"] for entry in running.logged()][1:] == [
            "Draining: accepting connections for 0 s more",
            "Closing: waiting at most 8 s; requests in work: 0",
            "Stopped",
        ]


@pytest.mark.parametrize(("delay", "message"), [("0", "Closing"), ("600", "Draining")])
def test_second_signal(start: Callable, tmp_path: pathlib.Path, delay: str, message: str) -> None:
    """A second signal ends it now, while it waits for requests and before it closes, with exit code 1."""
    with start(SHUTDOWN_DELAY=delay, SHUTDOWN_TIMEOUT="600") as running, running.connect() as connection:
        connection.sendall(GET % b"/slow?go")
        until_waiting(tmp_path)
        running.stop()
        running.until_said(message)
        running.process.send_signal(signal.SIGINT)
        assert running.ended() == 1
        assert running.messages() == ["Abandoned requests: 1"]


# ---- What it still answers ------------------------------------------------------------------------------------------


def test_health_is_503_during_the_delay(start: Callable) -> None:
    """During SHUTDOWN_DELAY only /health changes: every listener accepts, and no client is told to close."""
    with start(BIND="*", SHUTDOWN_DELAY="600") as running, ExitStack() as clients:
        places = two_listeners(running)
        old = [clients.enter_context(socket.create_connection(place, 10)) for place in places]
        assert [statuses(ask(connection, b"/health")) for connection in old] == [[200], [200]]
        running.stop()
        running.until_said("Draining")
        new = [clients.enter_context(socket.create_connection(place, 10)) for place in places]
        for connection in old + new:
            assert statuses(ask(connection, b"/health")) == [503]
            told = ask(connection)
            assert statuses(told) == [200]
            assert b"connection:" not in told.lower()


def test_requests_in_work(start: Callable, tmp_path: pathlib.Path) -> None:
    """After the delay it accepts nobody new, and finishes what is in work, saying once that the connection ends."""
    asked = {
        "new": GET % b"/slow?new",
        "old": b"GET /slow?old HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
        "begun": GET % b"/stream?begun",
    }
    with start(BIND="*", SHUTDOWN_DELAY="1.2") as running, ExitStack() as clients:
        ipv4, ipv6 = places = two_listeners(running)
        connections = [clients.enter_context(socket.create_connection(place, 30)) for place in (ipv4, ipv6, ipv4)]
        for connection, (name, request) in zip(connections, asked.items(), strict=True):
            connection.sendall(request)
            until_waiting(tmp_path, name)
        began = time.monotonic()
        until_closed(running)
        assert time.monotonic() - began >= 1.2  # longer than clients are waited for from now on
        assert [listens(place) for place in places] == [False, False]
        for name in asked:
            (tmp_path / name).touch()
        *whole, begun = [rest(connection) for connection in connections]
        for response in whole:
            assert statuses(response) == [200]
            assert response.endswith(b"\r\n\r\nok")
            assert response.lower().count(b"\r\nconnection:") == response.lower().count(b"\r\nconnection: close") == 1
        assert begun.endswith(b"first\r\n4\r\nlast\r\n0\r\n\r\n")  # its header was sent before anybody knew
        assert running.ended() == 0


@pytest.mark.parametrize("lookahead", ["0", "1"])
def test_queued_requests(start: Callable, tmp_path: pathlib.Path, lookahead: str) -> None:
    """Requests that wait for a thread, and those behind them on the same connection, are answered too."""
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
        until_closed(running)
        (tmp_path / "go").touch()
        assert statuses(rest(first)) == [200]
        answered = rest(second)
        assert statuses(answered) == [200, 200, 200]
        assert answered.lower().count(b"connection: close") == 1
        assert statuses(rest(third)) == [400]
        assert running.ended() == 0


def test_who_goes_on(start: Callable) -> None:
    """A request that goes on arriving, and one more on an idle connection, are answered, with `Connection: close`."""
    with start() as running, running.connect() as uploading, running.connect() as idle:
        uploading.sendall(HALF_AN_UPLOAD)
        ask(idle)  # by now the half has arrived
        until_closed(running)
        uploading.sendall(b"56789")
        idle.sendall(GET % b"/")
        for connection, body in ((uploading, b"10 bytes"), (idle, b"ok")):
            answered = rest(connection)
            assert answered.endswith(b"\r\n\r\n" + body)
            assert b"\r\nconnection: close\r\n" in answered.lower()
        assert running.ended() == 0


def test_who_does_not_go_on(start: Callable) -> None:
    """Idle connections and half requests hold up the end for a second, not for any timeout; this is nobody's loss."""
    sent = {b"": [], b"\r\n\r\n": [], b"GET / HT": [408], HALF_AN_UPLOAD: [408]}
    with start(READ_TIMEOUT="60", SHUTDOWN_TIMEOUT="60") as running, ExitStack() as clients:
        connections = [clients.enter_context(running.connect()) for _ in sent]
        for connection, begin in zip(connections, sent, strict=True):
            connection.sendall(begin)
        with running.connect() as used:
            assert statuses(ask(used)) == [200]  # by now the halves have arrived
            running.stop()
            assert rest(used) == b""
        assert [statuses(rest(connection)) for connection in connections] == list(sent.values())
        assert running.ended() == 0
        assert running.messages() == []


def test_request_that_has_arrived(start: Callable) -> None:
    """Requests that are there before it closes anything are answered, also on connections that wait to be accepted."""
    with start() as running, ExitStack() as clients:
        connections = [clients.enter_context(running.connect()) for _ in range(20)]
        for connection in connections:
            ask(connection)
        time.sleep(1.6)  # connections that have been idle for a second are closed as soon as it stops
        # As a busy machine does it: the server sleeps while all this happens, and learns of the signal first.
        running.process.send_signal(signal.SIGSTOP)
        time.sleep(0.4)  # by then its select() has expired
        connections += [clients.enter_context(running.connect()) for _ in range(20)]
        for connection in connections:
            connection.sendall(GET % b"/")
        running.stop()
        running.process.send_signal(signal.SIGCONT)
        for connection in connections:
            assert statuses(rest(connection)) == [200]  # ConnectionResetError: it was closed with the request unread
        assert running.ended() == 0


@pytest.mark.parametrize(("parts", "header"), [(1, b""), (1, b"Connection: close\r\n"), (40, b"")])
def test_sent_but_not_taken(start: Callable, parts: int, header: bytes) -> None:
    """A response is waited for until its client has all of it: what the system still sends goes with the container."""
    with start(SHUTDOWN_TIMEOUT="60") as running, running.connect(receive_buffer=2**15) as connection:
        # One part is as large as the system's buffer takes at once; of 40 the server keeps most.
        connection.sendall(b"GET /parts?%d HTTP/1.1\r\nHost: a\r\n%b\r\n" % (parts, header))
        received = connection.recv(1000)
        if parts == 1:
            running.requests(1)
        until_closed(running)
        with pytest.raises(subprocess.TimeoutExpired):
            running.process.wait(1.8)  # an idle or half-closed connection is kept for a second
        received += rest(connection)
        assert received.count(b"\0") == parts * 120_000
        assert running.ended() == 0


def test_clients_that_reconnect(start: Callable) -> None:
    """Clients that ask without a pause, and come back when told to close, never go without an answer."""
    with start() as running:
        assert unanswered_until_gone(running.address(), running.stop) == []
        assert running.ended() == 0


# ---- How long it waits ----------------------------------------------------------------------------------------------


def test_timeout(start: Callable, tmp_path: pathlib.Path) -> None:
    """After SHUTDOWN_TIMEOUT it stops waiting, says how many requests it has abandoned, and ends with exit code 1."""
    with start(SHUTDOWN_TIMEOUT="0.5", WAITRESS_THREADS="1") as running, ExitStack() as clients:
        taking, working, queued, arriving = [clients.enter_context(running.connect(2**15)) for _ in range(4)]
        taking.sendall(GET % b"/parts?1")
        running.requests(1)  # sent, as far as it goes
        working.sendall(GET % b"/slow?go")
        until_waiting(tmp_path)
        queued.sendall(GET % b"/" * 2)
        arriving.sendall(b"GET / HTTP/1.1\r\n")  # does not count: it is no request yet
        running.stop()
        assert running.ended() == 1
    assert "Abandoned requests: 4" in running.messages()


def test_client_gone(start: Callable, tmp_path: pathlib.Path) -> None:
    """An application at work is waited for, also if its client is gone."""
    with start(SHUTDOWN_TIMEOUT="60") as running:
        with running.connect() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset when closed
            connection.sendall(GET % b"/slow?go")
            until_waiting(tmp_path)
        with running.connect() as connection:
            ask(connection)  # by now the server knows
        running.stop()
        with pytest.raises(subprocess.TimeoutExpired):
            running.process.wait(0.5)
        (tmp_path / "go").touch()
        assert running.ended() == 0


def test_forked_child(start: Callable) -> None:
    """A child that the application has forked keeps neither the port open nor connections."""
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
    ("left", "code", "printed", "messages"),
    [
        ("atexit.register(print, 'bye')", 0, "bye\n", []),
        (
            "threading.Thread(target=time.sleep, args=[600]).start()",
            1,
            "",
            ["Ended with threads or atexit functions of the application still running"],
        ),
    ],
    ids=["function", "thread"],
)
def test_what_the_application_leaves(start: Callable, left: str, code: int, printed: str, messages: list[str]) -> None:
    """What the application has registered with atexit is done; a thread that it leaves running is not waited for."""
    with start(f"import atexit, threading, time\n{left}\n" + APPLICATION) as running:
        running.listening()
        running.stop()
        assert running.ended() == code
        assert (running.access_log.read_text(), running.messages()) == (printed, messages)
