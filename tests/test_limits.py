"""Clients that are slow, stalled or many: timeouts, limits and memory. They do not hold up other clients."""

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
LARGE = 30_000_000  # bytes: more than both sides' socket buffers hold
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
    if path == "/hoard":  # opens files until the limit
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
# A limit on file size acts like a full disk.
FULL_DISK = """
import resource, signal
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
"""

POST = b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n%b\r\n\r\n"
SIZED = POST % b"Content-Length: %d"
LINE = b"GET /" + b"a" * 3000


def drip(connection: socket.socket, sent: bytes) -> bytes:
    """Send a byte every 20 ms until a response comes; return it."""
    for byte in sent:
        if select.select([connection], [], [], 0.02)[0]:
            return rest(connection)
        connection.sendall(bytes([byte]))
    raise AssertionError("all was sent before a response came")


@pytest.mark.parametrize(
    ("at_once", "dripped"),
    [
        (b"", LINE),
        (b"GET / HTTP/1.1\r\n", b"A: b\r\n" * 500),
        (b"\r\n", b"\r\n" + LINE),
        (SIZED % 3000, b"a" * 2999),
        (POST % b"Transfer-Encoding: chunked", b"1\r\na\r\n" * 500),
    ],
    ids=["request line", "headers", "empty lines", "body", "chunks"],
)
def test_slow_request_gets_408(running: Server, at_once: bytes, dripped: bytes) -> None:
    """A client whose request takes too long gets 408 and is disconnected, however steadily its bytes arrive."""
    with running.connect() as connection:
        began = time.monotonic()
        connection.sendall(at_once)
        response = drip(connection, dripped)
    assert 0.45 < time.monotonic() - began < 10
    assert statuses(response) == [408]
    assert response.endswith(b"408 Request Timeout: the request took too long to arrive\n")
    assert b"\r\nConnection: close\r\n" in response
    assert running.entries(request_id(response))[0]["duration_ms"] > 450


def test_timeout_starts_with_the_request(running: Server) -> None:
    """READ_TIMEOUT starts with a request's first byte, however long the connection was idle or in use before."""
    with running.connect() as used, running.connect() as unused, running.connect() as slow:
        ask(used)
        drip(slow, LINE)  # takes READ_TIMEOUT, while the other two are idle
        ask(unused)
        ask(used)
        began = time.monotonic()
        assert statuses(drip(used, LINE)) == [408]
        assert time.monotonic() - began > 0.45


def test_slow_application(running: Server) -> None:
    """READ_TIMEOUT does not run while the application works, not even for an unfinished request behind the first."""
    with running.connect() as connection:
        connection.sendall(GET % b"/slow" + b"GET / HTTP/1.1\r\n")
        assert statuses(connection.recv(1000)) == [200]
        connection.sendall(b"Host: a\r\nConnection: close\r\n\r\n")
        assert statuses(rest(connection)) == [200]
    # A request that is being answered is not reported as waiting for a thread.
    assert not [message for message in running.messages() if "waiting for one of" in message]


def remaining_bytes(connection: socket.socket) -> int:
    """Return how many bytes are left to read from a connection that the server has closed."""
    received = 0
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1_000_000):
            received += len(part)
    return received


# With the smallest buffer, the kernel of a client that reads 700 bytes/s acknowledges data at least every 1.7 s.
@pytest.mark.parametrize(("read_timeout", "read_size"), [("0.5", 0), ("2", 70)])
def test_slow_reader_is_disconnected(start: Callable, read_timeout: str, read_size: int) -> None:
    """A client that reads slower than 1 KiB/s is disconnected after READ_TIMEOUT; its thread is free again."""
    with (
        start(READ_TIMEOUT=read_timeout, WAITRESS_THREADS="1") as running,
        running.connect(receive_buffer=1) as slow,
        running.connect() as other,
    ):
        slow.sendall(GET % b"/large")
        assert statuses(slow.recv(70)) == [200]
        other.sendall(LAST % b"/")
        deadline = time.monotonic() + 30
        while not select.select([other], [], [], 0.1)[0]:
            assert time.monotonic() < deadline, "the thread is not free"
            with contextlib.suppress(OSError):
                slow.recv(read_size, socket.MSG_DONTWAIT)
        assert statuses(rest(other)) == [200]
        entry, _ = running.requests(2)
        assert entry["path"] == "/large"
        assert entry["duration_ms"] > 900 * float(read_timeout)
        assert entry["bytes"] < LARGE
        assert remaining_bytes(slow) < LARGE


