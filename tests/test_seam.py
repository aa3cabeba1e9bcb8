"""What serve relies on in waitress. A release that moves any of it fails here, by name."""

import inspect
import re
import select
import signal
import socket

import pytest
from waitress import channel, parser, proxy_headers, server, task, utilities, wasyncore
from waitress.adjustments import Adjustments

from serve.answer import Application, ErrorAnswer
from serve.connection import Channel, Connections, State
from serve.request import Parser
from serve.server import Server
from serve.settings import DEFAULTS, read_settings
from tests.support import ROOT


@pytest.mark.parametrize(
    ("owner", "name", "parameters"),
    [
        (parser.HTTPRequestParser, "received", ["self", "data"]),
        (parser.HTTPRequestParser, "parse_header", ["self", "header_plus"]),
        (task.Task, "service", ["self"]),
        (task.Task, "build_response_header", ["self"]),
        (task.Task, "finish", ["self"]),
        (task.Task, "set_close_on_finish", ["self"]),
        (task.Task, "write", ["self", "data"]),
        (task.WSGITask, "get_environment", ["self"]),
        (task.ErrorTask, "execute", ["self"]),
        (channel.HTTPChannel, "__init__", ["self", "server", "sock", "addr", "adj", "map"]),
        (channel.HTTPChannel, "service", ["self"]),
        (channel.HTTPChannel, "send_continue", ["self"]),
        (channel.HTTPChannel, "write_soon", ["self", "data"]),
        (channel.HTTPChannel, "received", ["self", "data"]),
        (channel.HTTPChannel, "handle_write", ["self"]),
        (channel.HTTPChannel, "handle_close", ["self"]),
        (server.BaseWSGIServer, "handle_accept", ["self"]),
        (server.BaseWSGIServer, "pull_trigger", ["self"]),
        (wasyncore.dispatcher, "readable", ["self"]),
        (wasyncore.dispatcher, "writable", ["self"]),
        (wasyncore, "readwrite", ["obj", "flags"]),
        (wasyncore, "loop", ["timeout", "use_poll", "map", "count"]),
        (utilities.Error, "__init__", ["self", "body"]),
    ],
    ids=lambda value: getattr(value, "__name__", value) if not isinstance(value, list) else "",
)
def test_methods(owner: object, name: str, parameters: list[str]) -> None:
    """The methods that are overridden or called are there, and take what they took."""
    assert list(inspect.signature(getattr(owner, name)).parameters) == parameters


@pytest.fixture
def listener() -> object:
    """A listener of waitress's, with its settings, that serves an application."""

    def application(environ: dict, start_response: object) -> list[bytes]:
        start_response("200 OK", [("Content-Length", "2")])
        return [b"ok"]

    connections = Connections(use_poll=True)
    listener = server.create_server(application, map=connections, listen="127.0.0.1:0", threads=1)
    yield listener
    listener.task_dispatcher.shutdown()
    wasyncore.close_all(connections)


def made(listener: server.BaseWSGIServer, end: socket.socket) -> Channel:
    """Return a connection as a listener makes one."""
    return Channel(State(None, 10), listener, end, ("192.0.2.1", 1), listener.adj, map=listener._map)  # noqa: SLF001


def test_attributes(listener: server.BaseWSGIServer) -> None:
    """What is read or set of waitress's objects is there, with what it should hold before anything has happened."""
    ours, theirs = socket.socketpair()
    with theirs:
        connection = made(listener, ours)
        wanted = {
            "request": None,
            "requests": [],
            "total_outbufs_len": 0,
            "close_when_flushed": False,
            "will_close": False,
            "connected": True,
            "accepting": False,
            "addr": ("192.0.2.1", 1),
            "server": listener,
        }
        assert {name: getattr(connection, name) for name in wanted} == wanted
        assert isinstance(connection.last_activity, float)
        assert connection.task_class is Application
        assert connection.error_task_class is ErrorAnswer
        assert connection.parser_class is Parser
        assert listener.channel_class is channel.HTTPChannel
        assert (listener.accepting, listener.effective_host) == (True, "127.0.0.1")
        assert list(listener.task_dispatcher.queue) == []
        connection.close()


