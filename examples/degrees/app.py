"""Degrees by year: a JSON API over SQLite, and nothing about how it is served (serve does that).

DATABASE names the file. It is made, with the five years of SEED, where it is not there.
"""

import json
import os
import pathlib
import re
import sqlite3
import time
from contextlib import closing

from flask import Flask, Response, abort, g, jsonify, request, url_for
from werkzeug.exceptions import HTTPException
from werkzeug.routing import BaseConverter

# An absolute path, because SQLite takes some names, such as an empty one, for a database in memory.
DATABASE = pathlib.Path(os.environ.get("DATABASE", "degrees.sqlite3")).absolute()
BUSY_TIMEOUT = 2  # seconds that a writer waits for another one: less than a probe waits (3 s)

SEED = [(0, 1990, 5818), (1, 1991, 5725), (2, 1992, 6005), (3, 1993, 6123), (4, 1994, 6096)]
# AUTOINCREMENT: what is deleted leaves its id to nobody.
SCHEMA = """
CREATE TABLE degrees (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    year INTEGER NOT NULL UNIQUE,
    degrees INTEGER NOT NULL
) STRICT
"""

LARGEST = 2**63 - 1  # that SQLite's INTEGER holds
FIELDS = {"year": (1, 9999), "degrees": (0, LARGEST)}  # smallest and largest of each
MOST_AT_ONCE = 1000


class Id(BaseConverter):
    """An id in a path: digits, and no more than SQLite holds; anything else is a path that is not there."""

    regex = "[0-9]{1,18}"

    def to_python(self, value: str) -> int:
        """Return the number."""
        return int(value)


app = Flask(__name__, static_folder=None)
app.url_map.converters["id"] = Id
app.url_map.merge_slashes = False  # no redirection, which would be HTML
app.json.sort_keys = False
app.config["MAX_CONTENT_LENGTH"] = 4096  # bytes: an object of two numbers is far smaller


def connect() -> sqlite3.Connection:
    """Return a connection to the database, on which each statement is a transaction unless BEGIN says otherwise."""
    connection = sqlite3.connect(DATABASE, timeout=BUSY_TIMEOUT, isolation_level=None)
    connection.row_factory = sqlite3.Row
    return connection


def prepare() -> None:
    """Make the table and fill it, once: the version, set in the same transaction, tells that it was done.

    Raises SystemExit, with one line, where DATABASE is no file that SQLite can work with.
    """
    try:
        with closing(connect()) as connection, connection:
            # Readers do not wait for a writer, nor it for them; what is committed outlives a kill: https://sqlite.org/wal.html
            patiently(connection, "PRAGMA journal_mode = WAL")
            connection.execute("BEGIN IMMEDIATE")
            if not connection.execute("PRAGMA user_version").fetchone()[0]:
                connection.execute(SCHEMA)
                connection.executemany("INSERT INTO degrees VALUES (?, ?, ?)", SEED)
                connection.execute("PRAGMA user_version = 1")
    except sqlite3.Error as error:
        problem = f"DATABASE={str(DATABASE)!r}: {error}; takes a file in a folder that can be written"
        raise SystemExit(problem) from error


