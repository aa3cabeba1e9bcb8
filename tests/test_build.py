"""The build on a real engine: what gets in, what stops it, locks, private indexes, no network, one digest."""

import base64
import gzip
import hashlib
import http.server
import io
import pathlib
import re
import secrets
import sys
import tarfile
import threading
import uuid
import zipfile
from collections.abc import Callable, Iterator

import pytest

from tests.conftest import needs_docker
from tests.support import ROOT, Project, get, run
from tests.test_image import python, until_health

if not (ROOT / "Dockerfile").exists():
    pytest.skip("the image has no Dockerfile", allow_module_level=True)


def steps_run(project: Project) -> list[str]:
    """Build the copy; return the steps of the Dockerfile that the cache did not have."""
    done = project.build("--progress", "plain")
    steps = re.findall(r"^#(\d+) (\[\S+ \d+/\d+\] (?!FROM).+)$", done.stderr, re.MULTILINE)
    assert steps
    cached = re.findall(r"^#(\d+) CACHED$", done.stderr, re.MULTILINE)
    return [instruction for number, instruction in steps if number not in cached]


def test_an_edit_of_the_code_runs_no_pip(project: Project) -> None:
    """After an edit of app.py only the steps that take the code in run again; after one of the lock, pip does."""
    steps_run(project)
    assert steps_run(project) == []
    for name, expected in ("app.py", ["app.py", "compileall"]), ("requirements.txt", ["pip wheel"]):
        with (project.folder / name).open("a") as file:
            file.write(f"\n# {uuid.uuid4()}\n")  # unlike any edit that an earlier run has left in the build cache
        again = steps_run(project)
        assert all(any(text in step for step in again) for text in expected)
        assert any("pip" in step for step in again) == (name == "requirements.txt")


@pytest.mark.parametrize(
    ("name", "pattern", "replacement", "message"),
    [
        (
            "requirements.txt",
            r"(waitress==(?s:.)*?sha256:)....",
            r"\g<1>0000",
            "THESE PACKAGES DO NOT MATCH THE HASHES",
        ),
        (
            "requirements.txt",
            r"werkzeug==(?s:.)*?\n(?=\S|\Z)",
            "",
            "all requirements must have their versions pinned with ==",
        ),
        ("app.py", r"\A", "app = (\n", "SyntaxError"),
    ],
    ids=["tampered hash", "incomplete lock", "syntax error"],
)
def test_what_stops_it(project: Project, name: str, pattern: str, replacement: str, message: str) -> None:
    """A wheel that is not the locked one, a lock that is not whole, code that does not compile: no image, and why."""
    path = project.folder / name
    text, count = re.subn(pattern, replacement, path.read_text())
    assert count
    # The lock has two hashes for some packages: none may fit.
    path.write_text(re.sub(r"sha256:[0-9a-f]{4}", "sha256:0000", text) if "0000" in replacement else text)
    done = project.build(check=False)
    assert done.returncode != 0
    assert message in done.stderr


SECRETS = ["infra/terraform.tfstate", ".env", "pip.conf", "id_rsa", "dump.sql", "more.py", "tests/more.py"]
SECRETS_IN_A_FOLDER = [
    "static/.env",
    "static/.git/config",
    "static/server.key",
    "static/deep/ca.pem",
    "static/x.sqlite3-wal",
]


