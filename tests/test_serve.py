"""The server as a process: what it listens on, how it ends, what it says of a variable that is wrong."""

import ctypes
import pathlib
import re
import signal
import socket
import sys
from contextlib import ExitStack, suppress

import pytest
from waitress.adjustments import Adjustments

from serve.settings import read_settings
from tests.support import ROOT, Server, get

# waitress's own settings for where to listen.
LISTEN = {"listen", "host", "port", "ipv4", "ipv6", "unix_socket", "unix_socket_perms", "sockets"}

APPLICATION = """
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [environ["PATH_INFO"].encode("latin-1")]

def fails(environ, start_response):
    raise RuntimeError("secret")

class Group:
    inner = staticmethod(app)

def create_app():
    return app

def create_nothing():
    pass

text = "not callable"
"""


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder with applications: of its own, because the server takes any."""
    (tmp_path / "app.py").write_text(APPLICATION)
    (tmp_path / "broken.py").write_text("import os\n\n\nos.environ['NOT_SET']\n")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "library.py").write_text("def connect():\n    raise OSError('no database')\n")
    library = "import sys\n\nsys.path.append('{}')\nimport library\n\nlibrary.connect()\n"
    (tmp_path / "uses.py").write_text(library.format(tmp_path / "site-packages"))
    (tmp_path / "needs.py").write_text("import not_installed\n")
    (tmp_path / "typo.py").write_text("def app(:\n")
    (tmp_path / "leaves.py").write_text("import sys\n\nsys.exit('DATABASE is not set')\n")
    (tmp_path / "runs.py").write_text("import flask\n\napp = flask.Flask(__name__)\napp.run(host='0.0.0.0', port=1)\n")
    (tmp_path / "lines.py").write_text("raise ValueError('one\\ntwo')\n")
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").write_text("from .inner import create_app\n")
    (tmp_path / "package" / "inner.py").write_text("from app import create_app\n")
    return tmp_path


def test_serves_without_a_banner(folder: pathlib.Path) -> None:
    """The application answers, with nothing in the headers of what serves it."""
    with Server(folder) as running:
        [url] = running.listening()
        assert get(url + "/here") == (200, "/here")
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, port), 10) as connection:
            connection.sendall(b"GET / HTTP/1.0\r\n\r\n")
            headers = connection.makefile("rb").read().lower()
    assert b"server:" not in headers
    assert b"waitress" not in headers


@pytest.mark.parametrize(
    ("environ", "hosts"),
    [
        ({"BIND": None}, ["127.0.0.1", "[::1]"]),
        ({"BIND": "*"}, ["127.0.0.1", "[::1]"]),
        ({"BIND": "0.0.0.0"}, ["127.0.0.1"]),
        ({"BIND": "127.0.0.1"}, ["127.0.0.1"]),
        ({"BIND": "::"}, ["[::1]"]),
        ({"BIND": "::1"}, ["[::1]"]),
        ({"BIND": "[::1]"}, ["[::1]"]),
    ],
    ids=str,
)
def test_listens(folder: pathlib.Path, environ: dict[str, str], hosts: list[str]) -> None:
    """It listens on IPv4 and IPv6 unless BIND says otherwise, and logs an address of each as one can use it."""
    with Server(folder, **environ) as running:
        urls = running.listening(addresses=len(hosts))
        for url, host in zip(urls, hosts, strict=True):
            port = url.rpartition(":")[2]
            assert get(f"http://{host}:{port}/") == (200, "/")


def test_listens_without_ipv6(folder: pathlib.Path) -> None:
    """On a kernel without IPv6, which makes no socket of it, every address is every one of IPv4."""
    (folder / "sitecustomize.py").write_text(  # imported at the start of Python
        "import socket\n\n\nclass IPv4(socket.socket):\n"
        "    def __init__(self, family=-1, *rest, **named):\n"
        "        if family == socket.AF_INET6:\n            raise OSError('no IPv6')\n"
        "        super().__init__(family, *rest, **named)\n\n\nsocket.socket = IPv4\n"
    )
    with Server(folder, BIND=None, PYTHONPATH=f"{folder}:{ROOT}") as running:
        [url] = running.listening()
        assert get(url + "/") == (200, "/")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_ends_on_a_signal(folder: pathlib.Path, number: signal.Signals) -> None:
    """SIGTERM and SIGINT end an idle server with exit code 0 and no complaint, keep-alive connection or not."""
    with Server(folder) as running:
        [url] = running.listening()
        host, port = url.removeprefix("http://").split(":")
        with socket.create_connection((host, port), 10) as connection:
            connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert connection.recv(1000).startswith(b"HTTP/1.1 200")
            running.requests(1)  # it has ended, not only been answered
            running.process.send_signal(number)
            assert running.ended() == 0
            assert running.messages() == []


def test_ends_on_sigint_as_a_background_job(folder: pathlib.Path) -> None:
    """SIGINT works where a shell has started the server in the background, that is with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a child process inherits
    try:
        with Server(folder) as running:
            signal.signal(signal.SIGINT, before)
            running.listening()
            running.process.send_signal(signal.SIGINT)
            assert running.ended() == 0
            assert running.messages() == []
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.skipif(sys.platform != "linux", reason="signals to one thread are sent as on Linux")
def test_ends_at_once_whenever_the_signal_comes(folder: pathlib.Path) -> None:
    """A signal that does not interrupt poll() ends it all the same, not only when poll() times out."""
    # Such a signal comes just before poll(); or, as here, to another thread: to be seen in the main thread's turn.
    with Server(folder, WAITRESS_ASYNCORE_LOOP_TIMEOUT="600") as running:
        running.listening()
        threads = [int(task.name) for task in pathlib.Path(f"/proc/{running.process.pid}/task").iterdir()]
        assert ctypes.CDLL(None).tgkill(running.process.pid, max(threads), signal.SIGTERM) == 0
        assert max(threads) != running.process.pid
        assert running.ended() == 0
        assert running.messages() == []


