"""The routes, the names that are greeted and those that are not, the errors."""

import re
from collections.abc import Callable
from urllib.parse import unquote_to_bytes

import pytest
from werkzeug.test import TestResponse

import app as greeting
from tests.support import ROOT


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """A function that asks the application for a path, and checks what holds for every answer.

    Browsers are told to take its type as declared; an error is one line of text that begins with the status and does
    not repeat what was asked for.
    """
    monkeypatch.setitem(greeting.app.config, "PROPAGATE_EXCEPTIONS", value=False)  # a crash is answered, not raised
    client = greeting.app.test_client()

    def ask(path: str, method: str = "GET", **environ: object) -> TestResponse:
        # Byte for byte as a WSGI server passes it on: the client would mend bad UTF-8.
        environ["PATH_INFO"] = unquote_to_bytes(path).decode("latin-1")
        answer = client.open(method=method, environ_overrides=environ)
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        if answer.status_code >= 400 and answer.mimetype != "application/json":
            assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
            assert re.fullmatch(f"{answer.status_code} .+\n", answer.text)
            assert path[1:] not in answer.text or path == "/"
        return answer

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
    """The root greets the world and a name is greeted as it is, as text that no browser takes for HTML."""
    answer = ask(path)
    assert (answer.status_code, answer.text) == (200, text)
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"


@pytest.mark.parametrize(
    "path",
    [
        "/" + "n" * 101,
        "/Joe%0A",  # control
        "/a%0D%0ASet-Cookie:x",
        "/%E2%80%AEeoJ",  # format: right-to-left override
        "/a%E2%80%8Bb",  # format: zero-width space
        "/%EE%80%80",  # private use
        "/%CD%B8",  # unassigned
        "/Joe%C3",  # no UTF-8: cut off
        "/%C0%AF",  # no UTF-8: overlong
        "/%ED%A0%80",  # surrogate
    ],
)
def test_refuses_a_name(ask: Callable, path: str) -> None:
    """A name that could forge a line, turn text around or hide is answered 400 with the rule, not with itself."""
    answer = ask(path)
    assert (answer.status_code, answer.text) == (400, f"400 Bad Request: {greeting.NAME_RULE}\n")


@pytest.mark.skipif(not (ROOT / "README.md").exists(), reason="the image has no README")
def test_the_readme_shows_what_is_answered(ask: Callable) -> None:
    """Each curl in the README prints what stands below it."""
    shown = re.findall(r"^\$ curl localhost:5000(/\S*)\n(.*\n)", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(shown) == 3
    assert [(path, ask(path).text) for path, _ in shown] == shown


@pytest.mark.parametrize(("draining", "status", "word"), [(False, 200, "ok"), (True, 503, "draining")])
def test_health(ask: Callable, *, draining: bool, status: int, word: str) -> None:
    """/health is not a name; it says in JSON that no cache keeps whether the server is fine or about to stop."""
    answer = ask("/health", **{"serve.draining": draining})
    assert (answer.status_code, answer.text) == (status, f'{{"status": "{word}"}}\n')
    assert (answer.mimetype, answer.headers["Cache-Control"]) == ("application/json", "no-store")


@pytest.mark.parametrize("path", ["/a/b", "/Joe/", "/health/", "/static/app.py", "/../app.py"])
def test_unknown_path(ask: Callable, path: str) -> None:
    """A path that is no route is answered 404: no redirect, no file."""
    assert ask(path).status_code == 404


@pytest.mark.parametrize("path", ["/", "/Joe", "/health"])
@pytest.mark.parametrize("method", ["POST", "DELETE"])
def test_wrong_method(ask: Callable, method: str, path: str) -> None:
    """A method that a route has not is answered 405 with those that it has."""
    answer = ask(path, method)
    assert (answer.status_code, set(answer.allow)) == (405, {"GET", "HEAD", "OPTIONS"})


def test_crash(ask: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A view that raises is answered 500 without a word of why."""
    monkeypatch.setitem(greeting.app.view_functions, "hello", lambda: {}["secret"])
    answer = ask("/")
    assert answer.status_code == 500
    assert "secret" not in answer.text
