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

from tests.support import ROOT, Project, edit, run

if not (ROOT / "tools").is_dir():
    pytest.skip("the image has no tools", allow_module_level=True)

LOCKS = ("requirements.txt", "requirements-dev.txt")
OTHER_HASH = "sha256:" + 64 * "0"


def lock(folder: pathlib.Path, *arguments: object, **options: object) -> subprocess.CompletedProcess:
    """Run tools/lock.py in a folder."""
    command = [sys.executable, ROOT / "tools" / "lock.py", *arguments]
    return run(*command, cwd=folder, check=False, **options)


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
        ("requirements.in", r"\Z", "-r requirements-more.in\n", "-r requirements-more.in", "an option"),
        ("requirements.in", r"\Z", "-c https://example.org/x.txt\n", "-c https", "an option"),
        ("requirements.in", r"\Z", "./mine\n", "./mine", "a path or an address"),
        ("requirements.in", r"\Z", "wheels/mine-1.0-py3-none-any.whl\n", "wheels/", "a path or an address"),
        ("requirements.in", r"\Z", "mine-1.0-py3-none-any.whl\n", "mine-1.0", "a path or an address"),
        ("requirements.in", r"\Z", "${MINE}\n", "${MINE}", "a path or an address"),
        ("requirements.in", r"\Z", "-e .\n", "-e .", "a path or an address"),
        ("requirements.in", r"Flask ~=", "Flask =", "Flask =", "not a requirement; takes a name, and versions as in"),
        ("requirements-dev.in", r"\Z", "mine @ file:///mine\n", "mine @", "a path or an address"),
        ("requirements-dev.in", r"\Z", "git+https://example.org/x\n", "git+", "a path or an address"),
        ("Dockerfile", r"@sha256:\w+", "", "ARG PYTHON_IMAGE=", "takes PYTHON_IMAGE=name:tag@sha256:"),
        ("Dockerfile", r"FROM \S+ AS dev", "FROM python:3 AS dev", "AS dev", "python:3: neither a stage nor an image"),
        ("Dockerfile", r"FROM \S+ AS dev", "from python:3 as dev", "as dev", "python:3: neither a stage nor an image"),
        ("Dockerfile", r"COPY --from=dev", "COPY --from=busybox:1", "=busybox", "busybox:1: neither a stage nor"),
        ("Dockerfile", r"from=bytecode", "from=busybox:1", "=busybox", "busybox:1: neither a stage nor"),
        ("Dockerfile", r"--mount=type=bind,from=bytecode", "--mount=from=busybox:1", "=busybox", "busybox:1: neither"),
        ("Dockerfile", r"\A", "# Syntax=docker/dockerfile:1\n", "Syntax=", "docker/dockerfile:1: neither a stage nor"),
        ("Dockerfile", r"\Z", "ADD https://example.org/x /x\n", "ADD", "an address without --checksum=sha256:"),
        ("README.md", r"(python:[\w.-]+@)sha256:\w+", rf"\1{OTHER_HASH}", OTHER_HASH, "does not name the base of Dock"),
        (
            "README.md",
            r"python:[\w.-]+@sha256",
            "localhost:5000/python:3@sha256",
            "localhost:5000/python:3@",
            "does not name the base",
        ),
        (".github/base/Dockerfile", r"(FROM \w+:)[\d.]+", r"\g<1>3.14.8", "FROM", "does not name the base of Dockerf"),
        (".github/base/Dockerfile", r"^FROM \S+", "FROM python:3", "FROM", "does not name the base of Dockerfile:"),
        ("compose.yaml", r"- PYTHON_IMAGE$", "- PYTHON_IMAGE=evil:1", "evil", "the base is the Dockerfile's"),
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


@pytest.mark.parametrize("base", [rf"\g<1>@{OTHER_HASH}", f"localhost:5000/python:3@{OTHER_HASH}"])
def test_the_base_in_the_dockerfile_is_held_to_the_documents(copy: Project, base: str) -> None:
    """Another base in the Dockerfile alone is named at each place that still has the old one."""
    edit(copy.folder / "Dockerfile", r"(?<=ARG PYTHON_IMAGE=)(\S+)@sha256:\w+", base)
    done = lock(copy.folder, "check")
    assert {line.split(":")[1].strip() for line in done.stderr.splitlines()} == {"README.md", ".github/base/Dockerfile"}


def test_a_second_base_is_said(copy: Project) -> None:
    """A second default for the base, in whatever case, is not overlooked."""
    edit(copy.folder / "Dockerfile", r"^FROM", "arg  PYTHON_IMAGE=evil:1\nFROM")
    message = "lock: Dockerfile: takes one line `ARG PYTHON_IMAGE=name:tag@sha256:…`, not 2\n"
    assert lock(copy.folder, "check").stderr == message


