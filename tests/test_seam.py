"""What serve relies on in waitress beyond its documented interface: a release that moves it fails here, by name."""

import inspect
import re

import pytest
from waitress import buffers, parser, proxy_headers, receiver, task, utilities
from waitress.adjustments import Adjustments

from serve.http import ChunkedBody, Request
from serve.settings import DEFAULTS, LISTEN, READERS
from tests.support import ROOT


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        # Overridden, or called as waitress calls it.
        (parser.HTTPRequestParser.received, ["self", "data"]),
        (receiver.ChunkedReceiver.received, ["self", "s"]),
        (task.Task.__init__, ["self", "channel", "request"]),
        (task.Task.build_response_header, ["self"]),
        (task.Task.finish, ["self"]),
        (task.Task.write, ["self", "data"]),
        (task.WSGITask.execute, ["self"]),
        (task.WSGITask.get_environment, ["self"]),
        (buffers.OverflowableBuffer.__init__, ["self", "overflow"]),
        (buffers.OverflowableBuffer.append, ["self", "s"]),
        (buffers.OverflowableBuffer.get, ["self", "numbytes", "skip"]),
        (buffers.OverflowableBuffer.skip, ["self", "numbytes", "allow_prune"]),
        (utilities.Error.__init__, ["self", "body"]),
        (proxy_headers.parse_proxy_headers, ["environ", "trusted_proxy_count", "trusted_proxy_headers", "logger"]),
    ],
    ids=lambda value: getattr(value, "__qualname__", ""),
)
def test_functions(function: object, parameters: list[str]) -> None:
    """The functions that are overridden or called take what they took."""
    assert list(inspect.signature(function).parameters) == parameters


def test_parsing() -> None:
    """A request is read into the attributes that are relied upon, as it arrives."""
    request = Request(Adjustments(**DEFAULTS))
    assert request.received(b"POST http://b/path?query HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\n") == 66
    assert not (request.completed or request.headers_finished or request.expect_continue)
    request.received(b"Transfer-Encoding: chunked\r\nX-Request-ID: mine\r\n\r\n")
    assert (request.completed, request.headers_finished, request.expect_continue) == (False, True, True)
    assert isinstance(request.body_rcv, ChunkedBody)
    assert request.received(b"2\r\nok\r\n0\r\n\r\nGET") == 12
    assert (request.completed, request.error, request.body_bytes_received) == (True, None, 12)
    assert (request.command, request.request_uri, request.path) == ("POST", "http://b/path?query", "/path")
    assert (request.version, request.proxy_netloc) == ("1.1", "b")
    assert request.headers == {"HOST": "b", "EXPECT": "100-continue", "X_REQUEST_ID": "mine", "CONTENT_LENGTH": "2"}


def test_settings() -> None:
    """The settings that are named here are still waitress's, and waitress stays below its next major release."""
    assert set(READERS) >= set(DEFAULTS) | LISTEN | {"threads", "trusted_proxy"}
    if (ROOT / "requirements.in").exists():  # not in the image
        assert re.search(r"^waitress ~= 3\.\d+$", (ROOT / "requirements.in").read_text(), re.MULTILINE)


def test_proxy_headers_change_the_environ() -> None:
    """Waitress writes what a trusted proxy says into the environ that it was given, where the access log finds it."""
    environ = {"REMOTE_ADDR": "127.0.0.1", "HTTP_X_FORWARDED_FOR": "192.0.2.1", "wsgi.url_scheme": "http"}
    proxy_headers.proxy_headers_middleware(lambda *_: [], "127.0.0.1", 1, {"x-forwarded-for"})(environ, None)
    assert environ["REMOTE_ADDR"] == "192.0.2.1"