def patiently(connection: sqlite3.Connection, statement: str) -> None:
    """Run a statement for which SQLite does not wait: of two that change the journal's mode it refuses one at once."""
    deadline = time.monotonic() + BUSY_TIMEOUT
    while True:
        try:
            connection.execute(statement)
        except sqlite3.OperationalError as error:
            if not is_busy(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def is_busy(error: sqlite3.OperationalError) -> bool:
    """Tell whether others have the database; the bits above the first eight say more: https://sqlite.org/rescode.html."""
    return error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY


def query(statement: str, *values: int) -> list[dict[str, int]]:
    """Return the rows that a statement gives. Once all are fetched, what it has changed is committed."""
    if "connection" not in g:
        g.connection = connect()
    return [dict(row) for row in g.connection.execute(statement, values).fetchall()]


@app.teardown_appcontext
def close(_error: BaseException | None) -> None:
    """Close the request's connection, if it had one."""
    if connection := g.pop("connection", None):
        connection.close()


def number(name: str, least: int, most: int, default: int) -> int:
    """Return a number of the query string; answer 400 if it is none from `least` to `most`."""
    text = request.args.get(name)
    if text is None:
        return default
    if not re.fullmatch("[0-9]{1,9}", text) or not least <= int(text) <= most:
        abort(400, f"{name}={text!r}: takes a whole number from {least} to {most}")
    return int(text)


def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return a JSON object as a dictionary; refuse a name that stands twice, which RFC 8259, 4, leaves open."""
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"{twice[0]!r} stands twice in it")
    return dict(pairs)


def body(*also: str) -> dict[str, int]:
    """Return year and degrees, and what else is allowed, from the request's body; answer 400 or 415 if it is wrong."""
    if request.mimetype != "application/json":
        abort(415, "takes Content-Type: application/json")
    try:
        given = json.loads(request.get_data().decode(), object_pairs_hook=once)  # UTF-8 alone: RFC 8259, 8.1
    except (ValueError, RecursionError) as error:
        abort(400, f"the body is not JSON: {error}")
    if not isinstance(given, dict):
        abort(400, "the body is not an object; takes year and degrees")
    if unknown := sorted(given.keys() - FIELDS.keys() - set(also)):
        abort(400, f"{unknown[0]!r}: no such field; takes year and degrees")
    for name, (least, most) in FIELDS.items():
        if name not in given:
            abort(400, f"{name} is missing; takes year and degrees")
        if type(given[name]) is not int or not least <= given[name] <= most:  # True is an int too
            abort(400, f"{name}: takes a whole number from {least} to {most}")
    return given


@app.get("/degrees")
def every() -> Response:
    """List the years in their order: from `start`, at most `limit` of them."""
    start = number("start", 0, 9999, default=0)
    limit = number("limit", 1, MOST_AT_ONCE, default=MOST_AT_ONCE)
    return jsonify(query("SELECT * FROM degrees WHERE year >= ? ORDER BY year LIMIT ?", start, limit))


ONE = "/degrees/<id:key>"


@app.get(ONE)
def one(key: int) -> Response:
    """Return one year."""
    return jsonify(found(query("SELECT * FROM degrees WHERE id = ?", key), key))


@app.get(f"{ONE}/degrees")
def degrees_of(key: int) -> Response:
    """Return the degrees of one year alone."""
    return jsonify(found(query("SELECT degrees FROM degrees WHERE id = ?", key), key))


@app.post("/degrees")
def add() -> Response:
    """Add a year; answer 201 with what it is now, and where."""
    given = body()
    row = written(given, "INSERT INTO degrees (year, degrees) VALUES (?, ?) RETURNING *")[0]
    answer = jsonify(row)
    answer.status_code = 201
    answer.headers["Location"] = url_for("one", key=row["id"])
    return answer


@app.put(ONE)
def replace(key: int) -> Response:
    """Give one year another content, whole."""
    given = body("id")
    if "id" in given and (type(given["id"]) is not int or given["id"] != key):
        abort(400, f"id: takes {key}, as in the path")
    return jsonify(found(written(given, "UPDATE degrees SET year = ?, degrees = ? WHERE id = ? RETURNING *", key), key))


@app.delete(ONE)
def delete(key: int) -> Response:
    """Delete one year."""
    found(query("DELETE FROM degrees WHERE id = ? RETURNING *", key), key)
    return Response(status=204)


def found(rows: list[dict[str, int]], key: int) -> dict[str, int]:
    """Return the only row, or answer 404."""
    if not rows:
        abort(404, f"no degrees have the id {key}")
    return rows[0]


def written(given: dict[str, int], statement: str, *values: int) -> list[dict[str, int]]:
    """Return the rows of a statement that writes year and degrees; answer 409 if another row has that year."""
    try:
        return query(statement, given["year"], given["degrees"], *values)
    except sqlite3.IntegrityError:
        abort(409, f"the year {given['year']} is there already")


@app.get("/health")
def health() -> Response:
    """Tell that requests are answered and the database read, until the server says that it is about to stop."""
    query("SELECT 1 FROM degrees LIMIT 1")
    draining = request.environ.get("serve.draining", False)
    answer = jsonify(status="draining" if draining else "ok")
    answer.status_code = 503 if draining else 200
    answer.cache_control.no_store = True
    return answer


@app.errorhandler(HTTPException)
def one_line(error: HTTPException) -> Response:
    """Answer an error, a crash of a view (500) included, in one line of JSON; headers such as Allow stay."""
    answer = jsonify(error=f"{error.name}: {error.description}")
    answer.status_code = error.code
    answer.headers.extend((name, value) for name, value in error.get_headers() if name != "Content-Type")
    return answer


@app.errorhandler(sqlite3.OperationalError)
def busy(error: sqlite3.OperationalError) -> Response:
    """Answer 503 if other writers have kept the database for longer than BUSY_TIMEOUT: a client may try again."""
    if not is_busy(error):
        raise error
    answer = jsonify(error="Service Unavailable: others are writing; try again")
    answer.status_code = 503
    answer.headers["Retry-After"] = "1"
    return answer


@app.after_request
def nosniff(response: Response) -> Response:
    """Forbid browsers to guess another content type than the one we declare."""
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response


prepare()
