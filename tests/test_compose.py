"""docker compose on a copy of the project: up and down, limits, the tests inside the image, `make dev`."""

import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from http.client import HTTPException

import pytest

from tests.support import ROOT, Project, edit, free_port, get, inspect, many_files, python, wait_until

if not (ROOT / "compose.yaml").exists():
    pytest.skip("the image has no compose.yaml", allow_module_level=True)


def container_of(project: Project, service: str = "web") -> str:
    """Return the id of a service's running container; empty if there is none."""
    return project.compose("ps", "--quiet", service, check=False).stdout.strip()


# ---- The service -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def up(base: str, target: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A copy of the project whose service is up, shared by tests that do not change it."""
    with Project(tmp_path_factory.mktemp("up") / "project", PYTHON_IMAGE=base, TARGET=target) as project:
        project.compose("up", "--build", "--wait")
        yield project


def test_up_serves(up: Project) -> None:
    """After `up --wait` it serves: on 127.0.0.1 only, and to other containers under the name `web`."""
    assert up.url().startswith("http://127.0.0.1:")
    assert get(up.url() + "/health")[0] == 200
    code = "import urllib.request; print(urllib.request.urlopen('http://web:5000/health').status)"
    assert up.compose("run", "--rm", "--no-TTY", "web", "python", "-c", code).stdout == "200\n"


def test_read_only_unprivileged_and_limited(up: Project, target: str) -> None:
    """It can write only to /tmp, has no privileges and can gain none; memory, CPU and processes are limited."""
    name = container_of(up)
    host = inspect(name, ".HostConfig")
    assert (host["Tmpfs"], host["CapDrop"]) == ({"/tmp": "size=64m"}, ["ALL"])
    assert (host["Memory"], host["NanoCpus"], host["PidsLimit"]) == (256 * 1024 * 1024, 1_000_000_000, 100)
    assert (host["SecurityOpt"], host["RestartPolicy"]["Name"]) == (["no-new-privileges:true"], "unless-stopped")
    assert inspect(name, ".Config.StopTimeout") > 10
    code = """
        import os, shutil
        print([path for path in ("/", "/app", "/tmp") if os.access(path, os.W_OK)])
        print([line for line in open("/proc/1/status") if line.startswith(("CapEff", "NoNewPrivs"))])
        print(bool(shutil.which("sh")))
        """
    writable, process, shell = python(name, code).splitlines()
    assert writable == "['/tmp']"
    assert process == r"['CapEff:\t0000000000000000\n', 'NoNewPrivs:\t1\n']"
    assert shell == str(target == "runtime")  # so TARGET has reached the build


@pytest.mark.parametrize("target", ["runtime"], indirect=True)
@pytest.mark.parametrize(("clients", "size"), [(700, 500_000), (1900, 32_000)])
def test_many_unfinished_uploads(up: Project, clients: int, size: int) -> None:
    """Unfinished uploads, many or large, neither get the service killed nor keep other clients out."""
    name = container_of(up)
    [network] = inspect(name, ".NetworkSettings.Networks").values()
    unfinished = f"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {size}\r\n\r\n".encode() + bytes(size - 1)
    with many_files(), ExitStack() as stack:
        for _ in range(clients):
            client = stack.enter_context(socket.create_connection((network["IPAddress"], 5000), 20))
            with suppress(OSError):  # some are refused, for lack of space
                client.sendall(unfinished)
        assert get(up.url() + "/health")[0] == 200
    assert (inspect(name, ".State.OOMKilled"), inspect(name, ".RestartCount")) == (False, 0)


def test_env_file_stop_and_down(project: Project) -> None:
    """BIND and PORT in .env set the published address; `stop` ends with exit code 0; `down` removes all containers."""
    port = free_port("127.0.0.2")
    del project.environ["BIND"], project.environ["PORT"]
    project.write({".env": f"BIND=127.0.0.2\nPORT={port}\n"})
    project.compose("up", "--build", "--wait")
    assert project.url() == f"http://127.0.0.2:{port}"
    assert get(project.url() + "/health")[0] == 200
    name = container_of(project)
    project.compose("stop")
    assert inspect(name, ".State.ExitCode") == 0
    project.compose("down")
    assert project.compose("ps", "--all", "--quiet").stdout == ""


def test_defaults(copy: Project, engine: None) -> None:
    """By default, compose builds `runtime` on the Dockerfile's own base and publishes it at 127.0.0.1:5000."""
    for variable in ("BIND", "PORT", "PYTHON_IMAGE", "TARGET"):
        copy.environ.pop(variable, None)
    web = json.loads(copy.compose("config", "--format", "json").stdout)["services"]["web"]
    assert (web["image"], web["build"]["target"], web["build"].get("args")) == (copy.name, "runtime", None)
    assert (web["ports"][0]["host_ip"], web["ports"][0]["published"]) == ("127.0.0.1", "5000")


