"""The application in examples/degrees: its routes, what it refuses, and that its data survive."""

import json
import os
import pathlib
import sqlite3
import sys
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import closing

import pytest

from tests.support import ROOT, Project, Server, run

EXAMPLE = ROOT / "examples" / "degrees"
if not EXAMPLE.is_dir():
    pytest.skip("examples/degrees is not here", allow_module_level=True)

SEED = [{"id": i, "year": 1990 + i, "degrees": n} for i, n in enumerate([5818, 5725, 6005, 6123, 6096])]
VALID = {"year": 1999, "degrees": 1}

APPLICATION = (EXAMPLE / "app.py").read_text()
DATABASE = "x.sqlite3"  # in the server's folder
VARIABLES = {"DATABASE": DATABASE}


def ask(url: str, method: str = "GET", body: object = None, kind: str = "application/json") -> tuple[int, object, dict]:
    """Send `body` as JSON, or as it is if it is bytes; return status, decoded JSON (None if empty) and headers."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": kind}, method=method)
    try:
        response = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        response = error
    with response:
        text = response.read().decode()
        return response.status, json.loads(text) if text else None, dict(response.headers)


@pytest.fixture
def url(running: Server) -> str:
    """The URL of the rows, for tests that leave them unchanged."""
    return running.listening()[0] + "/degrees"


@pytest.mark.parametrize(
    ("query", "rows"),
    [("", SEED), ("?start=1992", SEED[2:]), ("?start=1992&limit=2", SEED[2:4]), ("?start=1995", [])],
)
def test_list(url: str, query: str, rows: list[dict]) -> None:
    """Rows are listed by year: from `start`, at most `limit` of them."""
    assert ask(url + query)[:2] == (200, rows)


def test_rows(start: Callable) -> None:
    """Rows can be added, read, replaced and deleted. A kill loses nothing, no id is reused, the seed comes once."""
    with start(**VARIABLES) as running:  # the block ends with SIGKILL
        url = running.listening()[0] + "/degrees"
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
    with start(**VARIABLES) as running:
        url = running.listening()[0] + "/degrees"
        assert ask(url)[:2] == (200, [])
        assert ask(url, "POST", VALID)[1] == {"id": 6, **VALID}


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        *[("GET", f"?{query}", None, 400) for query in ("start=abc", "start=-1", "limit=0", "limit=1001")],
        *[("GET", path, None, 404) for path in ("/5", "/5/degrees")],
        ("DELETE", "/5", None, 404),
        *[("PUT", f"/{row_id}", VALID, 404) for row_id in (5, 2**63, "9" * 5000)],
        ("PATCH", "/0", VALID, 405),
        ("POST", "", {"year": 1990, "degrees": 1}, 409),
        ("PUT", "/0", {**VALID, "id": 1}, 400),
        *[("POST", "", {**VALID, name: 5}, 400) for name in ("id", "grade")],
        *[("POST", "", {**VALID, "year": year}, 400) for year in ("1999", True, 0, 10000)],
        *[("POST", "", {**VALID, "degrees": degrees}, 400) for degrees in (-1, 2**63)],
        *[("POST", "", body, 400) for body in ({"year": 1999}, [VALID])],
        ("POST", "", b'{"year": 1999, "degrees": NaN}', 400),
        ("POST", "", b"[" * 4096, 400),
        ("POST", "", b'{"year": "\xff"}', 400),
        ("POST", "", b" " * 4097, 413),
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused(url: str, method: str, path: str, body: object, status: int) -> None:
    """An invalid request is refused with this status and one line of JSON, and changes nothing."""
    refused, error, headers = ask(url + path, method, body)
    assert (refused, list(error)) == (status, ["error"])
    assert "\n" not in error["error"]
    assert (headers["Content-Type"], headers["X-Content-Type-Options"]) == ("application/json", "nosniff")
    assert ("Allow" in headers) == (status == 405)
    assert ask(url)[1] == SEED


def test_not_json(url: str) -> None:
    """A body that is not declared as JSON is answered 415."""
    assert ask(url, "POST", VALID, "text/plain")[0] == 415


def test_seeded_once(tmp_path: pathlib.Path) -> None:
    """Of several processes that start at the same time without a database, one seeds it, and none fails."""
    code = "import os, flask; [os.fork() for _ in range(2)]; import app"  # four processes, at about the same time
    (tmp_path / "app.py").write_text(APPLICATION)
    for number in range(4):
        environ = os.environ | {"DATABASE": str(tmp_path / str(number))}
        assert run(sys.executable, "-c", code, cwd=tmp_path, env=environ).stderr == ""  # of all four
        with closing(sqlite3.connect(environ["DATABASE"])) as connection:
            assert connection.execute("SELECT count(*) FROM degrees").fetchone() == (5,)
            assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize("value", ["", "/nonexistent/x.sqlite3", "app.py"])
def test_unusable_database(start: Callable, value: str) -> None:
    """A DATABASE that SQLite cannot use ends the start with exit code 2 and one line with its absolute path."""
    with start(DATABASE=value) as running:
        assert running.ended() == 2
        [line] = running.log.read_text().splitlines()
        assert "DATABASE='/" in line


def test_busy(running: Server, url: str) -> None:
    """While another process writes, reads succeed and a write is answered 503; afterwards it succeeds."""
    with closing(sqlite3.connect(running.log.with_name(DATABASE))) as writer:
        writer.execute("BEGIN IMMEDIATE")
        assert ask(url)[:2] == (200, SEED)
        status, _, headers = ask(url, "POST", VALID)
        assert (status, headers["Retry-After"]) == (503, "1")
    status, _, headers = ask(url, "POST", VALID)
    assert status == 201
    assert ask(url.replace("/degrees", headers["Location"]), "DELETE")[0] == 204


def test_health(start: Callable) -> None:
    """/health is 200, 503 while the server drains, and 500 if the database cannot be read."""
    with start(SHUTDOWN_DELAY="600", **VARIABLES) as running:
        health = running.listening()[0] + "/health"
        status, body, headers = ask(health)
        assert (status, body, headers["Cache-Control"]) == (200, {"status": "ok"}, "no-store")
        running.stop()
        running.until_said("Draining")
        assert ask(health)[:2] == (503, {"status": "draining"})
        with closing(sqlite3.connect(running.log.with_name(DATABASE))) as connection:
            connection.execute("DROP TABLE degrees")
        assert ask(health)[0] == 500


def test_data_outlive_the_container(project: Project) -> None:
    """The data survive kill, down and a new image; only 127.0.0.1 has the port; only /data and /tmp are writable."""
    project.environ["COMPOSE_FILE"] = "examples/degrees/compose.yaml"
    project.compose("up", "--build", "--wait")
    url = project.url("degrees") + "/degrees"
    assert url.startswith("http://127.0.0.1:")
    assert ask(url)[:2] == (200, SEED)
    assert ask(f"{url}/0", "DELETE")[0] == 204
    code = (
        "import os; print(*(os.access(path, os.W_OK) for path in '/ /app /data /tmp'.split()), *sorted(os.listdir()))"
    )
    done = project.compose("exec", "--no-TTY", "degrees", "python", "-c", code)
    assert done.stdout == "False False True True __pycache__ app.py healthcheck.py serve\n"
    project.compose("kill")
    project.compose("down")
    project.compose("up", "--build", "--wait", environ={"TARGET": "minimal"})
    assert ask(project.url("degrees") + "/degrees")[1] == SEED[1:]
