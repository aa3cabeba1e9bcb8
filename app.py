"""The greeting service: a plain Flask application. serve/ runs it.

To develop, with live reload and debugger, on this machine only:

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

# Without static_folder=None, Flask would add a route for /static/.
app = Flask(__name__, static_folder=None)


def text(body: str) -> Response:
    """Return `body` and a newline as text/plain, so that browsers never render a name as HTML."""
    return Response(f"{body}\n", mimetype="text/plain")


def is_name(name: str) -> bool:
    """Return whether `name` follows NAME_RULE.

    Its five kinds of characters are Unicode's general categories Cc, Cf (which includes the bidirectional overrides
    that reverse text), Cs, Co and Cn.
    """
    return len(name) <= 100 and not any(unicodedata.category(character).startswith("C") for character in name)


def path_is_utf8() -> bool:
    """Return whether the request's path is valid UTF-8. Flask replaces invalid bytes by U+FFFD, a valid character.

    WSGI passes the bytes of the path as latin-1 characters (PEP 3333, "Unicode Issues").
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
    """Greet `name`, or answer 400 with NAME_RULE."""
    if not (path_is_utf8() and is_name(name)):
        abort(400, NAME_RULE)
    return text(f"Hello, {name}!")


@app.get("/health")
def health() -> Response:
    """Answer 200, or 503 once the server is about to stop. Not cacheable: a cache must not give this answer."""
    draining = request.environ.get("serve.draining", False)
    body = json.dumps({"status": "draining" if draining else "ok"})
    response = Response(f"{body}\n", status=503 if draining else 200, mimetype="application/json")
    response.cache_control.no_store = True
    return response


@app.errorhandler(HTTPException)
def one_line(error: HTTPException) -> Response:
    """Answer errors, including exceptions in views (500), in one line of text. Headers such as Allow are kept."""
    response = error.get_response()
    response.mimetype = "text/plain"
    response.data = f"{error.code} {error.name}: {error.description}\n"
    return response


@app.after_request
def nosniff(response: Response) -> Response:
    """Tell browsers not to guess the content type."""
    response.headers["X-Content-Type-Options"] = "nosniff"
    return response