@pytest.mark.parametrize("begin", [b"\xef\xbb\xbf", b"# -*- coding: utf-7 -*-\n", b"# \xfc\n"])
def test_a_file_that_reads_otherwise_is_said(copy: Project, begin: bytes) -> None:
    """What pip would read in another way than it is checked (a byte order mark, an encoding) is refused."""
    path = copy.folder / "requirements.in"
    path.write_bytes(begin + path.read_bytes())
    assert lock(copy.folder, "check").stderr.startswith("lock: requirements.in: takes UTF-8, ")


def test_a_comment_may_be_in_any_language(copy: Project) -> None:
    """What is not ASCII is no reason to refuse a file."""
    edit(copy.folder / "requirements.in", r"\A", "# für später\n")
    assert lock(copy.folder, "check").stderr == ""


def test_a_password_is_not_printed(copy: Project) -> None:
    """An address that has a password in it is named without."""
    edit(copy.folder / "requirements.in", r"\Z", "-i https://me:secret@example.org/simple\n")
    done = lock(copy.folder, "check")
    assert "https://****@example.org" in done.stderr
    assert "secret" not in done.stderr


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

    (tmp_path / "requirements-dev.txt").write_text("")

    def pin(requirements: str, *options: str, **variables: str) -> subprocess.CompletedProcess:
        (tmp_path / "requirements.in").write_text(requirements)
        variables["PIP_COMPILE_OPTIONS"] = " ".join(options)
        return lock(tmp_path, "pin", tmp_path / "fresh", env=environ | variables)

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


def test_pin_in_folders(pin: Callable, index: Index, tmp_path: pathlib.Path) -> None:
    """An application in a folder has a lock of its own, and a line of its source is named with the folder."""
    for name in ("api", "examples/degrees", "a/b/c", ".hidden", "deploy/api", "a/venv/lib"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "requirements.in").write_text("other\n")
    assert pin("greeting\n").stderr == ""
    locks = {path.relative_to(tmp_path / "fresh").as_posix() for path in (tmp_path / "fresh").rglob("*.txt")}
    assert locks == {*LOCKS, "api/requirements.txt", "examples/degrees/requirements.txt", "a/b/c/requirements.txt"}
    assert "# via -r api/requirements.in\n" in (tmp_path / "fresh" / "api" / "requirements.txt").read_text()
    (tmp_path / "api" / "requirements.in").write_text("others\n")
    assert (
        pin("greeting\n").stderr == "lock: api/requirements.in:1: no package others on the index; is the name right?\n"
    )
    (tmp_path / "api" / "requirements.in").write_text("./other\n")
    assert pin("greeting\n").stderr.startswith("lock: api/requirements.in:1: './other': a path or an address")


@pytest.fixture
def locked(pin: Callable, tmp_path: pathlib.Path) -> Callable[..., subprocess.CompletedProcess]:
    """A function that changes a lock of two packages by hand, and compares it with fresh ones."""
    assert pin("greeting\nother\n").stderr == ""
    for name in LOCKS:
        shutil.copy(tmp_path / "fresh" / name, tmp_path)

    def change(pattern: str, replacement: str) -> subprocess.CompletedProcess:
        edit(tmp_path / "requirements.txt", pattern, replacement)
        assert pin("greeting\nother\n").stderr == ""
        return lock(tmp_path, "diff", "fresh")

    return change


@pytest.mark.parametrize(
    ("pattern", "replacement", "message"),
    [
        (r"(--hash=\S+)", rf"\1 --hash={OTHER_HASH}", rf"requirements.txt:2: greeting==1.0: .* no file {OTHER_HASH}$"),
        (r"other==.*\n.*\n.*\n", "", "requirements.txt: other==1.0 is missing$"),
        (r"\Z", f"six==1.17.0 --hash={OTHER_HASH}\n", "requirements.txt:7: six==1.17.0: nothing asks for it$"),
        (r"# via", "# by", "requirements.txt:3: not as pip-compile writes it$"),
        (r"\n", "\r\n", "requirements.txt:1: not as pip-compile writes it$"),
    ],
)
def test_drift_is_named(locked: Callable, pattern: str, replacement: str, message: str) -> None:
    """A lock that is not what the sources and the index come to is named by line, package and hash."""
    done = locked(pattern, replacement)
    assert done.returncode == 1
    first, last = done.stderr.splitlines()
    assert re.fullmatch(f"lock: {message}", first)
    assert last == (
        "lock: the locks are not what the .in files and the index come to; if that is no surprise: make lock"
    )


