"""What is logged, where and in which form; and that a stalled log does not stall requests."""

import datetime as dt
import fcntl
import json
import os
import pathlib
import re
import select
import socket
import struct
from collections.abc import Callable, Iterator
from typing import BinaryIO

import pytest

from tests.support import GET, LAST, Server, free_port, listens, request_id, rest, statuses, wait_until

VARIABLES = {"READ_TIMEOUT": "0.5"}
APPLICATION = """
import logging
import sys
import threading
import warnings

released = threading.Event()

class Fails:
    def __del__(self):
        raise ValueError("late")

def app(environ, start_response):
    path, query = environ["PATH_INFO"], environ["QUERY_STRING"]
    if path == "/log":
        logging.getLogger("shop").info("sold %s", "".join(map(chr, range(0x300))))
        logging.getLogger("shop").debug("%d items", "x")
        warnings.warn("old")
        for target in (lambda: 1 / 0, sys.exit):  # sys.exit is not a failure
            thread = threading.Thread(target=target, name="worker")
            thread.start()
            thread.join()
        Fails()
        environ["wsgi.errors"].write("trouble\\n")
    if path.startswith("/loud/"):
        logging.warning("%s %s", path, "x" * int(query))
    if path == "/wait":
        logging.warning("waiting")
        released.wait(30)
    if path == "/release":
        released.set()
    status = {"/nothing": "204 No Content", "/health?sick": "503 Unavailable"}.get(f"{path}?{query}".rstrip("?"))
    own = [("X-Request-ID", "other"), ("x-content-type-options", "sniff")] if path == "/own" else []
    start_response(status or "200 OK", own)
    if path == "/chunks":
        return iter([b"one", b"two"])
    if path == "/file":
        return environ["wsgi.file_wrapper"](open(__file__, "rb"))
    return [environ["HTTP_X_REQUEST_ID"].encode()]
"""

POST = b"POST /path HTTP/1.1\r\nHost: a\r\nContent-Length: 9999999\r\n\r\n"


def logged_request(running: Server, target: bytes, *headers: bytes) -> tuple[bytes, dict]:
    """Send a request; return the response and its entry in the access log, the only one."""
    response = running.exchange(b"\r\n".join([(LAST % target)[:-4], *headers, b"\r\n"]))
    [entry] = running.entries(request_id(response))
    return response, entry


def test_entry(running: Server) -> None:
    """A request is logged on standard output as one JSON object with these nine fields; the query is left out."""
    before = dt.datetime.now(dt.UTC)
    _, entry = logged_request(running, b"/path%20/?token=secret", b"User-Agent: test/1.0", b"X-Request-ID: my.own-1_")
    names = "time method path status bytes duration_ms remote_addr request_id user_agent"
    assert list(entry) == names.split()
    when = entry.pop("time")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", when)
    assert abs(dt.datetime.fromisoformat(when) - before) < dt.timedelta(seconds=20)
    assert 0 < entry.pop("duration_ms") < 10_000
    assert list(entry.values()) == ["GET", "/path%20/", 200, 9, "127.0.0.1", "my.own-1_", "test/1.0"]


@pytest.mark.parametrize(
    ("sent", "method", "path", "status"),
    [
        (LAST % b"/nothing", "GET", "/nothing", 204),
        (LAST % b"/chunks", "GET", "/chunks", 200),
        (LAST % b"/file", "GET", "/file", 200),
        (LAST.replace(b"GET", b"HEAD") % b"/file", "HEAD", "/file", 200),
        (b"nonsense\r\n\r\n", None, None, 400),
        (b"GET /path?query HTTP/1.1\r\n\r\n", "GET", "/path", 400),
        (POST, "POST", "/path", 413),
        (b"GET /" + b"a" * 20000, None, None, 431),
        (b"GET /path HTTP/1.1\r\n", "GET", "/path", 408),
        (LAST % b"//\x9b2J", "GET", "//\x9b2J", 400),
    ],
)
def test_response_is_logged(running: Server, sent: bytes, method: str | None, path: str | None, status: int) -> None:
    """Every response is logged, with what could be read of the request; `bytes` counts all that follows its header."""
    response = running.exchange(sent)
    [entry] = running.entries(request_id(response))
    assert (entry["method"], entry["path"], entry["status"]) == (method, path, status)
    assert statuses(response) == [status]
    assert entry["bytes"] == len(response.partition(b"\r\n\r\n")[2])


@pytest.mark.parametrize("given", [b"", b"a b", b"a" * 129, b"\xc3\xb8", b"a, b"])
def test_invalid_request_id_is_replaced(running: Server, given: bytes) -> None:
    """An invalid X-Request-ID is replaced: in the response, for the application and in the log."""
    response, entry = logged_request(running, b"/", b"X-Request-ID: " + given)
    assert re.fullmatch(r"[0-9a-f]{32}", entry["request_id"])
    assert response.endswith(b"\r\n\r\n" + entry["request_id"].encode())


