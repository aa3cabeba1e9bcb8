"""The application of examples/degrees: its routes, what it refuses, and that data outlive writers, kills and `down`."""

import http.client
import json
import os
import pathlib
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, suppress

import pytest

from tests.support import ROOT, Project, Server, server, wait_until

EXAMPLE = ROOT / "examples" / "degrees"
if not EXAMPLE.is_dir():
    pytest.skip("examples/degrees is not here", allow_module_level=True)

SEED = [
    {"id": 0, "year": 1990, "degrees": 5818},
    {"id": 1, "year": 1991, "degrees": 5725},
    {"id": 2, "year": 1992, "degrees": 6005},
    {"id": 3, "year": 1993, "degrees": 6123},
    {"id": 4, "year": 1994, "degrees": 6096},
]


def ask(url: str, method: str = "GET", body: object = None, kind: str = "application/json") -> tuple[int, object, dict]:
    """Return status, JSON (None without a body) and headers of an answer; a body that is bytes is sent as it is."""
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": kind} if data is not None else {}, method=method)
    try:
        answer = urllib.request.urlopen(request, timeout=30)
    except urllib.error.HTTPError as error:
        answer = error
    with answer:
        text = answer.read().decode()
        return answer.status, json.loads(text) if text else None, dict(answer.headers)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The example's code in a folder where it can write."""
    folder = tmp_path_factory.mktemp("degrees")
    shutil.copy(EXAMPLE / "app.py", folder)
    return folder


def serving(folder: pathlib.Path, database: object) -> AbstractContextManager[Server]:
    """Serve it, on a database of one's own."""
    return server(folder, BIND="127.0.0.1", PORT="0", DATABASE=str(database))


@pytest.fixture
def url(folder: pathlib.Path, tmp_path: pathlib.Path) -> Iterator[str]:
    """Where it is served, with a database that no other test has."""
    with serving(folder, tmp_path / "x.sqlite3") as running:
        yield running.listening()[0] + "/degrees"


