"""Clients that are slow, many or lazy: how long they are waited for, what they cost, and that nobody else waits."""

import contextlib
import os
import pathlib
import select
import signal
import socket
import time
from collections.abc import Callable

import pytest

from tests.support import GET, LAST, Server, ask, many_files, request_id, rest, statuses, wait_until

VARIABLES = {"READ_TIMEOUT": "0.5"}
LARGE = 30_000_000  # bytes, more than the buffers of both systems take
APPLICATION = """
import os
import time

def app(environ, start_response):
    path = environ["PATH_INFO"]
    if path == "/slow":
        time.sleep(1.2)
    if path == "/waits":
        while not os.path.exists("release"):
            time.sleep(0.01)
        files = [open("/dev/null") for _ in range(5)]
    if path == "/hoard":  # all the files that the process may have
        files = []
        try:
            while True:
                files.append(open("/dev/null"))
        except OSError:
            os.mkdir("hoarded")
            while not os.path.exists("release"):
                time.sleep(0.01)
            files.clear()
    size, parts = {"/large": (100_000, 300), "/crumbs": (4_000, 7_500), "/megabyte": (1_000_000, 1)}.get(path, (0, 0))
    if size:
        start_response("200 OK", [("Content-Length", str(size * parts))])
        return (bytes(size) for _ in range(parts))
    body = environ["wsgi.input"].read()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""
# A limit of the size of files has the same effect as a full disk.
FULL_DISK = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
"""

POST = b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n%b\r\n\r\n"
SIZED = POST % b"Content-Length: %d"
LINE = b"GET /" + b"a" * 3000


def drip(connection: socket.socket, sent: bytes) -> bytes:
    """Send a byte every 20 ms until an answer comes; return it."""
    for byte in sent:
        if select.select([connection], [], [], 0.02)[0]:
            return rest(connection)
        connection.sendall(bytes([byte]))
    raise AssertionError("all was sent before an answer came")


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (b"", LINE),
        (b"GET / HTTP/1.1\r\n", b"A: b\r\n" * 500),
        (b"\r\n", b"\r\n" + LINE),
        (SIZED % 3000, b"a" * 2999),
        (POST % b"Transfer-Encoding: chunked", b"1\r\na\r\n" * 500),
    ],
    ids=["line", "headers", "empty lines", "body", "chunks"],
)
def test_slow_request_gets_408(running: Server, begin: bytes, more: bytes) -> None:
    """A client that does not send a whole request in time gets 408 and is closed, however steadily its bytes come."""
    with running.connect() as connection:
        began = time.monotonic()
        connection.sendall(begin)
        answered = drip(connection, more)
    assert 0.45 < time.monotonic() - began < 10
    assert statuses(answered) == [408]
    assert answered.endswith(b"408 Request Timeout: the request took too long to arrive\n")
    assert b"\r\nConnection: close\r\n" in answered
    assert running.entries(request_id(answered))[0]["duration_ms"] > 450


def test_idle_connections_stay(running: Server) -> None:
    """The time begins with a request's first byte: before it, a connection may have been idle for longer, or in use."""
    with running.connect() as used, running.connect() as unused, running.connect() as slow:
        ask(used)
        drip(slow, LINE)  # by when its time is over, that of the others would be
        ask(unused)
        ask(used)
        began = time.monotonic()
        assert statuses(drip(used, LINE)) == [408]
        assert time.monotonic() - began > 0.45


def test_slow_application(running: Server) -> None:
    """The time that the application takes is not the client's: neither for a request in work nor for one behind it."""
    with running.connect() as connection:
        connection.sendall(GET % b"/slow" + b"GET / HTTP/1.1\r\n")
        assert statuses(connection.recv(1000)) == [200]
        connection.sendall(b"Host: a\r\nConnection: close\r\n\r\n")
        assert statuses(rest(connection)) == [200]
    # The request was in work, so it was not waiting for a thread.
    assert not [message for message in running.messages() if "waiting for one of" in message]


