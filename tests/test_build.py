"""The build on a real engine: cache, failures, contents, private index, no network, locks."""

import base64
import gzip
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
from functools import partial

import pytest

from tests.conftest import needs_docker
from tests.support import ROOT, Project, edit, get, python, run

if not (ROOT / "Dockerfile").exists():
    pytest.skip("the image has no Dockerfile", allow_module_level=True)


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


def link_tools(project: Project) -> None:
    """Use this run's tools as the copy's .venv: installing them takes long."""
    (project.folder / ".venv").mkdir()
    (project.folder / ".venv/bin").symlink_to(pathlib.Path(sys.executable).parent)
    (project.folder / ".venv/ready").touch()


# ---- Cache, failures, contents ---------------------------------------------------------------------------------------


def uncached_steps(project: Project) -> list[str]:
    """Build the copy; return the Dockerfile steps that were not cached."""
    done = project.build("--progress", "plain")
    steps = dict(re.findall(r"^#(\d+) (\[\S+ \d+/\d+\] (?!FROM).+)$", done.stderr, re.MULTILINE))
    assert steps
    cached = re.findall(r"^#(\d+) CACHED$", done.stderr, re.MULTILINE)
    return [instruction for number, instruction in steps.items() if number not in cached]


def test_a_code_edit_runs_no_pip(project: Project) -> None:
    """After an edit of app.py, only the steps that copy and compile the code run again; without an edit, none."""
    uncached_steps(project)
    assert uncached_steps(project) == []
    project.append("app.py", f"\n# {uuid.uuid4()}\n")  # unique, so not cached by an earlier run
    again = uncached_steps(project)
    assert "app.py" in again[0]
    assert [step for step in again if "RUN" in step] == [step for step in again if "compileall" in step] != []


@pytest.mark.parametrize(
    ("name", "pattern", "replacement", "message"),
    [
        # The lock has two hashes for some packages: change them all.
        ("requirements.txt", "sha256:....", "sha256:0000", "THESE PACKAGES DO NOT MATCH THE HASHES"),
        ("requirements.txt", r"^werkzeug==(?s:.)*?\n(?=\S|\Z)", "", "all requirements must have their versions pinned"),
        ("app.py", r"\A", "app = (\n", "SyntaxError"),
    ],
    ids=["tampered hash", "incomplete lock", "syntax error"],
)
def test_build_failures(project: Project, name: str, pattern: str, replacement: str, message: str) -> None:
    """A wrong hash, an incomplete lock or a syntax error fails the build, with a message that says why."""
    edit(project.folder / name, pattern, replacement, count=0)
    done = project.build(check=False)
    assert done.returncode != 0
    assert message in done.stderr


CODE = {"app.py", "healthcheck.py", *(f"serve/{path.name}" for path in (ROOT / "serve").glob("*.py"))}
STATIC = {"static/deep/style.css", "static/.well-known/security.txt"}
LEFT_OUT = {"infra/terraform.tfstate", ".env", "pip.conf", "id_rsa", "dump.sql", "more.py", "tests/more.py"}
LEFT_OUT |= {f"static/{name}" for name in (".env", ".git/config", "server.key", "deep/ca.pem", "x.sqlite3-wal")}


def test_image_has_only_what_copy_names(project: Project, target: str, container: Callable) -> None:
    """Only what COPY names gets in, readable even from a private clone; hidden files, keys and databases stay out."""
    project.write(dict.fromkeys(STATIC | LEFT_OUT, "secret = 1\n"))
    project.make_private()
    project.name_files("static")
    project.build("--target", target)
    code = """
        import pathlib
        for path in pathlib.Path('/app').rglob('*'):
            if path.is_file() and path.suffix != '.pyc' and path.open():
                print(path.relative_to('/app'))
        """
    found = set(python(container(project.name), code).splitlines())
    assert found >= CODE | STATIC
    assert not found & LEFT_OUT