def test_own_headers(running: Server) -> None:
    """The server's own headers replace those of the application."""
    response, _ = logged_request(running, b"/own", b"X-Request-ID: " + b"m" * 128)
    assert re.findall(rb"(?i)x-request-id: (.*)\r\n", response) == [b"m" * 128]
    assert re.findall(rb"(?i)x-content-type-options: (.*)\r\n", response) == [b"nosniff"]


def test_probes(running: Server) -> None:
    """Successful health checks are not logged; failed ones, and paths that only resemble /health, are."""
    check = GET.replace(b"\r\n\r\n", b"\r\nX-Request-ID: probe\r\n\r\n")
    with running.connect() as connection:
        for target in (b"/health", b"/health?", b"/health?sick", b"/health/", b"/healthy"):
            connection.sendall(check % target)
            assert connection.recv(1000)
        entries = running.entries("probe", 3)
    assert [entry["path"] for entry in entries] == ["/health", "/health/", "/healthy"]


@pytest.mark.parametrize(
    ("target", "agent"),
    [(b'/"}', b'"} {"'), (b"/\\n{", b"\\n\\u001b[2J"), (b"/%0A%1B[2J", b"\x9b2J \xe2\x80\xae \x85 a\tb")],
)
def test_forged_entries(running: Server, target: bytes, agent: bytes) -> None:
    """A client cannot forge a log entry: what it sends is escaped to printable ASCII, and parsing restores it."""
    _, entry = logged_request(running, target, b"User-Agent: " + agent)
    assert entry["path"].encode("latin-1") == target
    assert entry["user_agent"].encode("latin-1") == agent


def test_client_gone_before_its_response(running: Server) -> None:
    """A request whose client resets the connection before the response is logged without a status."""
    with running.connect() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # close() sends a reset
        client.sendall(GET.replace(b"Host", b"X-Request-ID: gone\r\nHost") % b"/wait")
        running.until_said("waiting")
    running.exchange(LAST % b"/release")
    [entry] = running.entries("gone")
    assert (entry["path"], entry["status"], entry["bytes"]) == ("/wait", None, 0)


def test_standard_error(start: Callable) -> None:
    """Log records, warnings, failed threads and wsgi.errors are JSON in printable ASCII on standard error.

    During a request they carry its id. A record whose arguments do not fit its format string is still logged.
    """
    with start(LOG_LEVEL="debug") as running:
        response = running.exchange(LAST % b"/log")
        running.end()
        assert re.fullmatch(rb"(?:[ -~]+\n)+", running.log.read_bytes())
        entries = [entry for entry in running.logged() if entry["logger"] != "serve" or "exception" in entry]
    sold, items, warned, failed, late, trouble = entries
    assert sold["message"] == "sold " + "".join(map(chr, range(0x300)))
    assert sold["request_id"] == trouble["request_id"] == request_id(response)
    assert "%d items" in items["message"]
    assert "UserWarning: old" in warned["message"]
    assert (failed["message"], trouble["message"]) == ("Uncaught exception in thread worker", "trouble")
    assert failed["exception"].endswith("ZeroDivisionError: division by zero")
    assert late["exception"].endswith("ValueError: late")
    assert [entry["logger"] for entry in entries] == ["shop", "shop", "py.warnings", "serve", "serve", "wsgi.errors"]
    assert [entry["level"] for entry in entries] == ["INFO", "DEBUG", "WARNING", "ERROR", "ERROR", "ERROR"]


# ---- servers whose log does not tell the port ----


def exchange_at(port: int, sent: bytes) -> bytes:
    """Wait until a port accepts connections; send, and return everything that arrives."""
    wait_until(lambda: listens(("127.0.0.1", port)), 30, "the server to listen")
    with socket.create_connection(("127.0.0.1", port), 30) as connection:
        connection.sendall(sent)
        return rest(connection)


@pytest.mark.parametrize(
    ("access", "level", "levels"),
    [
        ("1", "DEBUG", {"DEBUG", "INFO", "WARNING", "ERROR"}),
        ("0", "info", {"INFO", "WARNING", "ERROR"}),
        ("1", "Critical", set()),
    ],
)
def test_log_level_and_access_log(start: Callable, access: str, level: str, levels: set[str]) -> None:
    """LOG_LEVEL, in upper or lower case, sets the lowest level logged; only ACCESS_LOG=0 turns the access log off."""
    port = free_port("127.0.0.1")
    with start(ACCESS_LOG=access, LOG_LEVEL=level, PORT=str(port)) as running:
        assert statuses(exchange_at(port, LAST % b"/log")) == [200]
        assert statuses(exchange_at(port, b"nonsense\r\n\r\n")) == [400]
        running.end()
        assert {entry["level"] for entry in running.logged()} == levels
        assert len(running.access_log.read_text().splitlines()) == 2 * int(access)


