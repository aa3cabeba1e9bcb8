"""What is logged, where, in which form; and that the log holds nobody up."""

import datetime as dt
import json
import os
import pathlib
import re
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator

import pytest

from tests.support import Server, rest, statuses, wait_until

APPLICATION = """
import logging
import sys
import threading
import warnings

class Unprintable:
    def __str__(self):
        raise ValueError("no text")

class Fails:
    def __del__(self):
        raise ValueError("late")

def app(environ, start_response):
    path = environ["PATH_INFO"]
    if path == "/log":
        logging.getLogger("shop").info("sold %s", "".join(map(chr, range(0x300))))
        logging.getLogger("shop").debug("details")
        warnings.warn("old")
        thread = threading.Thread(target=lambda: 1 / 0, name="worker")
        thread.start()
        thread.join()
        thread = threading.Thread(target=sys.exit)  # which is no failure
        thread.start()
        thread.join()
        Fails()
        environ["wsgi.errors"].write("trouble\\n")
    if path == "/format":
        logging.warning("%d items", "x")
        logging.warning(Unprintable())
        logging.warning("own", extra={"request_id": 7})
    if path == "/raises":
        logging.warning("bound to fail")
        raise RuntimeError("secret")
    if path == "/logs":
        for number in range(200):
            logging.warning("%04d%s", number, "x" * 1000)
    if path == "/health" and environ["QUERY_STRING"] == "sick":
        start_response("503 Unavailable", [])
        return [b"sick"]
    if path == "/own":
        start_response("200 OK", [("X-Request-ID", "other"), ("x-content-type-options", "sniff")])
        return [b""]
    if path == "/chunks":
        start_response("200 OK", [])
        return iter([b"one", b"two"])
    if path == "/file":
        start_response("200 OK", [])
        return environ["wsgi.file_wrapper"](open(__file__, "rb"))
    start_response("204 No Content" if path == "/nothing" else "200 OK", [])
    return [environ["HTTP_X_REQUEST_ID"].encode()]
"""

LAST = b"%s %s HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"


@pytest.fixture
def start(tmp_path: pathlib.Path) -> Callable:
    """A function that starts a server with an application that logs."""
    (tmp_path / "app.py").write_text(APPLICATION)
    return lambda **options: Server(tmp_path, **options)


def ask(running: Server, target: bytes, *headers: bytes, method: bytes = b"GET") -> bytes:
    """Return the answer to one request on a connection of its own."""
    return running.exchange(LAST % (method, target) + b"".join(header + b"\r\n" for header in headers) + b"\r\n")


def test_entry(start: Callable) -> None:
    """A request is one JSON object on standard output, with what one wants to know of it; the query is left out."""
    with start() as running:
        before = dt.datetime.now(dt.UTC)
        body = ask(
            running, b"/path%20/?token=secret", b"User-Agent: test/1.0", b"X-Request-ID: my.own-1_"
        ).splitlines()[-1]
        [entry] = running.requests(1)
    assert list(entry) == [
        "time",
        "method",
        "path",
        "status",
        "bytes",
        "duration_ms",
        "remote_addr",
        "request_id",
        "user_agent",
    ]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", entry["time"])
    assert abs(dt.datetime.fromisoformat(entry["time"]) - before) < dt.timedelta(seconds=20)
    assert 0 < entry.pop("duration_ms") < 10_000
    del entry["time"]
    assert body == b"my.own-1_"
    assert entry == {
        "method": "GET",
        "path": "/path%20/",
        "status": 200,
        "bytes": 9,
        "remote_addr": "127.0.0.1",
        "request_id": "my.own-1_",
        "user_agent": "test/1.0",
    }


