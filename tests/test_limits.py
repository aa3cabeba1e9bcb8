"""Clients that are slow or many: how long they are waited for, and that nobody else waits."""

import contextlib
import os
import pathlib
import select
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable

import pytest

from tests.support import Server, ask, many_files, rest, statuses, wait_until

APPLICATION = """
import time

def app(environ, start_response):
    path = environ["PATH_INFO"]
    if path == "/slow":
        time.sleep(2.5)
    if path == "/crumbs":
        start_response("200 OK", [("Content-Length", "100000000")])
        return (bytes(4_000) for _ in range(25_000))
    if path == "/large":
        start_response("200 OK", [("Content-Length", "100000000")])
        return (bytes(100_000) for _ in range(1000))
    if path == "/megabyte":
        start_response("200 OK", [("Content-Length", "1000000")])
        return [bytes(1_000_000)]
    body = environ["wsgi.input"].read()
    start_response("200 OK", [("Content-Length", str(len(body)))])
    return [body]
"""

# For /hoard, the application opens all the files that the process may have, and closes them when it is told to.
HOARD = """
import os

def hoard(environ, start_response):
    files = []
    try:
        while environ["PATH_INFO"] == "/hoard":
            files.append(open("/dev/null"))
    except OSError:
        os.mkdir("hoarded")
        while not os.path.exists("release"):
            time.sleep(0.01)
        files.clear()
    return app(environ, start_response)
"""

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
LAST = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


@pytest.fixture
def start(tmp_path: pathlib.Path) -> Callable:
    """A function that starts a server that waits a second for its clients."""
    (tmp_path / "app.py").write_text(APPLICATION)
    return lambda **environ: Server(tmp_path, **{"BIND": "127.0.0.1", "PORT": "0", "READ_TIMEOUT": "1"} | environ)


def drip(connection: socket.socket, sent: bytes) -> bytes:
    """Send a byte every 20 ms until an answer comes; return it."""
    connection.settimeout(0.02)
    for byte in sent:
        with contextlib.suppress(TimeoutError):
            return connection.recv(1) + rest(connection)
        connection.sendall(bytes([byte]))
    raise AssertionError("all was sent before an answer came")


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        (b"", b"GET /" + b"a" * 3000),
        (b"GET / HTTP/1.1\r\n", b"A: b\r\n" * 500),
        (b"\r\n", b"\r\n" * 1 + b"GET /" + b"a" * 3000),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 3000\r\n\r\n", b"a" * 2999),
        (b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n" * 500),
    ],
    ids=["line", "headers", "empty lines", "body", "chunks"],
)
def test_drip(start: Callable, begin: bytes, more: bytes) -> None:
    """Who has not sent a whole request in time is answered 408, however steadily the bytes come, and closed."""
    with start() as running, running.connect() as connection:
        began = time.monotonic()
        connection.sendall(begin)
        answered = drip(connection, more)
        assert 0.9 < time.monotonic() - began < 10
        assert statuses(answered) == [408]
        assert answered.endswith(b"408 Request Timeout: the request took too long to arrive\n")
        assert b"\r\nconnection: close\r\n" in answered.lower()
        [entry] = running.requests(1)
        assert entry["status"] == 408
        assert entry["duration_ms"] >= 900


def test_second_request_on_a_connection(start: Callable) -> None:
    """The time begins anew with each request: an earlier one on the connection neither uses it up nor extends it."""
    with start() as running, running.connect() as connection:
        connection.sendall(GET)
        assert statuses(connection.recv(1000)) == [200]
        assert statuses(drip(connection, b"GET /" + b"a" * 3000)) == [408]


def test_idle_connections_stay(start: Callable) -> None:
    """A connection on which no request has begun is not closed after READ_TIMEOUT: keep-alive is there to be used."""
    with start() as running, running.connect() as used, running.connect() as unused, running.connect() as slow:
        used.sendall(GET)
        assert statuses(used.recv(1000)) == [200]
        drip(slow, b"GET /" + b"a" * 3000)  # by when its time is over, that of the others would be
        for connection in (used, unused):
            connection.sendall(LAST)
            assert statuses(rest(connection)) == [200]