@pytest.mark.parametrize("name", ["app:Group.inner", "package:create_app()", "package.inner:create_app()"])
def test_application_by_name(folder: pathlib.Path, name: str) -> None:
    """APP names the application as module:attribute, with dots in either, or as module:factory()."""
    with Server(folder, APP=name) as running:
        assert get(running.listening()[0] + "/here") == (200, "/here")


def test_crash_tells_the_client_nothing(folder: pathlib.Path) -> None:
    """An application that raises is answered 500 without its traceback; the log has it; the server goes on."""
    with Server(folder, APP="app:fails") as running:
        [url] = running.listening()
        for _ in range(2):
            status, body = get(url + "/")
            assert status == 500
            assert "secret" not in body
        running.end()
        exceptions = [entry["exception"] for entry in running.logged() if "exception" in entry]
        assert [text.count("RuntimeError: secret") for text in exceptions] == [1, 1]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "takes module:attribute such as app:app, or module:factory()"),
        ("app", "takes module:attribute such as app:app, or module:factory()"),
        (":app", "takes module:attribute such as app:app, or module:factory()"),
        ("app:", "takes module:attribute such as app:app, or module:factory()"),
        ("nowhere:app", "No module named 'nowhere'"),
        ("app:nothing", "has no attribute 'nothing'"),
        ("app:text", "is of type str, not a WSGI application"),
        ("app:app()", "TypeError: app() missing 2 required positional arguments"),
        ("app:create_nothing()", "is of type NoneType, not a WSGI application"),
        ("app:create_app(1)", "takes module:attribute such as app:app, or module:factory()"),
        ("app:create_app()()", "takes module:attribute such as app:app, or module:factory()"),
        ("()", "takes module:attribute such as app:app, or module:factory()"),
        ("../app:app", "ValueError"),
        ("needs:app", "No module named 'not_installed'"),
        ("broken:app", "broken.py, line 4)"),
        ("broken:app", "KeyError: 'NOT_SET'"),
        ("typo:app", "SyntaxError"),
        ("uses:app", "uses.py, line 6)"),
        ("leaves:app", "SystemExit: DATABASE is not set"),
        ("lines:app", "ValueError: one two"),
    ],
)
def test_wrong_application(folder: pathlib.Path, name: str, problem: str) -> None:
    """An APP that is none ends the start with exit code 2 and one line that says what is wrong with it."""
    with Server(folder, APP=name) as running:
        assert running.ended() == 2
        errors = running.log.read_text()
    assert errors.startswith(f"serve: APP={name!r}: ")
    assert problem in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [
        *[("THREADS", value, "takes a whole number from 1") for value in ("", "0", "-1", "4.0", "1_0")],
        ("CHANNEL_TIMEOUT", "2min", "takes a whole number from 1"),
        ("CHANNEL_REQUEST_LOOKAHEAD", "-1", "takes a whole number from 0"),
        *[("EXPOSE_TRACEBACKS", value, "takes true or false") for value in ("", "ture")],
        *[(name.upper(), "8080", "use BIND and PORT instead") for name in sorted(LISTEN)],
        *[
            (name, value, "takes printable ASCII")
            for name, value in (("IDENT", "a\nb"), ("IDENT", "李"), ("THREADS", "²"))
        ],
        *[
            ("TRUSTED_PROXY", value, "takes the proxy's IP address")
            for value in ("", "proxy", "10.0.0.0/8", "10.0.0.1 10.0.0.2")
        ],
    ],
)
def test_wrong_waitress_setting(folder: pathlib.Path, variable: str, value: str, problem: str) -> None:
    """A setting that waitress cannot use ends the start with exit code 2 and one line that names it."""
    with Server(folder, **{f"WAITRESS_{variable}": value}) as running:
        assert running.ended() == 2
        errors = running.log.read_text()
    assert errors.startswith(f"serve: WAITRESS_{variable}={value!r}: ")
    assert problem in errors
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [
        *[
            ("PORT", value, "takes a whole number from 0 to 65535")
            for value in ("", "http", "-1", "+80", "65536", "70000", "5000 5001")
        ],
        *[
            ("BIND", value, "takes *, or one name or IP address of this machine")
            for value in ("", "no.such.host.invalid", "127.0.0.1 ::1", "127.0.0.1:80", "[::1]:80", "[::1", "x" * 70)
        ],
        *[
            ("READ_TIMEOUT", value, "takes seconds, from 0.1 to 86400")
            for value in ("", "0", "-1", "ten", "86401", "1e3")
        ],
        *[
            ("SHUTDOWN_DELAY", value, "takes seconds, from 0 to 86400")
            for value in ("", "-1", "5s", "inf", "nan", "1.")
        ],
        *[
            ("SHUTDOWN_TIMEOUT", value, "takes seconds, from 0 to 86400")
            for value in ("", " 8", "8,5", "999999", "\u0668")
        ],
        *[("ACCESS_LOG", value, "takes 0 or 1") for value in ("", "2", "true", "no")],
        *[("LOG_LEVEL", value, "takes DEBUG, INFO, WARNING, ERROR or CRITICAL") for value in ("", "LOUD")],
    ],
)
def test_wrong_variable(folder: pathlib.Path, variable: str, value: str, problem: str) -> None:
    """A variable of the server's own that it cannot use ends the start with exit code 2 and one line that says why."""
    with Server(folder, **{variable: value}) as running:
        assert running.ended() == 2
        assert running.log.read_text() == f"serve: {variable}={value!r}: {problem}\n"


