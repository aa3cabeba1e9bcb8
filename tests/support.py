"""Helpers for the tests: waiting, HTTP requests, running commands, a running server, copies of the project."""

import json
import os
import pathlib
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ROOT = pathlib.Path(__file__).parent.parent

ENVIRON = dict(os.environ)  # before any test module changes it
# Requests for a target; the second closes the connection.
GET = b"GET %b HTTP/1.1\r\nHost: a\r\n\r\n"
LAST = b"GET %b HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> object:
    """Call `condition` every 10 ms and return its first true value; after `seconds` fail, naming `what`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.01)
    return value


def get(url: str) -> tuple[int, str]:
    """Request `url`; return the status and the body."""
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def run(*command: object, check: bool = True, **options: object) -> subprocess.CompletedProcess:
    """Run a command; return its exit code and its output as text. With `check`, raise AssertionError if it fails."""
    options = {"capture_output": True, "text": True, "timeout": 600, "stdin": subprocess.DEVNULL} | options
    done = subprocess.run([str(part) for part in command], check=False, **options)
    if check and done.returncode:
        raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


def free_port(host: str) -> int:
    """Return a port that is not in use."""
    with socket.create_server((host, 0)) as listener:
        return listener.getsockname()[1]


def listens(address: tuple[str, int]) -> bool:
    """Return whether `address` accepts connections."""
    try:
        socket.create_connection(address, 5).close()
    except ConnectionRefusedError:
        return False
    return True


def edit(path: pathlib.Path, pattern: str, replacement: str, count: int = 1) -> None:
    """Replace the first `count` matches of a pattern in a file (0: all); fail if nothing matches."""
    text, found = re.subn(pattern, replacement, path.read_text(), count=count, flags=re.MULTILINE)
    assert found
    path.write_text(text)


def rest(connection: socket.socket) -> bytes:
    """Return everything that arrives until the connection is closed."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def statuses(responses: bytes) -> list[int]:
    """Return the status of each response."""
    return [int(code) for code in re.findall(rb"HTTP/1\.[01] ([0-9]{3}) ", responses)]


def request_id(response: bytes) -> str:
    """Return the X-Request-ID of a response."""
    return re.search(rb"\r\nX-Request-ID: (.*)\r\n", response)[1].decode()


def read_response(connection: socket.socket) -> bytes:
    """Read one response, which must have a Content-Length."""
    received = b""
    while b"\r\n\r\n" not in received:
        part = connection.recv(1)
        assert part, f"closed after {received!r}"
        received += part
    length = int(received.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0])
    while len(received.partition(b"\r\n\r\n")[2]) < length:
        part = connection.recv(65536)
        assert part, f"closed after {received!r}"
        received += part
    return received


def ask(connection: socket.socket, target: bytes = b"/") -> bytes:
    """Request `target`; return the response."""
    connection.sendall(GET % target)
    return read_response(connection)


def errors_while_stopping(address: tuple[str, int], stop: Callable[[], object]) -> list[Exception]:
    """Stop a server while eight clients send requests without a pause; return the clients' errors.

    A client that is told to close its connection opens another, until the server refuses connections.
    """
    failures, answered = [], [0] * 8

    def send_requests(number: int) -> None:
        while True:
            try:
                connection = socket.create_connection(address, 10)
            except ConnectionRefusedError:
                return
            try:
                with connection:
                    while b"connection: close" not in ask(connection).lower():
                        answered[number] += 1
            except (OSError, AssertionError) as failure:
                failures.append(failure)

    clients = [threading.Thread(target=send_requests, args=[number], daemon=True) for number in range(len(answered))]
    for client in clients:
        client.start()
    wait_until(lambda: min(answered) > 20, 30, "every client to get 20 responses")
    stop()
    for client in clients:
        client.join(30)
        assert not client.is_alive(), "the server still accepts connections"
    return failures