@pytest.mark.parametrize(
    ("method", "target", "size"),
    [
        (b"GET", b"/nothing", 0),
        (b"GET", b"/chunks", len(b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n")),
        (b"GET", b"/file", len(APPLICATION)),
        (b"GET", b"/own", 0),
    ],
)
def test_bytes(start: Callable, method: bytes, target: bytes, size: int) -> None:
    """The bytes are those that follow the header, as they are sent."""
    with start() as running:
        sent = ask(running, target, method=method).partition(b"\r\n\r\n")[2]
        assert running.requests(1)[0]["bytes"] == len(sent) == size


@pytest.mark.parametrize("given", [b"", b"a b", b"a" * 129, b"a/b", b"\xc3\xb8", b'"', b"a, b"])
def test_request_id(start: Callable, given: bytes) -> None:
    """A request id that could do harm is replaced: in the answer, for the application and in the log."""
    with start() as running:
        answered = ask(running, b"/", b"X-Request-ID: " + given)
        [entry] = running.requests(1)
    assert re.fullmatch(r"[0-9a-f]{32}", entry["request_id"])
    assert answered.endswith(b"\r\n\r\n" + entry["request_id"].encode())
    assert f"\r\nx-request-id: {entry['request_id']}\r\n".encode() in answered.lower()


def test_own_headers(start: Callable) -> None:
    """The server's headers are there once, whatever the application says."""
    with start() as running:
        answered = ask(running, b"/own", b"X-Request-ID: mine").lower()
    assert re.findall(rb"x-request-id: (.*)\r\n", answered) == [b"mine"]
    assert re.findall(rb"x-content-type-options: (.*)\r\n", answered) == [b"nosniff"]


@pytest.mark.parametrize(
    ("sent", "method", "path", "status"),
    [
        (b"nonsense\r\n\r\n", None, None, 400),
        (b"GET /path?query HTTP/1.1\r\n\r\n", "GET", "/path", 400),
        (b"POST /path HTTP/1.1\r\nHost: a\r\nContent-Length: 9999999\r\n\r\n", "POST", "/path", 413),
        (b"GET /" + b"a" * 20000, None, None, 431),
        (b"POST /path HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", "POST", "/path", 501),
    ],
)
def test_refused_requests(start: Callable, sent: bytes, method: str | None, path: str | None, status: int) -> None:
    """What is refused before the application sees it is on record too, as far as it could be read."""
    with start() as running:
        answered = running.exchange(sent)
        [entry] = running.requests(1)
    assert (entry["method"], entry["path"], entry["status"]) == (method, path, status)
    assert entry["request_id"].encode() in answered
    assert entry["bytes"] == len(answered.partition(b"\r\n\r\n")[2])


def test_timeout(start: Callable) -> None:
    """A request that did not arrive in time is on record with its answer, 408."""
    with start(READ_TIMEOUT="0.1") as running:
        running.exchange(b"GET / HTTP/1.1\r\n")
        assert running.requests(1)[0]["status"] == 408


def test_probes(start: Callable) -> None:
    """Successful probes are left out; those that fail are not, nor is anything that only looks like one."""
    with start() as running:
        for target in (b"/health", b"/health?", b"/health?sick", b"/health/", b"/healthy"):
            ask(running, target)
        assert [entry["path"] for entry in running.requests(3)] == ["/health", "/health/", "/healthy"]


@pytest.mark.parametrize(
    ("target", "agent"),
    [
        (b'/"}', b'"} {"'),
        (b"/\\n{", b"\\n\\u001b[2J"),
        (b"/", b"\x9b2J \xe2\x80\xae \x85"),
        (b"/%0A%1B[2J", b"a\tb"),
    ],
)
def test_no_forging(start: Callable, target: bytes, agent: bytes) -> None:
    """Whatever a client sends, its line is one object of printable ASCII, from which it can be had back."""
    with start() as running:
        ask(running, target, b"User-Agent: " + agent)
        [entry] = running.requests(1)
        line = running.access_log.read_bytes()
    assert line.count(b"\n") == 1
    assert re.fullmatch(rb"[ -~]+\n", line)
    assert entry["path"].encode("latin-1") == target
    assert entry["user_agent"].encode("latin-1") == agent


def test_without_access_log(start: Callable) -> None:
    """ACCESS_LOG=0: nothing on standard output."""
    with start(ACCESS_LOG="0") as running:
        assert statuses(ask(running, b"/")) == [200]
        assert statuses(running.exchange(b"nonsense\r\n\r\n")) == [400]
        running.stop()
        assert running.ended() == 0
        assert running.access_log.read_text() == ""


@pytest.mark.parametrize("target", [b"/\xc3\xb8", b"//\x9b2J", b"http://a/\xff"])
def test_bytes_that_are_no_characters(start: Callable, target: bytes) -> None:
    """Whether or not the log shows a refused target that has such bytes, its line is one object of printable ASCII."""
    with start() as running:
        assert statuses(ask(running, target)) == [400]
        [entry] = running.requests(1)
        assert entry["path"] in (None, target.decode("latin-1"))
        assert re.fullmatch(rb"[ -~]+\n", running.access_log.read_bytes())


def test_everything_else(start: Callable) -> None:
    """What the application logs, warns of, or lets a thread fail with, is JSON of printable ASCII on standard error."""
    with start() as running:
        ask(running, b"/log")
        running.end()
        assert re.fullmatch(rb"(?:[ -~]+\n)+", running.log.read_bytes())
        entries = [entry for entry in running.logged() if entry["logger"] != "serve" or "exception" in entry]
    sold, warned, failed, late, trouble = entries
    assert (sold["level"], sold["logger"], sold["message"]) == (
        "INFO",
        "shop",
        "sold " + "".join(map(chr, range(0x300))),
    )
    assert (warned["level"], warned["logger"]) == ("WARNING", "py.warnings")
    assert "UserWarning: old" in warned["message"]
    assert (failed["level"], failed["message"]) == ("ERROR", "Thread worker has ended")
    assert failed["exception"].endswith("ZeroDivisionError: division by zero")
    assert (trouble["logger"], trouble["message"]) == ("wsgi.errors", "trouble")
    assert late["exception"].endswith("ValueError: late")


def test_logging_to_wsgi_errors(start: Callable, tmp_path: pathlib.Path) -> None:
    """An application may have all its records written to wsgi.errors, as Flask's documentation has it."""
    (tmp_path / "app.py").write_text(
        "import logging.config\n\nfrom flask import Flask\n\n"
        "handlers = {'wsgi': {'class': 'logging.StreamHandler', 'stream': 'ext://flask.logging.wsgi_errors_stream'}}\n"
        "root = {'level': 'INFO', 'handlers': ['wsgi']}\n"
        "logging.config.dictConfig({'version': 1, 'handlers': handlers, 'root': root})\n"
        "app = Flask(__name__)\n\n\n@app.get('/')\ndef index():\n    app.logger.info('hello')\n    return 'ok'\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with start(PORT=str(port)) as running:
        wait_until(lambda: answers_on(port), 20, "an answer")
        running.end()
        entries = [json.loads(line) for line in running.log.read_text().splitlines() if '"hello"' in line]
        assert [entry["logger"] for entry in entries] == ["wsgi.errors"] * 3


def test_wrong_format(start: Callable) -> None:
    """A record whose arguments do not fit its text is logged all the same, as JSON."""
    with start() as running:
        assert statuses(ask(running, b"/format")) == [200]
        running.end()
        items, unprintable, own = (entry for entry in running.logged() if entry["logger"] == "root")
        assert "%d items" in items["message"]
        assert "Unprintable" in unprintable["message"]
        assert own["request_id"] == "7"


def test_request_id_in_the_log(start: Callable) -> None:
    """What is logged in a request has its id: the application's own records, and the traceback if it fails."""
    with start() as running:
        answered = ask(running, b"/raises")
        running.end()
        bound, failed = (entry for entry in running.logged() if "request_id" in entry)
    assert bound["message"] == "bound to fail"
    assert (failed["message"], failed["exception"][-6:]) == ("Exception while serving /raises", "secret")
    for entry in (bound, failed):
        assert f"\r\nx-request-id: {entry['request_id']}\r\n".encode() in answered.lower()


def test_serial_client(start: Callable) -> None:
    """A client that asks for one thing after another, with four threads, is not said to wait for one."""
    with start() as running, running.connect() as connection:
        began = time.monotonic()
        while time.monotonic() - began < 2:  # more than 200 requests; the server looks now and then only
            connection.sendall(b"GET /own HTTP/1.1\r\nHost: a\r\n\r\n")
            assert statuses(connection.recv(1000)) == [200]
        running.end()
        assert running.messages() == []


@pytest.mark.parametrize(
    ("level", "levels"),
    [
        ("DEBUG", {"DEBUG", "INFO", "WARNING", "ERROR"}),
        ("info", {"INFO", "WARNING", "ERROR"}),
        ("Warning", {"WARNING", "ERROR"}),
        ("critical", set()),
    ],
)
def test_level(start: Callable, level: str, levels: set[str]) -> None:
    """LOG_LEVEL says from where on, in capitals or not; the access log has no level."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with start(LOG_LEVEL=level, BIND="127.0.0.1", PORT=str(port)) as running:
        wait_until(lambda: answers_on(port, b"/log"), 20, "an answer")
        assert len(running.requests(3)) == 3
        running.end()
        assert {entry["level"] for entry in running.logged()} == levels


def test_client_gone_before_its_answer(start: Callable, tmp_path: pathlib.Path) -> None:
    """A request whose client has left, resetting its connection, is on record with no status."""
    wait = "import pathlib, time\n"
    wait += "def app(environ, start_response):\n"
    wait += "    pathlib.Path('began').touch()\n"
    wait += "    while not pathlib.Path('go').exists():\n        time.sleep(0.01)\n"
    wait += "    start_response('200 OK', [])\n    return [bytes(9_000_000)] * 9\n"
    (tmp_path / "app.py").write_text(wait)
    with start(WAITRESS_THREADS="1") as running:
        with running.connect() as impatient:
            impatient.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # reset when closed
            impatient.sendall(LAST % (b"GET", b"/gone") + b"\r\n")
            wait_until((tmp_path / "began").exists, 10, "the request to be in work")
        with running.connect() as another:  # by when it is answered, the server has noticed
            another.sendall(b"nonsense\r\n\r\n")
            (tmp_path / "go").touch()
            assert statuses(rest(another)) == [400]
        gone = next(entry for entry in running.requests(2) if entry["path"] == "/gone")
    assert (gone["status"], gone["bytes"]) == (None, 0)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """A pipe from which nobody reads."""
    ends = os.pipe()
    yield ends
    for end in ends:
        os.close(end)


def many(running: Server, count: int) -> list[int]:
    """Return the statuses of so many requests on one connection."""
    with running.connect() as connection:
        connection.settimeout(20)
        for _ in range(count // 20):
            connection.sendall(b"GET /some/path HTTP/1.1\r\nHost: a\r\n\r\n" * 20)
        connection.sendall(LAST % (b"GET", b"/") + b"\r\n")
        return statuses(rest(connection))


def test_nobody_reads_standard_output(start: Callable, pipe: tuple[int, int]) -> None:
    """If standard output takes no more, requests are answered all the same; the lines that are lost are counted."""
    read_end, write_end = pipe
    with start(stdout=write_end) as running:
        assert many(running, 6000) == [200] * 6001
        wait_until(lambda: lost(running), 30, "a report")
        # Read again, it goes on with whole lines, and all there are make up the number.
        os.set_blocking(read_end, False)
        received = b""

        def last_line() -> bool:
            nonlocal received
            try:
                received += os.read(read_end, 1_000_000)
            except BlockingIOError:
                ask(running, b"/last")
            return b'"/last"' in received and received.endswith(b"\n")

        wait_until(last_line, 30, "the log to flow again")
        paths = [json.loads(line)["path"] for line in received.splitlines()]
        running.stop()
        assert running.ended() == 0
        # Of /last, which was asked for until it was seen, some lines may be lost as well.
        assert 6001 <= paths.count("/some/path") + paths.count("/") + lost(running) <= 6001 + 1000


def lost(running: Server) -> int:
    """Return how many lines the server says are lost."""
    said = (re.match(r"Lines of the access log that could not be written: (\d+)", text) for text in running.messages())
    return sum(int(match[1]) for match in said if match)


def test_reader_of_standard_output_gone(start: Callable) -> None:
    """If the other end of standard output is closed, requests are answered all the same."""
    read_end, write_end = os.pipe()
    with start(stdout=write_end) as running:
        os.close(write_end)
        os.close(read_end)
        assert many(running, 200) == [200] * 201
        running.stop()
        assert running.ended() == 0


def test_disk_full(start: Callable) -> None:
    """If standard output is a file on a full disk, requests are answered all the same."""
    with pathlib.Path("/dev/full").open("w") as full, start(stdout=full.fileno()) as running:
        assert many(running, 200) == [200] * 201
        wait_until(lambda: lost(running), 30, "a report")
        running.stop()
        assert running.ended() == 0


def answers_on(port: int, last: bytes = b"/") -> bytes | None:
    """Return three answers on one connection, the last for `last`; or None if nobody listens."""
    try:
        with socket.create_connection(("127.0.0.1", port), 5) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n" * 2 + LAST % (b"GET", last) + b"\r\n")
            return rest(connection)
    except ConnectionRefusedError:
        return None


def test_nobody_reads_standard_error(start: Callable, tmp_path: pathlib.Path, pipe: tuple[int, int]) -> None:
    """If standard error takes no more, an application that logs a lot is answered all the same."""
    (tmp_path / "app.py").write_text(
        "import logging\n\n\ndef app(environ, start_response):\n"
        "    logging.warning('x' * 9000)\n    start_response('200 OK', [])\n    return [b'ok']\n"
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with start(stderr=pipe[1], BIND="127.0.0.1", PORT=str(port)) as running:
        wait_until(lambda: answers_on(port), 20, "an answer")
        for _ in range(200):
            assert statuses(answers_on(port)) == [200] * 3
        running.stop()
        assert running.ended() == 0


def test_non_blocking_standard_output(start: Callable) -> None:
    """If somebody who shares standard output has made it non-blocking, lines wait for room and stay whole."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    with start(stdout=write_end) as running, os.fdopen(read_end, "rb") as reader:
        os.close(write_end)
        assert many(running, 1000) == [200] * 1001
        assert len([json.loads(reader.readline()) for _ in range(1001)]) == 1001
        running.end()


@pytest.mark.parametrize("stops", [False, True])
def test_late_reader_of_standard_error(start: Callable, *, stops: bool) -> None:
    """Records that found no room are there as soon as they are read: nobody has to log more, nor are they lost."""
    read_end, write_end = os.pipe()
    with start(stderr=write_end) as running, os.fdopen(read_end):
        os.close(write_end)
        [serving] = read_entries(read_end, 1)
        answers_on(int(serving["message"].rpartition(":")[2]), b"/logs")
        if stops:
            running.stop()
        entries = read_entries(read_end, 200)[:200]
        assert [entry["message"][:4] for entry in entries] == [f"{number:04d}" for number in range(200)]


def read_entries(pipe: int, count: int) -> list[dict]:
    """Return so many entries from a pipe; fail where there is nothing for some time."""
    received = b""
    while received.count(b"\n") < count or not received.endswith(b"\n"):
        assert select.select([pipe], [], [], 2)[0], f"no more after {received[-1100:]}"
        part = os.read(pipe, 4096)
        assert part, f"ended after {received[-1100:]}"
        received += part
    return [json.loads(line) for line in received.splitlines()]


def test_last_lines(start: Callable) -> None:
    """What is still to be written when it ends is written, to a reader that is not the fastest."""
    read_end, write_end = os.pipe()
    with start(stdout=write_end) as running, os.fdopen(read_end, "rb") as reader:
        os.close(write_end)
        assert many(running, 1000) == [200] * 1001
        running.stop()
        lines = reader.readlines()
        assert running.ended() == 0
        assert len(lines) == 1001