def greedy_end(connection: socket.socket) -> int:
    """Return how many bytes are still to be had from a connection that has been closed."""
    received = 0
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1_000_000):
            received += len(part)
    return received


# With the smallest buffer there is, a client's system acknowledges something of 700 bytes/s at least every 1.7 s.
@pytest.mark.parametrize(("read_timeout", "taken"), [("0.5", 0), ("2", 70)])
def test_client_that_takes_too_little(start: Callable, read_timeout: str, taken: int) -> None:
    """A client that takes less than 1 KiB/s of a response is closed after READ_TIMEOUT; its thread is free again."""
    with (
        start(READ_TIMEOUT=read_timeout, WAITRESS_THREADS="1") as running,
        running.connect(receive_buffer=1) as greedy,
        running.connect() as honest,
    ):
        greedy.sendall(GET % b"/large")
        assert statuses(greedy.recv(70)) == [200]
        honest.sendall(LAST % b"/")
        deadline = time.monotonic() + 30
        while not select.select([honest], [], [], 0.1)[0]:
            assert time.monotonic() < deadline, "the thread is not free"
            with contextlib.suppress(OSError):
                greedy.recv(taken, socket.MSG_DONTWAIT)
        assert statuses(rest(honest)) == [200]
        entry, _ = running.requests(2)
        assert entry["path"] == "/large"
        assert entry["duration_ms"] > 900 * float(read_timeout)
        assert entry["bytes"] < LARGE
        assert greedy_end(greedy) < LARGE


def test_client_that_takes_its_time(start: Callable) -> None:
    """A client that reads slowly, but faster than 1 KiB/s, is served for longer than READ_TIMEOUT, though half-closed.

    What counts is what its system has acknowledged, not what the server's own has taken.
    """
    with start(READ_TIMEOUT="1") as running, running.connect(receive_buffer=4096) as connection:
        connection.sendall(LAST % b"/large")
        connection.shutdown(socket.SHUT_WR)
        began = time.monotonic()
        while time.monotonic() - began < 3:  # all of it would take minutes
            assert connection.recv(1_000)
            time.sleep(0.05)
        assert running.access_log.read_text() == "", "cut off"


def test_slow_upload(start: Callable) -> None:
    """An upload may take longer than READ_TIMEOUT, as long as 1 KiB/s arrives."""
    with start(READ_TIMEOUT="1") as running, running.connect() as connection:
        connection.sendall(SIZED % 40_000)
        began = time.monotonic()
        for sent in range(0, 40_000, 400):
            connection.sendall(bytes(400))
            time.sleep(max(0, began + sent / 20_000 - time.monotonic()))  # 20 kB/s
        assert statuses(rest(connection)) == [200]


def test_idle_connections_go(start: Callable) -> None:
    """WAITRESS_CHANNEL_TIMEOUT closes a client that sends only empty lines, but none that has sent half a request."""
    with (
        start(READ_TIMEOUT="1.5", WAITRESS_CHANNEL_TIMEOUT="1") as running,
        running.connect() as half,
        running.connect() as idle,
    ):
        began = time.monotonic()
        half.sendall(SIZED % 10 + b"01234")
        ask(idle)
        with contextlib.suppress(ConnectionError):
            while not select.select([idle], [], [], 0.1)[0]:
                idle.sendall(b"\r\n")
                assert time.monotonic() - began < 10, "it is still open"
            assert rest(idle) == b""
        assert statuses(rest(half)) == [408]
        assert time.monotonic() - began > 1.45


# ---- many ----


def test_a_thousand_slow_clients(start: Callable) -> None:
    """A thousand clients that have sent half a request keep nobody out: the limit of open files is raised for them."""
    with contextlib.ExitStack() as slow, many_files(), start(files=(64, 8192), READ_TIMEOUT="600") as running:
        for _ in range(500):
            slow.enter_context(running.connect()).sendall(b"GET / HTTP/1.1\r\nHost: a\r\n")
            slow.enter_context(running.connect()).sendall(SIZED % 9)
        for _ in range(5):
            assert statuses(running.exchange()) == [200]
        assert running.messages() == []


