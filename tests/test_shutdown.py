"""How the server ends: what it still answers, what it tells clients, how long it waits."""

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

from tests.support import Server, ask, listens, many_files, rest, statuses, unanswered_until_gone, wait_until

# /slow waits for a file named after its query; /stream sends a part before that and a part after; /work goes on when
# its client is gone; /fork answers with the number of a child.
APPLICATION = """
import os
import pathlib
import time

here = pathlib.Path(__file__).parent

def app(environ, start_response):
    path, name = environ["PATH_INFO"], environ["QUERY_STRING"]
    if path == "/health":
        draining = environ["serve.draining"]
        start_response("503 Unavailable" if draining else "200 OK", [("Content-Length", "1")])
        return [b"d" if draining else b"k"]
    if path == "/upload":
        body = environ["wsgi.input"].read()
        start_response("200 OK", [])
        return [b"%d bytes" % len(body)]
    if path == "/large":
        start_response("200 OK", [("Content-Length", "30000000")])
        return (bytes(1_000_000) for _ in range(30))
    if path == "/buffered":
        start_response("200 OK", [("Content-Length", "120000")])
        return [bytes(120_000)]
    if path in {"/slow", "/stream"}:
        return wait(name, path == "/stream", start_response)
    if path == "/work":
        return work(start_response)
    if path == "/fork":
        if not (child := os.fork()):
            time.sleep(600)
        start_response("200 OK", [("Content-Length", "10")])
        return [b"%10d" % child]
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]

def wait(name, streams, start_response):
    (here / f"{name}.began").touch()
    start_response("200 OK", [("Content-Length", "10")])
    if streams:
        yield b"first"
    while not (here / name).exists():
        time.sleep(0.01)
    yield b"later" if streams else b"0123456789"

def work(start_response):
    start_response("200 OK", [])
    try:
        yield b"part"
        yield from wait("part", False, lambda *_: None)
    finally:
        for _ in wait("rest", False, lambda *_: None):
            (here / "done").touch()
"""

GET = b"GET %s HTTP/1.1\r\nHost: a\r\n\r\n"


@pytest.fixture
def start(tmp_path: pathlib.Path) -> Callable:
    """A function that starts a server with an application that can be held up."""
    (tmp_path / "app.py").write_text(APPLICATION)
    return lambda **environ: Server(tmp_path, **environ)


def said(running: Server, word: str) -> bool:
    """Tell whether a message of the log begins with `word`."""
    return any(entry["message"].startswith(word) for entry in running.logged())


def until_said(running: Server, word: str) -> None:
    """Wait for a message."""
    wait_until(lambda: said(running, word), 10, word)


def until_in_work(folder: pathlib.Path, name: str = "go") -> None:
    """Wait until the application has begun with the request that waits for a file of that name."""
    wait_until((folder / f"{name}.began").exists, 10, "the request to be in work")


def until_refused(running: Server) -> None:
    """Wait until it listens no more."""

    def refused() -> bool:
        try:
            running.connect().close()
        except ConnectionRefusedError:
            return True
        except ConnectionResetError:  # right when it closes
            return False
        return False

    wait_until(refused, 10, "the listener to close")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_delay(start: Callable, number: signal.Signals) -> None:
    """During SHUTDOWN_DELAY health is gone at once, all else goes on: new connections, and none is told to close."""
    with start(SHUTDOWN_DELAY="1") as running, running.connect() as old:
        assert statuses(ask(old, b"/health")) == [200]
        began = time.monotonic()
        running.process.send_signal(number)
        until_said(running, "Draining")
        assert statuses(ask(old, b"/health")) == [503]
        with running.connect() as new:
            for connection in (old, new):
                told = ask(connection, b"/")
                assert statuses(told) == [200]
                assert b"connection:" not in told.lower()
        assert not said(running, "Closing")
        assert running.ended() == 0
        assert time.monotonic() - began >= 1


def test_without_delay(start: Callable) -> None:
    """Without a delay it closes at once, and in the log stands what it did."""
    with start() as running:
        running.listening()
        running.stop()
        assert running.ended() == 0
        messages = [entry["message"] for entry in running.logged()]
    assert messages[1:] == [
        "Draining: accepting connections for 0 s more",
        "Closing: waiting at most 8 s; requests in work: 0",
        "Stopped",
    ]