def test_parsing(listener: server.BaseWSGIServer) -> None:
    """A request is read into the attributes that are relied upon, as it arrives."""
    request = Parser(listener.adj)
    assert request.received(b"POST /path?query HTTP/1.1\r\nHost: a\r\n") == 36
    assert (request.completed, request.headers_finished, request.header_plus[:4]) == (False, False, b"POST")
    request.received(b"Content-Length: 2\r\nExpect: 100-continue\r\n\r\n")
    assert (request.completed, request.headers_finished, request.expect_continue) == (False, True, True)
    request.received(b"ok")
    assert (request.completed, request.error, request.empty) == (True, None, False)
    assert (request.command, request.request_uri, request.path, request.version) == (
        "POST",
        "/path?query",
        "/path",
        "1.1",
    )
    assert request.headers == {"HOST": "a", "CONTENT_LENGTH": "2", "EXPECT": "100-continue"}
    assert request.proxy_netloc == ""


def test_answering(listener: server.BaseWSGIServer) -> None:
    """A channel makes an answer of a request in one call of service(), and sends header and body at once."""
    ours, theirs = socket.socketpair()
    with theirs:
        connection = made(listener, ours)
        request = Parser(listener.adj)
        request.received(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        connection.requests.append(request)
        connection.service()
        answered = theirs.recv(1000)
        assert answered.startswith(b"HTTP/1.1 200 OK\r\n")
        assert answered.endswith(b"\r\n\r\nok")
        assert (connection.requests, connection.total_outbufs_len, connection.body_sent) == ([], 0, 2)
        assert request.environ["HTTP_X_REQUEST_ID"] == request.id
        connection.close()


def test_settings() -> None:
    """The settings that are set here are still waitress's, and waitress stays below its next major release."""
    names = {name for name, _ in Adjustments._params}  # noqa: SLF001
    assert names >= set(DEFAULTS) | {"asyncore_loop_timeout", "threads"}
    if (ROOT / "requirements.in").exists():  # not in the image
        assert re.search(r"^waitress ~= 3\.\d+$", (ROOT / "requirements.in").read_text(), re.MULTILINE)


def test_proxy_headers_change_the_environ() -> None:
    """Waitress writes what a trusted proxy says into the environ that it was given, where the access log finds it."""
    environ = {"REMOTE_ADDR": "127.0.0.1", "HTTP_X_FORWARDED_FOR": "192.0.2.1", "wsgi.url_scheme": "http"}
    proxy_headers.proxy_headers_middleware(
        lambda *_: [],
        trusted_proxy="127.0.0.1",
        trusted_proxy_headers={"x-forwarded-for"},
    )(environ, None)
    assert environ["REMOTE_ADDR"] == "192.0.2.1"


def test_what_epoll_knows(listener: server.BaseWSGIServer) -> None:
    """A connection is waited for as soon as it is there, for what it wants, and no more once it is closed."""
    connections = listener._map  # noqa: SLF001
    ours, theirs = socket.socketpair()
    with theirs:
        connection, fd = made(listener, ours), ours.fileno()
        connections.turn(0)
        assert connections.awaited[fd] == select.POLLIN
        connection.close_when_flushed = True
        connections.changed.add(fd)
        connections.turn(0)
        assert fd not in connections
        assert fd not in connections.awaited
        assert fd not in connections.changed
        assert theirs.recv(1) == b""


def test_listeners_close_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """No client is told that its connection ends before everybody who waited is accepted and nobody else can come."""
    monkeypatch.setattr(signal, "set_wakeup_fd", lambda _: None)
    settings = read_settings({"BIND": "127.0.0.1", "PORT": "0", "WAITRESS_THREADS": "1"})
    ours = Server(lambda *_: [], settings)
    [listener] = ours.listeners
    seen = []
    close = listener.close
    monkeypatch.setattr(listener, "close", lambda: (seen.append(ours.state.closing), close()))
    with socket.create_connection(("127.0.0.1", int(listener.effective_port))):
        ours.shut_down(1.0)
        assert seen == [False]
        assert ours.state.closing
        assert len(ours.connections.channels()) == 1
    ours.tasks.shutdown()
    wasyncore.close_all(ours.connections)
