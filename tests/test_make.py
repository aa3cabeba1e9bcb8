"""The make targets in a copy of the project, on a machine without Docker."""

import pathlib
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator

import pytest

from tests.support import ROOT, Project, free_port, get, listens

if not (shutil.which("make") and (ROOT / "Makefile").exists()):
    pytest.skip("make or the Makefile is not here", allow_module_level=True)

APP = """
from flask import Flask

app = Flask(__name__)


@app.get("/")
def hello():
    return {text!r}


@app.get("/health")
def health():
    return "ok"
"""


@pytest.fixture
def bare(tmp_path: pathlib.Path) -> Iterator[Project]:
    """A copy of the project where no engine answers, on a port of its own; what it has started ends with the test."""
    environ = {"DOCKER_HOST": "unix:///nonexistent.sock", "PORT": str(free_port("127.0.0.1"))}
    project = Project(tmp_path / "a project", **environ)
    yield project
    project.run("scripts/without-docker", "down")


@pytest.fixture
def ready(bare: Project) -> Project:
    """Such a copy with a virtual environment: one that has this run's own packages, as to install them takes long."""
    venv.create(bare.folder / ".venv-runtime", symlinks=True)
    [packages] = bare.folder.glob(".venv-runtime/lib/*/site-packages")
    (packages / "own.pth").write_text(sysconfig.get_path("purelib"))
    (bare.folder / ".venv-runtime/ready").touch()
    return bare


def address(project: Project) -> tuple[str, int]:
    """Return where it serves."""
    return "127.0.0.1", int(project.environ["PORT"])


def url(project: Project) -> str:
    """Return its address as a URL."""
    return "http://{}:{}".format(*address(project))


def replace_program(project: Project, name: str, script: str) -> None:
    """Let commands in a copy of the project find this shell script under the name of a program."""
    project.write({f"bin/{name}": f"#!/bin/sh\n{script}\n"})
    (project.folder / "bin" / name).chmod(0o755)
    project.environ["PATH"] = f"{project.folder}/bin:{project.environ['PATH']}"


def test_help(bare: Project) -> None:
    """`make` alone lists the targets with what they do."""
    listed = bare.run("make").stdout
    [targets] = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in targets.split():
        assert f"make {target} " in listed


@pytest.mark.slow
def test_up_installs_what_it_takes(bare: Project) -> None:
    """Where there is only make and Python, `make up` makes a virtual environment, and serves from it."""
    bare.run("make", "up")
    assert get(url(bare) + "/health")[0] == 200


def test_up_and_down(ready: Project) -> None:
    """`make up` says so and serves, each time what is there by then; `make down` ends it, also where there is no ps."""
    for text in ("one", "two"):
        ready.write({"app.py": APP.format(text=text)})
        done = ready.run("make", "up")
        assert done.stderr.startswith("No Docker Engine answers: serving from a virtual environment instead.\n")
        assert done.stdout.splitlines()[-1] == f"{url(ready)} (not in a container; log: .serve.log)"
        assert get(url(ready) + "/") == (200, text)
    (ready.folder / "bin").mkdir()
    for tool in ["make", "sh", "cat", "rm", "dirname", "date", "sleep", "grep", "tr"]:  # as in slim containers
        (ready.folder / "bin" / tool).symlink_to(shutil.which(tool))
    ready.run("make", "down", environ={"PATH": f"{ready.folder}/bin"})
    assert not listens(address(ready))


def test_up_without_a_base_image(ready: Project, engine: None) -> None:
    """With an engine but no base image to be had, `make up` says so and serves all the same; a mistake it reports."""
    del ready.environ["DOCKER_HOST"]
    ready.environ["PYTHON_IMAGE"] = "registry.invalid/no-such-image"
    done = ready.run("make", "up")
    assert "The base image can neither be found nor pulled: serving from a virtual environment" in done.stderr
    assert get(url(ready) + "/health")[0] == 200
    ready.append("Dockerfile", "\nNONSENSE\n")
    done = ready.run("make", "up", check=False)
    assert done.returncode != 0
    assert "unknown instruction: NONSENSE" in done.stderr


@pytest.mark.parametrize(
    ("app", "reason"),
    [
        ("from flask import Flask\n\napp = Flask(__name__)\n", "unhealthy: answered b'HTTP/1.0 404"),
        ("raise RuntimeError('no database')\n", "RuntimeError: no database"),
    ],
    ids=["no /health", "a crash"],
)
def test_up_says_why_not(ready: Project, app: str, reason: str) -> None:
    """An application that is not healthy is not up: why is said, and nothing is left."""
    ready.write({"app.py": app})
    # A clock that goes twice as fast: `make up` waits 15 s.
    replace_program(ready, "date", f"echo $(($({shutil.which('date')} +%s) * 2))")
    done = ready.run("make", "up", check=False)
    assert done.returncode != 0
    assert reason in done.stderr
    assert not listens(address(ready))


def test_up_on_a_taken_port(ready: Project) -> None:
    """If something else has the port, `make up` fails and says so; it never takes that for its own."""
    with socket.create_server(address(ready)):
        done = ready.run("make", "up", check=False)
    assert done.returncode != 0
    assert "serve: cannot listen on {}:{}: Address already in use".format(*address(ready)) in done.stderr
    ready.run("make", "up")
    (ready.folder / ".serve.pid").rename(ready.folder / ".serve.pid.other")
    done = ready.run("make", "up", check=False)
    (ready.folder / ".serve.pid.other").rename(ready.folder / ".serve.pid")
    assert done.returncode != 0
    assert f"PORT={ready.environ['PORT']} is taken: something answers there" in done.stderr


def test_the_env_file_counts(ready: Project) -> None:
    """.env says what to serve and where, as for compose; the environment comes first."""
    ready.write({"mine/web.py": APP.format(text="from a folder") + "\n\ndef make():\n    return app\n"})
    text = "# mine\nLOG_LEVEL=debug\nTITLE=two words\nAPP_DIR='mine' # here\nexport APP=web:make() # a factory\n"
    (ready.folder / ".env").write_bytes(text.replace("\n", "\r\n").encode() + b"UID=1\nPORT=1")
    ready.run("make", "up")
    assert get(url(ready) + "/") == (200, "from a folder")


def test_down_spares_another_process(bare: Project) -> None:
    """A number that a restart of the machine has given to another process, a server even, ends nobody."""
    with subprocess.Popen([sys.executable, "-m", "http.server", "0"], stdout=subprocess.DEVNULL) as other:
        (bare.folder / ".serve.pid").write_text(f"{other.pid}\n")
        bare.run("make", "down")
        assert other.poll() is None
        other.terminate()
    assert not (bare.folder / ".serve.pid").exists()


def test_an_old_python_is_refused(bare: Project) -> None:
    """A Python that is too old is refused in one line that says what it takes."""
    # A python3 that says it is 3.10.
    replace_program(bare, "python3", f'exec {sys.executable} -c "import sys; sys.version_info = (3, 10); $2"')
    done = bare.run("make", ".venv-runtime/ready", check=False)
    assert done.returncode != 0
    assert done.stderr.startswith("python3 is too old: needs 3.11 or later\n")
