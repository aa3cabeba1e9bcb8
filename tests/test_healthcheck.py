"""healthcheck.py against real servers: those that answer, answer badly, or do not."""

import pathlib
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from healthcheck import address
from serve.settings import waitress_settings
from tests.support import ROOT, server


def probe(**environ: str) -> subprocess.CompletedProcess:
    """Run the probe as the image does, with nothing but these variables."""
    command = [sys.executable, "-IS", ROOT / "healthcheck.py"]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=30, check=False)


@contextmanager
def answering(answer: bytes, pause: float = 0) -> Iterator[int]:
    """Listen, send `answer` to whoever asks, byte by byte where there is a `pause` in seconds; yield the port."""
    done = threading.Event()

    def serve() -> None:
        while not done.is_set():
            with suppress(OSError):  # nobody has asked yet, or the probe has given up
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(10)
                    connection.recv(1000)
                    for piece in [answer[i : i + 1] for i in range(len(answer))] if pause else [answer]:
                        connection.sendall(piece)
                        done.wait(pause)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)
        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        try:
            yield listener.getsockname()[1]
        finally:
            done.set()
            thread.join(30)


@pytest.mark.parametrize(
    "answer",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.0 200 OK\r\n\r\n",
        b"HTTP/1.1 200 \r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\ncut off",
    ],
)
def test_healthy(answer: bytes) -> None:
    """Status 200 is healthy: exit code 0 and nothing to say."""
    with answering(answer) as port:
        done = probe(PORT=str(port))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(b"HTTP/1.1 301 Moved Permanently\r\nLocation: /\r\n\r\n", id="redirect"),
        pytest.param(b"HTTP/1.1 204 No Content\r\n\r\n", id="another success"),
        pytest.param(b"HTTP/1.1 404 Not Found\r\n\r\n", id="not found"),
        pytest.param(b"HTTP/1.1 500 Internal Server Error\r\n\r\n", id="crash"),
        pytest.param(b"HTTP/1.1 503 Service Unavailable\r\n\r\n", id="draining"),
        pytest.param(b"HTTP/1.1 2000 OK\r\n\r\n", id="not a status"),
        pytest.param(b"HTTP/2 200\r\n\r\n", id="another protocol"),
        pytest.param(b"200 OK\r\n\r\n", id="no protocol"),
        pytest.param(b"\x15\x03\x01\x00\x02\x02\x46\r\n", id="TLS alert"),
        pytest.param(b"\xff\xfe\x1b[31mHTTP/1.1 200 OK\r\n", id="garbage before the status"),
        pytest.param(b"HTTP/1.1 200 OK", id="cut off"),
        pytest.param(b"x" * 100_000, id="no end"),
        pytest.param(b"", id="nothing"),
    ],
)
def test_unhealthy(answer: bytes) -> None:
    """Anything else is unhealthy: exit code 1 and one printable line that says what came."""
    with answering(answer) as port:
        done = probe(PORT=str(port))
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("unhealthy: ")
    assert done.stdout.removesuffix("\n").isprintable()


def test_timeout_of_a_trickle() -> None:
    """A server that sends a byte now and then, but no whole line in time, is unhealthy."""
    with answering(b"HTTP/1.1 200 OK" * 10, 0.25) as port:
        done = probe(PORT=str(port))
    assert (done.returncode, done.stdout, done.stderr) == (1, "unhealthy: timed out\n", "")


def test_timeout_of_silence() -> None:
    """A server that takes the connection and says nothing is unhealthy."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        done = probe(PORT=str(listener.getsockname()[1]))
    assert (done.returncode, done.stdout, done.stderr) == (1, "unhealthy: timed out\n", "")


def test_refused() -> None:
    """A port on which nothing listens is unhealthy."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    done = probe(PORT=str(port))
    assert (done.returncode, done.stderr) == (1, "")
    assert "refused" in done.stdout


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder with an application that is healthy."""
    (tmp_path / "app.py").write_text(
        "def app(environ, start_response):\n"
        "    ok = environ['PATH_INFO'] == '/health'\n"
        "    start_response('200 OK' if ok else '404 Not Found', [])\n"
        "    return []\n"
    )
    return tmp_path


@pytest.fixture
def port() -> int:
    """A port that is free on IPv4 and IPv6."""
    with socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        return listener.getsockname()[1]


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"BIND": "127.0.0.1"},
        {"BIND": "127.0.0.2"},
        {"BIND": "0.0.0.0"},
        {"BIND": "[::1]"},
        {"BIND": "::"},
        {"BIND": "localhost"},
    ],
    ids=str,
)
def test_follows_the_server(folder: pathlib.Path, port: int, variables: dict[str, str]) -> None:
    """By the same variables as serve the probe finds it: healthy while it runs, unhealthy when it is gone."""
    environ = {"PORT": str(port)} | variables
    with server(folder, **environ) as running:
        running.listening()
        done = probe(**environ)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
        running.process.send_signal(signal.SIGTERM)
        running.ended()
        assert probe(**environ).returncode == 1


def test_default_port() -> None:
    """Where nothing is set, it is the port that serve then takes."""
    settings = waitress_settings({})
    assert address({}) == (settings["host"], settings["port"])


def test_starts_light() -> None:
    """The probe imports nothing from site-packages, and no HTTP, TLS or e-mail parser of the standard library."""
    code = "import sys, healthcheck; print(*sys.modules)"
    modules = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    assert {"http", "ssl", "email", "logging", "asyncio", "re"}.isdisjoint(modules)
