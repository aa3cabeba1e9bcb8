"""README's "Make it yours": an application of somebody's own takes the place of app.py, and all else stays."""

import pathlib
import re

import pytest

from tests.support import ROOT, Project, free_port, get

if not (ROOT / "tools").is_dir():
    pytest.skip("the image has no tools", allow_module_level=True)

# A module of its own, templates, static files, a package with an extension in C.
MODULES = {
    "app.py": """
import msgpack
from flask import Flask, render_template

from greetings import greeting

app = Flask(__name__)


@app.get("/")
def hello():
    return render_template("hello.html", greeting=greeting(), packed=msgpack.packb([1, 2]).hex())


@app.get("/health")
def health():
    return "ok"


@app.get("/extension")
def extension():
    return msgpack.Packer.__module__
""",
    "greetings.py": "def greeting():\n    return 'from a module'\n",
    "templates/hello.html": "{{ url_for('static', filename='style.css') }} {{ greeting }} {{ packed }}\n",
    "static/style.css": "body { color: black }\n",
}
# A package with a factory; templates and data of the package's own.
PACKAGE = {
    "myapp/__init__.py": """
import pathlib

from flask import Flask, render_template


def create_app():
    app = Flask(__name__)
    app.add_url_rule("/", view_func=lambda: render_template("hello.html"))
    app.add_url_rule("/health", "health", lambda: "ok")
    app.add_url_rule("/data", "data", lambda: pathlib.Path(__file__).with_name("schema.sql").read_text())
    return app
""",
    "myapp/templates/hello.html": "from a package\n",
    "myapp/schema.sql": "SELECT 1\n",
}


def write(folder: pathlib.Path, files: dict[str, str]) -> None:
    """Write these files."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


@pytest.fixture
def mine(project: Project, target: str) -> Project:
    """A copy of the project, for either target."""
    project.environ["TARGET"] = target
    return project


def test_make_it_yours(mine: Project) -> None:
    """README's three steps and no other: replace app.py, edit requirements.in, `make lock && make up`."""
    write(mine.folder, MODULES)
    with (mine.folder / "requirements.in").open("a") as requirements:
        requirements.write("msgpack\n")
    done = mine.run("sh", "-c", "make lock && make up")
    assert done.stdout.splitlines()[-1] == mine.url()
    assert get(mine.url() + "/") == (200, "/static/style.css from a module 920102")
    assert get(mine.url() + "/static/style.css") == (200, MODULES["static/style.css"])
    assert get(mine.url() + "/extension") == (200, "msgpack._cmsgpack")
    assert re.search(r"^msgpack==", (mine.folder / "requirements.txt").read_text(), re.MULTILINE)


def test_a_package_with_a_factory(mine: Project) -> None:
    """APP names the factory of a package, whose templates and data are in the image; app.py is not needed."""
    (mine.folder / "app.py").unlink()
    write(mine.folder, PACKAGE)
    (mine.folder / ".env").write_text("APP=myapp:create_app()\n")
    mine.compose("up", "--build", "--wait")
    assert get(mine.url() + "/") == (200, "from a package")
    assert get(mine.url() + "/data") == (200, "SELECT 1\n")


def test_an_application_in_a_folder(mine: Project) -> None:
    """APP_DIR names a folder with an application and a lock; what lies beside that is not in the image."""
    write(mine.folder, {f"services/api/{name}": text for name, text in PACKAGE.items()})
    (mine.folder / "services" / "api" / "requirements.in").write_text("Flask ~= 3.1\nwaitress ~= 3.0\n")
    (mine.folder / ".env").write_text("APP_DIR=services/api\nAPP=myapp:create_app()\n")
    mine.run("make", "lock")
    mine.run("make", "up")
    assert get(mine.url() + "/data") == (200, "SELECT 1\n")
    listed = mine.compose("exec", "--no-TTY", "web", "python", "-c", "import os; print(*sorted(os.listdir()))").stdout
    assert listed == "__pycache__ healthcheck.py myapp serve\n"


def test_a_folder_without_an_engine(copy: Project) -> None:
    """Without an engine `make up` serves APP_DIR too, from its own lock."""
    write(copy.folder, {f"mine/{name}": text for name, text in PACKAGE.items()})
    (copy.folder / "mine" / "requirements.txt").write_text((ROOT / "requirements.txt").read_text())
    copy.environ |= {"APP_DIR": "mine/", "APP": "myapp:create_app()", "PORT": str(free_port("127.0.0.1"))}
    copy.environ["DOCKER_HOST"] = "unix:///nonexistent.sock"
    try:
        done = copy.run("make", "up")
        url = re.search(r"http://\S+", done.stdout)[0]
        assert get(url + "/data") == (200, "SELECT 1\n")
    finally:
        copy.run("make", "down")


@pytest.mark.parametrize("folder", ["/etc", "../other"])
def test_a_folder_elsewhere(copy: Project, folder: str) -> None:
    """An APP_DIR that no build could see is named, and what it takes."""
    done = copy.run("make", "up", check=False, environ={"APP_DIR": folder})
    assert done.returncode != 0
    assert f"APP_DIR={folder}: takes a folder inside of the project" in done.stderr


@pytest.mark.parametrize("folder", ["nowhere", "bench"])
def test_a_folder_without_a_lock(copy: Project, folder: str) -> None:
    """An APP_DIR that is no application's folder is named, and what it should be."""
    done = copy.run("make", "up", check=False, environ={"APP_DIR": folder})
    assert done.returncode != 0
    assert f"APP_DIR={folder}: no folder with a requirements.txt; make lock pins a requirements.in" in done.stderr
