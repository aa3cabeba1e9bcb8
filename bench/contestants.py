"""What is compared: images that people use for a Flask service, and ours. Builds them, runs them."""

import contextlib
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parent.parent
NAME = f"flask-helloworld-bench-{uuid.uuid4().hex[:8]}"  # of the images; label of images and containers
BASE = (
    os.environ.get("PYTHON_IMAGE")
    or re.search(r"^FROM (\S+) AS pinned$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[1]
)
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
RESPONSE_START, RESPONSE_END = b"HTTP/1.1 200 ", b"\r\n\r\nHello, world!\n"
# Of the limits in compose.yaml not the one on threads: the development server has one for each connection.
COMPOSE = ("--cpus=1", "--memory=256m")


class Contestant(NamedTuple):
    """An image, and how it is run."""

    image: str
    context: str = ""  # the folder that it is built from
    command: tuple[str, ...] = ()  # in place of the image's
    options: tuple[str, ...] = ()  # of `docker run`

    def build(self, workspace: pathlib.Path, *options: str) -> None:
        """Build the image."""
        target = [f"--target={self.image.partition(':')[2]}"] if self.context == "project" else []
        arguments = [f"--build-arg=PYTHON_IMAGE={BASE}", f"--tag={self.image}", f"--label={NAME}", *target, *options]
        run("docker", "build", *arguments, workspace / self.context)

    @contextlib.contextmanager
    def container(self, *options: str) -> Iterator[tuple[str, str]]:
        """Run a container for a `with` block; yield its id and address once it answers. Raises TimeoutError."""
        command = ["docker", "run", "--detach", f"--label={NAME}", "--log-driver=local", *self.options, *options]
        name = run(*command, self.image, *self.command).strip()
        try:
            field = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
            address = run("docker", "inspect", f"--format={field}", name).strip()
            deadline = time.perf_counter() + 60
            while True:
                with contextlib.suppress(OSError), connect(address) as connection:
                    connection.sendall(REQUEST)
                    if connection.recv(4096):
                        break
                if time.perf_counter() > deadline:
                    raise TimeoutError(run("docker", "logs", name, stderr=subprocess.STDOUT))
                time.sleep(0.005)
            yield name, address
        finally:
            run("docker", "rm", "--force", name)


def ours(target: str, *options: str) -> Contestant:
    """Return an image of this project."""
    return Contestant(f"{NAME}:{target}", "project", options=options)


def theirs(name: str, command: str = "", *options: str) -> Contestant:
    """Return an image with a Dockerfile in bench/contestants."""
    return Contestant(f"{NAME}:{name}", name, tuple(command.split()), options)


TUNED = "waitress-serve --listen=*:5000 --asyncore-use-poll --connection-limit=2000 --backlog=4096 app:app"
GTHREAD = "gunicorn --bind=0.0.0.0:5000 --worker-class=gthread --workers=1 --threads=4 app:app"
CONTESTANTS = {
    "runtime": ours("runtime"),
    "runtime, no log": ours("runtime", "--env=ACCESS_LOG=0"),
    "minimal": ours("minimal"),
    "tutorial": theirs("tutorial"),
    "copy first": theirs("copy-first"),
    "waitress": theirs("waitress"),
    "waitress, tuned": theirs("waitress", TUNED, "--stop-signal=SIGINT"),
    "gunicorn": theirs("gunicorn"),
    "gunicorn, threads": theirs("gunicorn", GTHREAD),
    "uWSGI": theirs("uwsgi"),
    "granian": theirs("granian"),
}
OURS = {"runtime", "runtime, no log", "minimal"}
IMAGES = {name: each for name, each in CONTESTANTS.items() if not each.command + each.options}
# The log is a variation of one measure; both tutorials run the same server.
SERVERS = {name: each for name, each in CONTESTANTS.items() if name not in {"runtime, no log", "copy first"}}
# What these have in place of waitress.
SERVER_PINS = {"gunicorn": "gunicorn==27.0.1", "uwsgi": "pyuwsgi==2.0.30.post1", "granian": "granian==2.8.9"}
# How quickly could a server in Python start? This one imports a socket, from bytecode.
BARE = """
import socket
server = socket.create_server(("", 5000))
while True:
    connection = server.accept()[0]
    connection.recv(4096)
    connection.sendall(b"HTTP/1.1 204 No Content\\r\\n\\r\\n")
    connection.close()
"""
BARE_SERVER = Contestant(f"{NAME}:runtime", command=("python", "-IS", "-c", BARE))


@contextlib.contextmanager
def workspace(temporary: str) -> Iterator[pathlib.Path]:
    """Yield a folder with all build contexts; at the end remove all images and containers of this run."""
    folder = pathlib.Path(temporary)
    shutil.copytree(ROOT, folder / "project", ignore=shutil.ignore_patterns(".git", ".venv*", ".env"))
    locked = re.findall(r"^[a-z]\S+==\S+", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    for file in (ROOT / "bench/contestants").glob("*.Dockerfile"):
        context = folder / file.stem
        context.mkdir()
        shutil.copy(file, context / "Dockerfile")
        shutil.copy(ROOT / "app.py", context)
        server = SERVER_PINS.get(file.stem)
        pins = [pin for pin in locked if not (server and pin.startswith("waitress="))] + ([server] if server else [])
        (context / "requirements.txt").write_text("\n".join(pins))
    try:
        yield folder
    finally:
        print("bench: removing its containers and images", flush=True)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        time.sleep(1)  # the engine may still be creating a container for a command that was interrupted
        for kind, listing in (("container", ("ps", "--all")), ("image", ("image", "ls"))):
            for left in set(run("docker", *listing, f"--filter=label={NAME}", "--quiet").split()):
                run("docker", kind, "rm", "--force", left, check=False)


def run(*command: object, **options: object) -> str:
    """Run a command, which Ctrl-C does not reach, and return its output; raises CalledProcessError."""
    options = {"check": True, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    options["start_new_session"] = True
    return subprocess.run([str(part) for part in command], **options).stdout


def connect(address: str, timeout: float = 20) -> socket.socket:
    """Connect to a server, with a timeout in seconds for this and each later step."""
    return socket.create_connection((address, 5000), timeout)


def request(connection: socket.socket) -> bool:
    """Send a request and read the whole response; return whether the connection stays open. Raises OSError."""
    connection.sendall(REQUEST)
    response = b""
    while not response.endswith(RESPONSE_END):
        part = connection.recv(4096)
        response += part
        if not part or not RESPONSE_START.startswith(response[: len(RESPONSE_START)]):
            raise ConnectionError(f"not a complete response with status 200: {response!r}")
    return b"connection: close" not in response.lower()
