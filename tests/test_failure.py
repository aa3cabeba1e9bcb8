"""Applications that fail, hang or return garbage: what the client gets, and that the server goes on."""

import os
import pathlib
import sys
from collections.abc import Iterator

import pytest

from tests.support import ROOT, Server, rest, run, statuses, wait_until

APPLICATION = """
import pathlib
import sys
import time


class Closes(list):
    def close(self):
        raise RuntimeError("secret")


def part(start_response):
    start_response("200 OK", [])
    yield b"part"
    raise RuntimeError("secret")


def wait():
    pathlib.Path(f"began-{time.monotonic()}").touch()
    while not pathlib.Path("go").exists():
        time.sleep(0.01)


def app(environ, start_response):
    match environ["PATH_INFO"][1:]:
        case "raises":
            raise RuntimeError("secret")
        case "raises-os-error":
            raise FileNotFoundError("secret")
        case "raises-after-start":
            start_response("200 OK", [("X-Mine", "1")])
            raise RuntimeError("secret")
        case "raises-in-iteration":
            start_response("200 OK", [])
            return (1 / 0 for _ in "x")
        case "raises-after-part":
            return part(start_response)
        case "raises-in-close":
            start_response("200 OK", [("Content-Length", "2")])
            return Closes([b"ok"])
        case "exits":
            sys.exit("secret")
        case "interrupts":
            raise KeyboardInterrupt
        case "none":
            start_response("200 OK", [])
            return None
        case "nothing-started":
            return [b"ok"]
        case "text":
            start_response("200 OK", [])
            return "ok"
        case "list-of-text":
            start_response("200 OK", [("Content-Length", "2")])
            return ["ok"]
        case "list-of-numbers":
            start_response("200 OK", [])
            return [1]
        case "status":
            start_response("fine", [])
            return [b"ok"]
        case "status-number":
            start_response(200, [])
            return [b"ok"]
        case "status-lines":
            start_response("200 OK\\r\\nX: y", [])
            return [b"ok"]
        case "header-lines":
            start_response("200 OK", [("X", "y\\r\\nSet-Cookie: z")])
            return [b"ok"]
        case "header-number":
            start_response("200 OK", [("X", 1)])
            return [b"ok"]
        case "header-not-latin-1":
            start_response("200 OK", [("X", "\\u674e")])
            return [b"ok"]
        case "headers-none":
            start_response("200 OK", None)
            return [b"ok"]
        case "connection":
            start_response("200 OK", [("Connection", "close")])
            return [b"ok"]
        case "too-few":
            start_response("200 OK", [("Content-Length", "9")])
            return [b"ok"]
        case "too-many":
            start_response("200 OK", [("Content-Length", "2")])
            return [b"ok and more"]
        case "large":
            start_response("200 OK", [("Content-Length", "90000000")])
            return (bytes(1_000_000) for _ in range(90))
        case "long-file":
            start_response("200 OK", [("Content-Length", "30000000")])
            return environ["wsgi.file_wrapper"](open("some", "rb"))
        case "file":
            start_response("200 OK", [("Content-Length", "9")])
            return environ["wsgi.file_wrapper"](open("some", "rb"))
        case "not-modified":
            start_response("304 Not Modified", [])
            return [b"body"]
        case "waits":
            wait()
        case "environ":
            environ.clear()
            environ["REMOTE_ADDR"] = 7
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]
"""

GET = b"GET /%s HTTP/1.1\r\nHost: a\r\n\r\n"
LAST = b"GET / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


@pytest.fixture
def running(tmp_path: pathlib.Path) -> Iterator[Server]:
    """A server with one thread: what that does not survive, the next request shows."""
    (tmp_path / "app.py").write_text(APPLICATION)
    with Server(tmp_path, WAITRESS_THREADS="1") as running:
        yield running


@pytest.mark.parametrize(
    "what",
    [
        "raises",
        "raises-os-error",
        "raises-after-start",
        "raises-in-iteration",
        "exits",
        "interrupts",
        "none",
        "nothing-started",
        "text",
        "list-of-text",
        "list-of-numbers",
        "status",
        "status-number",
        "status-lines",
        "header-lines",
        "header-number",
        "header-not-latin-1",
        "headers-none",
        "connection",
    ],
)
def test_nothing_sent_yet(running: Server, what: str) -> None:
    """An application that fails before its first byte is answered 500 in one line; only the log says why."""
    answered = running.exchange(GET % what.encode())
    assert statuses(answered) == [500]
    header, _, body = answered.partition(b"\r\n\r\n")
    assert body == b"500 Internal Server Error: The server encountered an unexpected internal server error\n"
    assert b"x-mine" not in header.lower()
    assert statuses(running.exchange(LAST)) == [200]
    failed, fine = running.requests(2)
    assert (failed["path"], failed["status"], failed["bytes"], fine["status"]) == (f"/{what}", 500, len(body), 200)
    assert failed["request_id"].encode() in header
    running.end()
    [logged] = [entry for entry in running.logged() if "exception" in entry]
    assert logged["message"] == f"Exception while serving /{what}"
    assert "app.py" in logged["exception"] or "waitress" in logged["exception"]