def test_few_files(start: Callable, tmp_path: pathlib.Path) -> None:
    """Where the limit of open files holds fewer connections than allowed, it says so; the application has some left."""
    with contextlib.ExitStack() as clients, start(files=(256, 256)) as running, running.connect() as first:
        first.sendall(GET % b"/waits")  # which opens files when the others are there
        for _ in range(300):
            clients.enter_context(running.connect())
        (tmp_path / "release").touch()
        assert statuses(first.recv(1000)) == [200]
        clients.close()
        assert statuses(running.exchange()) == [200]
        running.end()
        [warned] = [message for message in running.messages() if "A limit of 256 open files" in message]
        assert warned.endswith("does not hold connection_limit=2000: it is now 96")
        assert not [entry for entry in running.logged() if "exception" in entry]


def test_connections_beyond_the_limit(start: Callable) -> None:
    """Connections beyond connection_limit wait until others have kept the server waiting for a second."""
    with start(WAITRESS_CONNECTION_LIMIT="20") as running, contextlib.ExitStack() as clients:
        began = time.monotonic()
        for _ in range(25):
            clients.enter_context(running.connect())
        assert statuses(running.exchange()) == [200]
        assert time.monotonic() - began > 0.95


def test_dripping_clients_beyond_the_limit(start: Callable) -> None:
    """More clients than connection_limit that drip, and come back when they are closed, keep nobody out for long."""
    with start(READ_TIMEOUT="60", WAITRESS_CONNECTION_LIMIT="20") as running:
        clients = [running.connect() for _ in range(30)]
        for _ in range(2):
            with running.connect() as honest:
                honest.sendall(LAST % b"/")
                deadline = time.monotonic() + 30
                while not select.select([honest], [], [], 0.2)[0]:
                    assert time.monotonic() < deadline, "kept out"
                    for number, client in enumerate(clients):
                        try:
                            client.sendall(b"G")
                        except OSError:
                            client.close()
                            clients[number] = running.connect()
                assert statuses(rest(honest)) == [200]
        for client in clients:
            client.close()


def test_no_more_files(start: Callable, tmp_path: pathlib.Path) -> None:
    """Out of file descriptors, it says so once, waits without being busy, and goes on when there are some again."""
    # A request in work holds the files: an idle connection would be closed after a second, and free one.
    with start(files=(100, 100), READ_TIMEOUT="600") as running, running.connect() as known:
        known.sendall(GET % b"/hoard")
        wait_until((tmp_path / "hoarded").exists, 10, "all files to be open")
        with running.connect() as waiting:
            waiting.sendall(LAST % b"/")
            before = cpu_seconds(running.process.pid)
            assert not select.select([waiting], [], [], 1)[0]
            assert cpu_seconds(running.process.pid) - before < 0.5
            (tmp_path / "release").touch()
            assert statuses(rest(waiting)) == [200]
        running.end()
        assert len([message for message in running.messages() if message.startswith("no connection can be")]) == 1


def cpu_seconds(process: int) -> float:
    """Return how long a process has been busy."""
    numbers = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")


# ---- memory, and the folder for temporary files ----