def test_request_in_work(start: Callable, tmp_path: pathlib.Path) -> None:
    """A request in work is finished, told that it was the last on its connection; nobody new is accepted."""
    with start() as running, running.connect() as connection:
        connection.sendall(GET % b"/slow?go")
        until_in_work(tmp_path)
        running.stop()
        until_refused(running)
        (tmp_path / "go").touch()
        answered = rest(connection)
        assert statuses(answered) == [200]
        assert b"\r\nconnection: close\r\n" in answered.lower()
        assert answered.endswith(b"0123456789")
        assert running.ended() == 0


def test_queued_requests(start: Callable, tmp_path: pathlib.Path) -> None:
    """Requests that wait for a thread, and those behind them on the same connection, are answered too."""
    with start(WAITRESS_THREADS="1") as running, running.connect() as first, running.connect() as second:
        first.sendall(GET % b"/slow?go")
        until_in_work(tmp_path)
        second.sendall(GET % b"/" * 3)
        with running.connect() as third:  # refused: the one thread is busy, but by now the others are queued
            third.sendall(b"BAD\r\n\r\n")
            running.stop()
            until_refused(running)
            (tmp_path / "go").touch()
            assert statuses(rest(first)) == [200]
            answered = rest(second)
            assert statuses(answered) == [200, 200, 200]
            assert answered.lower().count(b"connection: close") == 1
            assert statuses(rest(third)) == [400]
        assert running.ended() == 0


def test_upload(start: Callable) -> None:
    """A request that is still arriving is waited for, and answered."""
    with start() as running, running.connect() as connection:
        connection.sendall(b"POST /upload HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n01234")
        wait_until(lambda: ask_health(running) == 200, 10, "the half to have arrived")
        running.stop()
        until_refused(running)
        connection.sendall(b"56789")
        assert rest(connection).endswith(b"10 bytes")
        assert running.ended() == 0


def ask_health(running: Server) -> int:
    """Return the status of /health."""
    with running.connect() as connection:
        return statuses(ask(connection, b"/health"))[0]


def test_download(start: Callable) -> None:
    """A long answer is sent to its end, however slowly the client takes it."""
    with start(SHUTDOWN_TIMEOUT="60") as running, running.connect() as connection:
        connection.sendall(GET % b"/large")
        connection.recv(1)
        running.stop()
        until_refused(running)
        received = 1
        while part := connection.recv(1_000_000):
            received += len(part)
            time.sleep(0.01)
        assert received > 30_000_000
        assert running.ended() == 0


@pytest.mark.parametrize("header", [b"", b"Connection: close\r\n"])
def test_sent_but_not_taken(start: Callable, header: bytes) -> None:
    """What the system has still to send counts as unanswered: in a container it would be lost with the network."""
    with start() as running, running.connect(receive_buffer=4096) as connection:
        # As large as the system's buffer takes at once: nothing of it is kept by the server.
        connection.sendall(b"GET /buffered HTTP/1.1\r\nHost: a\r\n" + header + b"\r\n")
        received = len(connection.recv(1000))
        running.requests(1)
        running.stop()
        until_refused(running)
        began = time.monotonic()
        while part := connection.recv(1000):
            received += len(part)
            if time.monotonic() - began < 2:
                time.sleep(0.02)  # much faster than the slowest that is allowed
                assert running.process.poll() is None
        assert received > 120_000
        assert running.ended() == 0


def test_stream(start: Callable, tmp_path: pathlib.Path) -> None:
    """An answer that has begun before anybody knew that it would be the last is finished, its connection closed."""
    with start() as running, running.connect() as connection:
        connection.sendall(GET % b"/stream?go")
        until_in_work(tmp_path)
        running.stop()
        until_refused(running)
        (tmp_path / "go").touch()
        assert rest(connection).endswith(b"firstlater")
        assert running.ended() == 0


def test_idle_connections(start: Callable) -> None:
    """Idle connections, used before or never, are closed; they hold nothing up."""
    with start() as running, running.connect() as used, running.connect() as unused:
        assert statuses(ask(used, b"/")) == [200]
        began = time.monotonic()
        running.stop()
        assert rest(used) == rest(unused) == b""
        assert running.ended() == 0
        assert time.monotonic() - began < 4