@contextmanager
def many_files() -> Iterator[None]:
    """Raise this process's limit on open files to 3000, or to its hard limit if that is lower."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(3000, before[1]), before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


class Server:
    """`python -m serve`, run in a folder until the `with` block ends, and its logs."""

    def __init__(
        self,
        folder: pathlib.Path,
        application: str | None = None,
        files: tuple[int, int] | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
        **environ: str | None,
    ) -> None:
        """Write `application` to app.py and start the server.

        `files` are the soft and hard limit on open files; `stdout` and `stderr` are file descriptors for the logs.
        A variable that is None is not set. The default is to listen on a free port of 127.0.0.1.
        """
        if application is not None:
            (folder / "app.py").write_text(application)
        self.log, self.access_log = folder / "serve.log", folder / "access.log"
        environ = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "BIND": "127.0.0.1", "PORT": "0"} | environ
        command = [sys.executable, "-m", "serve"]
        if files:
            limit = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_NOFILE, ({}, {})); os.execv(*{})"
            command = [sys.executable, "-c", limit.format(*files, (sys.executable, command))]
        with self.log.open("w") as errors, self.access_log.open("w") as access:
            self.process = subprocess.Popen(
                command,
                env={name: value for name, value in environ.items() if value is not None},
                cwd=folder,
                stdout=access if stdout is None else stdout,
                stderr=errors if stderr is None else stderr,
            )

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_: object) -> None:
        """Kill the server if it still runs; print its logs."""
        self.process.kill()
        self.process.wait()
        print(self.log.read_text(), self.access_log.read_text(), sep="\n")  # pytest shows this if the test fails

    def logged(self) -> list[dict]:
        """Return the log entries on standard error so far."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def messages(self) -> list[str]:
        """Return their messages, without those of a normal start and stop."""
        normal = re.compile("Serving on .*|Draining: .*|Closing: .*|Stopped")
        return [entry["message"] for entry in self.logged() if not normal.fullmatch(entry["message"])]

    def until_said(self, word: str) -> None:
        """Wait until a message that begins with `word` is logged."""
        wait_until(lambda: any(entry["message"].startswith(word) for entry in self.logged()), 10, word)

    def requests(self, count: int) -> list[dict]:
        """Wait until the access log has `count` entries; return them. Fail if there are more."""
        entries = wait_until(
            lambda: (lines := self.access_log.read_text().splitlines()) and len(lines) >= count and lines,
            10,
            f"{count} lines in the access log",
        )
        assert len(entries) == count
        return [json.loads(line) for line in entries]

    def entries(self, identity: str, count: int = 1, log: pathlib.Path | None = None) -> list[dict]:
        """Wait until the access log, or `log`, has `count` entries with a request id; return them.

        Fail if any line there is not a JSON object in printable ASCII.
        """

        def found() -> list[dict] | None:
            lines = (log or self.access_log).read_bytes().rpartition(b"\n")[0].split(b"\n")
            assert all(re.fullmatch(rb"[ -~]*", line) for line in lines)
            entries = [json.loads(line) for line in lines if line]
            found = [entry for entry in entries if entry.get("request_id") == identity]
            return found if len(found) >= count else None

        return wait_until(found, 10, f"{count} entries with request id {identity}")

    def listening(self, addresses: int = 1) -> list[str]:
        """Wait until the server has logged `addresses` URLs that it listens on; return them."""

        def logged() -> list[str]:
            assert self.process.poll() is None, f"the server ended too early: {self.log.read_text()}"
            return re.findall(r'"Serving on ([^"]+)"', self.log.read_text())

        return wait_until(lambda: len(logged()) >= addresses and logged(), 30, f"{addresses} addresses")

    def address(self) -> tuple[str, int]:
        """Return the first address that the server listens on."""
        host, port = self.listening()[0].removeprefix("http://").rsplit(":", 1)
        return host.strip("[]"), int(port)

    def connect(self, receive_buffer: int | None = None) -> socket.socket:
        """Connect to that address. With a small receive buffer, the kernel keeps little unread data."""
        if not receive_buffer:
            return socket.create_connection(self.address(), 30)
        connection = socket.socket()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)  # must be set before connect()
        connection.settimeout(30)
        connection.connect(self.address())
        return connection

    def exchange(self, sent: bytes = LAST % b"/") -> bytes:
        """Send on a new connection; return everything that arrives until the server closes it."""
        with self.connect() as connection:
            connection.sendall(sent)
            return rest(connection)

    def stop(self) -> None:
        """Send SIGTERM."""
        self.process.send_signal(signal.SIGTERM)

    def ended(self) -> int:
        """Wait until the server has ended; return its exit code."""
        return self.process.wait(30)

    def end(self) -> None:
        """Stop the server and check its exit code; after that its logs are complete."""
        self.stop()
        assert self.ended() == 0