@pytest.mark.parametrize(
    ("environ", "problem"),
    [
        ({"WAITRESS_TRUSTED_PROXY_COUNT": "2"}, "trusted_proxy"),
        ({"WAITRESS_TRUSTED_PROXY": "*", "WAITRESS_TRUSTED_PROXY_HEADERS": "x-real-ip"}, "trusted_proxy_headers"),
    ],
)
def test_settings_that_exclude_each_other(folder: pathlib.Path, environ: dict[str, str], problem: str) -> None:
    """Settings that waitress does not take together end the start as a wrong one does, with what waitress says."""
    with Server(folder, **environ) as running:
        assert running.ended() == 2
        errors = running.log.read_text()
    assert errors.startswith("serve: WAITRESS_*: ")
    assert problem in errors
    assert errors.count("\n") == 1


def test_names_that_are_no_setting(folder: pathlib.Path) -> None:
    """A platform may set names that begin with WAITRESS_: they are reported in one warning, and left alone."""
    environ = {  # what Kubernetes sets where there is a Service named waitress, and a slip
        "WAITRESS_SERVICE_HOST": "10.0.0.1",
        "WAITRESS_SERVICE_PORT": "5000",
        "WAITRESS_PORT": "tcp://10.0.0.1:5000",
        "WAITRESS_PORT_5000_TCP": "tcp://10.0.0.1:5000",
        "WAITRESS_HOST": "udp://10.0.0.1:53",
        "WAITRESS_PORT_5000_TCP_ADDR": "10.0.0.1",
        "WAITRESS_TREADS": "8",
    }
    with Server(folder, **environ) as running:
        assert get(running.listening()[0] + "/") == (200, "/")
        running.end()
        [message] = [entry["message"] for entry in running.logged() if entry["level"] == "WARNING"]
        assert set(re.findall(r"WAITRESS_\w+", message)) == set(environ)


