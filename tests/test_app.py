"""The routes, the names that are greeted and those that are not, the errors."""

import http.client
import pathlib
import re
from collections.abc import Callable
from urllib.parse import unquote_to_bytes

import pytest

import app as greeting
from tests.support import ROOT, Server
from tests.test_shutdown import until_said


@pytest.fixture
def ask(monkeypatch: pytest.MonkeyPatch) -> Callable:
    """A function that asks the application for a path, and a crash is answered as in production, not raised."""
    monkeypatch.setitem(greeting.app.config, "PROPAGATE_EXCEPTIONS", value=False)
    client = greeting.app.test_client()

    def ask(path: str, method: str = "GET") -> greeting.Response:
        # Byte for byte as a WSGI server passes it on: the client would mend bad UTF-8.
        path, _, query = path.partition("?")
        environ = {"PATH_INFO": unquote_to_bytes(path).decode("latin-1"), "QUERY_STRING": query}
        return client.open(method=method, environ_overrides=environ)

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
    """A method that a route has not is answered 405 with those that it has."""
    answer = ask(path, method)
    assert answer.status_code == 405
    assert set(answer.headers["Allow"].split(", ")) == {"GET", "HEAD", "OPTIONS"}


def test_crash(ask: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    """A view that raises is answered 500 without a word of why."""

    def crash() -> None:
        raise RuntimeError("secret")

    monkeypatch.setitem(greeting.app.view_functions, "hello", crash)
    answer = ask("/")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "Traceback" not in answer.text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/%FF", 400), ("GET", "/a/b", 404), ("POST", "/", 405), ("GET", "/crash", 500)],
)
def test_errors_are_one_line_of_text(
    ask: Callable, monkeypatch: pytest.MonkeyPatch, method: str, path: str, status: int
) -> None:
    """Every error is one line of plain text that begins with its status and does not repeat what was asked for."""
    if status == 500:
        monkeypatch.setitem(greeting.app.view_functions, "hello_name", lambda **_: 1 / 0)
    answer = ask(path, method)
    assert answer.status_code == status
    assert answer.headers["Content-Type"] == "text/plain; charset=utf-8"
    assert answer.text.startswith(f"{status} ")
    assert answer.text.endswith("\n")
    assert answer.text.count("\n") == 1
    assert path[1:] not in answer.text or path == "/"


@pytest.mark.parametrize("path", ["/", "/Joe", "/health", "/%FF", "/a/b"])
@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "OPTIONS"])
def test_nosniff(ask: Callable, method: str, path: str) -> None:
    """Whatever the answer, a browser is told to take its type as declared."""
    assert ask(path, method).headers["X-Content-Type-Options"] == "nosniff"


def test_the_greeting_service_drains(tmp_path: pathlib.Path) -> None:
    """Told to stop, the server has it say so: /health turns to 503, not to be cached, in the same form."""
    (tmp_path / "app.py").write_bytes((ROOT / "app.py").read_bytes())
    with Server(tmp_path, SHUTDOWN_DELAY="1") as running:
        address = running.listening()[0].removeprefix("http://")
        running.stop()
        until_said(running, "Draining")
        connection = http.client.HTTPConnection(address, timeout=10)
        connection.request("GET", "/health")
        answered = connection.getresponse()
        assert (answered.status, answered.read()) == (503, b'{"status": "draining"}\n')
        assert answered.headers["Cache-Control"] == "no-store"
        connection.close()
        assert running.ended() == 0
