"""`make dev`: what is edited is served; a syntax error, a changed lock and Ctrl-C end as one expects."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPException

import pytest

from tests.support import ROOT, Project, free_port, get, run, wait_until

if not (ROOT / "Makefile").exists():
    pytest.skip("the image has no Makefile", allow_module_level=True)

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
        with suppress(OSError, HTTPException, AssertionError):  # nothing runs yet, or for a moment nothing
            answered, body = get(self.project.url("dev") + "/")
            return answered == status and text in body
        return False

    def until(self, text: str, seconds: int = 20, status: int = 200) -> None:
        """Wait until `/` is answered with a text."""
        try:
            wait_until(lambda: self.answers(text, status), seconds, repr(text))
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
    project.write({"app.py": APP, "templates/hello.html": "one {{ greeting }}"})
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
    """Code, a template, a new module, the mending of a syntax error: each edit is served without a word."""
    project, container = dev.project, dev.container()
    project.write({"templates/hello.html": "two {{ greeting }}"})
    dev.until("two hello")
    project.write({"app.py": APP.replace('"hello")', '"three")')})
    dev.until("two three")
    project.write({"more.py": "GREETING = 'four'\n"})
    project.write({"app.py": f"import more\n{APP}".replace('"hello")', "more.GREETING)")})
    dev.until("two four")
    project.write({"app.py": "app = (\n"})
    dev.until("was never closed", status=500)
    assert "SyntaxError: '(' was never closed" in dev.log.read_text()
    project.write({"app.py": APP.replace('"hello")', '"well")')})
    dev.until("two well")
    assert dev.container() == container


def test_a_changed_lock_rebuilds(dev: Dev) -> None:
    """A package that a lock has got is there a moment later; that the application failed until then is no hindrance."""
    before = dev.container()
    dev.project.write({"app.py": f"import humanize\n{APP}".replace('"hello")', "humanize.intword(10**6))")})
    dev.until("No module named", status=500)
    with (dev.project.folder / "requirements.in").open("a") as requirements:
        requirements.write("humanize\n")
    dev.project.run(sys.executable, "-m", "piptools", "compile", "--quiet")
    dev.until("one 1.0 million", 120)
    assert dev.container() != before


def test_it_is_for_this_machine_alone(dev: Dev) -> None:
    """It is published on 127.0.0.1 whatever BIND says, cannot write to the folder, and ends with Ctrl-C."""
    [facts] = json.loads(run("docker", "inspect", dev.container()).stdout)
    [published] = facts["NetworkSettings"]["Ports"]["5000/tcp"]
    assert published["HostIp"] == "127.0.0.1"
    assert facts["HostConfig"]["ReadonlyRootfs"] is True
    assert facts["HostConfig"]["RestartPolicy"]["Name"] == "no"
    assert [mount["RW"] for mount in facts["Mounts"] if mount["Destination"] == "/src"] == [False]
    dev.interrupt()
    dev.process.wait(60)
    assert dev.container() == ""
