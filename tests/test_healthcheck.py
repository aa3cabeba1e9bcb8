"""healthcheck.py against real servers: those that answer, answer badly, or do not."""

import io
import pathlib
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from tests.support import ROOT, Server


def probe(*options: str, **environ: str) -> subprocess.CompletedProcess:
    """Run the probe as the image does, with nothing but these variables."""
    command = [sys.executable, "-IS", *options, ROOT / "healthcheck.py"]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=30, check=False)


@contextmanager
def answering(*pieces: bytes, pause: float = 0) -> Iterator[str]:
    """Answer the first client piece by piece, with a `pause` in seconds after each; yield the port."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):  # the probe has gone
            connection.recv(1000)
            for piece in pieces:
                connection.sendall(piece)
                time.sleep(pause)

    with socket.create_server(("127.0.0.1", 0)) as listener:
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
        pytest.param(1, b"HTTP/1.1 204 No Content\r\n\r\n", id="another success"),
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


@pytest.mark.parametrize("piece", [b"H", b""], ids=["trickle", "silence"])
def test_timeout(piece: bytes) -> None:
    """A server that sends no whole line in time is unhealthy, whether it sends a byte now and then or nothing."""
    with answering(*[piece] * 12, pause=0.25) as port:
        done = probe(PORT=port)
    assert (done.returncode, done.stdout, done.stderr) == (1, "unhealthy: timed out\n", "")


def test_refused() -> None:
    """Where nobody listens it is unhealthy; somebody on another address than the one in BIND does not count."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        elsewhere = probe(BIND="::1", PORT=port)
    for done in (elsewhere, probe(PORT=port)):
        assert (done.returncode, done.stderr) == (1, "")
        assert "refused" in done.stdout


@pytest.mark.parametrize("port", ["", "-1", "nonsense"])
def test_wrong_port(port: str) -> None:
    """A PORT that is no port is unhealthy, in one line."""
    done = probe(PORT=port)
    assert (done.returncode, done.stderr) == (1, "")
    assert re.fullmatch("unhealthy: .+\n", done.stdout)


@pytest.mark.parametrize("bind", ["*", "0.0.0.0", "127.0.0.1", "::", "::1", "[::1]", "localhost"])
def test_follows_the_server(tmp_path: pathlib.Path, bind: str) -> None:
    """By the same variables as serve the probe finds it: healthy while it runs, unhealthy when it is gone."""
    (tmp_path / "app.py").write_text(
        "def app(environ, start_response):\n"
        "    ok = environ['PATH_INFO'] == '/health'\n"
        "    start_response('200 OK' if ok else '404 Not Found', [])\n"
        "    return []\n"
    )
    with Server(tmp_path, BIND=bind, PORT="0") as running:
        port = running.listening()[0].rpartition(":")[2]
        assert probe(BIND=bind, PORT=port).returncode == 0
        assert probe(PORT=port).returncode == 0  # by 127.0.0.1, else ::1
        running.stop()
        running.ended()
        assert probe(BIND=bind, PORT=port).returncode == 1


def test_light() -> None:
    """The probe imports nothing from site-packages, and no HTTP, TLS, IDNA or regular expressions."""
    with answering(b"HTTP/1.1 200 OK\r\n\r\n") as port:
        lines = probe("-X", "importtime", PORT=port).stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines}
    assert "socket" in imported
    assert {"http", "ssl", "encodings.idna", "re", "typing", "site"}.isdisjoint(imported)