@pytest.mark.parametrize(
    ("what", "body"),
    [("raises-after-part", b"4\r\npart\r\n"), ("too-few", b"ok"), ("raises-in-close", b"ok")],
)
def test_after_the_first_byte(running: Server, what: str, body: bytes) -> None:
    """An application that fails later is cut short: the client sees that something is missing, and no more."""
    answered = running.exchange(GET % what.encode())
    assert statuses(answered) == [200]
    assert answered.partition(b"\r\n\r\n")[2] == body
    assert statuses(running.exchange(LAST)) == [200]
    assert [entry["status"] for entry in running.requests(2)] == [200, 200]
    running.end()
    assert len(running.messages()) == 1


def test_more_than_promised(running: Server) -> None:
    """What an application sends beyond its Content-Length does not become the beginning of the next answer."""
    answered = running.exchange(GET % b"too-many" + LAST)
    assert statuses(answered) == [200, 200]
    assert b"more" not in answered
    running.end()
    assert "exceeded the number of bytes specified by Content-Length" in running.messages()[0]


def test_client_gone_in_the_middle(running: Server) -> None:
    """A client that leaves in the middle of its answer costs the server that answer, no more."""
    with running.connect() as connection:
        connection.sendall(GET % b"large")
        assert statuses(connection.recv(100)) == [200]
    assert statuses(running.exchange(LAST)) == [200]
    large, _ = running.requests(2)
    assert large["status"] == 200
    assert 0 < large["bytes"] < 90_000_000
    running.end()
    assert running.messages() == ["Client disconnected while serving /large"]


def test_threads_all_stuck(tmp_path: pathlib.Path) -> None:
    """While every thread is stuck the probe fails, in its own time; when they are free it succeeds again."""
    (tmp_path / "app.py").write_text(APPLICATION)
    with Server(tmp_path, WAITRESS_THREADS="2") as running:
        environ = {"PORT": running.listening()[0].rpartition(":")[2]}

        def probe() -> tuple[int, str]:
            done = run(sys.executable, "-IS", ROOT / "healthcheck.py", env=environ, check=False, timeout=2.9)
            return done.returncode, done.stdout

        assert probe() == (0, "")
        with running.connect() as one, running.connect() as two:
            for connection in (one, two):
                connection.sendall(GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n") % b"waits")
            wait_until(lambda: len(list(tmp_path.glob("began-*"))) == 2, 10, "both threads to be stuck")
            assert probe() == (1, "unhealthy: timed out\n")
            waiting = "Requests seen waiting for one of 2 threads"
            wait_until(lambda: any(m.startswith(waiting) for m in running.messages()), 10, "a warning")
            (tmp_path / "go").touch()
            assert statuses(rest(one)) == statuses(rest(two)) == [200]
        assert probe() == (0, "")


def test_exposed_traceback(tmp_path: pathlib.Path) -> None:
    """WAITRESS_EXPOSE_TRACEBACKS shows why, as waitress does: to develop with."""
    (tmp_path / "app.py").write_text(APPLICATION)
    with Server(tmp_path, WAITRESS_EXPOSE_TRACEBACKS="true") as running:
        assert b"\nRuntimeError: secret\n" in running.exchange(GET % b"raises")


def test_file_that_becomes_shorter(running: Server, tmp_path: pathlib.Path) -> None:
    """If a file ends before the length that was promised, no other answer takes the place of the rest."""
    (tmp_path / "some").write_bytes(bytes(30_000_000))
    with running.connect() as connection:
        connection.sendall(GET % b"long-file" + GET % b"next")
        assert statuses(connection.recv(100)) == [200]
        os.truncate(tmp_path / "some", 8_000_000)
        received = rest(connection)
    assert len(received) < 30_000_000
    assert statuses(received) == []


@pytest.mark.parametrize(
    "line", [b"HEAD /", b"HEAD /file", b"HEAD /raises", b"HEAD /raises-after-part", b"GET /not-modified"]
)
def test_no_body(running: Server, tmp_path: pathlib.Path, line: bytes) -> None:
    """Where an answer has no body (RFC 9112, 6.3), what an application gives does not become the next answer."""
    (tmp_path / "some").write_text("some text")
    answered = running.exchange(line + b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert answered.endswith(b"\r\n\r\n")
    assert answered.count(b"\r\n\r\n") == 1


def test_os_error_is_not_the_clients(tmp_path: pathlib.Path) -> None:
    """An application's OSError is answered 500 also where waitress is told not to log those of connections."""
    (tmp_path / "app.py").write_text(APPLICATION)
    with Server(tmp_path, WAITRESS_LOG_SOCKET_ERRORS="false") as running:
        assert statuses(running.exchange(GET % b"raises-os-error")) == [500]


def test_environ_is_the_applications(running: Server) -> None:
    """Whatever an application does with its environ, its thread goes on."""
    for _ in range(3):
        assert statuses(running.exchange(LAST.replace(b"/ ", b"/environ "))) == [200]
    assert len(running.requests(3)) == 3
