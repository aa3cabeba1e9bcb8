"""docker compose with a copy of the project: up, what its container may do, down; the tests inside; `make dev`."""

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
    """Return the id of the container that runs a service; empty if there is none."""
    return project.compose("ps", "--quiet", service, check=False).stdout.strip()


# ---- The service -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def up(base: str, target: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """A copy of the project whose service is up, for tests that leave it as it is."""
    with Project(tmp_path_factory.mktemp("up") / "project", PYTHON_IMAGE=base, TARGET=target) as project:
        project.compose("up", "--build", "--wait")
        yield project


def test_up_serves(up: Project) -> None:
    """After `up --wait` it serves: on 127.0.0.1 alone, and other containers by the name of the service."""
    assert up.url().startswith("http://127.0.0.1:")
    assert get(up.url() + "/health")[0] == 200
    code = "import urllib.request; print(urllib.request.urlopen('http://web:5000/health').status)"
    assert up.compose("run", "--rm", "--no-TTY", "web", "python", "-c", code).stdout == "200\n"


def test_read_only_unprivileged_and_bounded(up: Project, target: str) -> None:
    """It can write to /tmp alone, has no capabilities and cannot get any; memory, CPU and processes are bounded."""
    name = container_of(up)
    host = inspect(name, ".HostConfig")
    assert (host["Tmpfs"], host["CapDrop"]) == ({"/tmp": "size=64m"}, ["ALL"])
    assert (host["Memory"], host["NanoCpus"], host["PidsLimit"]) == (256 * 1024 * 1024, 1_000_000_000, 100)
    assert (host["SecurityOpt"], host["RestartPolicy"]["Name"]) == (["no-new-privileges:true"], "unless-stopped")
    assert inspect(name, ".Config.StopTimeout") > 10
    code = """
        import os, shutil
        print([path for path in ("/", "/app", "/data", "/tmp") if os.access(path, os.W_OK)])
        print([line for line in open("/proc/1/status") if line.startswith(("CapEff", "NoNewPrivs"))])
        print(bool(shutil.which("sh")))
        """
    writable, process, shell = python(name, code).splitlines()
    assert writable == "['/tmp']"
    assert process == r"['CapEff:\t0000000000000000\n', 'NoNewPrivs:\t1\n']"
    assert shell == str(target == "runtime")  # TARGET has reached the build


@pytest.mark.parametrize("target", ["runtime"], indirect=True)
@pytest.mark.parametrize(("clients", "size"), [(700, 500_000), (1900, 32_000)])
def test_many_unfinished_uploads(up: Project, clients: int, size: int) -> None:
    """Clients that stop in the middle of their uploads, many or large, neither get it killed nor keep others out."""
    name = container_of(up)
    [network] = inspect(name, ".NetworkSettings.Networks").values()
    half = f"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {size}\r\n\r\n".encode() + bytes(size - 1)
    with many_files(), ExitStack() as stack:
        for _ in range(clients):
            client = stack.enter_context(socket.create_connection((network["IPAddress"], 5000), 20))
            with suppress(OSError):  # some are refused, for lack of room
                client.sendall(half)
        assert get(up.url() + "/health")[0] == 200
    assert (inspect(name, ".State.OOMKilled"), inspect(name, ".RestartCount")) == (False, 0)


def test_env_says_where_and_down_removes(project: Project) -> None:
    """BIND and PORT of .env say where it is published; `stop` lets it end by itself, `down` leaves nothing."""
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
    """With nothing set, it is 127.0.0.1:5000 and the Dockerfile's own base image."""
    for variable in ("BIND", "PORT", "PYTHON_IMAGE", "COMPOSE_FILE", "TARGET"):
        copy.environ.pop(variable, None)
    web = json.loads(copy.compose("config", "--format", "json").stdout)["services"]["web"]
    assert (web["image"], web["build"]["target"], web["build"].get("args")) == ("flask-helloworld", "runtime", None)
    assert (web["ports"][0]["host_ip"], web["ports"][0]["published"]) == ("127.0.0.1", "5000")


def test_dev_and_test_are_kept_apart(copy: Project, engine: None) -> None:
    """The debugger stays on this machine even if BIND opens the service; neither dev nor test gets its data."""
    edit(copy.folder / "compose.yaml", "^    read_only: true$", '    read_only: true\n    volumes: ["data:/data"]')
    edit(copy.folder / "compose.yaml", "^secrets:$", "volumes: { data: }\nsecrets:")
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
def test_the_tests_pass_inside_of_the_image(project: Project) -> None:
    """The profile `test` runs, in the image's own Python, every test that needs no engine, from a private clone too."""
    project.make_private()
    done = project.compose("run", "--build", "--rm", "--no-TTY", "test")
    assert " passed" in done.stdout  # or all may have been skipped


# ---- make dev --------------------------------------------------------------------------------------------------------

APP = """
from flask import Flask, render_template

app = Flask(__name__)


@app.get("/")
def hello():
    return render_template("hello.html", greeting="hello")
"""


class Dev:
    """`make dev` in a copy of the project, in the foreground of a terminal of its own."""

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
        """Wait until `/` is answered with a status and a text in it."""

        def answers() -> bool:
            with suppress(OSError, HTTPException):  # nothing listens yet, or for a moment nothing
                answered, body = get(f"http://127.0.0.1:{self.project.environ['PORT']}/")
                if answered == status and text in body:
                    return True
            time.sleep(0.2)  # the debugger keeps each error in memory
            return False

        wait_until(answers, 120, repr(text))

    def interrupt(self) -> None:
        """Do what Ctrl-C does."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGINT)
        self.process.wait(60)


@pytest.fixture
def dev(project: Project) -> Iterator[Dev]:
    """`make dev` with an application that has a template, in a folder that is readable for its owner alone."""
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
    """Code, a template, a new module, the mending of a syntax error: each edit is served; Ctrl-C leaves nothing."""
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
def test_dev_installs_what_the_lock_gets(dev: Dev) -> None:
    """A package that a lock has got is there a moment later; that the application failed until then is no hindrance."""
    before = container_of(dev.project, "dev")
    dev.project.write({"app.py": f"import iniconfig\n{APP}".replace('"hello")', "iniconfig.__name__)")})
    dev.until("No module named", status=500)
    [locked] = re.findall(r"^iniconfig==(?s:.)*?\n(?=\S)", (ROOT / "requirements-dev.txt").read_text(), re.MULTILINE)
    dev.project.append("requirements.txt", locked)
    # Not asking meanwhile: the debugger keeps each error, and two hundred of them fill the container's memory.
    wait_until(lambda: container_of(dev.project, "dev") not in ("", before), 300, "another container")
    dev.until("one iniconfig")