@pytest.fixture(scope="module")
def refusing(folder: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where it is served for requests that change nothing, because it refuses them."""
    with serving(folder, tmp_path_factory.mktemp("data") / "x.sqlite3") as running:
        yield running.listening()[0] + "/degrees"


@pytest.mark.parametrize(
    ("query", "years"),
    [
        ("", [1990, 1991, 1992, 1993, 1994]),
        ("?start=1992", [1992, 1993, 1994]),
        ("?start=1992&limit=2", [1992, 1993]),
        ("?limit=1", [1990]),
        ("?limit=1000", [1990, 1991, 1992, 1993, 1994]),
        ("?start=0", [1990, 1991, 1992, 1993, 1994]),
        ("?start=1995", []),
    ],
)
def test_list(refusing: str, query: str, years: list[int]) -> None:
    """The years come in their order, from `start`, at most `limit` of them."""
    status, listed, _ = ask(refusing + query)
    assert (status, listed) == (200, [row for row in SEED if row["year"] in years])


def test_one(refusing: str) -> None:
    """A year is found by its id, and its degrees alone."""
    assert ask(f"{refusing}/0")[:2] == (200, SEED[0])
    assert ask(f"{refusing}/0/degrees")[:2] == (200, {"degrees": 5818})


def test_written(url: str) -> None:
    """A year is added, replaced and deleted; its id goes to no other one."""
    status, row, headers = ask(url, "POST", {"year": 1989, "degrees": 5000})
    assert (status, row) == (201, {"id": 5, "year": 1989, "degrees": 5000})
    assert headers["Location"] == "/degrees/5"
    assert ask(url)[1] == [row, *SEED]
    changed = {"id": 5, "year": 1988, "degrees": 0}
    assert ask(f"{url}/5", "PUT", {"year": 1988, "degrees": 0})[:2] == (200, changed)
    assert ask(f"{url}/5", "PUT", changed)[:2] == (200, changed)
    assert ask(f"{url}/5")[1] == changed
    assert ask(f"{url}/5", "DELETE")[:2] == (204, None)
    assert ask(f"{url}/5")[0] == 404
    assert ask(url, "POST", {"year": 1988, "degrees": 2**63 - 1})[1]["id"] == 6


RIGHT = {"year": 1999, "degrees": 1}
NUMBER = "takes a whole number from"


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "message"),
    [
        ("GET", "?start=abc", None, 400, f"start='abc': {NUMBER} 0 to 9999"),
        ("GET", "?start=", None, 400, f"start='': {NUMBER}"),
        ("GET", "?start=-1", None, 400, f"start='-1': {NUMBER}"),
        ("GET", "?start=1990.5", None, 400, f"start='1990.5': {NUMBER}"),
        ("GET", "?start=10000", None, 400, f"start='10000': {NUMBER}"),
        ("GET", "?start=1_990", None, 400, f"start='1_990': {NUMBER}"),
        ("GET", "?start=%D9%A1", None, 400, NUMBER),  # ARABIC-INDIC DIGIT ONE
        ("GET", "?start=a%0Ab", None, 400, NUMBER),
        ("GET", "?limit=-1", None, 400, f"limit='-1': {NUMBER} 1 to 1000"),
        ("GET", "?limit=0", None, 400, f"limit='0': {NUMBER} 1 to 1000"),
        ("GET", "?limit=1001", None, 400, f"limit='1001': {NUMBER} 1 to 1000"),
        ("GET", "?limit=" + "9" * 5000, None, 400, NUMBER),
        ("GET", "?limit=ten", None, 400, f"limit='ten': {NUMBER} 1 to 1000"),
        ("GET", "/5", None, 404, "no degrees have the id 5"),
        ("GET", "/5/degrees", None, 404, "no degrees have the id 5"),
        ("GET", "/-1", None, 404, "Not Found"),
        ("GET", "/abc", None, 404, "Not Found"),
        ("GET", f"/{10**18 - 1}", None, 404, "no degrees have the id"),
        ("DELETE", f"/{2**63}", None, 404, "Not Found"),
        ("PUT", f"/{2**63}", RIGHT, 404, "Not Found"),
        ("GET", "/%D9%A1", None, 404, "Not Found"),  # ARABIC-INDIC DIGIT ONE
        ("GET", "/1//degrees", None, 404, "Not Found"),
        ("GET", f"/{2**63}", None, 404, "Not Found"),
        ("GET", "/" + "9" * 5000, None, 404, "Not Found"),
        ("GET", "/0/years", None, 404, "Not Found"),
        ("PUT", "/5", RIGHT, 404, "no degrees have the id 5"),
        ("DELETE", "/5", None, 404, "no degrees have the id 5"),
        ("DELETE", "", None, 405, "Method Not Allowed"),
        ("PUT", "", RIGHT, 405, "Method Not Allowed"),
        ("POST", "/0", RIGHT, 405, "Method Not Allowed"),
        ("PATCH", "/0", RIGHT, 405, "Method Not Allowed"),
        ("POST", "", {"year": 1990, "degrees": 1}, 409, "the year 1990 is there already"),
        ("PUT", "/0", {"year": 1991, "degrees": 1}, 409, "the year 1991 is there already"),
        ("PUT", "/0", {"id": 1, "year": 1990, "degrees": 1}, 400, "id: takes 0, as in the path"),
        ("PUT", "/0", {"id": "0", "year": 1990, "degrees": 1}, 400, "id: takes 0, as in the path"),
        ("PUT", "/0", {"id": False, "year": 1990, "degrees": 1}, 400, "id: takes 0, as in the path"),
        ("PUT", "/0", {"id": 0.0, "year": 1990, "degrees": 1}, 400, "id: takes 0, as in the path"),
        ("PUT", "/0", {"id": None, "year": 1990, "degrees": 1}, 400, "id: takes 0, as in the path"),
        ("POST", "", b"x" * 5000, 413, "Request Entity Too Large"),
        *[
            (method, path, body, 400, message)
            for method, path in [("POST", ""), ("PUT", "/0")]
            for body, message in [
                (b"", "the body is not JSON"),
                (b"{", "the body is not JSON"),
                (b'{"year": 1999, "degrees": 1}}', "the body is not JSON"),
                (b'{"year": 1999, "year": 1998, "degrees": 1}', "'year' stands twice"),
                (b'{"year": 1999, "degrees": ' + b"9" * 4000 + b"}", f"degrees: {NUMBER}"),
                (b"[" * 4000, "the body is not JSON"),
                (b'{"year": "\xff"}', "the body is not JSON"),
                (json.dumps(RIGHT).encode("utf-16"), "the body is not JSON"),
                (b"null", "the body is not an object"),
                ([RIGHT], "the body is not an object"),
                ({}, "year is missing"),
                ({"degrees": 1}, "year is missing"),
                ({"year": 1999}, "degrees is missing"),
                ({**RIGHT, "year": "1999"}, f"year: {NUMBER} 1 to 9999"),
                ({**RIGHT, "year": 1999.0}, f"year: {NUMBER}"),
                ({**RIGHT, "year": True}, f"year: {NUMBER}"),
                ({**RIGHT, "year": None}, f"year: {NUMBER}"),
                ({**RIGHT, "year": [1999]}, f"year: {NUMBER}"),
                ({**RIGHT, "year": 0}, f"year: {NUMBER}"),
                ({**RIGHT, "year": 10000}, f"year: {NUMBER}"),
                ({**RIGHT, "degrees": "1"}, f"degrees: {NUMBER} 0 to {2**63 - 1}"),
                ({**RIGHT, "degrees": -1}, f"degrees: {NUMBER}"),
                ({**RIGHT, "degrees": 2**63}, f"degrees: {NUMBER}"),
                (b'{"year": 1999, "degrees": NaN}', f"degrees: {NUMBER}"),
                (b'{"year": 1999, "degrees": 1e400}', f"degrees: {NUMBER}"),
                ({**RIGHT, "grade": 1}, "'grade': no such field"),
            ]
        ],
    ],
    ids=lambda value: str(value)[:40],
)
def test_refused(  # noqa: PLR0913, PLR0917 - a table has as many columns as it needs
    refusing: str, method: str, path: str, body: object, status: int, message: str
) -> None:
    """Each bad request gets its status and one line of JSON that says what is wrong; the data stay as they are."""
    answered, error, headers = ask(refusing + path, method, body)
    assert answered == status
    assert list(error) == ["error"]
    assert message in error["error"]
    assert "\n" not in error["error"]
    assert headers["Content-Type"] == "application/json"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert ("Allow" in headers) == (status == 405)
    assert ask(refusing)[1] == SEED


@pytest.mark.parametrize("kind", ["", "text/plain", "application/x-www-form-urlencoded", "application/problem+json"])
@pytest.mark.parametrize(("method", "path"), [("POST", ""), ("PUT", "/0")])
def test_refused_kind(refusing: str, method: str, path: str, kind: str) -> None:
    """A body that does not say that it is JSON gets 415."""
    status, error, _ = ask(refusing + path, method, RIGHT, kind)
    assert (status, error) == (415, {"error": "Unsupported Media Type: takes Content-Type: application/json"})


def test_seeded_once(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """What is deleted stays deleted, all of it too; the next start does not fill an empty table again."""
    with serving(folder, tmp_path / "x.sqlite3") as running:
        url = running.listening()[0] + "/degrees"
        for row in SEED:
            assert ask(f"{url}/{row['id']}", "DELETE")[0] == 204
    with serving(folder, tmp_path / "x.sqlite3") as running:
        assert ask(running.listening()[0] + "/degrees")[:2] == (200, [])


def test_seeded_by_one_of_many(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Servers that start at the same time on no database agree on one seed."""
    environ = os.environ | {"PYTHONPATH": str(folder)}
    for number in range(5):
        environ["DATABASE"] = str(tmp_path / f"{number}.sqlite3")
        started = [subprocess.Popen([sys.executable, "-c", "import app"], cwd=folder, env=environ) for _ in range(8)]
        assert [process.wait(30) for process in started] == [0] * 8
        with closing(sqlite3.connect(environ["DATABASE"])) as connection:
            assert connection.execute("SELECT count(*) FROM degrees").fetchone() == (5,)


@pytest.mark.parametrize(
    ("database", "problem"),
    [
        ("", "unable to open database file"),
        ("/nonexistent/x.sqlite3", "unable to open database file"),
        ("app.py", "file is not a database"),
    ],
)
def test_wrong_database(folder: pathlib.Path, database: str, problem: str) -> None:
    """A DATABASE that is none ends the start with exit code 2 and one line that names it."""
    with serving(folder, database) as running:
        assert running.ended() == 2
        logged = running.log.read_text()
    assert re.match(r"serve: APP='app:app': SystemExit: DATABASE='/.*': " + problem, logged)
    assert logged.count("\n") == 1


def write(url: str, years: range, acknowledged: list[int]) -> None:
    """Add years until the server is gone; keep those that it has acknowledged."""
    with suppress(OSError, http.client.HTTPException):
        for year in years:
            status, error, _ = ask(url, "POST", {"year": year, "degrees": year})
            assert status == 201, error
            acknowledged.append(year)


def writers(urls: list[str]) -> tuple[list[threading.Thread], list[list[int]]]:
    """Start four writers to each of some servers, none with another's years; return them and what each has added."""
    places = [url for url in urls for _ in range(4)]
    acknowledged = [[] for _ in places]
    years = [range(2000 + number * 900, 2900 + number * 900) for number in range(len(places))]
    threads = [
        threading.Thread(target=write, args=arguments) for arguments in zip(places, years, acknowledged, strict=True)
    ]
    for thread in threads:
        thread.start()
    return threads, acknowledged


def sound(url: str, acknowledged: list[list[int]], threads: int) -> None:
    """Check that all that was acknowledged is there, and of the rest at most what each writer was about to add."""
    rows = []
    while more := ask(f"{url}?start={rows[-1]['year'] + 1 if rows else 0}")[1]:
        rows += more
    there = {row["year"] for row in rows if row["year"] == row["degrees"]}
    assert {row["year"] for row in rows} == there | {row["year"] for row in SEED}
    assert there >= {year for years in acknowledged for year in years}
    assert len(there) <= sum(map(len, acknowledged)) + threads


def test_concurrent_writers(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """Two servers with four writers each lose nothing and fail nobody; one year is added once, whoever else tries."""
    with serving(folder, tmp_path / "x.sqlite3") as one:
        one.listening()
        shutil.copytree(folder, tmp_path / "other")
        with serving(tmp_path / "other", tmp_path / "x.sqlite3") as other:
            urls = [running.listening()[0] + "/degrees" for running in (one, other)]
            statuses = []
            rivals = [
                threading.Thread(target=lambda url=url: statuses.append(ask(url, "POST", RIGHT)[0])) for url in urls * 4
            ]
            for rival in rivals:
                rival.start()
            for rival in rivals:
                rival.join(30)
            assert sorted(statuses) == [201, *[409] * 7]
            ask(f"{urls[0]}/5", "DELETE")
            threads, acknowledged = writers(urls)
            wait_until(lambda: min(map(len, acknowledged)) > 20, 60, "twenty years of each writer")
            one.stop()
            other.stop()
            for thread in threads:
                thread.join(30)
            assert (one.ended(), other.ended()) == (0, 0)
    with serving(folder, tmp_path / "x.sqlite3") as running:
        sound(running.listening()[0] + "/degrees", acknowledged, 0)


def test_a_writer_that_does_not_end(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """While another process keeps the database, reads go on; a write gets 503 in the end, and works after that."""
    with serving(folder, tmp_path / "x.sqlite3") as running:
        url = running.listening()[0] + "/degrees"
        with closing(sqlite3.connect(tmp_path / "x.sqlite3", isolation_level=None)) as keeper:
            keeper.execute("BEGIN IMMEDIATE")
            assert ask(url)[:2] == (200, SEED)
            status, error, headers = ask(url, "POST", RIGHT)
            assert (status, error) == (503, {"error": "Service Unavailable: others are writing; try again"})
            assert headers["Retry-After"] == "1"
        assert ask(url, "POST", RIGHT)[0] == 201


def test_killed_while_it_writes(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """SIGKILL in the middle of writes loses nothing that was acknowledged, and leaves a database that is whole."""
    with serving(folder, tmp_path / "x.sqlite3") as running:
        threads, acknowledged = writers([running.listening()[0] + "/degrees"])
        wait_until(lambda: min(map(len, acknowledged)) > 10, 60, "ten years of each writer")
        running.process.send_signal(signal.SIGKILL)
        for thread in threads:
            thread.join(30)
    with serving(folder, tmp_path / "x.sqlite3") as running:
        sound(running.listening()[0] + "/degrees", acknowledged, len(threads))
    with closing(sqlite3.connect(tmp_path / "x.sqlite3")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_health(refusing: str, folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    """It is healthy while the database can be read, and not without it."""
    status, body, headers = ask(refusing.replace("/degrees", "/health"))
    assert (status, body, headers["Cache-Control"]) == (200, {"status": "ok"}, "no-store")
    with serving(folder, tmp_path / "x.sqlite3") as running:
        health = running.listening()[0] + "/health"
        with closing(sqlite3.connect(tmp_path / "x.sqlite3")) as connection:
            connection.execute("DROP TABLE degrees")
        assert ask(health)[0] == 500


# ---- In its container -----------------------------------------------------------------------------------------------


@pytest.fixture
def degrees(project: Project, target: str) -> Project:
    """A copy of the project where compose serves it, from either target."""
    project.environ["TARGET"] = target
    up(project)
    return project


def up(project: Project) -> None:
    """Start it, until it is healthy."""
    project.compose("--profile", "degrees", "up", "--build", "--wait", "degrees")


def inside(project: Project, code: str) -> str:
    """Return what Python code prints in its container."""
    return project.compose("exec", "--no-TTY", "degrees", "python", "-c", code).stdout.strip()


def test_its_data_outlive_its_container(degrees: Project) -> None:
    """What was written is there after `down` and `up`; the volume is the process's user's, all else is read-only."""
    assert degrees.url("degrees").startswith("http://127.0.0.1:")
    url = degrees.url("degrees") + "/degrees"
    assert ask(url)[:2] == (200, SEED)
    assert ask(url, "POST", RIGHT)[0] == 201
    assert ask(f"{url}/0", "DELETE")[0] == 204
    owner = "import os; print(os.getuid(), *(os.stat(p).st_uid for p in ('/data', '/data/degrees.sqlite3')))"
    assert inside(degrees, owner) == "65532 65532 65532"
    assert inside(degrees, "import os; print(*(os.access(p, os.W_OK) for p in '/ /app /data /tmp'.split()))") == (
        "False False True True"
    )
    assert inside(degrees, "import os; print(*sorted(os.listdir()))") == "__pycache__ app.py healthcheck.py serve"
    degrees.compose("--profile", "degrees", "down")
    up(degrees)
    assert ask(degrees.url("degrees") + "/degrees")[1] == [*SEED[1:], {"id": 5, **RIGHT}]


def test_its_container_is_killed_while_it_writes(degrees: Project) -> None:
    """`docker kill` in the middle of writes loses nothing that was acknowledged."""
    threads, acknowledged = writers([degrees.url("degrees") + "/degrees"])
    wait_until(lambda: min(map(len, acknowledged)) > 10, 60, "ten years of each writer")
    degrees.compose("kill", "degrees")
    for thread in threads:
        thread.join(30)
    up(degrees)
    sound(degrees.url("degrees") + "/degrees", acknowledged, len(threads))
    check = "sqlite3.connect('/data/degrees.sqlite3').execute('PRAGMA integrity_check').fetchone()[0]"
    assert inside(degrees, f"import sqlite3; print({check})") == "ok"


def test_a_volume_for_a_random_user(project: Project) -> None:
    """A user of the group root, as OpenShift makes them, can write to a new volume too."""
    override = json.loads((project.folder / "override.yaml").read_text())
    override["services"]["degrees"]["user"] = "12345:0"
    (project.folder / "override.yaml").write_text(json.dumps(override))
    project.compose("--profile", "degrees", "up", "--build", "--wait")  # and what has no profile, web
    assert ask(project.url("degrees") + "/degrees", "POST", RIGHT)[0] == 201


def test_a_volume_of_another_user(project: Project) -> None:
    """Where the process may not write, it ends with one line that names the file, as README has it."""
    project.compose("--profile", "degrees", "build", "degrees")
    take = "import os; open('/data/theirs', 'w'); os.chmod('/data', 0o700); os.chown('/data', 1, 1)"
    root = ["run", "--rm", "--no-TTY", "--user", "0", "--cap-add", "CHOWN", "--cap-add", "FOWNER"]
    project.compose(*root, "degrees", "python", "-c", take)
    done = project.compose("run", "--rm", "--no-TTY", "degrees", check=False, timeout=60)
    assert done.returncode == 2
    assert "DATABASE='/data/degrees.sqlite3': unable to open database file; takes a file in" in done.stderr
