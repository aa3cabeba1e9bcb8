"""healthcheck.py against servers that respond well, badly or not at all."""

import io
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from tests.support import ROOT, run


def probe(**environ: str) -> subprocess.CompletedProcess:
    """Run the probe as the image does, with only these environment variables."""
    return run(sys.executable, "-IS", ROOT / "healthcheck.py", env=environ, timeout=30, check=False)


@contextmanager
def server_sending(*pieces: bytes, host: str = "127.0.0.1", pause: float = 0) -> Iterator[str]:
    """Send `pieces` to the first client, with a `pause` in seconds after each; yield the port."""

    def serve() -> None:
        connection, _ = listener.accept()
        with connection, suppress(OSError):  # the probe has disconnected
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
    ("code", "response"),
    [
        (0, b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"),
        (0, b"HTTP/1.0 200 OK\r\n\r\n"),
        (1, b"HTTP/1.0 204 No Content\r\n\r\n"),
        (1, b"HTTP/1.1 503 Service Unavailable\r\n\r\n"),
        (1, b"HTTP/1.1 2000 OK\r\n\r\n"),
        (1, b"\xff\x1b[31mHTTP/1.1 200 OK\r\n"),
        (1, b"HTTP/1.1 200 OK"),  # truncated
        (1, b"x" * 100_000),
        (1, b""),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_response(code: int, response: bytes) -> None:
    """Only status 200 is healthy; for anything else the probe prints the first line of the response, escaped."""
    with server_sending(response) as port:
        done = probe(PORT=port)
    printed = f"unhealthy: answered {io.BytesIO(response).readline(1000)!r}\n" if code else ""
    assert (done.returncode, done.stdout, done.stderr) == (code, printed, "")


def test_timeout() -> None:
    """A server that sends no complete line within 2 s is unhealthy, even if it keeps sending bytes."""
    with server_sending(*[b"H"] * 40, pause=0.25) as port:
        done = probe(PORT=port)
    assert (done.returncode, done.stdout, done.stderr) == (1, "unhealthy: timed out\n", "")


@pytest.mark.parametrize(("port", "why"), [("", ""), ("nonsense", ""), (None, "refused")])
def test_no_connection(port: str | None, why: str) -> None:
    """An invalid PORT, or a server that does not listen on BIND, is reported as unhealthy in one line."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = probe(BIND="::1", PORT=str(listener.getsockname()[1]) if port is None else port)
    assert (done.returncode, done.stderr) == (1, "")
    assert re.fullmatch("unhealthy: .+\n", done.stdout)
    assert why in done.stdout


@pytest.mark.parametrize(
    ("bind", "host"),
    [("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1"), *[(bind, "::1") for bind in ("*", "::", "::1", "[::1]")]],
)
def test_address(bind: str, host: str) -> None:
    """The probe connects to BIND; if that is every address, it also tries ::1."""
    with server_sending(b"HTTP/1.1 200 OK\r\n\r\n", host=host) as port:
        assert probe(BIND=bind, PORT=port).returncode == 0