def test_dev_and_test_are_isolated(copy: Project, engine: None) -> None:
    """Even if BIND opens the service, `dev` stays on 127.0.0.1; neither `dev` nor `test` mounts the service's data."""
    if "\n    volumes: [" not in (copy.folder / "compose.yaml").read_text():  # your application may have one
        edit(copy.folder / "compose.yaml", "^    read_only: true$", '    read_only: true\n    volumes: ["data:/data"]')
        copy.append("compose.yaml", "volumes: { data: }\n")
    config = copy.compose("--profile", "*", "config", "--format", "json", environ={"BIND": "0.0.0.0"}).stdout
    services = json.loads(config)["services"]
    published = {name: [port["host_ip"] for port in service.get("ports", [])] for name, service in services.items()}
    assert published == {"web": ["0.0.0.0"], "dev": ["127.0.0.1"], "test": []}
    volumes = {
        name: [(v["target"], v.get("read_only")) for v in services[name].get("volumes", [])] for name in services
    }
    assert volumes == {"web": [("/data", None)], "dev": [("/src", True)], "test": []}
    assert [services[name]["restart"] for name in ("web", "dev", "test")] == ["unless-stopped", "no", "no"]
    assert all(service["read_only"] for service in services.values())


@pytest.mark.slow
def test_the_tests_pass_in_the_image(project: Project) -> None:
    """`compose run test` passes in the image's own Python, even if only the owner can read the clone."""
    project.make_private()
    done = project.compose("run", "--build", "--rm", "--no-TTY", "test")
    assert " passed" in done.stdout  # so not all were skipped


# ---- make dev --------------------------------------------------------------------------------------------------------

APP = """
from flask import Flask, render_template

app = Flask(__name__)


@app.get("/")
def hello():
    return render_template("hello.html", greeting="hello")
"""


class Dev:
    """`make dev` in a copy of the project, in a process group of its own, as in a terminal."""

    def __init__(self, project: Project) -> None:
        """Start it; its output goes to a file."""
        self.project, self.log = project, project.folder / "dev.log"
        project.environ["PORT"] = str(free_port("127.0.0.1"))
        options = {"cwd": project.folder, "env": project.environ, "start_new_session": True}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                ["make", "dev"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, **options
            )

    def until(self, text: str, status: int = 200) -> None:
        """Wait until the response to `/` has this status and contains this text."""

        def matches() -> bool:
            with suppress(OSError, HTTPException):  # nothing listens yet, or during a reload
                actual, body = get(f"http://127.0.0.1:{self.project.environ['PORT']}/")
                if actual == status and text in body:
                    return True
            time.sleep(0.2)  # not more often: the debugger keeps each error in memory
            return False

        wait_until(matches, 120, repr(text))

    def interrupt(self) -> None:
        """Interrupt it as Ctrl-C does, and wait until it has ended."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGINT)
        self.process.wait(60)


@pytest.fixture
def dev(project: Project) -> Iterator[Dev]:
    """`make dev` with an application that has a template, in a folder that only its owner can read."""
    project.write({"app.py": APP, "templates/hello.html": "one {{ greeting }}"})
    project.make_private()
    running = Dev(project)
    try:
        running.until("one hello")
        yield running
    finally:
        running.interrupt()
        print(running.log.read_text()[-5000:])


def test_dev_serves_what_you_edit(dev: Dev) -> None:
    """One container serves each edit: a template, a new module, a syntax error and its fix. Ctrl-C stops it."""
    project, container = dev.project, container_of(dev.project, "dev")
    project.write({"templates/hello.html": "two {{ greeting }}"})
    dev.until("two hello")
    project.write(
        {"more.py": "GREETING = 'three'\n", "app.py": f"import more\n{APP}".replace('"hello")', "more.GREETING)")}
    )
    dev.until("two three")
    project.write({"app.py": "app = (\n"})
    dev.until("was never closed", status=500)
    wait_until(lambda: "SyntaxError: '(' was never closed" in dev.log.read_text(), 10, "the error in the log")
    project.write({"app.py": APP.replace('"hello")', '"well")')})
    dev.until("two well")
    assert container_of(project, "dev") == container
    dev.interrupt()
    assert container_of(project, "dev") == ""


@pytest.mark.slow
def test_dev_installs_newly_locked_packages(dev: Dev) -> None:
    """A package added to the lock is installed in a new container, even if the application fails until then."""
    before = container_of(dev.project, "dev")
    dev.project.write({"app.py": f"import iniconfig\n{APP}".replace('"hello")', "iniconfig.__name__)")})
    dev.until("No module named", status=500)
    [locked] = re.findall(r"^iniconfig==(?s:.)*?\n(?=\S)", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)
    dev.project.append("requirements.txt", locked)
    # No requests meanwhile: the debugger keeps each error, and two hundred fill the container's memory.
    wait_until(lambda: container_of(dev.project, "dev") not in ("", before), 300, "a new container")
    dev.until("one iniconfig")
