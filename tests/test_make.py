"""The make targets in a copy of the project, with and without Docker."""

import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator

import pytest

from tests.support import ROOT, Project, get, wait_until

pytestmark = pytest.mark.skipif(not shutil.which("make"), reason="make is not installed")

NEW_PACKAGE = "humanize"
NEW_APP = """
import humanize
from flask import Flask

app = Flask(__name__)


@app.get("/")
def million():
    return humanize.intword(1_000_000)


@app.get("/health")
def health():
    return "ok"
"""


@pytest.fixture(scope="module")
def without_engine(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy of the project where no engine answers, for all tests here: its virtual environment is made once."""
    copy = Project(tmp_path_factory.mktemp("make") / "a project")
    copy.environ["DOCKER_HOST"] = "unix:///nonexistent.sock"
    return copy


@pytest.fixture
def no_engine(without_engine: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """That copy, on a port of its own; what `make up` starts ends with the test, and what it edits is undone."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    monkeypatch.setattr(without_engine, "environ", without_engine.environ | {"PORT": str(port)})
    yield without_engine
    without_engine.run("make", "down")
    for name in ("app.py", "requirements.in"):
        shutil.copy2(ROOT / name, without_engine.folder)


def test_up_without_health(no_engine: Project) -> None:
    """An application that is not healthy is not up, without an engine as with one; why is said, nothing is left."""
    (no_engine.folder / "app.py").write_text("from flask import Flask\n\napp = Flask(__name__)\n")
    done = no_engine.run("make", "up", check=False)
    assert done.returncode != 0
    assert "404 NOT FOUND" in done.stderr
    with pytest.raises(OSError, match="refused"):
        get(f"http://127.0.0.1:{no_engine.environ['PORT']}/health")


@pytest.mark.parametrize(
    "line", ["PORT={}", 'PORT="{}"', "PORT='{}'", "PORT={} # a comment", "PORT=1\nPORT={}", "export PORT = {}"]
)
def test_reads_the_env_file(copy: Project, line: str) -> None:
    """Lines NAME=value in a file .env count without an engine too, and the environment comes before them."""
    copy.environ["BIND"] = ""
    del copy.environ["PORT"]
    (copy.folder / ".env").write_text(f"# comment\n{line.format(5001)}\nBIND=127.0.0.2\n")
    (copy.folder / "show.mk").write_text("include Makefile\nshow: ; @echo '$(BIND):$(PORT)'\n")
    show = ["make", "-f", "show.mk", "show"]
    assert copy.run(*show).stdout == "127.0.0.2:5001\n"
    assert copy.run(*show, environ={"PORT": "5002"}).stdout == "127.0.0.2:5002\n"
    assert copy.run(*show, "PORT=5003").stdout == "127.0.0.2:5003\n"


def test_prints_its_commands(copy: Project) -> None:
    """`make` alone prints every command that the README names, and does nothing."""
    printed = set(re.findall(r"^make (\w+)", copy.run("make").stdout, re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+)`", (ROOT / "README.md").read_text()))
    assert {"up", "down", "serve", "test", "lock", "upgrade", "check"} <= named <= printed


def test_up_and_down_without_an_engine(no_engine: Project) -> None:
    """Without an engine `make up` says so and serves from the lock, a second time anew; `down` ends it."""
    url = f"http://127.0.0.1:{no_engine.environ['PORT']}"
    done = no_engine.run("make", "up")
    assert done.stdout.splitlines() == ["No Docker Engine answers: serving from a virtual environment instead.", url]
    assert get(url + "/health")[0] == 200
    no_engine.run("make", "up")
    assert get(url + "/health")[0] == 200
    no_engine.run("make", "down")
    with pytest.raises(OSError, match="refused"):
        get(url + "/health")


def test_up_serves_what_was_edited(no_engine: Project) -> None:
    """`make up` after an edit, in a folder with a space in its name, serves the edit; the old log misleads nobody."""
    url = f"http://127.0.0.1:{no_engine.environ['PORT']}"
    for text in ("one", "two", "three"):
        (no_engine.folder / "app.py").write_text(
            NEW_APP.replace("humanize.intword(1_000_000)", f"{text!r}").replace("import humanize\n", "")
        )
        no_engine.run("make", "up")
        assert get(url + "/") == (200, text)


def test_down_without_ps(no_engine: Project, tmp_path: pathlib.Path) -> None:
    """`make down` ends the server where there is no ps, as in slim containers."""
    for tool in ("make", "sh", "cat", "rm", "grep", "sleep", "nohup", "sed", "tail", "touch"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    no_engine.run("make", "up")
    no_engine.run("make", "down", environ={"PATH": str(tmp_path)})
    with pytest.raises(OSError, match="refused"):
        get(f"http://127.0.0.1:{no_engine.environ['PORT']}/health")


def test_serve(no_engine: Project) -> None:
    """`make serve` serves in the foreground until it is interrupted."""
    port = no_engine.environ["PORT"]
    options = {"cwd": no_engine.folder, "env": no_engine.environ, "start_new_session": True}
    with subprocess.Popen(
        ["make", "serve"], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, **options
    ) as process:
        try:
            wait_until(lambda: answers(f"http://127.0.0.1:{port}/health"), 60, "an answer")
        finally:
            os.killpg(process.pid, signal.SIGINT)
        process.wait(30)
    assert not answers(f"http://127.0.0.1:{port}/health")


def answers(url: str) -> bool:
    """Tell whether there is an answer 200."""
    try:
        return get(url)[0] == 200
    except OSError:
        return False


def test_dry_run_starts_nothing(no_engine: Project) -> None:
    """`make --dry-run up` only prints."""
    no_engine.run("make", "--dry-run", "up")
    assert not answers(f"http://127.0.0.1:{no_engine.environ['PORT']}/health")


def test_up_says_why_not(project: Project) -> None:
    """If the container does not get healthy, `make up` ends with what the server has logged."""
    (project.folder / "app.py").write_text("raise RuntimeError('no database')\n")
    done = project.run("make", "up", check=False)
    assert done.returncode != 0
    assert "RuntimeError: no database" in done.stderr


def test_lock_mends_a_broken_lock(project: Project) -> None:
    """`make lock` needs a requirements.txt that can be installed no more than one that is there."""
    (project.folder / "requirements.txt").unlink()
    project.run("make", "lock")
    names = re.compile(r"^\S+(?===)", re.MULTILINE)
    assert names.findall((project.folder / "requirements.txt").read_text()) == names.findall(
        (ROOT / "requirements.txt").read_text()
    )


def test_lock_without_an_engine(no_engine: Project) -> None:
    """Without an engine `make lock` says which Python it locks with instead, and changes no byte here."""
    done = no_engine.run("make", "lock")
    assert "No Docker Engine answers: locking with python3 instead." in done.stdout
    for name in ("requirements.txt", "requirements-dev.txt"):
        assert (no_engine.folder / name).read_bytes() == (ROOT / name).read_bytes()


def test_up_without_an_engine_on_a_taken_port(no_engine: Project) -> None:
    """If something else answers on the port, healthy even, `make up` fails with the server's own line."""
    with socket.create_server(("127.0.0.1", int(no_engine.environ["PORT"]))):
        done = no_engine.run("make", "up", check=False)
    assert done.returncode != 0
    assert f"serve: cannot listen on 127.0.0.1:{no_engine.environ['PORT']}: Address already in use" in done.stderr


def test_up_without_a_base_image(no_engine: Project, engine: None) -> None:
    """With an engine but no base image to be had, `make up` says so in one line and serves all the same."""
    del no_engine.environ["DOCKER_HOST"]  # this test's own: monkeypatch gives the next one another
    no_engine.environ["PYTHON_IMAGE"] = "registry.invalid/no-such-image"
    done = no_engine.run("make", "up")
    assert "registry.invalid/no-such-image can neither be found nor pulled: serving from a virtual" in done.stdout
    assert get(f"http://127.0.0.1:{no_engine.environ['PORT']}/health")[0] == 200


def test_a_new_dependency(project: Project) -> None:
    """A line in requirements.in, plain pip-compile, an app.py of one's own: `make up` serves it with the package."""
    (project.folder / "app.py").write_text(NEW_APP)
    with (project.folder / "requirements.in").open("a") as requirements:
        requirements.write(f"{NEW_PACKAGE}\n")
    project.run("make", ".venv/dev")
    project.run(".venv/bin/pip-compile")
    lock = (project.folder / "requirements.txt").read_text()
    before = (ROOT / "requirements.txt").read_text()
    added = [line for line in lock.splitlines() if line not in before]
    assert added[0].startswith(f"{NEW_PACKAGE}==")
    assert set(before.splitlines()) <= set(lock.splitlines())
    done = project.run("make", "up")
    assert done.stdout.splitlines()[-1] == project.url()
    assert get(project.url() + "/") == (200, "1.0 million")
    project.run("make", "down")
    assert project.compose("ps", "--all", "--quiet").stdout == ""


def test_lock_in_the_image(project: Project) -> None:
    """`make lock` pins with the image's Python and changes nothing where nothing new is asked for, not a byte."""
    locks = {name: (ROOT / name).read_bytes() for name in ("requirements.txt", "requirements-dev.txt")}
    project.run("make", "lock")
    assert {name: (project.folder / name).read_bytes() for name in locks} == locks


def test_check_finds_drift(no_engine: Project) -> None:
    """`make check` passes as it is and fails, naming the line, if a lock is not what its .in file asks for."""
    no_engine.run("make", "check")
    with (no_engine.folder / "requirements.in").open("a") as requirements:
        requirements.write("click\n")
    done = no_engine.run("make", "check", check=False)
    assert done.returncode != 0
    assert re.search(r"^lock: requirements.txt:\d+: not as pip-compile writes it$", done.stderr, re.MULTILINE)
    assert "if that is no surprise: make lock" in done.stderr


def test_old_python(copy: Project) -> None:
    """A Python that is too old is refused in one line that says which to name."""
    old = copy.folder / "old-python"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    done = copy.run("make", "serve", f"PYTHON={old}", check=False)
    assert done.returncode != 0
    assert f"{old} is not Python 3.11 or later" in done.stderr
