"""Settings from the environment: valid and invalid values, where the server listens, which application it runs."""

import pathlib
import re
import socket
from collections.abc import Callable

import pytest
from waitress.adjustments import Adjustments

from serve.settings import LISTEN, SettingError, read_settings
from tests.support import Server, get

APPLICATION = """
def app(environ, start_response):
    start_response("200 OK", [("Content-Type", "text/plain")])
    return [environ["PATH_INFO"].encode("latin-1")]

class Group:
    inner = staticmethod(app)

def create_app():
    return app

def create_nothing():
    pass

text = "not callable"
"""


def test_defaults() -> None:
    """With nothing set, the settings have the documented defaults."""
    settings = read_settings({"PATH": "/bin"})
    assert settings[:6] == ("app:app", 10, 0, 8, True, "INFO")
    assert (settings.waitress.host, settings.waitress.port, settings.unknown) == ("*", 5000, [])
    documented = {
        "ident": None,
        "connection_limit": 2000,
        "backlog": 4096,
        "max_request_header_size": 16 * 1024,
        "max_request_body_size": 1024 * 1024,
        "inbuf_overflow": 32 * 1024,
        "outbuf_overflow": 32 * 1024,
        "outbuf_high_watermark": 1024 * 1024,
        "channel_request_lookahead": 1,
    }
    assert {name: getattr(settings.waitress, name) for name in documented} == documented


@pytest.mark.parametrize(
    ("variable", "value", "field", "expected"),
    [
        ("APP", "a.b:c", "application", "a.b:c"),
        ("READ_TIMEOUT", "0.1", "read_timeout", 0.1),
        ("READ_TIMEOUT", "86400", "read_timeout", 86400),
        ("SHUTDOWN_DELAY", "2.125", "shutdown_delay", 2.125),
        ("SHUTDOWN_TIMEOUT", "0", "shutdown_timeout", 0),
        ("ACCESS_LOG", "0", "access_log", False),
        ("LOG_LEVEL", "Critical", "log_level", "CRITICAL"),
        ("PORT", "0", "port", 0),
        ("PORT", "65535", "port", 65535),
        ("WAITRESS_THREADS", "8", "threads", 8),
        ("WAITRESS_CHANNEL_REQUEST_LOOKAHEAD", "0", "channel_request_lookahead", 0),
        ("WAITRESS_CONNECTION_LIMIT", "9" * 12, "connection_limit", int("9" * 12)),
        ("WAITRESS_EXPOSE_TRACEBACKS", "Yes", "expose_tracebacks", True),
        ("WAITRESS_EXPOSE_TRACEBACKS", "off", "expose_tracebacks", False),
        ("WAITRESS_IDENT", "mine/1.0 ~", "ident", "mine/1.0 ~"),
        ("WAITRESS_TRUSTED_PROXY", "2001:db8::1", "trusted_proxy", "2001:db8::1"),
        ("WAITRESS_TRUSTED_PROXY", "*", "trusted_proxy", "*"),
    ],
)
@pytest.mark.filterwarnings("ignore:No proxy headers were marked as trusted:DeprecationWarning")
def test_valid_value(variable: str, value: str, field: str, expected: object) -> None:
    """A valid value is used, including the smallest and the largest."""
    settings = read_settings({variable: value})
    assert getattr(settings, field, None) == expected or getattr(settings.waitress, field) == expected
    assert settings.unknown == []