def test_request_that_has_arrived(start: Callable) -> None:
    """A request that is there before its idle connection is closed is answered, however many come at once."""
    # The server is stopped meanwhile, so all are there before it closes anything: more than epoll_wait() returns by
    # default, 1023.
    with many_files(), start() as running, ExitStack() as clients:
        connections = [clients.enter_context(running.connect()) for _ in range(1100)]
        for connection in connections:
            ask(connection, b"/")
        time.sleep(1.1)  # at a stop, who has been idle for a second is closed at once
        running.process.send_signal(signal.SIGSTOP)
        for connection in connections:
            connection.sendall(GET % b"/")
        running.stop()
        running.process.send_signal(signal.SIGCONT)
        for connection in connections:
            assert statuses(rest(connection)) == [200]  # ConnectionResetError: it was closed with the request unread
        assert running.ended() == 0


@pytest.mark.parametrize(
    ("begin", "answers"),
    [
        (b"GET / HT", [408]),
        (b"POST /upload HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n01234", [408]),
        (b"\r\n\r\n", []),
    ],
    ids=["line", "upload", "empty lines"],
)
def test_half_a_request(start: Callable, begin: bytes, answers: list[int]) -> None:
    """A request that does not go on arriving holds up the end for about a second, and is nobody's loss."""
    with start() as running, running.connect() as connection:
        connection.sendall(begin)
        assert ask_health(running) == 200  # by now the half has arrived
        began = time.monotonic()
        running.stop()
        assert statuses(rest(connection)) == answers
        assert running.ended() == 0
        assert time.monotonic() - began < 4
        assert running.messages() == []


@pytest.mark.parametrize(("timeout", "code"), [("8", 0), ("0.5", 1)])
def test_client_gone(start: Callable, tmp_path: pathlib.Path, timeout: str, code: int) -> None:
    """An application at work is waited for, or reported as abandoned, also if its client is gone."""
    with start(SHUTDOWN_TIMEOUT=timeout) as running:
        with running.connect() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset when closed
            connection.sendall(GET % b"/work")
            until_in_work(tmp_path, "part")
        (tmp_path / "part").touch()
        until_in_work(tmp_path, "rest")  # what it has sent meanwhile went nowhere
        assert ask_health(running) == 200  # by now the server knows
        running.stop()
        if code == 0:
            with pytest.raises(subprocess.TimeoutExpired):
                running.process.wait(0.5)
            (tmp_path / "rest").touch()
        assert running.ended() == code
        assert (tmp_path / "done").exists() == (code == 0)
        assert [message for message in running.messages() if "Abandoned" in message] == ["Abandoned requests: 1"] * code


def test_forked_child(start: Callable) -> None:
    """A child that the application has forked keeps neither the port open nor connections."""
    with start() as running, running.connect() as connection:
        address = running.address()
        child = int(ask(connection, b"/fork").split()[-1])
        try:
            running.stop()
            assert running.ended() == 0
            assert not listens(address)
            assert rest(connection) == b""
        finally:
            os.kill(child, signal.SIGKILL)


def test_next_request_on_a_connection(start: Callable) -> None:
    """A client that asks on, right when the server closes, is answered, and told to close."""
    with start() as running, running.connect() as connection:
        ask(connection, b"/")
        running.stop()
        until_refused(running)
        answered = ask(connection, b"/")
        assert statuses(answered) == [200]
        assert b"connection: close" in answered.lower()
        assert running.ended() == 0


def test_old_clients(start: Callable, tmp_path: pathlib.Path) -> None:
    """An HTTP/1.0 client that asked for keep-alive is told to close, in one word."""
    with start() as running, running.connect() as connection:
        connection.sendall(b"GET /slow?go HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")
        until_in_work(tmp_path)
        running.stop()
        until_refused(running)
        (tmp_path / "go").touch()
        header = rest(connection).lower().partition(b"\r\n\r\n")[0]
        assert header.count(b"connection:") == header.count(b"connection: close") == 1


