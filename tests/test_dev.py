"""`make dev`: what is edited is served; a syntax error, a changed lock and Ctrl-C end as one expects."""

import json
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress

import pytest

from tests.support import ROOT, Project, free_port, get, listens, run, wait_until

if not (ROOT / "tools").is_dir():
    pytest.skip("the image has no tools", allow_module_level=True)

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
        self.project = project
        self.log = project.folder / "dev.log"
        with self.log.open("w") as log:
            options = {"cwd": project.folder, "env": project.environ, "start_new_session": True}
            self.process = subprocess.Popen(
                ["make", "dev"], stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, **options
            )

    def answers(self, text: str, status: int = 200) -> bool:
        """Tell whether `/` is answered with a status and a text in it."""
        with suppress(OSError, AssertionError):  # nothing runs yet, or for a moment nothing
            answered, body = get(self.project.url("dev") + "/")
            return answered == status and text in body
        return False

    def until(self, text: str, seconds: int = 10) -> None:
        """Wait until `/` is answered with a text: after an edit some seconds, on a machine that has other work too."""
        try:
            wait_until(lambda: self.answers(text), seconds, repr(text))
        except AssertionError as late:
            raise AssertionError(f"{late}; its log: {self.log.read_text()[-2000:]}") from None

    def container(self) -> str:
        """Return the id of the container that runs."""
        return self.project.compose("ps", "--quiet", "dev", check=False).stdout.strip()

    def interrupt(self) -> None:
        """Send what Ctrl-C does."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGINT)


@pytest.fixture
def dev(project: Project) -> Iterator[Dev]:
    """`make dev` with an application that has a template, in a folder that is readable for its owner alone."""
    (project.folder / "app.py").write_text(APP)
    (project.folder / "templates").mkdir()
    (project.folder / "templates" / "hello.html").write_text("one {{ greeting }}")
    for path in [project.folder, *project.folder.rglob("*")]:
        path.chmod(path.stat().st_mode & 0o700)
    project.environ |= {"PORT": str(free_port("127.0.0.1")), "BIND": "0.0.0.0"}
    running = Dev(project)
    try:
        running.until("one hello", 120)
        yield running
    finally:
        running.interrupt()
        running.process.wait(60)


def test_edits_are_served(dev: Dev) -> None:
    """Code, a template, a module that is new: each edit is served without a word."""
    folder, container = dev.project.folder, dev.container()
    (folder / "templates" / "hello.html").write_text("two {{ greeting }}")
    dev.until("two hello")
    (folder / "app.py").write_text(APP.replace('"hello")', '"three")'))
    dev.until("two three")
    (folder / "more.py").write_text("GREETING = 'four'\n")
    (folder / "app.py").write_text(f"import more\n{APP}".replace('"hello")', "more.GREETING)"))
    dev.until("two four")
    (folder / "more.py").write_text("GREETING = 'five'\n")
    dev.until("two five")
    assert dev.container() == container


def test_a_syntax_error_is_said(dev: Dev) -> None:
    """A syntax error stands in the log and in the answer, and the next good save is served."""
    (dev.project.folder / "app.py").write_text("app = (\n")
    wait_until(lambda: dev.answers("was never closed", 500), 60, "the error in the answer")
    assert "SyntaxError: '(' was never closed" in dev.log.read_text()
    (dev.project.folder / "app.py").write_text(APP.replace('"hello")', '"well")'))
    dev.until("one well")


def test_a_changed_lock_rebuilds(dev: Dev) -> None:
    """A package that a lock has got is there a moment later; that the application failed until then is no hindrance."""
    before = dev.container()
    (dev.project.folder / "app.py").write_text(
        f"import humanize\n{APP}".replace('"hello")', "humanize.intword(10**6))")
    )
    wait_until(lambda: dev.answers("No module named", 500), 60, "the error in the answer")
    with (dev.project.folder / "requirements.in").open("a") as requirements:
        requirements.write("humanize\n")
    dev.project.run("make", "lock")
    dev.until("one 1.0 million", 120)
    assert dev.container() != before


def test_it_is_for_this_machine_alone(dev: Dev) -> None:
    """It is published on 127.0.0.1 whatever BIND says, cannot write to the folder, and ends with Ctrl-C."""
    [facts] = json.loads(run("docker", "inspect", dev.container()).stdout)
    [published] = facts["NetworkSettings"]["Ports"]["5000/tcp"]
    assert published["HostIp"] == "127.0.0.1"
    assert facts["HostConfig"]["ReadonlyRootfs"] is True
    assert [mount["RW"] for mount in facts["Mounts"] if mount["Destination"] == "/app"] == [False]
    dev.interrupt()
    dev.process.wait(60)
    assert dev.container() == ""


def test_it_takes_the_place_of_up(project: Project) -> None:
    """After `make up`, on the same port, `make dev` serves; `make down` leaves nothing of either."""
    project.environ["PORT"] = str(free_port("127.0.0.1"))
    project.run("make", "up")
    running = Dev(project)
    try:
        running.until("Hello", 120)
    finally:
        running.interrupt()
        running.process.wait(60)
    project.run("make", "down")
    assert project.compose("--profile", "*", "ps", "--all", "--quiet").stdout == ""


def test_without_an_engine(copy: Project) -> None:
    """Without an engine it serves from a virtual environment, on this machine alone too, whatever Flask is told."""
    port = free_port("127.0.0.1")
    copy.environ |= {"DOCKER_HOST": "unix:///nonexistent.sock", "PORT": str(port), "FLASK_RUN_HOST": "0.0.0.0"}
    copy.run("make", ".venv/runtime")
    running = Dev(copy)
    try:
        wait_until(lambda: listens(("127.0.0.1", port)), 30, "it to listen")
        assert get(f"http://127.0.0.1:{port}/health")[0] == 200
        assert not listens(("127.0.0.2", port))
    finally:
        running.interrupt()
        running.process.wait(60)


def test_in_no_image(image: str) -> None:
    """Nothing of it is in an image: neither its command nor what makes Flask debug."""
    [facts] = json.loads(run("docker", "image", "inspect", image).stdout)
    assert facts["Config"]["Cmd"] == ["python", "-m", "serve"]
    assert not [variable for variable in facts["Config"]["Env"] if "FLASK" in variable or "DEBUG" in variable]
