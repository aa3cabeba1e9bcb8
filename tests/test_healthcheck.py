"""healthcheck.py against real servers: those that answer, answer badly, or do not."""

import io
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

import healthcheck
from tests.support import ROOT

APPLICATION = """
def app(environ, start_response):
    start_response("200 OK" if environ["PATH_INFO"] == "/health" else "404 Not Found", [])
    return []
"""


def probe(*options: str, **environ: str) -> subprocess.CompletedProcess:
    """Run the probe as the image does, with nothing but these variables."""
    command = [sys.executable, "-IS", *options, ROOT / "healthcheck.py"]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=30, check=False)


@contextmanager
def answering(*pieces: bytes, host: str = "127.0.0.1", pause: float = 0) -> Iterator[str]:
    """Answer the first client piece by piece, with a `pause` in seconds after each; yield the port."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):  # the probe has gone
            connection.recv(1000)
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, 0), family=family) as listener:
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield str(listener.getsockname()[1])
        thread.join(30)


@pytest.mark.parametrize(
    ("code", "answer"),
    [
        pytest.param(0, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", id="healthy"),
        pytest.param(0, b"HTTP/1.0 200 OK\r\n\r\n", id="healthy in HTTP/1.0"),
        pytest.param(0, b"HTTP/1.1 200 \r\n\r\n", id="healthy without a reason"),
        pytest.param(1, b"HTTP/1.0 204 No Content\r\n\r\n", id="another success"),
        pytest.param(1, b"HTTP/1.1 301 Moved Permanently\r\nLocation: /\r\n\r\n", id="redirect"),
        pytest.param(1, b"HTTP/1.1 503 Service Unavailable\r\n\r\n", id="draining"),
        pytest.param(1, b"HTTP/1.1 2000 OK\r\n\r\n", id="not a status"),
        pytest.param(1, b"HTTP/2 200\r\n\r\n", id="another protocol"),
        pytest.param(1, b"\x15\x03\x01\x00\x02\x02\x46\r\n", id="TLS alert"),
        pytest.param(1, b"\xff\x1b[31mHTTP/1.1 200 OK\r\n", id="garbage before the status"),
        pytest.param(1, b"HTTP/1.1 200 OK", id="cut off"),
        pytest.param(1, b"x" * 100_000, id="no end"),
        pytest.param(1, b"", id="nothing"),
    ],
)
def test_answer(code: int, answer: bytes) -> None:
    """Only status 200 is healthy; of anything else the probe prints the first line, escaped."""
    with answering(answer) as port:
        done = probe(PORT=port)
    said = f"unhealthy: answered {io.BytesIO(answer).readline(1000)!r}\n" if code else ""
    assert (done.returncode, done.stdout, done.stderr) == (code, said, "")


def test_timeout() -> None:
    """A server that sends no whole line in 2 s is unhealthy, also if it sends a byte now and then."""
    with answering(*[b"H"] * 40, pause=0.25) as port:
        done = probe(PORT=port)
    assert (done.returncode, done.stdout, done.stderr) == (1, "unhealthy: timed out\n", "")


@pytest.mark.parametrize("port", ["", "-1", "nonsense", None])
def test_no_connection(port: str | None) -> None:
    """A PORT that is none is unhealthy, in one line, as is a server on another address than the one in BIND."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = probe(BIND="::1", PORT=str(listener.getsockname()[1]) if port is None else port)
    assert (done.returncode, done.stderr) == (1, "")
    assert re.fullmatch("unhealthy: .+\n", done.stdout)


@pytest.mark.parametrize(
    ("bind", "host"),
    [("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1"), *[(bind, "::1") for bind in ("*", "::", "::1", "[::1]")]],
)
def test_where_it_asks(bind: str, host: str) -> None:
    """It asks where BIND says that the server listens; if that is every address, at ::1 too."""
    with answering(b"HTTP/1.1 200 OK\r\n\r\n", host=host) as port:
        assert probe(BIND=bind, PORT=port).returncode == 0


@pytest.mark.parametrize("bind", [None, "*", "0.0.0.0", "::"])
def test_asks_this_machine_at_port_5000(monkeypatch: pytest.MonkeyPatch, bind: str | None) -> None:
    """Without PORT it asks at 5000; without BIND, or if that is every address, at 127.0.0.1 first."""
    monkeypatch.delenv("PORT", raising=False)
    monkeypatch.delenv("BIND", raising=False)
    if bind:
        monkeypatch.setenv("BIND", bind)
    monkeypatch.setattr(socket, "create_connection", lambda address: address)
    assert healthcheck.connect() == (b"127.0.0.1", "5000")


def test_follows_the_server(start: Callable) -> None:
    """A server is healthy while it runs, and unhealthy when it is gone."""
    with start() as running:
        port = str(running.address()[1])
        assert probe(PORT=port).returncode == 0
        running.end()
        done = probe(PORT=port)
        assert (done.returncode, done.stderr) == (1, "")
        assert "refused" in done.stdout


def test_light() -> None:
    """The probe imports nothing from site-packages, and no HTTP, TLS, IDNA or regular expressions."""
    with answering(b"HTTP/1.1 200 OK\r\n\r\n") as port:
        lines = probe("-X", "importtime", PORT=port).stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines}
    assert "socket" in imported
    assert {"http", "ssl", "encodings.idna", "re", "typing", "site"}.isdisjoint(imported)