def test_only_what_is_named_gets_in(project: Project, target: str) -> None:
    """Files that no COPY names stay out, and of a folder that one names hidden files, keys and databases."""
    public = {"static/deep/style.css", "static/.well-known/security.txt"}
    for name in (*public, *SECRETS, *SECRETS_IN_A_FOLDER):
        (project.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (project.folder / name).write_text("secret = 1\n")
    project.name_files("static")
    project.build("--target", target)
    code = "import pathlib; print(*(p for p in pathlib.Path('/app').rglob('*') if p.is_file() and p.suffix != '.pyc'))"
    listed = {path.removeprefix("/app/") for path in python(project.name, code).split()}
    own = {f"serve/{path.name}" for path in (ROOT / "serve").glob("*.py")} | {"app.py", "healthcheck.py"}
    assert listed == own | public


def test_a_private_clone_builds_a_readable_image(project: Project, container: Callable) -> None:
    """A clone made under umask 077 gives an image that its user can read."""
    for path in project.folder.rglob("*"):
        path.chmod(path.stat().st_mode & 0o700)
    project.build()
    until_health(container(project.name), "healthy")


# ---- Locks -----------------------------------------------------------------------------------------------------------


def test_drift_of_a_lock_is_found_and_mended(project: Project) -> None:
    """`make check` fails with the difference where a lock is out of date; `make lock` and plain pip-compile mend it."""
    with (project.folder / "requirements.in").open("a") as requirements:
        requirements.write("humanize\n")
    done = project.run("make", "check", check=False)
    assert done.returncode != 0
    assert re.search(r"^> humanize==", done.stdout, re.MULTILINE)
    before = (project.folder / "requirements.txt").read_text().splitlines()
    project.run("make", "lock")
    after = (project.folder / "requirements.txt").read_text().splitlines()
    assert any(line.startswith("humanize==") for line in after)
    assert set(before) <= set(after)  # no other pin has moved
    (project.folder / "requirements.txt").write_text("\n".join(before) + "\n")
    project.run(".venv/bin/pip-compile", "--quiet")
    assert (project.folder / "requirements.txt").read_text().splitlines() == after


# ---- Where PyPI is not reachable -------------------------------------------------------------------------------------

NAME, GREETING = "helloworld_private_test", "from the private index"  # a name that PyPI does not have


def wheel(name: str, version: str, code: str) -> bytes:
    """Return a wheel with one module."""
    file = io.BytesIO()
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{name}.py", code)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return file.getvalue()


@pytest.fixture
def index(engine: None) -> Iterator[tuple[str, str]]:
    """The address and the password of an index with one package, where a build finds it."""
    if sys.platform != "linux":
        needs_docker("a build reaches this machine by the bridge's address on Linux only")
    password, package = secrets.token_hex(16), wheel(NAME, "1.0", f"GREETING = {GREETING!r}\n")
    name = f"{NAME}-1.0-py3-none-any.whl"
    link = f'<a href="/{name}#sha256={hashlib.sha256(package).hexdigest()}">{name}</a>'
    pages = {f"/simple/{NAME.replace('_', '-')}/": link.encode(), f"/{name}": package}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            known = self.headers["Authorization"] == f"Basic {base64.b64encode(f'me:{password}'.encode()).decode()}"
            body = pages.get(self.path, b"") if known else b""
            self.send_response(401 if not known else 200 if body else 404)
            self.send_header("WWW-Authenticate", "Basic")
            self.send_header("Content-Type", "text/html" if self.path.endswith("/") else "application/zip")
            self.send_header("Cache-Control", "max-age=600")  # so that pip may keep what it gets
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    gateway = "{{(index .IPAM.Config 0).Gateway}}"
    host = run("docker", "network", "inspect", "bridge", "--format", gateway).stdout.strip()
    with http.server.ThreadingHTTPServer((host, 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"{host}:{server.server_port}", password
        server.shutdown()


def test_a_private_index(project: Project, index: tuple[str, str], tmp_path: pathlib.Path) -> None:
    """Packages are locked and installed from an index with a password, which gets into no layer, history or cache."""
    address, password = index
    conf, wrong = tmp_path / "pip.conf", tmp_path / "wrong.conf"
    for path, secret in (conf, password), (wrong, "wrong"):
        url, host = f"http://me:{secret}@{address}/simple/", address.partition(":")[0]
        path.write_text(f"[global]\nextra-index-url = {url}\ntrusted-host = {host}\n")
    (project.folder / "requirements.in").write_text(f"{NAME}\n")
    project.run("make", "lock", environ={"PIP_CONF": str(conf)})
    lock = (project.folder / "requirements.txt").read_text()
    assert lock.startswith(f"{NAME.replace('_', '-')}==1.0 ")
    assert address not in lock
    done = project.build(f"--secret=id=pip_conf,src={wrong}", "--target=wheels", check=False)
    assert done.returncode != 0
    assert "401 Error, Credentials not correct" in done.stderr
    for target in ("builder", "minimal", "runtime"):
        project.build(f"--secret=id=pip_conf,src={conf}", f"--target={target}")
        blobs = saved(project.name, tmp_path)
        assert not any(password.encode() in blob for blob in blobs)
        assert any(NAME.encode() in blob for blob in blobs)  # so a secret would be seen
    caches = set(re.findall("--mount=type=cache,target=([^ ]+)", (ROOT / "Dockerfile").read_text()))
    mounts = " ".join(f"--mount=type=cache,id={path},target=/cache{path}" for path in sorted(caches))
    look = f"FROM {project.environ['PYTHON_IMAGE']}\nRUN {mounts} ls -R /cache && ! grep -rla {password} /cache\n"
    (project.folder / "look.Dockerfile").write_text(look)
    project.build("--file=look.Dockerfile", "--no-cache")


def saved(image: str, folder: pathlib.Path) -> list[bytes]:
    """Return what an image is made of: its layers, unpacked, and its configuration with history and labels."""
    run("docker", "save", "--output", folder / "image.tar", image)
    with tarfile.open(folder / "image.tar") as archive:
        blobs = [archive.extractfile(blob).read() for blob in archive if blob.isfile()]
    return [gzip.decompress(blob) if blob[:2] == b"\x1f\x8b" else blob for blob in blobs]


def test_a_build_without_network(project: Project, container: Callable) -> None:
    """With the locked wheels in a folder the build takes no network, and checks their hashes all the same."""
    project.run("make", "wheels")
    offline = ["--no-cache", "--network=none", "--build-context=wheels=wheels"]
    project.build(*offline)
    until_health(container(project.name), "healthy")
    [path] = (project.folder / "wheels").glob("waitress-*")
    path.write_bytes(wheel("waitress", path.name.split("-")[1], "tampered = True\n"))
    done = project.build(*offline, check=False)
    assert done.returncode != 0
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in done.stderr


# ---- One commit, one image -------------------------------------------------------------------------------------------


def test_two_builds_give_one_digest(project: Project) -> None:
    """`make reproduce` builds both images of a release to the same digests twice, one clone under a private umask."""
    if "containerd" not in run("docker", "info", "--format", "{{.DriverStatus}}").stdout:
        needs_docker("the engine has no containerd image store")
    for role in ("AUTHOR", "COMMITTER"):
        project.environ |= {f"GIT_{role}_NAME": "tests", f"GIT_{role}_EMAIL": "tests@example.org"}
    project.run("git", "init", "--quiet")
    project.run("git", "add", "--all")
    project.run("git", "commit", "--quiet", "--message", "test")
    done = project.run("make", "reproduce", check=False)
    assert re.fullmatch(r"scripts/reproduce\nminimal\tsha256:\w{64}\nruntime\tsha256:\w{64}\n", done.stdout)
    assert done.returncode == 0


# ---- "Make it yours": an application of somebody's own ---------------------------------------------------------------

# A module of its own, templates, static files, a package that is linked with a library of the base (libstdc++).
MODULES = {
    "app.py": """
import greenlet
from flask import Flask, render_template

from greetings import greeting

app = Flask(__name__)


@app.get("/")
def hello():
    return render_template("hello.html", greeting=greeting(), main=greenlet.getcurrent().parent)


@app.get("/health")
def health():
    return "ok"
""",
    "greetings.py": "def greeting():\n    return 'from a module'\n",
    "templates/hello.html": "{{ url_for('static', filename='style.css') }} {{ greeting }} {{ main }}\n",
    "static/style.css": "body { color: black }\n",
}
# A package with a factory, in a folder of its own.
PACKAGE = {
    "services/api/app.py": "from myapp import create_app\n",
    "services/api/myapp/__init__.py": """
from flask import Flask, render_template


def create_app():
    app = Flask(__name__)
    app.add_url_rule("/", view_func=lambda: render_template("hello.html"))
    app.add_url_rule("/health", "health", lambda: "ok")
    return app
""",
    "services/api/myapp/templates/hello.html": "from a package",
}


def test_make_it_yours(project: Project) -> None:
    """README's steps and no other: replace app.py, name its files, edit requirements.in, `make lock up`."""
    project.write(MODULES)
    project.name_files("greetings.py", "templates", "static")
    with (project.folder / "requirements.in").open("a") as requirements:
        requirements.write("greenlet\n")
    project.run("make", "lock")
    for target in ("runtime", "minimal"):
        done = project.run("make", "up", environ={"TARGET": target})
        assert done.stdout.splitlines()[-1] == project.url()
        assert get(project.url() + "/") == (200, "/static/style.css from a module None")
        assert get(project.url() + "/static/style.css") == (200, MODULES["static/style.css"])


def test_a_package_in_a_folder(project: Project) -> None:
    """APP_DIR names the folder with app.py, APP a factory; both from .env."""
    project.write(PACKAGE)
    project.name_files("services/api/myapp", at="./myapp")
    (project.folder / ".env").write_text("APP_DIR=services/api\nAPP='myapp:create_app()'\n")
    project.compose("up", "--build", "--wait")
    assert get(project.url() + "/") == (200, "from a package")
