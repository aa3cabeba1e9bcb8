"""The locks: what `make check` says of them, what `make lock` says when it cannot make them, what stops a build."""

import functools
import hashlib
import http.server
import io
import pathlib
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator

import pytest

from tests.support import ROOT, Project, run

if not (ROOT / "tools").is_dir():
    pytest.skip("the image has no tools", allow_module_level=True)

LOCKS = ("requirements.txt", "requirements-dev.txt")
OTHER_HASH = "sha256:" + 64 * "0"


def lock(folder: pathlib.Path, *arguments: object, **options: object) -> subprocess.CompletedProcess:
    """Run tools/lock.py in a folder."""
    command = [sys.executable, ROOT / "tools" / "lock.py", *arguments]
    return run(*command, cwd=folder, check=False, **options)


def edit(path: pathlib.Path, pattern: str, replacement: str) -> None:
    """Change the first place in a file where a pattern matches."""
    text, count = re.subn(pattern, replacement, path.read_text(), count=1, flags=re.MULTILINE)
    assert count
    path.write_text(text)


def line_of(path: pathlib.Path, text: str) -> int:
    """Return the number of the first line with that text."""
    return next(number for number, line in enumerate(path.read_text().splitlines(), start=1) if text in line)


def test_nothing_is_wrong_here(copy: Project) -> None:
    """Of the project as it is, `make check` has nothing to say."""
    done = lock(copy.folder, "check")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("name", "pattern", "replacement", "at", "message"),
    [
        ("requirements.txt", r"flask==", "--index-url https://example.org/simple\nflask==", "--index-url", "an option"),
        ("requirements.txt", r"flask==", "--find-links wheels\nflask==", "--find-links", "an option"),
        ("requirements.txt", r"flask==", "./flask.whl\nflask==", "./flask.whl", "not name==version with hashes"),
        ("requirements.txt", r"flask==", "x @ https://example.org/x.whl\nflask==", "x @", "not name==version"),
        ("requirements.txt", r"flask==", "flask>=", "flask>=", "not name==version with hashes"),
        ("requirements.txt", r"flask==\S+ \\", "flask==3.1.0", "flask==", "flask==3.1.0 has no hash"),
        ("requirements.txt", r"flask==", "six==1.17.0\nflask==", "six==", "six==1.17.0 has no hash"),
        ("requirements.txt", r"(flask==.*)\n.*\n.*", r"\1", "flask==", "flask"),
        ("requirements.txt", r"--hash=sha256:", "--hash=md5:", "==", "is no SHA-256"),
        ("requirements.txt", r"flask==", "<<<<<<< HEAD\nflask==", "<<<<<<<", "a conflict of a merge; take one side"),
        ("requirements-dev.txt", r"pytest==", "=======\npytest==", "=====", "a conflict of a merge; take one side"),
        ("requirements-dev.txt", r"^click==\S+", "click==1.0", "click==1.0", "click==1.0 contradicts click=="),
        ("requirements.in", r"\Z", "--extra-index-url https://example.org/simple\n", "--extra", "an option"),
        ("requirements.in", r"\Z", "-f wheels\n", "-f wheels", "an option"),
        ("requirements.in", r"\Z", "./mine\n", "./mine", "a path or an address"),
        ("requirements.in", r"\Z", "-e .\n", "-e .", "a path or an address"),
        ("requirements-dev.in", r"\Z", "mine @ file:///mine\n", "mine @", "a path or an address"),
        ("requirements-dev.in", r"\Z", "git+https://example.org/x\n", "git+", "a path or an address"),
        ("Dockerfile", r"@sha256:\w+", "", "ARG PYTHON_IMAGE=", "takes name:tag@sha256:"),
        ("Dockerfile", r"FROM \S+ AS dev", "FROM python:3 AS dev", "AS dev", "python:3: neither a stage nor an image"),
        ("Dockerfile", r"COPY --from=dev", "COPY --from=busybox:1", "=busybox", "busybox:1: neither a stage nor"),
        ("Dockerfile", r"\A", "# syntax=docker/dockerfile:1\n", "syntax=", "docker/dockerfile:1: neither a stage nor"),
        ("README.md", r"(python:[\w.-]+@)sha256:\w+", rf"\1{OTHER_HASH}", OTHER_HASH, "is not the base of Dockerfile:"),
        (".github/base/Dockerfile", r"(FROM \w+:)[\d.]+", r"\g<1>3.14.8", "FROM", "is not the base of Dockerfile:"),
    ],
)
def test_a_change_by_hand_is_named(  # noqa: PLR0913, PLR0917 - a table has as many columns as it needs
    copy: Project, name: str, pattern: str, replacement: str, at: str, message: str
) -> None:
    """What no lock may have is named with file, line and reason, without any package or network."""
    edit(copy.folder / name, pattern, replacement)
    done = lock(copy.folder, "check")
    assert done.returncode == 1
    first = done.stderr.splitlines()[0]
    assert first.startswith(f"lock: {name}:{line_of(copy.folder / name, at)}: ")
    assert message in first


