"""The application of examples/degrees: its routes, what it refuses, and that its data survive."""

import http.client
import json
import os
import pathlib
import shutil
import sqlite3
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress

import pytest

from tests.support import ROOT, Project, Server, wait_until

EXAMPLE = ROOT / "examples" / "degrees"
if not EXAMPLE.is_dir():
    pytest.skip("examples/degrees is not here", allow_module_level=True)

SEED = [{"id": i, "year": 1990 + i, "degrees": n} for i, n in enumerate([5818, 5725, 6005, 6123, 6096])]
RIGHT = {"year": 1999, "degrees": 1}


def ask(url: str, method: str = "GET", body: object = None, kind: str = "application/json") -> tuple[int, object, dict]:
    """Return status, JSON (None without a body) and headers of a response; a body of bytes is sent as it is."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": kind}, method=method)
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        response = error
    with response:
        text = response.read().decode()
        return response.status, json.loads(text) if text else None, dict(response.headers)


@contextmanager
def serving(folder: pathlib.Path, **environ: str) -> Iterator[tuple[Server, str]]:
    """Serve a copy of the example in `folder`, its database there too; give the server and the address of the rows."""
    shutil.copy(EXAMPLE / "app.py", folder)
    settings = {"BIND": "127.0.0.1", "PORT": "0", "DATABASE": str(folder / "x.sqlite3")}
    with Server(folder, **settings, **environ) as running:
        yield running, running.listening()[0] + "/degrees"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the rows, for tests that leave them as they are."""
    with serving(tmp_path_factory.mktemp("degrees")) as (_, url):
        yield url


@pytest.mark.parametrize(
    ("query", "rows"),
    [("", SEED), ("?start=1992", SEED[2:]), ("?start=1992&limit=2", SEED[2:4]), ("?start=1995", [])],
)
def test_list(url: str, query: str, rows: list[dict]) -> None:
    """Rows are listed in the order of their years: from `start`, at most `limit` of them."""
    assert ask(url + query)[:2] == (200, rows)


def test_rows(tmp_path: pathlib.Path) -> None:
    """Rows are added, read, replaced and deleted; ids are not used again. The next start does not seed again."""
    with serving(tmp_path) as (_, url):
        status, row, headers = ask(url, "POST", {"year": 1989, "degrees": 2**63 - 1})
        assert (status, row, headers["Location"]) == (201, {"id": 5, "year": 1989, "degrees": 2**63 - 1}, "/degrees/5")
        assert ask(url)[1] == [row, *SEED]
        changed = {"id": 5, "year": 1988, "degrees": 0}
        assert ask(f"{url}/5", "PUT", {"year": 1988, "degrees": 0})[:2] == (200, changed)
        assert ask(f"{url}/5", "PUT", changed)[:2] == (200, changed)
        assert ask(f"{url}/5", "HEAD")[:2] == (200, None)
        assert ask(f"{url}/5")[:2] == (200, changed)
        assert ask(f"{url}/5/degrees")[:2] == (200, {"degrees": 0})
        for number in range(6):
            assert ask(f"{url}/{number}", "DELETE")[:2] == (204, None)
    with serving(tmp_path) as (_, url):
        assert ask(url)[:2] == (200, [])
        assert ask(url, "POST", RIGHT)[1] == {"id": 6, **RIGHT}


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("GET", "?start=abc", None, 400),
        ("GET", "?start=-1", None, 400),
        ("GET", "?limit=0", None, 400),
        ("GET", "?limit=1001", None, 400),
        ("GET", "?limit=" + "9" * 5000, None, 400),
        ("GET", "/5", None, 404),
        ("GET", "/5/degrees", None, 404),
        ("PUT", "/5", RIGHT, 404),
        ("DELETE", "/5", None, 404),
        ("PUT", f"/{2**63}", RIGHT, 404),
        ("PUT", "/" + "9" * 5000, RIGHT, 404),
        ("PATCH", "/0", RIGHT, 405),
        ("POST", "", {"year": 1990, "degrees": 1}, 409),
        ("PUT", "/0", {**RIGHT, "id": 1}, 400),
        ("POST", "", {**RIGHT, "id": 5}, 400),
        ("POST", "", {**RIGHT, "grade": 1}, 400),
        ("POST", "", {"year": 1999}, 400),
        ("POST", "", {**RIGHT, "year": "1999"}, 400),
        ("POST", "", {**RIGHT, "year": True}, 400),
        ("POST", "", {**RIGHT, "year": 10000}, 400),
        ("POST", "", {**RIGHT, "degrees": -1}, 400),
        ("POST", "", {**RIGHT, "degrees": 2**63}, 400),
        ("POST", "", b'{"year": 1999, "degrees": NaN}', 400),
        ("POST", "", [RIGHT], 400),
        ("POST", "", b"[" * 4096, 400),
        ("POST", "", b'{"year": "\xff"}', 400),
        ("POST", "", b" " * 4097, 413),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused(url: str, method: str, path: str, body: object, status: int) -> None:
    """A bad request gets its status and one line of JSON, and changes nothing."""
    refused, error, headers = ask(url + path, method, body)
    assert (refused, list(error)) == (status, ["error"])
    assert "\n" not in error["error"]
    assert (headers["Content-Type"], headers["X-Content-Type-Options"]) == ("application/json", "nosniff")
    assert ("Allow" in headers) == (status == 405)
    assert ask(url)[1] == SEED