def test_logging_to_wsgi_errors(start: Callable) -> None:
    """A record that the application sends to wsgi.errors, as in Flask's documentation, is logged once as JSON."""
    application = """
import logging.config

import flask

handlers = {"wsgi": {"class": "logging.StreamHandler", "stream": "ext://flask.logging.wsgi_errors_stream"}}
root = {"level": "INFO", "handlers": ["wsgi"]}
logging.config.dictConfig({"version": 1, "handlers": handlers, "root": root})
app = flask.Flask(__name__)
app.before_request(lambda: app.logger.info("hello"))
"""
    port = free_port("127.0.0.1")
    with start(application, PORT=str(port)) as running:
        exchange_at(port, LAST % b"/")
        running.end()
        [line] = [line for line in running.log.read_text().splitlines() if '"hello"' in line]
        assert json.loads(line)["logger"] == "wsgi.errors"


# ---- logs that cannot be written ----


@pytest.fixture
def pipe() -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """The read and write end of a pipe that holds 4 KiB."""
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    with os.fdopen(read_end, "rb", 0) as reader, os.fdopen(write_end, "wb", 0) as writer:
        yield reader, writer


def fill(stream: str, count: int, size: int) -> bytes:
    """Return `count` requests that each log a line of about `size` bytes on `stream`, and one more for /."""
    target, agent = (b"/%04d", b"x" * size) if stream == "stdout" else (b"/loud/%04d?" + str(size).encode(), b"")
    request = (GET % target).replace(b"Host", b"User-Agent: " + agent + b"\r\nHost")
    return b"".join(request % number for number in range(count)) + LAST % b"/"


def lost(running: Server) -> int:
    """Return how many lines of the access log the server has reported as lost."""
    found = (re.match(r"Lines of the access log that could not be written: (\d+)", text) for text in running.messages())
    return sum(int(match[1]) for match in found if match)


def test_stalled_access_log(start: Callable, pipe: tuple[BinaryIO, BinaryIO]) -> None:
    """While the access log is not read, requests are answered; every line is delivered later or reported lost."""
    reader, writer = pipe
    with start(stdout=writer.fileno()) as running, running.connect():  # an open connection: the server reports sooner
        writer.close()
        assert statuses(running.exchange(fill("stdout", 200, 9000))) == [200] * 201  # about twice what it queues
        wait_until(lambda: lost(running), 10, "a report")
        # When reading resumes, only complete lines arrive.
        received = b""
        while select.select([reader], [], [], 1)[0]:
            received += reader.read(65536)
        running.exchange(LAST % b"/last")
        running.stop()
        entries = [json.loads(line) for line in (received + reader.read()).splitlines()]
        assert running.ended() == 0
        assert entries[-1]["path"] == "/last"
        assert len(entries) + lost(running) == 202


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("problem", ["reader gone", "nobody reads", "disk full"])
def test_unwritable_log(start: Callable, pipe: tuple[BinaryIO, BinaryIO], stream: str, problem: str) -> None:
    """If a log cannot be written, requests are still answered; lost lines of the access log are counted."""
    reader, writer = pipe
    port = free_port("127.0.0.1")
    with pathlib.Path("/dev/full").open("wb", 0) as full:
        log = full if problem == "disk full" else writer
        with start(PORT=str(port), **{stream: log.fileno()}) as running:
            if problem == "reader gone":
                reader.close()
            assert statuses(exchange_at(port, fill(stream, 200, 9000))) == [200] * 201
            running.end()
            if stream == "stdout":
                assert lost(running) == 201
                assert not [entry for entry in running.logged() if "exception" in entry]


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("stops", [False, True])
def test_slow_reader(start: Callable, pipe: tuple[BinaryIO, BinaryIO], stream: str, *, stops: bool) -> None:
    """A slow reader gets every line, whole and in order, without waiting for new ones, even if the server stops."""
    reader, writer = pipe
    os.set_blocking(writer.fileno(), stops)  # another process that shares it may have set this
    port = free_port("127.0.0.1")
    with start(PORT=str(port), **{stream: writer.fileno()}) as running:
        writer.close()
        assert statuses(exchange_at(port, fill(stream, 20, 2000))) == [200] * 21
        if stops:
            running.stop()
        received, paths = b"", []
        while len(paths) < 20:
            assert select.select([reader], [], [], 5)[0], f"no more after {paths}"
            received += (part := reader.read(4096))
            assert part, f"ended after {paths}"
            entries = map(json.loads, received.rpartition(b"\n")[0].splitlines())
            paths = [entry.get("path") or entry["message"][5:10] for entry in entries if "request_id" in entry]
        assert paths[:20] == [f"/{number:04d}" for number in range(20)]