def test_steady_reader_is_served(start: Callable) -> None:
    """A client that reads faster than 1 KiB/s is served for longer than READ_TIMEOUT, even if it has half-closed."""
    # What counts is what the client's kernel has acknowledged, not what the server's kernel has buffered.
    with start(READ_TIMEOUT="1") as running, running.connect(receive_buffer=4096) as connection:
        connection.sendall(LAST % b"/large")
        connection.shutdown(socket.SHUT_WR)
        began = time.monotonic()
        while time.monotonic() - began < 3:  # the whole response would take minutes
            assert connection.recv(1_000)
            time.sleep(0.05)
        assert running.access_log.read_text() == "", "cut off"


def test_slow_upload(start: Callable) -> None:
    """An upload faster than 1 KiB/s may take longer than READ_TIMEOUT."""
    with start(READ_TIMEOUT="1") as running, running.connect() as connection:
        connection.sendall(SIZED % 40_000)
        began = time.monotonic()
        for sent in range(0, 40_000, 400):
            connection.sendall(bytes(400))
            time.sleep(max(0, began + sent / 20_000 - time.monotonic()))  # 20 kB/s
        assert statuses(rest(connection)) == [200]


def test_idle_timeout(start: Callable) -> None:
    """WAITRESS_CHANNEL_TIMEOUT closes a connection that sends only empty lines, but not one with half a request."""
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


# ---- Many clients ----------------------------------------------------------------------------------------------------


def test_a_thousand_slow_clients(start: Callable) -> None:
    """A thousand unfinished requests do not keep others out: the server raises its limit of open files."""
    with contextlib.ExitStack() as slow, many_files(), start(files=(64, 8192), READ_TIMEOUT="600") as running:
        for _ in range(500):
            slow.enter_context(running.connect()).sendall(b"GET / HTTP/1.1\r\nHost: a\r\n")
            slow.enter_context(running.connect()).sendall(SIZED % 9)
        for _ in range(5):
            assert statuses(running.exchange()) == [200]
        assert running.messages() == []


def test_low_limit_of_open_files(start: Callable, tmp_path: pathlib.Path) -> None:
    """A low limit of open files lowers connection_limit, with a warning, and leaves files for the application."""
    with contextlib.ExitStack() as clients, start(files=(256, 256)) as running, running.connect() as first:
        first.sendall(GET % b"/waits")  # opens files once the others have connected
        for _ in range(300):
            clients.enter_context(running.connect())
        (tmp_path / "release").touch()
        assert statuses(first.recv(1000)) == [200]
        clients.close()
        assert statuses(running.exchange()) == [200]
        running.end()
        [warning] = [message for message in running.messages() if "A limit of 256 open files" in message]
        assert warning.endswith("is too low for connection_limit=2000: lowered to 96")
        assert not [entry for entry in running.logged() if "exception" in entry]


def test_connections_beyond_the_limit(start: Callable) -> None:
    """At connection_limit, a new connection waits until others have been idle for a second and are closed."""
    with start(WAITRESS_CONNECTION_LIMIT="20") as running, contextlib.ExitStack() as clients:
        began = time.monotonic()
        for _ in range(25):
            clients.enter_context(running.connect())
        assert statuses(running.exchange()) == [200]
        assert time.monotonic() - began > 0.95


def test_dripping_clients_beyond_the_limit(start: Callable) -> None:
    """Clients that drip bytes and reconnect do not keep others out, even if they exceed connection_limit."""
    with start(READ_TIMEOUT="60", WAITRESS_CONNECTION_LIMIT="20") as running:
        clients = [running.connect() for _ in range(30)]
        for _ in range(2):
            with running.connect() as other:
                other.sendall(LAST % b"/")
                deadline = time.monotonic() + 30
                while not select.select([other], [], [], 0.2)[0]:
                    assert time.monotonic() < deadline, "kept out"
                    for number, client in enumerate(clients):
                        try:
                            client.sendall(b"G")
                        except OSError:
                            client.close()
                            clients[number] = running.connect()
                assert statuses(rest(other)) == [200]
        for client in clients:
            client.close()


def test_out_of_files(start: Callable, tmp_path: pathlib.Path) -> None:
    """Out of file descriptors, the server warns once, does not spin, and accepts again once some are free."""
    # The request holds the files while it is answered: an idle connection would be closed after a second, and free one.
    with start(files=(100, 100), READ_TIMEOUT="600") as running, running.connect() as hoarding:
        hoarding.sendall(GET % b"/hoard")
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
    """Return the CPU time that a process has used."""
    numbers = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")


# ---- Memory and temporary files --------------------------------------------------------------------------------------