def test_slow_application(start: Callable) -> None:
    """The time that the application takes is not the client's: neither for a request in work nor for one behind it."""
    with start() as running, running.connect() as connection:
        connection.sendall(GET.replace(b"/ ", b"/slow ") + LAST[:20])
        assert statuses(connection.recv(1000)) == [200]
        connection.sendall(LAST[20:])
        assert statuses(rest(connection)) == [200]


def test_client_that_takes_nothing(start: Callable) -> None:
    """A client that takes no byte of its answer for so long is closed, and the thread that served it is free again."""
    with start(WAITRESS_THREADS="1") as running, running.connect() as greedy:
        greedy.sendall(GET.replace(b"/ ", b"/large "))
        assert statuses(greedy.recv(20)) == [200]
        [entry] = running.requests(1)
        assert entry["path"] == "/large"
        assert entry["duration_ms"] > 900
        assert entry["bytes"] < 100_000_000
        assert statuses(running.exchange(LAST)) == [200]
        assert greedy_end(greedy) < 100_000_000


def greedy_end(connection: socket.socket) -> int:
    """Return how many bytes are still to be had from a connection that has been closed."""
    received = 0
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(1_000_000):
            received += len(part)
    return received


def test_readers_below_the_rate(start: Callable) -> None:
    """Clients that take less than 1 KiB/s of an answer are closed after READ_TIMEOUT; their threads are free again."""
    with start(READ_TIMEOUT="2") as running, contextlib.ExitStack() as slow, running.connect() as honest:
        # With the smallest buffer there is, their system acknowledges something of 700 bytes/s at least every 1.7 s.
        readers = [slow.enter_context(running.connect(receive_buffer=1)) for _ in range(4)]  # as many as threads
        for reader in readers:
            reader.sendall(GET.replace(b"/ ", b"/large "))
            assert statuses(reader.recv(70)) == [200]
            reader.setblocking(False)
        honest.sendall(LAST)
        deadline = time.monotonic() + 10
        while len(running.access_log.read_text().splitlines()) < 5:
            assert time.monotonic() < deadline, "their threads are not free"
            for reader in readers:
                with contextlib.suppress(OSError):
                    reader.recv(70)
            time.sleep(0.1)
        assert statuses(rest(honest)) == [200]


def test_slow_upload(start: Callable) -> None:
    """An upload may take longer than READ_TIMEOUT, as long as 1 KiB/s arrives."""
    with start(READ_TIMEOUT="1.5") as running, running.connect() as connection:
        connection.sendall(LAST.replace(b"GET", b"POST")[:-2] + b"Content-Length: 10000\r\n\r\n")
        began = time.monotonic()
        for sent in range(0, 10_000, 200):
            connection.sendall(bytes(200))
            time.sleep(max(0, began + sent / 4000 - time.monotonic()))  # 4 kB/s
        assert statuses(rest(connection)) == [200]


def test_client_that_takes_its_time(start: Callable) -> None:
    """A client that takes a part of its answer now and then is served to the end, longer than READ_TIMEOUT."""
    with start() as running, running.connect() as connection:
        connection.sendall(LAST.replace(b"/ ", b"/large "))
        began, received = time.monotonic(), 0
        while part := connection.recv(4_000_000):
            received += len(part)
            if time.monotonic() - began < 2.5:
                time.sleep(0.2)
        assert received > 100_000_000