@pytest.mark.parametrize("name", ["requirements.in", "requirements.txt", "requirements-dev.txt"])
def test_a_missing_file_is_named(copy: Project, name: str) -> None:
    """A lock or a source that is not there is said, and how to get it back."""
    (copy.folder / name).unlink()
    assert lock(copy.folder, "check").stderr == f"lock: {name} is missing; `git checkout {name}` restores it\n"


def test_the_base_in_the_dockerfile_is_held_to_the_documents(copy: Project) -> None:
    """Another base in the Dockerfile alone is named at each place that still has the old one."""
    edit(copy.folder / "Dockerfile", r"@sha256:\w+", f"@{OTHER_HASH}")
    done = lock(copy.folder, "check")
    assert {line.split(":")[1].strip() for line in done.stderr.splitlines()} == {"README.md", ".github/base/Dockerfile"}


@pytest.mark.parametrize(
    ("pattern", "replacement", "at", "message"),
    [
        (r"sha256:\w{4}", "sha256:0000", "sha256:0000", "the index has no file sha256:0000"),
        (r"( \\\n *--hash=sha256:\w+)\n", "\n", "==", "the index also has sha256:"),
        (r"\Z", f"six==1.17.0 --hash={OTHER_HASH}\n", "six==", "six==1.17.0: nothing asks for it"),
        (r"^click==[^#]*# via .*\n", "", None, "click==.* is missing"),
        (r"^flask==\S+", "flask==2.0.0", "flask==2.0.0", "flask==2.0.0 should be 3."),
        (r"# via flask", "# via nothing", "# via nothing", "not as pip-compile writes it"),
    ],
)
def test_drift_is_named(copy: Project, pattern: str, replacement: str, at: str | None, message: str) -> None:
    """A lock that is not what the sources and the index come to is named by line, package and hash."""
    path = copy.folder / "requirements.txt"
    edit(path, pattern, replacement)
    (copy.folder / "requirements-dev.in").write_text("-c requirements.txt\n")  # that is for the second lock to show
    (copy.folder / "requirements-dev.txt").write_text("")
    fresh = copy.folder / "fresh"
    fresh.mkdir()
    assert lock(copy.folder, "pin", fresh).returncode == 0
    done = lock(copy.folder, "diff", fresh)
    assert done.returncode == 1
    assert re.search(message, done.stderr)
    if at:
        numbers = [n for n, line in enumerate(path.read_text().splitlines(), start=1) if at in line]
        assert int(done.stderr.split(":")[2]) in numbers


def test_check_fails_for_drift(project: Project) -> None:
    """`make check` compares the locks with what the image's own Python makes of the sources."""
    edit(project.folder / "requirements.txt", r"^(flask==\S+)", rf"\1 --hash={OTHER_HASH}")
    done = project.run("make", "check", check=False)
    assert done.returncode != 0
    assert f"the index has no file {OTHER_HASH}" in done.stderr


# ---- An index of our own --------------------------------------------------------------------------------------------