SECONDS = "must be a number of seconds from {} to 86400"
WHOLE = "must be a whole number, {} or more"
INVALID = {  # per variable: the message, and values that it must refuse
    "PORT": (
        "must be a whole number from 0 to 65535",
        ["", "http", "-1", "+80", "65536", "70000", "5000 5001", "\u0668"],
    ),
    "BIND": (
        "must be *, or one name or IP address of this machine",
        ["", "no.such.host.invalid", "127.0.0.1 ::1", "127.0.0.1:80", "[::1]:80", "[::1", "x" * 70],
    ),
    "READ_TIMEOUT": (SECONDS.format(0.1), ["", "0", "0.099", "-1", "ten", "86400.001", "86401", "1e3", "1" * 400]),
    "SHUTDOWN_DELAY": (SECONDS.format(0), ["", "-1", "5s", "inf", "nan", "1."]),
    "SHUTDOWN_TIMEOUT": (SECONDS.format(0), ["", " 8", "8,5", "999999", "\u0668"]),
    "ACCESS_LOG": ("must be 0 or 1", ["", "2", "true", "no"]),
    "LOG_LEVEL": ("must be DEBUG, INFO, WARNING, ERROR or CRITICAL", ["", "LOUD"]),
    "WAITRESS_THREADS": (WHOLE.format(1), ["", "0", "-1", "4.0", "1_0", "9" * 13]),
    "WAITRESS_CHANNEL_TIMEOUT": (WHOLE.format(1), ["2min"]),
    "WAITRESS_BACKLOG": (WHOLE.format(1), ["0"]),
    "WAITRESS_CHANNEL_REQUEST_LOOKAHEAD": (WHOLE.format(0), ["-1"]),
    "WAITRESS_EXPOSE_TRACEBACKS": ("must be true or false", ["", "ture"]),
    "WAITRESS_IDENT": ("must be printable ASCII", ["a\nb", "李"]),
    "WAITRESS_TRUSTED_PROXY": (
        "must be the proxy's IP address (no network, no name), or * for any client",
        ["", "proxy", "abc", "10.0.0.0/8", "10.0.0.1 10.0.0.2", "**"],
    ),
} | {f"WAITRESS_{name.upper()}": ("use BIND and PORT instead", ["8080"]) for name in sorted(LISTEN)}


@pytest.mark.parametrize(
    ("variable", "value", "problem"),
    [(variable, value, problem) for variable, (problem, values) in INVALID.items() for value in values],
)
def test_invalid_value(variable: str, value: str, problem: str) -> None:
    """An invalid value is refused with one line: the variable, the value, what it must be."""
    with pytest.raises(SettingError) as refused:
        read_settings({variable: value})
    assert str(refused.value) == f"{variable}={value!r}: {problem}"


@pytest.mark.parametrize(
    ("environ", "line"),
    [
        ({"SHUTDOWN_DELAY": "-1"}, "SHUTDOWN_DELAY='-1': must be a number of seconds from 0 to 86400"),
        ({"WAITRESS_TRUSTED_PROXY_COUNT": "2"}, r"WAITRESS_\*: .*trusted_proxy.*"),
        (
            {"WAITRESS_TRUSTED_PROXY": "*", "WAITRESS_TRUSTED_PROXY_HEADERS": "x-real-ip"},
            r"WAITRESS_\*: .*trusted_proxy_headers.*",
        ),
    ],
)
def test_invalid_settings_stop_the_start(start: Callable, environ: dict[str, str], line: str) -> None:
    """An invalid variable, or an invalid combination, ends the start with exit code 2 and one line that says why."""
    with start(**environ) as running:
        assert running.ended() == 2
        assert re.fullmatch(f"serve: {line}\n", running.log.read_text())


def test_unknown_variables(start: Callable) -> None:
    """Unknown variables that begin with WAITRESS_ do not stop the start; one warning lists them all."""
    environ = {
        "WAITRESS_SERVICE_HOST": "10.0.0.1",  # set by Kubernetes for a Service named waitress
        "WAITRESS_PORT": "tcp://10.0.0.1:5000",
        "WAITRESS_TREADS": "8",
        "WAITRESS_threads": "x",
    }
    with start(**environ) as running:
        assert get(running.listening()[0] + "/") == (200, "/")
        [message] = [entry["message"] for entry in running.logged() if entry["level"] == "WARNING"]
        assert set(re.findall(r"WAITRESS_\w+", message)) == set(environ)


@pytest.mark.filterwarnings("ignore:send_bytes will be removed:DeprecationWarning")
def test_every_setting_of_waitress_is_known() -> None:
    """Every waitress setting accepts its own default: if a release reads settings differently, this fails."""
    trust = {"WAITRESS_TRUSTED_PROXY": "::1", "WAITRESS_TRUSTED_PROXY_HEADERS": "forwarded"}
    for name, _ in Adjustments._params:
        default = getattr(Adjustments, name, None)
        if name not in LISTEN and isinstance(default, str | int):
            read_settings(trust | {f"WAITRESS_{name.upper()}": str(default)})