@pytest.mark.parametrize(
    "begin", [b"GET / HTTP/1.1\r\nHost: a\r\n", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n"]
)
def test_a_thousand_slow_clients(start: Callable, begin: bytes) -> None:
    """A thousand clients that have sent half a request keep nobody out."""
    with contextlib.ExitStack() as slow, start(READ_TIMEOUT="600") as running, many_files():
        running.listening()
        for _ in range(1000):
            slow.enter_context(running.connect()).sendall(begin)
        for _ in range(20):
            assert statuses(running.exchange(LAST)) == [200]


@pytest.mark.parametrize(("soft", "hard"), [(64, 8192), (256, 256), (100, 100), (40, 40)])
def test_open_files(start: Callable, soft: int, hard: int) -> None:
    """It raises its limit of open files; where that holds fewer connections than allowed it says so, and goes on."""
    with contextlib.ExitStack() as clients, many_files(), start(files=(soft, hard)) as running:
        running.listening()
        warned = [message for message in running.messages() if f"A limit of {hard} open files" in message]
        assert len(warned) == (hard == soft)
        for _ in range(150 if warned else 1000):
            clients.enter_context(running.connect())
        if warned:
            clients.close()
        assert statuses(running.exchange(LAST)) == [200]
        running.end()
        assert not [entry for entry in running.logged() if "exception" in entry]


def test_connections_beyond_the_limit(start: Callable) -> None:
    """Connections beyond connection_limit wait until there is room, and are served then."""
    with start(READ_TIMEOUT="600", WAITRESS_CONNECTION_LIMIT="20") as running, contextlib.ExitStack() as clients:
        for _ in range(30):
            clients.enter_context(running.connect())
        with running.connect() as waiting:
            waiting.sendall(LAST)
            assert not select.select([waiting], [], [], 0.5)[0]
            clients.close()
            assert statuses(rest(waiting)) == [200]


def test_dripping_clients_beyond_the_limit(start: Callable) -> None:
    """More clients than connection_limit, each of which sends its header a byte at a time, keep nobody out for long."""
    with start(READ_TIMEOUT="60", WAITRESS_CONNECTION_LIMIT="60") as running, contextlib.ExitStack() as slow:
        clients = [running.connect() for _ in range(100)]
        ended = threading.Event()
        dripping = threading.Thread(target=drip_all, args=[clients, running.address(), ended])
        dripping.start()
        slow.callback(dripping.join)
        slow.callback(ended.set)
        for _ in range(5):
            with running.connect() as honest:
                honest.settimeout(4)  # it takes 2, on a machine that has nothing else to do
                honest.sendall(LAST)
                assert statuses(rest(honest)) == [200]


def drip_all(clients: list[socket.socket], address: tuple[str, int], ended: threading.Event) -> None:
    """Send a byte on each connection every 0.2 s; make another where one is closed."""
    while not ended.wait(0.2):
        for number, client in enumerate(clients):
            try:
                gone = select.select([client], [], [], 0)[0] or not client.send(b"G")
            except OSError:
                gone = True
            if gone:
                client.close()
                clients[number] = socket.create_connection(address, 30)
    for client in clients:
        client.close()


def test_no_more_files(start: Callable, tmp_path: pathlib.Path) -> None:
    """Out of file descriptors, it says so once, waits without being busy, and goes on when there are some again."""
    (tmp_path / "app.py").write_text(HOARD + APPLICATION)
    with start(files=(100, 100), READ_TIMEOUT="600", APP="app:hoard") as running, running.connect() as known:
        known.sendall(GET.replace(b"/ ", b"/hoard "))
        wait_until((tmp_path / "hoarded").exists, 10, "all files to be open")
        with running.connect() as waiting:
            waiting.sendall(LAST)
            before = cpu_seconds(running.process.pid)
            assert not select.select([waiting], [], [], 1)[0]
            assert cpu_seconds(running.process.pid) - before < 0.5
            (tmp_path / "release").touch()
            released = time.monotonic()
            assert statuses(rest(waiting)) == [200]
            assert time.monotonic() - released < 3
        running.end()
        assert 1 < len(running.messages()) < 5  # the first is that a hundred files do not hold connection_limit


def test_no_room_for_a_body(start: Callable, tmp_path: pathlib.Path) -> None:
    """A body that does not fit into the folder for temporary files is answered 503; the next that fits is taken."""
    # A limit of the size of files has the same effect as a full disk.
    limit = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    (tmp_path / "app.py").write_text(limit + APPLICATION)
    post = b"POST / HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Length: %d\r\n\r\n"
    with start() as running:
        answered = running.exchange(post % 500_000 + bytes(500_000))
        assert statuses(answered) == [503]
        assert answered.endswith(b"503 Service Unavailable: there is no room for the body\n")
        assert statuses(running.exchange(post % 90_000 + bytes(90_000))) == [200]
        assert [entry["status"] for entry in running.requests(2)] == [503, 200]
        running.end()
        assert not [entry for entry in running.logged() if "uncaptured" in entry["message"]]


def test_client_that_takes_a_little(start: Callable) -> None:
    """A client is not cut off because it takes little at a time: what its system acknowledges is what counts."""
    with start() as running, running.connect() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.sendall(LAST.replace(b"/ ", b"/large "))
        began = time.monotonic()
        while time.monotonic() - began < 3.5:  # seconds, at some 100 kB/s, with megabytes in the server's buffer
            assert connection.recv(5000), "cut off"
            time.sleep(0.05)


def test_memory_of_answers(start: Callable) -> None:
    """Answers that nobody reads are not kept in memory."""
    with start(READ_TIMEOUT="600") as running, contextlib.ExitStack() as clients:
        assert statuses(running.exchange(LAST)) == [200]
        before = memory(running.process.pid)
        for _ in range(60):
            client = clients.enter_context(running.connect(receive_buffer=4096))
            client.sendall(GET.replace(b"/ ", b"/megabyte "))
        running.requests(61)  # the application is done with all of them
        assert memory(running.process.pid) - before < 30_000_000  # half of what they have asked for


def test_memory_of_requests(start: Callable) -> None:
    """Of the hundreds of requests that a packet holds only a few are taken up at a time; all are answered."""
    with start(READ_TIMEOUT="600") as running, contextlib.ExitStack() as clients:
        assert statuses(running.exchange(LAST)) == [200]
        before = memory(running.process.pid)
        waiting = [clients.enter_context(running.connect()) for _ in range(200)]
        for client in waiting:
            client.sendall(b"GET / HTTP/1.1\r\nHost:\r\n\r\n" * 300)
        assert statuses(running.exchange(LAST)) == [200]
        assert memory(running.process.pid) - before < 20_000_000
        waiting[0].sendall(LAST)
        assert statuses(rest(waiting[0])) == [200] * 301


@pytest.mark.parametrize("path", ["/large", "/crumbs"])  # of the latter, the last bytes wait for the file to be closed
def test_no_room_for_an_answer(start: Callable, tmp_path: pathlib.Path, path: str) -> None:
    """If what a client does not take finds no room in the folder for temporary files, that client alone is cut off."""
    limit = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    (tmp_path / "app.py").write_text(limit + APPLICATION)
    with start() as running, running.connect(receive_buffer=4096) as lazy:
        lazy.sendall(GET.replace(b"/ ", path.encode() + b" "))
        [entry] = running.requests(1)
        assert (entry["path"], entry["status"]) == (path, 200)
        assert 0 < greedy_end(lazy) < 100_000_000
        assert statuses(running.exchange(LAST)) == [200]
        running.end()
        assert [message for message in running.messages() if message.startswith("A response is cut short")]
        assert not [entry for entry in running.logged() if "exception" in entry]


def memory(process: int) -> int:
    """Return how many bytes of memory are a process's own, those of its files excepted."""
    status = pathlib.Path(f"/proc/{process}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def cpu_seconds(process: int) -> float:
    """Return how long a process has been busy."""
    numbers = pathlib.Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(numbers[11]) + int(numbers[12])) / os.sysconf("SC_CLK_TCK")


def test_silent_connections(start: Callable) -> None:
    """If no more connections fit, those on which nothing has happened for so long are closed."""
    with start(WAITRESS_CONNECTION_LIMIT="20") as running, contextlib.ExitStack() as clients:
        for _ in range(40):
            clients.enter_context(running.connect())
        assert statuses(running.exchange(LAST)) == [200]


def test_empty_lines_are_no_request(start: Callable) -> None:
    """An empty line after a request, which RFC 9112 (2.2) knows, is neither answered nor waited for."""
    with start() as running, running.connect() as polite, running.connect() as slow:
        polite.sendall(GET + b"\r\n")
        assert statuses(polite.recv(1000)) == [200]
        drip(slow, b"GET /" + b"a" * 3000)  # by when the time of a request would be over
        polite.sendall(GET + b"\r\n")
        assert statuses(polite.recv(1000)) == [200]
        running.stop()
        assert running.ended() == 0


def test_empty_lines_keep_no_connection(start: Callable) -> None:
    """A client that sends nothing but empty lines is idle: it is closed channel_timeout after its last answer."""
    with start(WAITRESS_CHANNEL_TIMEOUT="1") as running, running.connect() as connection:
        assert statuses(ask(connection, b"/")) == [200]
        deadline = time.monotonic() + 8
        with contextlib.suppress(ConnectionError):
            while not select.select([connection], [], [], 0.2)[0]:
                assert time.monotonic() < deadline, "it is still open"
                connection.sendall(b"\r\n")
            assert rest(connection) == b""


def test_half_an_upload_is_not_idle(start: Callable) -> None:
    """Who has sent half a request is answered 408 after READ_TIMEOUT, also if channel_timeout is shorter."""
    environ = {"READ_TIMEOUT": "3", "WAITRESS_CHANNEL_TIMEOUT": "1", "WAITRESS_CLEANUP_INTERVAL": "1"}
    with start(**environ) as running:
        sent = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n01234"
        assert statuses(running.exchange(sent)) == [408]


def test_half_closed(start: Callable) -> None:
    """A client that sends no more, but reads, gets all of a large answer."""
    with start() as running:
        for _ in range(10):
            with running.connect() as connection:
                connection.sendall(LAST.replace(b"/ ", b"/large "))
                connection.shutdown(socket.SHUT_WR)
                assert greedy_end(connection) > 100_000_000


def test_reset_while_told_to_continue(start: Callable) -> None:
    """Clients that leave right when they are told to continue do no harm to the server."""
    sent = GET + b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n"
    with start() as running:
        for _ in range(30):
            with contextlib.ExitStack() as clients:
                for _ in range(40):
                    client = clients.enter_context(running.connect())
                    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset
                    client.sendall(sent)
        assert statuses(running.exchange(LAST)) == [200]
        running.end()
        assert not [entry for entry in running.logged() if "exception" in entry]


def test_continue_behind_another_request(start: Callable) -> None:
    """Told to continue once, after the answer to the request before, a client gets both answers whole."""
    with start() as running, running.connect() as connection:
        for _ in range(300):
            connection.sendall(GET + b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nExpect: 100-continue\r\n\r\n")
            received = b""
            while b" 100 Continue\r\n\r\n" not in received:
                received += connection.recv(1000)
            connection.sendall(b"hello")
            while not received.endswith(b"hello"):
                received += connection.recv(1000)
            assert statuses(received) == [200, 100, 200]


def test_blanks(start: Callable) -> None:
    """A header of nothing but blanks is refused, not pondered over while everybody waits."""
    with start() as running:
        answered = running.exchange(b"GET / HTTP/1.1\r\nHost: a\r\nA:" + b" " * 16_000 + b"b\r\n\r\n")
        assert statuses(answered) == [400]
        assert running.requests(1)[0]["duration_ms"] < 200


def test_crumbs(start: Callable) -> None:
    """A body in chunks of one byte is read about as fast as another."""
    body = b"1\r\na\r\n" * 150_000 + b"0\r\n\r\n"
    with start(READ_TIMEOUT="20") as running:
        answered = running.exchange(LAST.replace(b"GET", b"POST")[:-2] + b"Transfer-Encoding: chunked\r\n\r\n" + body)
        assert answered.endswith(b"a" * 150_000)
        assert running.requests(1)[0]["duration_ms"] < 5000


def test_no_wait_for_the_next_look(start: Callable) -> None:
    """A connection is closed when its answer is sent, not at the next look at all of them."""
    with start(READ_TIMEOUT="20") as running:
        began = time.monotonic()
        for _ in range(40):
            running.exchange(LAST)
        assert time.monotonic() - began < 40 * 0.1


def test_paused(start: Callable) -> None:
    """While the process is stopped, as by `docker pause`, it is not the clients who are slow."""
    post = LAST.replace(b"GET", b"POST")[:-2] + b"Content-Length: 2000\r\n\r\n"
    with start(READ_TIMEOUT="0.5") as running, running.connect() as header, running.connect() as body:
        header.sendall(LAST[:20])
        body.sendall(post + bytes(20))
        assert statuses(running.exchange(LAST)) == [200]  # by now both have arrived
        running.process.send_signal(signal.SIGSTOP)
        time.sleep(2)
        running.process.send_signal(signal.SIGCONT)
        header.sendall(LAST[20:])
        body.sendall(bytes(1980))
        assert statuses(rest(header)) == statuses(rest(body)) == [200]