def wheel(name: str, version: str, code: str = "") -> bytes:
    """Return a wheel with one module."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": code,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: tests\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": "",
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return buffer.getvalue()


class Index(http.server.ThreadingHTTPServer):
    """A package index (https://peps.python.org/pep-0503/) on this machine."""

    def __init__(self) -> None:
        self.status = 200
        self.wheels: dict[str, bytes] = {}
        self.yanked: dict[str, str] = {}
        super().__init__(("127.0.0.1", 0), IndexHandler)
        self.url = f"http://127.0.0.1:{self.server_port}/simple"

    def page(self, package: str) -> bytes | None:
        """Return the list of a package's files, without hashes: an index that has been taken over would not help."""
        rows = []
        for name in self.wheels:
            if name.startswith(f"{package}-"):
                yanked = f' data-yanked="{self.yanked[name]}"' if name in self.yanked else ""
                rows.append(f'<a href="/files/{name}"{yanked}>{name}</a>')
        return f"<!DOCTYPE html><html><body>{''.join(rows)}</body></html>".encode() if rows else None


class IndexHandler(http.server.BaseHTTPRequestHandler):
    """Answers for the index."""

    def do_GET(self) -> None:
        """Answer with a page, a wheel, or the error that the index is to have."""
        kind, name = self.path.strip("/").split("/")
        body = self.server.page(name) if kind == "simple" else self.server.wheels.get(name)
        if self.server.status != http.HTTPStatus.OK or body is None:
            self.send_error(self.server.status if self.server.status != http.HTTPStatus.OK else 404)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/html" if kind == "simple" else "application/octet-stream")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def index() -> Iterator[Index]:
    """An index with one package, greeting."""
    with Index() as server:
        server.wheels["greeting-1.0-py3-none-any.whl"] = wheel("greeting", "1.0")
        server.wheels["greeting-0.9-py3-none-any.whl"] = wheel("greeting", "0.9")
        server.wheels["other-1.0-py3-none-any.whl"] = wheel("other", "1.0")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def pin(index: Index, tmp_path: pathlib.Path) -> Callable[..., subprocess.CompletedProcess]:
    """A function that locks the lines that it is given, from that index; the locks go to tmp_path/fresh."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    (tmp_path / "requirements-dev.in").write_text("-c requirements.txt\nother\n")
    (tmp_path / "fresh").mkdir()
    environ = {"PATH": "/usr/bin:/bin", "PIP_CONFIG_FILE": "/dev/null", "PIP_RETRIES": "0", "PIP_INDEX_URL": index.url}

    def pin(requirements: str, *options: str, **variables: str) -> subprocess.CompletedProcess:
        (tmp_path / "requirements.in").write_text(requirements)
        return lock(tmp_path, "pin", tmp_path / "fresh", *options, env=environ | variables)

    return pin


def test_pin(pin: Callable, index: Index, tmp_path: pathlib.Path) -> None:
    """A lock has the hash of what the index gives, nothing of where it is, and a pin that still fits stays."""
    assert pin("greeting\n").stderr == ""
    text = (tmp_path / "fresh" / "requirements.txt").read_text()
    digest = hashlib.sha256(index.wheels["greeting-1.0-py3-none-any.whl"]).hexdigest()
    assert text == f"greeting==1.0 \\\n    --hash=sha256:{digest}\n    # via -r requirements.in\n"
    for name in LOCKS:
        shutil.copy(tmp_path / "fresh" / name, tmp_path)
    index.wheels["greeting-1.1-py3-none-any.whl"] = wheel("greeting", "1.1")
    pin("greeting\n")
    assert (tmp_path / "fresh" / "requirements.txt").read_text() == text
    pin("greeting\n", "--upgrade-package=Greeting")
    assert "greeting==1.1" in (tmp_path / "fresh" / "requirements.txt").read_text()
    done = pin("greeting\n", "--upgrade-package=greetings")
    assert done.stderr == "lock: PACKAGE=greetings: not in requirements.txt or requirements-dev.txt\n"


@pytest.mark.parametrize(
    ("requirements", "message"),
    [
        ("# a comment\ngreetin\n", "requirements.in:2: no package greetin on the index; is the name right?"),
        ("greeting>=2\n", "requirements.in:1: no release is greeting>=2; the newest is 1.0"),
        ("other\ngreeting ~~ 1\n", "requirements.in:2: Invalid requirement: 'greeting ~~ 1': "),
        (
            "greeting<1\ngreeting>=1\n",
            "requirements.in: Cannot install greeting<1 and greeting>=1 because of conflicts: The user ",
        ),
        ("greeting\n-i https://example.org/\n", "requirements.in:2: '-i https://example.org/': an option; an index "),
        ("<<<<<<< HEAD\ngreeting\n", "requirements.in:1: '<<<<<<< HEAD': a conflict of a merge; "),
    ],
)
def test_what_cannot_be_locked_is_said(pin: Callable, tmp_path: pathlib.Path, requirements: str, message: str) -> None:
    """One line says what is wrong and where; no lock is written."""
    done = pin(requirements)
    assert done.returncode == 1
    assert done.stderr.startswith(f"lock: {message}")
    assert len(done.stderr.splitlines()) == 1
    assert not list((tmp_path / "fresh").iterdir())


def test_a_yanked_release_is_said(pin: Callable, index: Index, tmp_path: pathlib.Path) -> None:
    """A release that its authors have taken back is not locked, even if it is asked for by number."""
    index.yanked["greeting-1.0-py3-none-any.whl"] = "wrong name"
    done = pin("greeting==1.0\n")
    assert done.stderr == "lock: requirements.in:1: greeting==1.0 is yanked (wrong name); take another\n"
    assert not list((tmp_path / "fresh").iterdir())


def test_an_index_that_fails_is_said(pin: Callable, index: Index, tmp_path: pathlib.Path) -> None:
    """An index that answers 500, or not at all, is not taken for one that lacks the package; its password stays."""
    index.status = 500
    done = pin("greeting\n", PIP_INDEX_URL=index.url.replace("//", "//me:secret@"))
    assert done.stderr.startswith("lock: the package index 127.0.0.1 cannot be read: ")
    assert "500" in done.stderr
    assert "secret" not in done.stderr
    done = pin("greeting\n", PIP_INDEX_URL="https://index.invalid/simple")
    assert done.stderr.startswith("lock: the package index index.invalid cannot be read: ")
    assert len(done.stderr.splitlines()) == 1
    assert not list((tmp_path / "fresh").iterdir())


# ---- Through make and docker ----------------------------------------------------------------------------------------


def test_lock_says_why_not(project: Project) -> None:
    """`make lock` ends with one line if it cannot lock, and leaves every file as it was."""
    (project.folder / "requirements.in").write_text("Flaskk\n")
    before = {path.name: path.read_bytes() for path in project.folder.iterdir() if path.is_file()}
    done = project.run("make", "lock", check=False)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert said == ["lock: requirements.in:1: no package Flaskk on the index; is the name right?"]
    assert {path.name: path.read_bytes() for path in project.folder.iterdir() if path.is_file()} == before


def test_upgrade_one_package(project: Project) -> None:
    """`make upgrade PACKAGE=NAME` moves that package alone, in whichever lock it stands."""
    path = project.folder / "requirements.txt"
    project.run("make", "upgrade", "PACKAGE=click==8.2.0 jinja2==3.1.5")
    older = path.read_text()
    assert "click==8.2.0" in older
    project.run("make", "upgrade", "PACKAGE=click")
    text = path.read_text()
    pins = [set(re.findall(r"^\S+==\S+", lock, re.MULTILINE)) for lock in (older, text)]
    assert pins[0] - pins[1] == {"click==8.2.0"}
    assert "jinja2==3.1.5" in pins[1]
    assert (pins[1] - pins[0]).pop() in (project.folder / "requirements-dev.txt").read_text()


@pytest.fixture
def base_with_index(base: str, index: Index, tmp_path: pathlib.Path) -> Iterator[str]:
    """The base image, with that index for pip, whatever it asks for."""
    name = f"flask-helloworld-test-index:{index.server_port}"
    (tmp_path / "Dockerfile").write_text(f"FROM {base}\nENV PIP_INDEX_URL={index.url} PIP_NO_CACHE_DIR=1\n")
    run("docker", "build", "--tag", name, "--file", tmp_path / "Dockerfile", tmp_path)
    yield name
    run("docker", "image", "rm", "--force", name)


@pytest.mark.skipif(sys.platform != "linux", reason="a build shares this machine's network on Linux")
def test_a_swapped_wheel_stops_the_build(project: Project, index: Index, base_with_index: str) -> None:
    """If the index gives another file under the same name, pip's message has both hashes, and nothing is built."""
    name = "greeting-1.0-py3-none-any.whl"
    digest = hashlib.sha256(index.wheels[name]).hexdigest()
    (project.folder / "requirements.txt").write_text(f"greeting==1.0 --hash=sha256:{digest}\n")
    build = functools.partial(project.build, "--network=host", "--target=builder", "--no-cache", check=False)
    project.environ["PYTHON_IMAGE"] = base_with_index
    assert build().returncode == 0
    index.wheels[name] = wheel("greeting", "1.0", "import os; os.system('true')\n")
    done = build()
    assert done.returncode != 0
    assert "THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE" in done.stderr
    assert f"Expected sha256 {digest}" in done.stderr
    assert f"Got        {hashlib.sha256(index.wheels[name]).hexdigest()}" in done.stderr


def test_a_wheel_too_many_stops_the_build(project: Project) -> None:
    """A wheel among those to be installed that the lock does not name ends the build, which says its name."""
    edit(
        project.folder / "Dockerfile",
        r"^# pip works on",
        "RUN touch /wheels/extra-1.0-py3-none-any.whl\n# pip works on",
    )
    done = project.build("--target=builder", check=False)
    assert done.returncode != 0
    assert "/wheels/extra-1.0-py3-none-any.whl is not in requirements.txt" in done.stderr


def test_a_base_without_a_digest_is_said(project: Project) -> None:
    """A base by name alone is built on, with a warning; one by digest is built on without."""
    project.environ["PYTHON_IMAGE"] = project.environ["PYTHON_IMAGE"].partition("@")[0]
    done = project.build("--no-cache", "--progress=plain", "--target=builder")
    assert f"warning: PYTHON_IMAGE={project.environ['PYTHON_IMAGE']} has no digest" in done.stderr
