"""What several test modules need: waiting, asking over HTTP, running commands, copies of the project."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager

ROOT = pathlib.Path(__file__).parent.parent


def wait_until(condition: Callable[[], object], seconds: float, what: str) -> object:
    """Return the first true value of `condition`, asked every 50 ms; fail, naming `what`, after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)
    return value


def get(url: str) -> tuple[int, str]:
    """Return the status and the body that `url` answers with."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def run(*command: object, check: bool = True, **options: object) -> subprocess.CompletedProcess:
    """Run a command and return it, ended, with its output as text; with `check`, fail with that output if it fails."""
    options = {"capture_output": True, "text": True, "timeout": 600, "stdin": subprocess.DEVNULL} | options
    done = subprocess.run([str(part) for part in command], check=False, **options)
    if check and done.returncode:
        raise AssertionError(f"{command} ended with {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done


class Server:
    """A serve.py that runs in a folder, and what it has written to standard error."""

    def __init__(self, folder: pathlib.Path, **environ: str) -> None:
        shutil.copy(ROOT / "serve.py", folder)
        self.log = folder / "serve.log"
        clean = {
            name: value for name, value in os.environ.items() if not name.startswith("WAITRESS_") and name != "APP"
        }
        with self.log.open("w") as errors:
            command = [sys.executable, folder / "serve.py"]
            self.process = subprocess.Popen(command, env=clean | environ, stderr=errors)

    def listening(self, addresses: int = 1) -> list[str]:
        """Return the addresses that it says it serves on, as soon as it has said so many."""

        def said() -> list[str]:
            assert self.process.poll() is None, f"it ended before it served: {self.log.read_text()}"
            return re.findall(r"Serving on (.+)\n", self.log.read_text())

        return wait_until(lambda: len(said()) >= addresses and said(), 30, f"{addresses} addresses")

    def ended(self) -> tuple[int, str]:
        """Return the exit code and what was written to standard error, once it has ended."""
        code = self.process.wait(30)
        return code, "".join(
            line for line in self.log.read_text().splitlines(keepends=True) if "Serving on" not in line
        )


@contextmanager
def server(folder: pathlib.Path, **environ: str) -> Iterator[Server]:
    """Run serve.py beside the application in `folder`; end it after."""
    running = Server(folder, **environ)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait()


class Project:
    """A copy of the project in a folder of its own, whose images, containers and networks no other run has."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.folder = folder
        name = f"flask-helloworld-test-{uuid.uuid4().hex[:8]}"
        left_out = shutil.ignore_patterns(".git", ".venv", ".env", ".serve.*", "__pycache__", ".*_cache")
        shutil.copytree(ROOT, folder, ignore=left_out)
        # Another image name, so that an image of the user's own under the usual one stays what it is.
        override = f"services: {{web: {{image: {name}}}, test: {{image: {name}-tests}}}}\n"
        (folder / "override.yaml").write_text(override)
        self.environ = os.environ | {
            "COMPOSE_FILE": "compose.yaml:override.yaml",
            "COMPOSE_PROJECT_NAME": name,
            "BIND": "127.0.0.1",
            "PORT": "0",  # the engine takes a free one
        }
        # As a user's shell has it: this run's own virtual environment and make must not reach into the copy's.
        for variable in ("VIRTUAL_ENV", "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "REQUIRE_DOCKER"):
            self.environ.pop(variable, None)

    def run(self, *command: object, **options: object) -> subprocess.CompletedProcess:
        """Run a command in this copy."""
        environ = self.environ | options.pop("environ", {})
        return run(*command, cwd=self.folder, env=environ, **options)

    def build(self, *options: object, check: bool = True) -> subprocess.CompletedProcess:
        """Build this copy's image with docker, under the name that compose gives it here."""
        name = self.environ["COMPOSE_PROJECT_NAME"]
        return self.run("docker", "build", "--build-arg", "PYTHON_IMAGE", "--tag", name, *options, ".", check=check)

    def compose(self, *arguments: object, **options: object) -> subprocess.CompletedProcess:
        """Run a docker compose command in this copy."""
        return self.run("docker", "compose", *arguments, **options)

    def url(self) -> str:
        """Return where compose has published the service."""
        return "http://" + self.compose("port", "web", "5000").stdout.strip()
