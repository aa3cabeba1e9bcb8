"""Degrees by year: a JSON API over SQLite, in the file that DATABASE names."""

import os
import pathlib
import sqlite3
from contextlib import closing, suppress

from flask import Flask, Response, abort, jsonify, request, url_for
from werkzeug.exceptions import HTTPException, ServiceUnavailable

DATABASE = pathlib.Path(os.environ.get("DATABASE", "degrees.sqlite3")).absolute()  # to SQLite, "" is a temporary file
ROW = f"/degrees/<int(max={2**63 - 1}):row_id>"  # the largest integer in SQLite
FIELDS = {"year": range(1, 10_000), "degrees": range(2**63)}  # with their allowed values
TABLE = """CREATE TABLE degrees (
    id INTEGER PRIMARY KEY AUTOINCREMENT, -- the id of a deleted row is never used again
    year INTEGER NOT NULL UNIQUE,
    degrees INTEGER NOT NULL
) STRICT"""
SEED = [(0, 1990, 5818), (1, 1991, 5725), (2, 1992, 6005), (3, 1993, 6123), (4, 1994, 6096)]

# Create the database unless it exists. Several processes may do this at the same time.
try:
    with closing(sqlite3.connect(DATABASE, timeout=2)) as connection, connection:
        with suppress(sqlite3.OperationalError):  # another process is doing the same
            connection.execute("PRAGMA journal_mode = WAL")  # write-ahead log: reads do not wait for writes
        connection.execute("BEGIN IMMEDIATE")  # one process creates the table, the others wait
        if not connection.execute("SELECT * FROM sqlite_schema WHERE name = 'degrees'").fetchone():
            connection.execute(TABLE)
            connection.executemany("INSERT INTO degrees VALUES (?, ?, ?)", SEED)
except sqlite3.Error as error:
    raise SystemExit(f"DATABASE={str(DATABASE)!r}: {error}; must name an SQLite file in a writable folder") from error

app = Flask(__name__, static_folder=None)
app.json.sort_keys = False  # keep the order of the columns
app.config["MAX_CONTENT_LENGTH"] = 4096  # bytes: far more than a row needs


def query(statement: str, *values: int, one: bool = False) -> list | dict:
    """Run a statement in a transaction. Return its rows; with `one`, the only row, or raise 404 if there is none."""
    try:
        with closing(sqlite3.connect(DATABASE, timeout=2)) as connection, connection:  # waits 2 s for other writers
            connection.row_factory = sqlite3.Row
            rows = [dict(row) for row in connection.execute(statement, values)]
    except sqlite3.IntegrityError:
        abort(409, "another row has this year")
    except sqlite3.OperationalError as error:
        if not error.sqlite_errorname.startswith("SQLITE_BUSY"):
            raise
        raise ServiceUnavailable("another process is writing; try again", retry_after=1) from error
    if one and not rows:
        abort(404, "no row has this id")
    return rows[0] if one else rows


def values_from_body(**optional: range) -> tuple[int, int]:
    """Return year and degrees from the JSON body, or raise 400. The body must have FIELDS and may have `optional`."""
    try:
        row = request.get_json()
    except RecursionError:  # JSON that is nested too deeply
        abort(400)
    fields = FIELDS | optional
    if not isinstance(row, dict) or not FIELDS.keys() <= row.keys() <= fields.keys():
        abort(400, "the body must be an object with only year and degrees")
    for name, value in row.items():
        if type(value) is not int or value not in fields[name]:  # isinstance would take True for an int
            abort(400, f"{name} must be a whole number from {fields[name][0]} to {fields[name][-1]}")
    return row["year"], row["degrees"]


@app.get("/degrees")
def list_rows() -> list:
    """Return the rows in order of year, from year `start`, at most `limit` of them."""
    start = limit = -1
    with suppress(ValueError):
        start, limit = int(request.args.get("start", 0)), int(request.args.get("limit", 1000))
    if not (0 <= start <= 9999 and 1 <= limit <= 1000):
        abort(400, "start must be a year from 0 to 9999, limit a number from 1 to 1000")
    return query("SELECT * FROM degrees WHERE year >= ? ORDER BY year LIMIT ?", start, limit)


@app.post("/degrees")
def add_row() -> tuple:
    """Add a row. Return it, with its address in the Location header."""
    row = query("INSERT INTO degrees (year, degrees) VALUES (?, ?) RETURNING *", *values_from_body(), one=True)
    return row, 201, {"Location": url_for("one_row", row_id=row["id"])}


@app.route(ROW, methods=["GET", "PUT", "DELETE"])
def one_row(row_id: int) -> dict | tuple:
    """Return, replace or delete one row. A PUT may repeat the id, so a client can send back what GET returned."""
    if request.method == "PUT":
        values = values_from_body(id=range(row_id, row_id + 1))
        return query("UPDATE degrees SET year = ?, degrees = ? WHERE id = ? RETURNING *", *values, row_id, one=True)
    if request.method == "DELETE":
        query("DELETE FROM degrees WHERE id = ? RETURNING *", row_id, one=True)
        return "", 204
    return query("SELECT * FROM degrees WHERE id = ?", row_id, one=True)  # GET, and HEAD


@app.get(f"{ROW}/degrees")
def degrees_of_one_row(row_id: int) -> dict:
    """Return only the degrees of a row."""
    return query("SELECT degrees FROM degrees WHERE id = ?", row_id, one=True)


@app.get("/health")
def health() -> tuple:
    """Report whether the database can be read. Answer 503 once the server has begun to stop."""
    query("SELECT * FROM degrees LIMIT 1")
    status, code = ("draining", 503) if request.environ.get("serve.draining") else ("ok", 200)
    return {"status": status}, code, {"Cache-Control": "no-store"}


@app.errorhandler(HTTPException)
def error_as_json(error: HTTPException) -> Response:
    """Replace Flask's HTML error page by one line of JSON. Keep the status and headers, such as Allow."""
    response = error.get_response()
    response.data = jsonify(error=error.description).data
    response.content_type = "application/json"
    return response


@app.after_request
def nosniff(response: Response) -> Response:
    """Tell browsers not to guess a different content type."""
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response