# ---- Where it listens ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bind", "hosts"),
    [
        (None, ["127.0.0.1", "[::1]"]),
        ("*", ["127.0.0.1", "[::1]"]),
        ("0.0.0.0", ["127.0.0.1"]),
        ("127.0.0.1", ["127.0.0.1"]),
        ("::", ["[::1]"]),
        ("::1", ["[::1]"]),
        ("[::1]", ["[::1]"]),
    ],
)
def test_listens(start: Callable, bind: str | None, hosts: list[str]) -> None:
    """The server listens on IPv4 and IPv6 unless BIND restricts it, and logs a URL for each."""
    with start(BIND=bind) as running:
        for url, host in zip(running.listening(addresses=len(hosts)), hosts, strict=True):
            port = url.rpartition(":")[2]
            assert get(f"http://{host}:{port}/") == (200, "/")


def test_port_in_use(start: Callable) -> None:
    """A port that is in use ends the start with exit code 1 and one line that names it."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with start(PORT=str(port)) as running:
            assert running.ended() == 1
            assert running.log.read_text() == f"serve: cannot listen on 127.0.0.1:{port}: Address already in use\n"


# ---- The application -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder of modules for APP to name, most of them unusable."""
    folder = tmp_path_factory.mktemp("applications")
    for name, text in {
        "app": APPLICATION,
        "package/__init__": "from .inner import create_app",
        "package/inner": "from app import create_app",
        "broken": "import os\n\n\nos.environ['NOT_SET']",
        "site-packages/library": "def connect():\n    raise OSError('no database')",
        "uses": "import sys\n\nsys.path.append('site-packages')\nimport library\n\nlibrary.connect()",
        "needs": "import not_installed",
        "typo": "def app(:",
        "leaves": "import sys; sys.exit('DATABASE is not set')",
        "lines": "raise ValueError('one\\ntwo')",
        "runs": "from app import app; import flask; flask.Flask('other').run(host='0.0.0.0', port=1)",
        "quiet": "import logging.config\nfrom app import app\n\n"
        "logging.config.dictConfig({'version': 1, 'root': {'level': 'WARNING'}})",
    }.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(text)
    return folder


@pytest.mark.parametrize(
    "name", ["app:Group.inner", "package:create_app()", "package.inner:create_app()", "quiet:app", "runs:app"]
)
def test_application_by_name(folder: pathlib.Path, name: str) -> None:
    """APP can name an attribute or a factory; an application that configures logging or calls run() still starts."""
    with Server(folder, APP=name) as running:
        assert get(running.listening()[0] + "/here") == (200, "/here")


FORM = "must be module:attribute, such as app:app, or module:factory()"


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        *[(name, FORM) for name in ("", "app", ":app", "app:", "app:create_app(1)", "app:create_app()()", "()")],
        ("nowhere:app", "No module named 'nowhere'"),
        ("app:nothing", "has no attribute 'nothing'"),
        ("app:text", "is of type str, not a WSGI application"),
        ("app:app()", "TypeError: app() missing 2 required positional arguments"),
        ("app:create_nothing()", "is of type NoneType, not a WSGI application"),
        ("../app:app", "ValueError"),
        ("needs:app", "No module named 'not_installed'"),
        ("broken:app", "KeyError: 'NOT_SET'"),
        ("broken:app", "broken.py, line 4)"),
        ("typo:app", "SyntaxError"),
        ("uses:app", "uses.py, line 6)"),  # not the line in the library
        ("leaves:app", "SystemExit: DATABASE is not set"),
        ("lines:app", "ValueError: one two"),
    ],
)
def test_unusable_application(folder: pathlib.Path, name: str, problem: str) -> None:
    """An APP that cannot be loaded ends the start with exit code 2 and one line that says why."""
    with Server(folder, APP=name) as running:
        assert running.ended() == 2
        errors = running.log.read_text()
    assert errors.startswith(f"serve: APP={name!r}: ")
    assert problem in errors
    assert errors.count("\n") == 1