def memory(process: int) -> int:
    """Return how many bytes of memory are a process's own, those of its files excepted."""
    status = pathlib.Path(f"/proc/{process}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def test_memory_of_responses(start: Callable) -> None:
    """Responses that nobody reads are not kept in memory."""
    with start(READ_TIMEOUT="600") as running, contextlib.ExitStack() as clients:
        assert statuses(running.exchange()) == [200]
        before = memory(running.process.pid)
        for _ in range(60):
            clients.enter_context(running.connect(receive_buffer=4096)).sendall(GET % b"/megabyte")
        running.requests(61)  # the application is done with all of them
        assert memory(running.process.pid) - before < 30_000_000  # half of what they have asked for


def test_memory_of_requests(start: Callable, tmp_path: pathlib.Path) -> None:
    """Of the hundreds of requests that a packet holds only a few are taken up at a time; all are answered."""
    with start(READ_TIMEOUT="0.5", WAITRESS_THREADS="1") as running, running.connect() as connection:
        ask(connection)
        before = memory(running.process.pid)
        with contextlib.ExitStack() as clients, running.connect() as busy:
            busy.sendall(GET % b"/waits")
            for _ in range(100):
                clients.enter_context(running.connect()).sendall(b"GET / HTTP/1.1\r\nHost:\r\n\r\n" * 300)
            connection.sendall(b"GET / HTTP/1.1\r\nHost:\r\n\r\n" * 300)
            assert statuses(running.exchange(b"half a request")) == [408]  # by the loop, which has read all by then
            assert memory(running.process.pid) - before < 20_000_000
            (tmp_path / "release").touch()
        connection.sendall(LAST % b"/")
        assert statuses(rest(connection)) == [200] * 301


# Of the chunks, the last bytes wait until the file is closed.
CHUNKS = POST % b"Transfer-Encoding: chunked" + (b"64\r\n" + bytes(100) + b"\r\n") * 5000 + b"0\r\n\r\n"


@pytest.mark.parametrize("large", [SIZED % 500_000 + bytes(500_000), CHUNKS], ids=["whole", "chunks"])
def test_no_room_for_a_body(start: Callable, large: bytes) -> None:
    """A body that does not fit into the folder for temporary files is answered 503; the next that fits is taken."""
    with start(FULL_DISK + APPLICATION) as running:
        answered = running.exchange(large)
        assert statuses(answered) == [503]
        assert answered.endswith(b"503 Service Unavailable: there is no room for the body\n")
        assert statuses(running.exchange(SIZED % 90_000 + bytes(90_000))) == [200]
        assert [entry["status"] for entry in running.requests(2)] == [503, 200]
        running.end()
        assert running.messages() == []


@pytest.mark.parametrize("path", [b"/large", b"/crumbs"])  # of the latter, the last bytes wait until it is closed
def test_no_room_for_a_response(start: Callable, path: bytes) -> None:
    """If what a client does not take finds no room in the folder for temporary files, that client alone is cut off."""
    with start(FULL_DISK + APPLICATION) as running, running.connect(receive_buffer=4096) as lazy:
        lazy.sendall(GET % path)
        [entry] = running.requests(1)
        assert (entry["path"].encode(), entry["status"]) == (path, 200)
        assert 0 < greedy_end(lazy) < LARGE
        assert statuses(running.exchange()) == [200]
        running.end()
        assert [message for message in running.messages() if message.startswith("A response is cut short")]
        assert not [entry for entry in running.logged() if "exception" in entry]


# ---- what costs others time ----


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\nA:" + b" " * 16_000 + b"b\r\n\r\n", 400),
        (POST % b"Transfer-Encoding: chunked" + b"1\r\na\r\n" * 150_000 + b"0\r\n\r\n", 200),
    ],
    ids=["header of blanks", "chunks of a byte"],
)
def test_costly_requests(running: Server, sent: bytes, status: int) -> None:
    """A request that could take quadratic time to parse does not hold up everybody else."""
    answered = running.exchange(sent)
    assert statuses(answered) == [status]
    assert running.entries(request_id(answered))[0]["duration_ms"] < 5000  # or half a minute


def test_paused(start: Callable) -> None:
    """While the process is stopped, as by `docker pause`, it is not the clients who are slow."""
    last = LAST % b"/"
    with start(READ_TIMEOUT="1.5") as running, running.connect() as header, running.connect() as body:
        header.sendall(last[:20])
        body.sendall(SIZED % 2000 + bytes(20))
        assert statuses(running.exchange()) == [200]  # by now both have arrived
        running.process.send_signal(signal.SIGSTOP)
        time.sleep(2)
        running.process.send_signal(signal.SIGCONT)
        header.sendall(last[20:])
        body.sendall(bytes(1980))
        assert statuses(rest(header)) == statuses(rest(body)) == [200]
