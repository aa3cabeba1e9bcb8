"""The make targets in a copy of the project, with and without Docker."""

import pathlib
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.support import ROOT, Project, free_port, get

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


@pytest.fixture(scope="module")
def without_engine(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A copy of the project where no engine answers, for all tests here: its virtual environment is made once."""
    copy = Project(tmp_path_factory.mktemp("make") / "a project")
    copy.environ["DOCKER_HOST"] = "unix:///nonexistent.sock"
    return copy


@pytest.fixture
def no_engine(without_engine: Project, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    """That copy, on a port of its own; what `make up` starts ends with the test, and what it edits is undone."""
    port = str(free_port("127.0.0.1"))
    monkeypatch.setattr(without_engine, "environ", without_engine.environ | {"PORT": port})
    yield without_engine
    without_engine.run("make", "down")
    (without_engine.folder / ".env").unlink(missing_ok=True)
    shutil.copy2(ROOT / "app.py", without_engine.folder)


def gone(url: str) -> bool:
    """Tell whether nobody listens there."""
    try:
        get(url)
    except OSError as error:
        return "refused" in str(error)
    return False


def test_help(no_engine: Project) -> None:
    """`make` alone lists the targets with what they do."""
    listed = no_engine.run("make").stdout
    for target in ["up", "down", "dev", "test", "check", "lock", "upgrade", "wheels", "reproduce", "bench"]:
        assert f"make {target} " in listed


def test_up_and_down_without_an_engine(no_engine: Project) -> None:
    """Without an engine `make up` says so and serves, each time what is there by then; `make down` ends it."""
    url = f"http://127.0.0.1:{no_engine.environ['PORT']}"
    for text in ("one", "two"):
        (no_engine.folder / "app.py").write_text(APP.format(text=text))
        done = no_engine.run("make", "up")
        assert done.stderr.startswith("No Docker Engine answers: serving from a virtual environment instead.\n")
        assert done.stdout.splitlines()[-1] == f"{url} (not in a container; log: .serve.log)"
        assert get(url + "/") == (200, text)
    no_engine.run("make", "down")
    assert gone(url)


def test_up_without_a_base_image(no_engine: Project, engine: None) -> None:
    """With an engine but no base image to be had, `make up` says so and serves all the same; a mistake it reports."""
    del no_engine.environ["DOCKER_HOST"]  # this test's own: monkeypatch gives the next one another
    no_engine.environ["PYTHON_IMAGE"] = "registry.invalid/no-such-image"
    done = no_engine.run("make", "up")
    assert "The base image can neither be found nor pulled: serving from a virtual environment" in done.stderr
    assert get(f"http://127.0.0.1:{no_engine.environ['PORT']}/health")[0] == 200
    no_engine.run("make", "down")
    with (no_engine.folder / "Dockerfile").open("a") as dockerfile:
        dockerfile.write("\nNONSENSE\n")
    done = no_engine.run("make", "up", check=False)
    shutil.copy2(ROOT / "Dockerfile", no_engine.folder)
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
def test_up_says_why_not(no_engine: Project, app: str, reason: str) -> None:
    """An application that is not healthy is not up: why is said, and nothing is left."""
    (no_engine.folder / "app.py").write_text(app)
    done = no_engine.run("make", "up", check=False)
    assert done.returncode != 0
    assert reason in done.stderr
    assert gone(f"http://127.0.0.1:{no_engine.environ['PORT']}/health")


def test_up_on_a_taken_port(no_engine: Project) -> None:
    """If something else has the port, `make up` fails with the server's own line; it never takes that for its own."""
    port = no_engine.environ["PORT"]
    with socket.create_server(("127.0.0.1", int(port))):
        done = no_engine.run("make", "up", check=False)
    assert done.returncode != 0
    assert f"serve: cannot listen on 127.0.0.1:{port}: Address already in use" in done.stderr
    no_engine.run("make", "up")
    (no_engine.folder / ".serve.pid").rename(no_engine.folder / ".serve.pid.other")
    done = no_engine.run("make", "up", check=False)
    (no_engine.folder / ".serve.pid.other").rename(no_engine.folder / ".serve.pid")
    assert done.returncode != 0
    assert f"PORT={port} is taken: something answers there" in done.stderr


def test_the_env_file_counts_without_an_engine(no_engine: Project) -> None:
    """.env says what to serve and where, as for compose; the environment comes first."""
    no_engine.write({"mine/web.py": APP.format(text="from a folder") + "\n\ndef make():\n    return app\n"})
    (no_engine.folder / ".env").write_bytes(
        b"# mine\r\nTITLE=two words\r\nAPP_DIR='mine' # here\r\nexport APP=web:make() # a factory\r\nUID=1\nPORT=1"
    )
    no_engine.run("make", "up")
    assert get(f"http://127.0.0.1:{no_engine.environ['PORT']}/") == (200, "from a folder")


def test_down_without_ps(no_engine: Project, tmp_path: pathlib.Path) -> None:
    """`make down` ends the server where there is no ps, as in slim containers."""
    for tool in ("make", "sh", "cat", "rm", "dirname", "date", "sleep", "grep", "tr"):
        (tmp_path / tool).symlink_to(shutil.which(tool))
    no_engine.run("make", "up")
    no_engine.run("make", "down", environ={"PATH": str(tmp_path)})
    assert gone(f"http://127.0.0.1:{no_engine.environ['PORT']}/health")


def test_down_spares_another_process(no_engine: Project) -> None:
    """A number that a restart of the machine has given to another process, a server even, ends nobody."""
    with subprocess.Popen([sys.executable, "-m", "http.server", "0"], stdout=subprocess.DEVNULL) as other:
        (no_engine.folder / ".serve.pid").write_text(f"{other.pid}\n")
        no_engine.run("make", "down")
        assert other.poll() is None
        other.terminate()
    assert not (no_engine.folder / ".serve.pid").exists()


def test_an_old_python_is_refused(copy: Project) -> None:
    """A Python that is too old is refused in one line that says what it takes."""
    # Runs what it is given as Python 3.10 would.
    copy.write({"bin/python3": f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = (3, 10); $2"\n'})
    (copy.folder / "bin/python3").chmod(0o755)
    environ = {"PATH": f"{copy.folder}/bin:{copy.environ['PATH']}"}
    done = copy.run("make", ".venv-runtime/ready", environ=environ, check=False)
    assert done.returncode != 0
    assert done.stderr.startswith("python3 is too old: needs 3.11 or later\n")
