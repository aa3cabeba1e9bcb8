"""The greeting service: routes, valid and invalid names, errors."""

import re
from collections.abc import Callable
from urllib.parse import unquote_to_bytes

import pytest
from werkzeug.test import TestResponse

import app as greeting


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """A function that requests a path and checks what holds for every response.

    Every response has a nosniff header. An error is one line of text: the status and why, without the path.
    """
    monkeypatch.setitem(greeting.app.config, "PROPAGATE_EXCEPTIONS", value=False)  # a crash gives a 500
    client = greeting.app.test_client()

    def ask(path: str, method: str = "GET", **environ: object) -> TestResponse:
        # Set the bytes as a WSGI server would: the test client would repair invalid UTF-8.
        environ["PATH_INFO"] = unquote_to_bytes(path).decode("latin-1")
        response = client.open(method=method, environ_overrides=environ)
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        if response.status_code >= 400 and response.mimetype != "application/json":
            assert response.headers["Content-Type"] == "text/plain; charset=utf-8"
            assert re.fullmatch(f"{response.status_code} .+\n", response.text)
            assert path[1:] not in response.text or path == "/"
        return response

    return ask


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("/", "Hello, world!\n"),
        ("/Joe", "Hello, Joe!\n"),
        ("/" + "n" * 100, "Hello, " + "n" * 100 + "!\n"),
        ("/Mary%20Ann", "Hello, Mary Ann!\n"),
        ("/J%C3%B8rgen", "Hello, Jørgen!\n"),
        ("/%EF%BF%BD", "Hello, \ufffd!\n"),
        ("/" + "%F0%9F%90%8D" * 100, "Hello, " + "🐍" * 100 + "!\n"),
        ("/<script>", "Hello, <script>!\n"),
        ("/static", "Hello, static!\n"),
    ],
)
def test_greets(ask: Callable, path: str, text: str) -> None:
    """/ greets the world and /NAME greets the name, unchanged and as plain text."""
    response = ask(path)
    assert (response.status_code, response.text) == (200, text)
    assert response.headers["Content-Type"] == "text/plain; charset=utf-8"


@pytest.mark.parametrize(
    "path",
    [
        "/" + "n" * 101,
        "/Joe%0A",  # a control character
        "/a%0D%0ASet-Cookie:x",
        "/%E2%80%AEeoJ",  # a format character: right-to-left override
        "/a%E2%80%8Bb",  # a format character: zero-width space
        "/%EE%80%80",  # private use
        "/%CD%B8",  # unassigned
        "/Joe%C3",  # invalid UTF-8: truncated
        "/%C0%AF",  # invalid UTF-8: overlong
        "/%ED%A0%80",  # surrogate
    ],
)
def test_invalid_name(ask: Callable, path: str) -> None:
    """A name that is too long, has a forbidden character or is not UTF-8 is answered 400 with the rule for names."""
    response = ask(path)
    assert (response.status_code, response.text) == (400, f"400 Bad Request: {greeting.NAME_RULE}\n")


@pytest.mark.parametrize(("draining", "status", "word"), [(False, 200, "ok"), (True, 503, "draining")])
def test_health(ask: Callable, *, draining: bool, status: int, word: str) -> None:
    """/health returns JSON that must not be cached: 200 ok, or 503 draining while the server shuts down."""
    response = ask("/health", **{"serve.draining": draining})
    assert (response.status_code, response.text) == (status, f'{{"status": "{word}"}}\n')
    assert (response.mimetype, response.headers["Cache-Control"]) == ("application/json", "no-store")


@pytest.mark.parametrize("path", ["/a/b", "/Joe/", "/health/", "/static/app.py", "/../app.py"])
def test_unknown_path(ask: Callable, path: str) -> None:
    """An unknown path is answered 404, without a redirect or a file."""
    assert ask(path).status_code == 404


@pytest.mark.parametrize("path", ["/", "/Joe", "/health"])
@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_wrong_method(ask: Callable, method: str, path: str) -> None:
    """A method that the route does not support is answered 405, and Allow lists those that it does."""
    response = ask(path, method)
    assert (response.status_code, set(response.allow)) == (405, {"GET", "HEAD", "OPTIONS"})


def test_crash(ask: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A view that raises an exception is answered 500, without details."""
    monkeypatch.setitem(greeting.app.view_functions, "hello", lambda: {}["secret"])
    response = ask("/")
    assert response.status_code == 500
    assert "secret" not in response.text