def memory(process: int) -> int:
    """Return the size of a process's anonymous memory, in bytes."""
    status = pathlib.Path(f"/proc/{process}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def test_memory_of_responses(start: Callable) -> None:
    """Responses that clients do not read are not kept in memory."""
    with start(READ_TIMEOUT="600") as running, contextlib.ExitStack() as clients:
        assert statuses(running.exchange()) == [200]
        before = memory(running.process.pid)
        for _ in range(60):
            clients.enter_context(running.connect(receive_buffer=4096)).sendall(GET % b"/megabyte")
        running.requests(61)  # the application is done with all of them
        assert memory(running.process.pid) - before < 30_000_000  # half of what they asked for


def test_memory_of_requests(start: Callable, tmp_path: pathlib.Path) -> None:
    """Hundreds of pipelined requests are parsed a few at a time, to save memory, and all are answered."""
    with start(READ_TIMEOUT="0.5", WAITRESS_THREADS="1") as running, running.connect() as connection:
        ask(connection)
        before = memory(running.process.pid)
        with contextlib.ExitStack() as clients, running.connect() as busy:
            busy.sendall(GET % b"/waits")
            for _ in range(100):
                clients.enter_context(running.connect()).sendall(b"GET / HTTP/1.1\r\nHost:\r\n\r\n" * 300)
            connection.sendall(b"GET / HTTP/1.1\r\nHost:\r\n\r\n" * 300)
            assert statuses(running.exchange(b"half a request")) == [408]  # from the loop: it has read all
            assert memory(running.process.pid) - before < 20_000_000
            (tmp_path / "release").touch()
        connection.sendall(LAST % b"/")
        assert statuses(rest(connection)) == [200] * 301


# Small chunks leave bytes in the file's buffer, so that closing the file fails too.
CHUNKS = POST % b"Transfer-Encoding: chunked" + (b"64\r\n" + bytes(100) + b"\r\n") * 5000 + b"0\r\n\r\n"


@pytest.mark.parametrize("large", [SIZED % 500_000 + bytes(500_000), CHUNKS], ids=["sized", "chunked"])
def test_no_room_for_a_body(start: Callable, large: bytes) -> None:
    """A body that does not fit into the temporary folder gets 503; the next one that fits is accepted."""
    with start(FULL_DISK + APPLICATION) as running:
        response = running.exchange(large)
        assert statuses(response) == [503]
        assert response.endswith(b"503 Service Unavailable: there is no room for the body\n")
        assert statuses(running.exchange(SIZED % 90_000 + bytes(90_000))) == [200]
        assert [entry["status"] for entry in running.requests(2)] == [503, 200]
        running.end()
        assert running.messages() == []


@pytest.mark.parametrize("path", [b"/large", b"/crumbs"])  # crumbs: small parts, as in CHUNKS
def test_no_room_for_a_response(start: Callable, path: bytes) -> None:
    """If an unread response does not fit into the temporary folder, only its client is cut off."""
    with start(FULL_DISK + APPLICATION) as running, running.connect(receive_buffer=4096) as stalled:
        stalled.sendall(GET % path)
        [entry] = running.requests(1)
        assert (entry["path"].encode(), entry["status"]) == (path, 200)
        assert 0 < remaining_bytes(stalled) < LARGE
        assert statuses(running.exchange()) == [200]
        running.end()
        assert [message for message in running.messages() if message.startswith("A response is cut short")]
        assert not [entry for entry in running.logged() if "exception" in entry]


# ---- Costly requests and pauses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: a\r\nA:" + b" " * 16_000 + b"b\r\n\r\n", 400),
        (POST % b"Transfer-Encoding: chunked" + b"1\r\na\r\n" * 150_000 + b"0\r\n\r\n", 200),
    ],
    ids=["blanks in a header", "one-byte chunks"],
)
def test_parsing_is_not_quadratic(running: Server, sent: bytes, status: int) -> None:
    """A request designed for quadratic parsing time is answered within 5 s, so it does not hold up others."""
    response = running.exchange(sent)
    assert statuses(response) == [status]
    assert running.entries(request_id(response))[0]["duration_ms"] < 5000  # half a minute, if quadratic


def test_a_pause_does_not_count(start: Callable) -> None:
    """Time during which the process is paused, as by `docker pause`, does not count against clients."""
    last = LAST % b"/"
    with start(READ_TIMEOUT="1.5") as running, running.connect() as header, running.connect() as body:
        header.sendall(last[:20])
        body.sendall(SIZED % 2000 + bytes(20))
        assert statuses(running.exchange()) == [200]  # by now the server has read both
        running.process.send_signal(signal.SIGSTOP)
        time.sleep(2)
        running.process.send_signal(signal.SIGCONT)
        header.sendall(last[20:])
        body.sendall(bytes(1980))
        assert statuses(rest(header)) == statuses(rest(body)) == [200]
