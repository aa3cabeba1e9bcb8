"""The routes, the names that are greeted and those that are not, the errors."""

import re
from collections.abc import Callable
from urllib.parse import unquote_to_bytes

import pytest

import app as greeting
from tests.support import LAST, ROOT, statuses


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """A function that asks the application for a path, and checks what holds for every answer.

    Browsers are told to take its type as declared; an error is one line of text that begins with the status and does
    not repeat what was asked for.
    """
    monkeypatch.setitem(greeting.app.config, "PROPAGATE_EXCEPTIONS", value=False)  # a crash is answered, not raised
    client = greeting.app.test_client()

    def ask(path: str, method: str = "GET") -> greeting.Response:
        # Byte for byte as a WSGI server passes it on: the client would mend bad UTF-8.
        path, _, query = path.partition("?")
        environ = {"PATH_INFO": unquote_to_bytes(path).decode("latin-1"), "QUERY_STRING": query}
        answer = client.open(method=method, environ_overrides=environ)
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        if answer.status_code >= 400:
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
        ("/Joe?debug=1", "Hello, Joe!\n"),
        ("/J", "Hello, J!\n"),
        ("/" + "n" * 100, "Hello, " + "n" * 100 + "!\n"),
        ("/Mary%20Ann", "Hello, Mary Ann!\n"),
        ("/J%C3%B8rgen", "Hello, Jørgen!\n"),
        ("/%E6%9D%8E", "Hello, 李!\n"),
        ("/%F0%9F%90%8D", "Hello, 🐍!\n"),
        ("/%EF%BF%BD", "Hello, \ufffd!\n"),
        ("/" + "%F0%9F%90%8D" * 100, "Hello, " + "🐍" * 100 + "!\n"),
        ("/<script>", "Hello, <script>!\n"),
        ("/{{7*7}}", "Hello, {{7*7}}!\n"),
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
        pytest.param("/" + "n" * 101, id="101 characters"),
        pytest.param("/%00", id="NUL"),
        pytest.param("/Joe%0A", id="newline at the end"),
        pytest.param("/a%0D%0ASet-Cookie:x", id="header injection"),
        pytest.param("/%1B[31m", id="terminal escape"),
        pytest.param("/%7F", id="delete"),
        pytest.param("/%C2%85", id="C1 control"),
        pytest.param("/%E2%80%AEeoJ", id="right-to-left override"),
        pytest.param("/%E2%81%A6eoJ", id="left-to-right isolate"),
        pytest.param("/a%E2%80%8Bb", id="zero-width space"),
        pytest.param("/%EF%BB%BFJoe", id="byte order mark"),
        pytest.param("/%EE%80%80", id="private use"),
        pytest.param("/%EF%BF%BF", id="noncharacter"),
        pytest.param("/%CD%B8", id="unassigned"),
        pytest.param("/%FF", id="not UTF-8"),
        pytest.param("/Joe%C3", id="UTF-8 cut off"),
        pytest.param("/%C0%AF", id="overlong UTF-8"),
        pytest.param("/%ED%A0%80", id="surrogate"),
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


def test_health(ask: Callable) -> None:
    """/health is not a name; it says ok in JSON that no cache keeps."""
    answer = ask("/health")
    assert (answer.status_code, answer.text, answer.json) == (200, '{"status": "ok"}\n', {"status": "ok"})
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["Cache-Control"] == "no-store"


@pytest.mark.parametrize("path", ["/a/b", "/Joe/", "/a//b", "/health/", "/health/x", "/static/app.py", "/../app.py"])
def test_unknown_path(ask: Callable, path: str) -> None:
    """A path that is no route is answered 404: no redirect, no file."""
    assert ask(path).status_code == 404


@pytest.mark.parametrize("path", ["/", "/Joe", "/health"])
@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "TRACE"])
def test_wrong_method(ask: Callable, method: str, path: str) -> None:
    """A method that a route has not is answered 405 with those that it has, which work."""
    answer = ask(path, method)
    assert answer.status_code == 405
    allowed = answer.headers["Allow"].split(", ")
    assert sorted(allowed) == ["GET", "HEAD", "OPTIONS"]
    assert [ask(path, method).status_code for method in allowed] == [200] * 3


def test_crash(ask: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A view that raises is answered 500 without a word of why."""

    def crash() -> None:
        raise RuntimeError("secret")

    monkeypatch.setitem(greeting.app.view_functions, "hello", crash)
    answer = ask("/")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text


def test_the_greeting_service_drains(start: Callable) -> None:
    """Told to stop, the server has it say so: /health turns to 503, not to be cached, in the same form."""
    with start((ROOT / "app.py").read_text(), SHUTDOWN_DELAY="600") as running:
        running.listening()
        running.stop()
        running.until_said("Draining")
        answered = running.exchange(LAST % b"/health")
    assert statuses(answered) == [503]
    assert answered.endswith(b'\r\n\r\n{"status": "draining"}\n')
    assert b"\r\ncache-control: no-store\r\n" in answered.lower()
