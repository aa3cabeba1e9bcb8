"""The make targets in a copy of the project, without Docker."""

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
    pytest.skip("there is no make, or no Makefile", allow_module_level=True)

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
    """A copy of the project without a Docker Engine, on a free port; what it starts is stopped after the test."""
    environ = {"DOCKER_HOST": "unix:///nonexistent.sock", "PORT": str(free_port("127.0.0.1"))}
    project = Project(tmp_path / "a project", **environ)
    project.write({"app.py": APP.format(text="hello")})
    yield project
    project.run("scripts/without-docker", "down")


@pytest.fixture
def ready(bare: Project) -> Project:
    """Such a copy with a virtual environment, which uses this run's packages: installing them takes long."""
    venv.create(bare.folder / ".venv-runtime", symlinks=True)
    [packages] = bare.folder.glob(".venv-runtime/lib/*/site-packages")
    (packages / "own.pth").write_text(sysconfig.get_path("purelib"))
    (bare.folder / ".venv-runtime/ready").touch()
    return bare


def address(project: Project) -> tuple[str, int]:
    """Return the address that a copy serves on."""
    return "127.0.0.1", int(project.environ["PORT"])


def url(project: Project) -> str:
    """Return the URL that a copy serves on."""
    return "http://{}:{}".format(*address(project))


def replace_program(project: Project, name: str, script: str) -> None:
    """Put a shell script in place of a program, for commands in the copy."""
    project.write({f"bin/{name}": f"#!/bin/sh\n{script}\n"})
    (project.folder / "bin" / name).chmod(0o755)
    project.environ["PATH"] = f"{project.folder}/bin:{project.environ['PATH']}"


def test_help(bare: Project) -> None:
    """`make` alone lists all targets."""
    listed = bare.run("make").stdout
    [targets] = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    for target in targets.split():
        assert f"make {target} " in listed


@pytest.mark.slow
def test_up_creates_a_virtual_environment(bare: Project) -> None:
    """With make and Python alone, `make up` creates a virtual environment and serves from it."""
    bare.run("make", "up")
    assert get(url(bare) + "/health")[0] == 200


def test_up_and_down(ready: Project) -> None:
    """`make up` says that it runs without Docker and serves the current code; `make down` stops it, even without ps."""
    for text in ("one", "two"):
        ready.write({"app.py": APP.format(text=text)})
        done = ready.run("make", "up")
        assert done.stderr.startswith("No Docker Engine answers: serving from a virtual environment instead.\n")
        assert done.stdout.splitlines()[-1] == f"{url(ready)} (not in a container; log: .serve.log)"
        assert get(url(ready) + "/") == (200, text)
    (ready.folder / "bin").mkdir()
    for tool in ["make", "sh", "cat", "rm", "dirname", "date", "sleep", "grep", "tr"]:  # no ps, as in slim containers
        (ready.folder / "bin" / tool).symlink_to(shutil.which(tool))
    ready.run("make", "down", environ={"PATH": f"{ready.folder}/bin"})
    assert not listens(address(ready))


def test_up_without_a_base_image(ready: Project, engine: None) -> None:
    """If the base image is unavailable, `make up` says so and serves without Docker; it reports other build errors."""
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
    ids=["no /health", "crash"],
)
def test_up_reports_failures(ready: Project, app: str, reason: str) -> None:
    """If the application is unhealthy or crashes, `make up` fails, says why and leaves nothing running."""
    ready.write({"app.py": app})
    # The clock runs at double speed, because `make up` waits 15 s.
    replace_program(ready, "date", f"echo $(($({shutil.which('date')} +%s) * 2))")
    done = ready.run("make", "up", check=False)
    assert done.returncode != 0
    assert reason in done.stderr
    assert not listens(address(ready))


def test_up_on_a_taken_port(ready: Project) -> None:
    """If something else has the port, `make up` fails and says so, even if that is a healthy service."""
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


def test_env_file(ready: Project) -> None:
    """.env sets what is served, as with compose; environment variables take precedence."""
    ready.write({"mine/web.py": APP.format(text="from a folder") + "\n\ndef make():\n    return app\n"})
    text = "# mine\nLOG_LEVEL=debug\nTITLE=two words\nAPP_DIR='mine' # here\nexport APP=web:make() # a factory\n"
    (ready.folder / ".env").write_bytes(text.replace("\n", "\r\n").encode() + b"UID=1\nPORT=1")
    ready.run("make", "up")
    assert get(url(ready) + "/") == (200, "from a folder")


def test_down_spares_another_process(bare: Project) -> None:
    """If a restart gave the recorded process id to another process, `make down` leaves that process alone."""
    with subprocess.Popen([sys.executable, "-m", "http.server", "0"], stdout=subprocess.DEVNULL) as other:
        (bare.folder / ".serve.pid").write_text(f"{other.pid}\n")
        bare.run("make", "down")
        assert other.poll() is None
        other.terminate()
    assert not (bare.folder / ".serve.pid").exists()


def test_an_old_python_is_refused(bare: Project) -> None:
    """A Python that is too old is refused, with one line that says which version it needs."""
    # A python3 that claims to be 3.10.
    replace_program(bare, "python3", f'exec {sys.executable} -c "import sys; sys.version_info = (3, 10); $2"')
    done = bare.run("make", ".venv-runtime/ready", check=False)
    assert done.returncode != 0
    assert done.stderr.startswith("python3 is too old: needs 3.11 or later\n")