def test_both_listeners(start: Callable, tmp_path: pathlib.Path) -> None:
    """With a listener of IPv4 and one of IPv6, both go on accepting, both finish, both close."""
    with start(BIND="*", SHUTDOWN_DELAY="1") as running:
        ports = [url.rpartition(":")[2] for url in running.listening(addresses=2)]
        places = list(zip(("127.0.0.1", "::1"), ports, strict=True))
        connections = [socket.create_connection(place, 10) for place in places]
        for name, connection in zip((b"one", b"two"), connections, strict=True):
            connection.sendall(GET % (b"/slow?" + name))
        for name in ("one", "two"):
            until_in_work(tmp_path, name)
        running.stop()
        until_said(running, "Draining")
        for place in places:
            with socket.create_connection(place, 10) as connection:
                assert statuses(ask(connection, b"/health")) == [503]
        until_said(running, "Closing")
        for place in places:
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(place, 10)
        for name, connection in zip(("one", "two"), connections, strict=True):
            (tmp_path / name).touch()
            assert statuses(rest(connection)) == [200]
            connection.close()
        assert running.ended() == 0


def test_timeout(start: Callable, tmp_path: pathlib.Path) -> None:
    """After SHUTDOWN_TIMEOUT it stops waiting, says how many requests it has abandoned, and ends with exit code 1."""
    with start(SHUTDOWN_TIMEOUT="0.5", WAITRESS_THREADS="1") as running, running.connect() as connection:
        connection.sendall(GET % b"/slow?go")
        until_in_work(tmp_path)
        with running.connect() as queued, running.connect() as arriving:
            queued.sendall(GET % b"/" * 2)
            arriving.sendall(b"GET / HTTP/1.1\r\n")  # does not count: it is no request yet
            running.stop()
            assert running.ended() == 1
    assert "Abandoned requests: 3" in running.messages()


def test_no_patience(start: Callable) -> None:
    """With SHUTDOWN_TIMEOUT=0 an idle server ends at once, with exit code 0."""
    with start(SHUTDOWN_TIMEOUT="0") as running, running.connect():
        running.stop()
        assert running.ended() == 0
        assert running.messages() == []


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("delay", ["0", "600"])
def test_second_signal(start: Callable, tmp_path: pathlib.Path, second: signal.Signals, delay: str) -> None:
    """A second signal ends it now, while it waits and before it closes, with exit code 1."""
    with start(SHUTDOWN_DELAY=delay, SHUTDOWN_TIMEOUT="600") as running, running.connect() as connection:
        connection.sendall(GET % b"/slow?go")
        until_in_work(tmp_path)
        running.stop()
        until_said(running, "Draining" if delay == "600" else "Closing")
        running.process.send_signal(second)
        assert running.ended() == 1
        assert "Abandoned requests: 1" in running.messages()


def test_clients_that_reconnect(start: Callable) -> None:
    """Clients that ask without a pause, and come back when told to close, never go without an answer."""
    with start() as running:
        assert unanswered_until_gone(running.address(), running.stop) == []
        assert running.ended() == 0


def test_threads_of_the_application(start: Callable, tmp_path: pathlib.Path) -> None:
    """A thread that the application leaves running does not hold up the end."""
    stay = "import threading, time\nthreading.Thread(target=time.sleep, args=[600]).start()\n"
    (tmp_path / "app.py").write_text(stay + APPLICATION)
    with start() as running:
        running.listening()
        running.stop()
        assert running.ended() == 1
        assert running.messages() == ["Ended with threads or atexit functions of the application still running"]


def test_functions_at_exit(start: Callable, tmp_path: pathlib.Path) -> None:
    """What the application has registered with atexit is done."""
    (tmp_path / "app.py").write_text("import atexit\natexit.register(print, 'bye')\n" + APPLICATION)
    with start() as running:
        running.listening()
        running.stop()
        assert running.ended() == 0
        assert running.access_log.read_text() == "bye\n"


def test_application_that_ignores_signals(start: Callable, tmp_path: pathlib.Path) -> None:
    """The signals are the server's, whatever the application's module does with them."""
    ignore = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    (tmp_path / "app.py").write_text(ignore + APPLICATION)
    with start() as running:
        running.listening()
        running.stop()
        assert running.ended() == 0