def test_not_json(url: str) -> None:
    """A body that is not declared as JSON gets 415."""
    assert ask(url, "POST", RIGHT, "text/plain")[0] == 415


def test_seeded_by_one_of_many(tmp_path: pathlib.Path) -> None:
    """Processes that start at the same time without a database agree on one seed."""
    for number in range(5):
        environ = os.environ | {"DATABASE": str(tmp_path / f"{number}.sqlite3"), "PYTHONDONTWRITEBYTECODE": "1"}
        started = [subprocess.Popen([sys.executable, "-c", "import app"], cwd=EXAMPLE, env=environ) for _ in range(12)]
        assert [process.wait(60) for process in started] == [0] * 12
        with closing(sqlite3.connect(environ["DATABASE"])) as connection:
            assert connection.execute("SELECT count(*) FROM degrees").fetchone() == (5,)
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize("database", ["", "/nonexistent/x.sqlite3", "app.py"])
def test_wrong_database(tmp_path: pathlib.Path, database: str) -> None:
    """A DATABASE that SQLite cannot open ends the start with exit code 2 and one line that names the variable."""
    shutil.copy(EXAMPLE / "app.py", tmp_path)
    with Server(tmp_path, DATABASE=database) as running:
        assert running.ended() == 2
        [line] = running.log.read_text().splitlines()
        assert "DATABASE='/" in line


def test_busy(tmp_path: pathlib.Path) -> None:
    """While another process is writing, reads go on, and a write gets 503 in the end; after that it succeeds."""
    with serving(tmp_path) as (_, url):
        with closing(sqlite3.connect(tmp_path / "x.sqlite3")) as writer:
            writer.execute("BEGIN IMMEDIATE")
            assert ask(url)[:2] == (200, SEED)
            status, _, headers = ask(url, "POST", RIGHT)
            assert (status, headers["Retry-After"]) == (503, "1")
        assert ask(url, "POST", RIGHT)[0] == 201


def test_health(tmp_path: pathlib.Path) -> None:
    """It is healthy while the database can be read, until the server begins to stop."""
    with serving(tmp_path, SHUTDOWN_DELAY="30") as (running, url):
        health = url.replace("degrees", "health")
        status, body, headers = ask(health)
        assert (status, body, headers["Cache-Control"]) == (200, {"status": "ok"}, "no-store")
        running.stop()
        wait_until(lambda: ask(health)[:2] == (503, {"status": "draining"}), 10, "/health to say that it is draining")
        with closing(sqlite3.connect(tmp_path / "x.sqlite3")) as connection:
            connection.execute("DROP TABLE degrees")
        assert ask(health)[0] == 500