def test_a_file_that_was_added_to_a_release_is_named(locked: Callable, index: Index) -> None:
    """A file that the index has and the lock has not is drift too; a lock that is as it should be is none."""
    assert locked(r"\A", "").returncode == 0
    index.wheels["greeting-1.0-py2-none-any.whl"] = wheel("greeting", "1.0", "# for Python 2\n")
    digest = hashlib.sha256(index.wheels["greeting-1.0-py2-none-any.whl"]).hexdigest()
    assert f"requirements.txt:1: greeting==1.0: the index also has sha256:{digest}" in locked(r"\A", "").stderr


def test_settings_of_pip_tools_do_not_open_the_gate(locked: Callable, tmp_path: pathlib.Path) -> None:
    """What pyproject.toml says to pip-compile changes nothing in what the locks are compared with."""
    settings = "[tool.pip-tools]\ndry-run = true\nreuse-hashes = true\ngenerate-hashes = false\n"
    (tmp_path / "pyproject.toml").write_text(settings)
    assert f"no file {OTHER_HASH}" in locked(r"(--hash=\S+)", rf"\1 --hash={OTHER_HASH}").stderr


def test_a_swapped_wheel_is_named(pin: Callable, index: Index, tmp_path: pathlib.Path) -> None:
    """If a file of the index is another than is locked, the line of its hash is named, and nothing is locked."""
    pin("greeting\n")
    for name in LOCKS:
        shutil.copy(tmp_path / "fresh" / name, tmp_path)
        (tmp_path / "fresh" / name).unlink()
    index.wheels["greeting-1.0-py3-none-any.whl"] = swapped = wheel("greeting", "1.0", "import os\n")
    index.wheels.pop("greeting-0.9-py3-none-any.whl")
    digest = hashlib.sha256(swapped).hexdigest()
    done = pin("greeting\n", PIP_NO_CACHE_DIR="1")
    assert done.stderr == f"lock: requirements.txt:2: the index has another file than is locked, sha256:{digest}\n"
    assert not list((tmp_path / "fresh").iterdir())


@pytest.mark.parametrize(
    ("requirements", "message"),
    [
        ("# a comment\ngreetin\n", "requirements.in:2: no package greetin on the index; is the name right?"),
        ("greeting>=2\n", "requirements.in:1: no release is greeting>=2; the newest is 1.0"),
        ("other\ngreeting ~~ 1\n", "requirements.in:2: 'greeting ~~ 1': not a requirement; takes a name, and "),
        (
            "greeting<1\ngreeting>=1\n",
            "requirements.in: Cannot install greeting<1 and greeting>=1 because of conflicts: The user ",
        ),
        (
            "greeting\n-i https://example.org/\n",
            "requirements.in:2: '-i https://example.org/': an option; indexes are named ",
        ),
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
    said = "greeting==1.0 is yanked (wrong name); ask for another, or: make upgrade PACKAGE=greeting"
    assert done.stderr == f"lock: requirements.in:1: {said}\n"
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
    """`make upgrade PACKAGE=NAME` moves that package alone, in each lock; what was installed before is then old."""
    path = project.folder / "requirements.txt"
    project.run("make", "upgrade", "PACKAGE=click==8.2.0 jinja2==3.1.5")
    older = path.read_text()
    assert "click==8.2.0" in older
    installed = project.folder / ".venv" / "runtime"
    installed.parent.mkdir()
    installed.touch()
    project.run("make", "upgrade", "PACKAGE=click")
    assert path.stat().st_mtime_ns > installed.stat().st_mtime_ns
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


def test_no_place_for_fresh_locks(copy: Project, tmp_path: pathlib.Path) -> None:
    """Where no folder can be made for fresh locks, `make lock` ends there."""
    (tmp_path / "mktemp").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "mktemp").chmod(0o755)
    before = {path.name: path.read_bytes() for path in copy.folder.iterdir() if path.is_file()}
    done = copy.run("make", "lock", check=False, environ={"PATH": f"{tmp_path}:{copy.environ['PATH']}"})
    assert done.returncode != 0
    assert done.stdout == ""
    assert {path.name: path.read_bytes() for path in copy.folder.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "lock: requirements-dev.txt is missing; `git checkout requirements-dev.txt` restores it"),
        ("<<<<<<< HEAD\n", "lock: requirements-dev.txt:1: '<<<<<<< HEAD': a conflict of a merge; take one side whole "),
        ("pytest==1.0 --hash=sha256:123\n", "lock: requirements-dev.txt:1: pytest: 'sha256:123' is no SHA-256"),
    ],
)
def test_a_broken_lock_of_the_tools_is_said(copy: Project, text: str | None, message: str) -> None:
    """`make lock` takes pip-tools from a lock; if that cannot be read, one line says so before anything is built."""
    path = copy.folder / "requirements-dev.txt"
    path.unlink() if text is None else path.write_text(text)
    done = copy.run("make", "lock", check=False)
    assert done.returncode != 0
    first, *rest = done.stderr.splitlines()
    assert first.startswith(message)
    assert all(line.startswith("make") for line in rest)