# ---- Private index, no network ---------------------------------------------------------------------------------------

NAME = "helloworld_private_test"  # not on PyPI


@pytest.fixture
def index(engine: None, tmp_path: pathlib.Path) -> Iterator[tuple[str, str]]:
    """Address and password of a private index. Builds can reach it; it has one package."""
    if sys.platform != "linux":
        needs_docker("only on Linux can a build reach this machine at the bridge's address")
    password = secrets.token_hex(16)
    credentials = base64.b64encode(f"me:{password}".encode()).decode()
    package = tmp_path / "simple" / NAME.replace("_", "-") / f"{NAME}-1.0-py3-none-any.whl"
    package.parent.mkdir(parents=True)
    package.write_bytes(wheel(NAME, "1.0", "GREETING = 'from the private index'\n"))

    class Handler(http.server.SimpleHTTPRequestHandler):
        def send_head(self) -> object:
            authorized = self.headers["Authorization"] == f"Basic {credentials}"
            return super().send_head() if authorized else self.send_error(401)

        def end_headers(self) -> None:
            self.send_header("Cache-Control", "max-age=600")  # lets pip cache it
            super().end_headers()

    gateway = "{{(index .IPAM.Config 0).Gateway}}"
    host = run("docker", "network", "inspect", "bridge", "--format", gateway).stdout.strip()
    with http.server.ThreadingHTTPServer((host, 0), partial(Handler, directory=tmp_path)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"{host}:{server.server_port}", password
        server.shutdown()


def image_blobs(image: str, folder: pathlib.Path) -> list[bytes]:
    """Return an image's blobs: its layers, unpacked, and its configuration with history and labels."""
    run("docker", "save", "--output", folder / "image.tar", image)
    with tarfile.open(folder / "image.tar") as archive:
        blobs = [archive.extractfile(blob).read() for blob in archive if blob.isfile()]
    return [gzip.decompress(blob) if blob[:2] == b"\x1f\x8b" else blob for blob in blobs]


@pytest.mark.slow
def test_pip_conf_stays_secret(project: Project, index: tuple[str, str], tmp_path: pathlib.Path) -> None:
    """Packages are locked and installed from a private index; its password stays out of layers, history and caches."""
    address, password = index
    conf, wrong = tmp_path / "pip.conf", tmp_path / "wrong.conf"
    for path, secret in (conf, password), (wrong, "wrong"):
        url, host = f"http://me:{secret}@{address}/simple/", address.partition(":")[0]
        path.write_text(f"[global]\nextra-index-url = {url}\ntrusted-host = {host}\n")
    project.write({"requirements.in": f"{NAME}\n", "requirements-dev.in": ""})  # no tools, which `make lock` locks too
    project.run("make", "lock", environ={"PIP_CONF": str(conf)})
    lock = (project.folder / "requirements.txt").read_text()
    assert lock.startswith(f"{NAME.replace('_', '-')}==1.0 ")
    assert address not in lock
    done = project.build(f"--secret=id=pip_conf,src={wrong}", "--target=wheels", check=False)
    assert done.returncode != 0
    assert "401 Error, Credentials not correct" in done.stderr
    for target in ("builder", "minimal", "runtime"):
        project.build(f"--secret=id=pip_conf,src={conf}", f"--target={target}")
        blobs = image_blobs(project.name, tmp_path)
        assert not any(password.encode() in blob for blob in blobs)
        assert any(NAME.encode() in blob for blob in blobs)  # so the password would be found
    caches = set(re.findall("--mount=type=cache,target=([^ ]+)", (ROOT / "Dockerfile").read_text()))
    mounts = " ".join(f"--mount=type=cache,id={path},target=/cache{path}" for path in sorted(caches))
    search = f"FROM {project.environ['PYTHON_IMAGE']}\nRUN {mounts} ls -R /cache && ! grep -rla {password} /cache\n"
    project.write({"search.Dockerfile": search})
    project.build("--file=search.Dockerfile", "--no-cache")


@pytest.mark.slow
def test_a_build_without_network(project: Project) -> None:
    """With the locked wheels in a folder, the build needs no network and still checks their hashes."""
    project.run("make", "wheels")
    project.write({"wheels/new": str(uuid.uuid4())})  # so that the install step is not cached
    offline = ["--network=none", "--build-context=wheels=wheels", "--output=type=cacheonly"]
    project.build(*offline)
    [path] = (project.folder / "wheels").glob("waitress-*")
    path.write_bytes(wheel("waitress", path.name.split("-")[1], "tampered = True\n"))
    done = project.build(*offline, check=False)
    assert done.returncode != 0
    assert "THESE PACKAGES DO NOT MATCH THE HASHES" in done.stderr


# ---- "Make it yours", and locks --------------------------------------------------------------------------------------

# A factory in a folder of its own, with a module, templates and static files. greenlet is linked with libstdc++, a
# library of the base image.
YOURS = {
    ".env": "APP_DIR=services/api\nAPP=app:create_app()\n",
    "services/api/app.py": """
import greenlet
from flask import Flask, render_template

from greetings import greeting


def create_app():
    app = Flask(__name__)
    main = greenlet.getcurrent().parent
    app.add_url_rule("/", view_func=lambda: render_template("hello.html", greeting=greeting(), main=main))
    app.add_url_rule("/health", "health", lambda: "ok")
    return app
""",
    "services/api/greetings.py": "def greeting():\n    return 'from a module'\n",
    "services/api/templates/hello.html": "{{ url_for('static', filename='style.css') }} {{ greeting }} {{ main }}\n",
    "services/api/static/style.css": "body { color: black }\n",
}


@pytest.mark.slow
def test_make_it_yours(project: Project) -> None:
    """The README's steps give a running service; `make check` reports the outdated lock, `make lock` keeps its pins."""
    lock = project.folder / "requirements.txt"
    edit(lock, r"^jinja2==(?s:.)*?\n(?=\S)", "jinja2==3.1.5\n")  # an older release, which must stay
    pins = re.findall(r"^\S+==\S+", lock.read_text(), re.MULTILINE)
    project.write({"requirements-dev.in": ""})  # no tools, which `make lock` locks too
    project.append("requirements.in", "greenlet\n")
    link_tools(project)
    done = project.run("make", "check", check=False)
    assert done.returncode != 0
    assert re.search(r"^> greenlet==", done.stdout, re.MULTILINE)
    project.write(YOURS)
    dockerfile = project.folder / "Dockerfile"  # drop the COPY lines of the present application
    dockerfile.write_text(re.sub(r"(?m)^COPY .*\$\{APP_DIR\}/(?!app\.py).*\n", "", dockerfile.read_text()))
    project.name_files("greetings.py", "templates", "static")
    project.run("make", "lock")
    assert "greenlet==" in lock.read_text()
    assert set(pins) < set(re.findall(r"^\S+==\S+", lock.read_text(), re.MULTILINE))
    for target in ("runtime", "minimal"):
        done = project.run("make", "up", environ={"TARGET": target})
        assert done.stdout.splitlines()[-1] == project.url()
        assert get(project.url() + "/") == (200, "/static/style.css from a module None")
        assert get(project.url() + "/static/style.css") == (200, YOURS["services/api/static/style.css"])


@pytest.mark.slow
def test_pip_compile_gives_the_same_lock(copy: Project) -> None:
    """Plain pip-compile, without an engine, restores the lock's hashes and comments from its pins."""
    link_tools(copy)
    lock = copy.folder / "requirements.txt"
    original = lock.read_text()
    lock.write_text("\n".join(re.findall(r"^\S+==\S+", original, re.MULTILINE)))
    copy.run(".venv/bin/pip-compile", "--quiet")
    assert lock.read_text() == original
