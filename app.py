"""The greeting service: a Flask application, and nothing about how it is served (serve does that).

To develop, with reload and debugger on this machine alone:

    flask --app app run --debug
"""

import json
import unicodedata

from flask import Flask, Response, abort, request
from werkzeug.exceptions import HTTPException

NAME_RULE = (
    "a name is 1 to 100 characters of valid UTF-8, "
    "none of them a control, format, surrogate, private-use or unassigned character"
)

# No files to serve: without this, /static/anything would be a route.
app = Flask(__name__, static_folder=None)


def text(body: str) -> Response:
    """Return `body` and a newline as text/plain: a browser never takes a greeting for HTML, whatever the name."""
    return Response(f"{body}\n", mimetype="text/plain")


def is_name(name: str) -> bool:
    """Tell whether `name` can be greeted.

    The rule's five kinds are Unicode's general categories that begin with C: Cc, Cf (the bidirectional overrides that
    turn text around are among them), Cs, Co, Cn.
    """
    return len(name) <= 100 and not any(unicodedata.category(character).startswith("C") for character in name)


def path_is_utf8() -> bool:
    """Tell whether the request's path is valid UTF-8: Flask has put U+FFFD where it is not, a character like others.

    WSGI carries the path's bytes as the latin-1 characters of a string (PEP 3333, "Unicode Issues").
    """
    try:
        request.environ["PATH_INFO"].encode("latin-1").decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


@app.get("/")
def hello() -> Response:
    """Greet the world."""
    return text("Hello, world!")


@app.get("/<name>")
def hello_name(name: str) -> Response:
    """Greet `name`, or answer 400 with the rule that it breaks."""
    if not (path_is_utf8() and is_name(name)):
        abort(400, NAME_RULE)
    return text(f"Hello, {name}!")


@app.get("/health")
def health() -> Response:
    """Tell that requests are answered, until the server says that it is about to stop. No cache may tell it for us."""
    draining = request.environ.get("serve.draining", False)
    body = json.dumps({"status": "draining" if draining else "ok"})
    response = Response(f"{body}\n", status=503 if draining else 200, mimetype="application/json")
    response.cache_control.no_store = True
    return response


@app.errorhandler(HTTPException)
def one_line(error: HTTPException) -> Response:
    """Answer an error, a crash of a view (500) included, in one line of text; headers such as Allow stay."""
    response = error.get_response()
    response.mimetype = "text/plain"
    response.data = f"{error.code} {error.name}: {error.description}\n"
    return response


@app.after_request
def nosniff(response: Response) -> Response:
    """Forbid browsers to guess another content type than the one we declare."""
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response