def writers(urls: list[str]) -> tuple[list[threading.Thread], list[list[int]]]:
    """Start four threads a server that add years until it is gone; return them and the years acknowledged to each."""
    acknowledged = [[] for _ in urls * 4]

    def write(number: int, url: str) -> None:
        with suppress(OSError, http.client.HTTPException):
            for year in range(2000 + 900 * number, 2900 + 900 * number):
                assert ask(url, "POST", {"year": year, "degrees": year})[0] == 201
                acknowledged[number].append(year)

    threads = [threading.Thread(target=write, args=arguments) for arguments in enumerate(urls * 4)]
    for thread in threads:
        thread.start()
    return threads, acknowledged


def sound(url: str, acknowledged: list[list[int]], threads: int) -> None:
    """Check that every year acknowledged is there, and of the others at most one a thread."""
    found, start = set(), 2000
    while rows := ask(f"{url}?start={start}")[1]:
        found.update(row["year"] for row in rows)
        start = max(found) + 1
    assert found >= {year for years in acknowledged for year in years}
    assert len(found) <= sum(map(len, acknowledged)) + threads


def test_killed_while_it_writes(tmp_path: pathlib.Path) -> None:
    """SIGKILL during writes loses nothing that was acknowledged, and leaves a sound database."""
    with serving(tmp_path) as (running, url):
        threads, acknowledged = writers([url])
        wait_until(lambda: min(map(len, acknowledged)) > 10, 60, "ten years of each writer")
        running.process.kill()
        for thread in threads:
            thread.join(30)
    with serving(tmp_path) as (_, url):
        sound(url, acknowledged, len(threads))
    with closing(sqlite3.connect(tmp_path / "x.sqlite3")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


# ---- In its container -----------------------------------------------------------------------------------------------


@pytest.fixture
def degrees(project: Project) -> Project:
    """A copy of the project where the example's own compose file has brought it up."""
    (project.folder / "image.yaml").write_text(f"services: {{degrees: {{image: {project.name}}}}}\n")
    project.environ["COMPOSE_FILE"] = "examples/degrees/compose.yaml:image.yaml"
    project.compose("up", "--build", "--wait")
    return project


def test_its_data_outlive_its_container(degrees: Project) -> None:
    """What was written is there after `down` and `up`, from the minimal image too; all else is read-only."""
    url = degrees.url("degrees") + "/degrees"
    assert url.startswith("http://127.0.0.1:")
    assert ask(url)[:2] == (200, SEED)
    assert ask(url, "POST", RIGHT)[0] == 201
    assert ask(f"{url}/0", "DELETE")[0] == 204
    code = (
        "import os; print(*(os.access(path, os.W_OK) for path in '/ /app /data /tmp'.split()), *sorted(os.listdir()))"
    )
    done = degrees.compose("exec", "--no-TTY", "degrees", "python", "-c", code)
    assert done.stdout == "False False True True __pycache__ app.py healthcheck.py serve\n"
    degrees.compose("down")
    degrees.compose("up", "--build", "--wait", environ={"TARGET": "minimal"})
    assert ask(degrees.url("degrees") + "/degrees")[1] == [*SEED[1:], {"id": 5, **RIGHT}]


def test_its_container_is_killed_while_it_writes(degrees: Project) -> None:
    """`docker kill` in the middle of writes loses nothing that was acknowledged."""
    threads, acknowledged = writers([degrees.url("degrees") + "/degrees"])
    wait_until(lambda: min(map(len, acknowledged)) > 10, 60, "ten years of each writer")
    degrees.compose("kill")
    for thread in threads:
        thread.join(30)
    degrees.compose("up", "--wait")
    sound(degrees.url("degrees") + "/degrees", acknowledged, len(threads))