def inspect(name: str, field: str) -> object:
    """Return one field of `docker inspect` for a container or an image."""
    return json.loads(run("docker", "inspect", "--format", f"{{{{json {field}}}}}", name).stdout)


def until_health(container: str, status: str = "healthy") -> None:
    """Wait until a container has this health status; fail with its log if it has exited."""

    def reached() -> bool:
        state = inspect(container, ".State")
        assert state["Running"], f"it has exited: {run('docker', 'logs', container).stderr}"
        return state["Health"]["Status"] == status

    wait_until(reached, 60, f"{container} to be {status}")


def python(container: str, code: str, *options: str) -> str:
    """Run Python code in a running container; return what it prints."""
    return run("docker", "exec", *options, container, "python", "-c", textwrap.dedent(code)).stdout.strip()


class Project:
    """A copy of the project, whose images, containers and networks have unique names.

    They are removed when the `with` block ends.
    """

    def __init__(self, folder: pathlib.Path, **environ: str) -> None:
        """Copy the project to `folder`; commands run there get `environ`."""
        self.folder = folder
        self.name = name = f"flask-helloworld-test-{uuid.uuid4().hex[:8]}"
        left_out = shutil.ignore_patterns(".git", ".venv*", ".env", ".serve.*", "__pycache__", ".*_cache", "wheels")
        shutil.copytree(ROOT, folder, ignore=left_out)
        # Other image names, so that the user's own images are not overwritten.
        for path in [*folder.rglob("compose.yaml"), folder / "compose.override.yaml"]:
            edit(path, r"(^    image: )[^:\n]+", rf"\g<1>{name}", count=0)
        self.environ = ENVIRON | {
            "COMPOSE_PROJECT_NAME": name,
            "BIND": "127.0.0.1",
            "PORT": "0",  # any free port
            "TARGET": "runtime",
        }
        # Variables of this test run must not affect commands in the copy.
        makes = ("VIRTUAL_ENV", "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "REQUIRE_DOCKER")
        for variable in (*makes, "COMPOSE_FILE", "APP_DIR", "PIP_CONF"):
            self.environ.pop(variable, None)
        self.environ |= environ

    def __enter__(self) -> "Project":
        return self

    def __exit__(self, *_: object) -> None:
        """Remove containers, networks, volumes and images."""
        self.compose("--profile", "*", "down", "--rmi", "all", "--volumes", "--timeout", "1")

    def run(self, *command: object, **options: object) -> subprocess.CompletedProcess:
        """Run a command in this copy."""
        environ = self.environ | options.pop("environ", {})
        return run(*command, cwd=self.folder, env=environ, **options)

    def build(self, *arguments: object, **options: object) -> subprocess.CompletedProcess:
        """Run docker build in this copy; the image gets the same name as from compose."""
        command = ["docker", "build", "--build-arg", "PYTHON_IMAGE", "--tag", self.name, *arguments, "."]
        return self.run(*command, **options)

    def write(self, files: dict[str, str]) -> None:
        """Write files, given as name and text."""
        for name, text in files.items():
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_text(text)

    def append(self, name: str, text: str) -> None:
        """Append a text to a file."""
        with (self.folder / name).open("a") as file:
            file.write(text)

    def make_private(self) -> None:
        """Make everything readable by the owner only, as in a clone made under umask 077.

        Except the locks and docker/: only root reads them in the build, and another mode would miss the build cache.
        """
        for path in [self.folder, *self.folder.rglob("*")]:
            if not path.match("requirements*.txt") and not path.match("docker/*"):
                path.chmod(path.stat().st_mode & 0o700)

    def name_files(self, *names: str) -> None:
        """Add a COPY line to the Dockerfile for each of these files and folders."""
        lines = "".join(f"COPY --chmod=u=rwX,go=rX ${{APP_DIR}}/{name} ./{name}\n" for name in names)
        edit(self.folder / "Dockerfile", "^# checked-hash", lines + "# checked-hash")

    def compose(self, *arguments: object, **options: object) -> subprocess.CompletedProcess:
        """Run a docker compose command in this copy."""
        return self.run("docker", "compose", *arguments, **options)

    def url(self, service: str = "web") -> str:
        """Return the URL at which compose publishes a service."""
        return "http://" + self.compose("port", service, "5000").stdout.strip()