@pytest.mark.filterwarnings("ignore:send_bytes will be removed:DeprecationWarning")
def test_every_setting_of_waitress_is_known() -> None:
    """Each setting takes its own default: a release of waitress that reads settings otherwise fails here."""
    trust = {"WAITRESS_TRUSTED_PROXY": "::1", "WAITRESS_TRUSTED_PROXY_HEADERS": "forwarded"}
    for name, _ in Adjustments._params:
        default = getattr(Adjustments, name, None)
        if name not in LISTEN and isinstance(default, str | int):
            read_settings(trust | {f"WAITRESS_{name.upper()}": str(default)})


def test_taken_port(folder: pathlib.Path) -> None:
    """A port that is taken ends the start with exit code 1 and one line that names it: 5000, where PORT is not set."""
    with ExitStack() as stack:
        with suppress(OSError):  # somebody else listens there
            stack.enter_context(socket.create_server(("127.0.0.1", 5000)))
        with Server(folder, PORT=None) as running:
            assert running.ended() == 1
            assert running.log.read_text() == "serve: cannot listen on 127.0.0.1:5000: Address already in use\n"


@pytest.mark.parametrize("bind", ["*", "127.0.0.1"])
def test_smallest_connection_limit(folder: pathlib.Path, bind: str) -> None:
    """With a connection_limit of 1 the server still answers."""
    with Server(folder, BIND=bind, PORT="0", WAITRESS_CONNECTION_LIMIT="1") as running:
        port = running.listening()[0].rpartition(":")[2]
        assert get(f"http://127.0.0.1:{port}/") == (200, "/")


def test_goes_on_after_a_signal_of_the_application(folder: pathlib.Path) -> None:
    """A signal that the application handles itself disturbs nothing: the server neither spins nor logs."""
    (folder / "app.py").write_text("import signal\n\nsignal.signal(signal.SIGUSR1, lambda *_: None)\n" + APPLICATION)
    with Server(folder) as running:
        [url] = running.listening()
        for _ in range(10):
            running.process.send_signal(signal.SIGUSR1)
            assert get(url + "/")[0] == 200
        running.process.send_signal(signal.SIGTERM)
        assert running.ended() == 0
        assert running.messages() == []


def test_an_app_run_left_in_the_module(folder: pathlib.Path) -> None:
    """Flask's development server does not start in place of ours, whatever the module calls."""
    with Server(folder, APP="runs:app") as running:
        assert get(running.listening()[0] + "/")[0] == 404


def test_says_where_it_serves_whatever_the_logging(folder: pathlib.Path) -> None:
    """An application that configures logging for itself does not silence the server's own line."""
    config = "import logging.config\n\nlogging.config.dictConfig({'version': 1, 'root': {'level': 'WARNING'}})\n"
    (folder / "app.py").write_text(config + APPLICATION)
    with Server(folder) as running:
        assert running.listening()
