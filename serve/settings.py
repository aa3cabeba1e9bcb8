"""The settings: reads them from the environment, or says which variable is wrong."""

import re
import socket
from collections.abc import Mapping
from typing import NamedTuple

from waitress.adjustments import Adjustments, asbool

PREFIX = "WAITRESS_"
DAY = 86400  # seconds

# The function by which waitress reads each of its settings. It has no public list of them.
READERS = dict(Adjustments._params)  # noqa: SLF001

# Its settings for where to listen are refused in favour of BIND and PORT.
LISTEN = {"listen", "host", "port", "ipv4", "ipv6", "unix_socket", "unix_socket_perms", "sockets"}

# waitress reads every word that it does not know as false, "ture" too.
BOOLEANS = {"1", "on", "t", "true", "y", "yes", "0", "f", "false", "n", "no", "off"}

# Ours, where waitress's defaults suit a container of 256 MB less well.
DEFAULTS = {
    # No Server header: it tells an attacker more than a client.
    "ident": "",
    # waitress's 100 are soon taken by slow clients. An idle connection costs some 3 KiB.
    "connection_limit": 2000,
    # A burst waits in the kernel (up to net.core.somaxconn) instead of retrying a second later.
    "backlog": 4096,
    # Line and headers. RFC 9112 wants 8000 bytes at least; waitress keeps up to 256 KiB for each connection.
    "max_request_header_size": 2**14,
    # waitress takes 1 GiB, into /tmp, which is memory: one request would get the container killed.
    "max_request_body_size": 2**20,
    # So much of each body and response is kept in memory; the rest goes to /tmp.
    "inbuf_overflow": 2**15,
    "outbuf_overflow": 2**15,
    # A response of which more than this is unsent holds its thread. With waitress's 16 MiB a few of them fill /tmp.
    "outbuf_high_watermark": 2**20,
    # Read on while a request is in work, to notice if the client leaves, and to have the next request ready.
    "channel_request_lookahead": 1,
}


class SettingError(ValueError):
    """A variable is wrong. The message is one line: the variable, its value, what it takes."""

    def __init__(self, variable: str, value: str | None, problem: str) -> None:
        """Format the message; line breaks in `problem` become spaces."""
        named = variable if value is None else f"{variable}={value!r}"
        super().__init__(f"{named}: {' '.join(problem.split())}")


class Settings(NamedTuple):
    """The settings, checked. Times are in seconds."""

    application: str
    read_timeout: float
    shutdown_delay: float
    shutdown_timeout: float
    access_log: bool
    log_level: str
    waitress: Adjustments
    unknown: list[str]  # variables that begin with WAITRESS_ and are no setting of it


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Return the settings in `environ`; raises SettingError for the first variable that is wrong."""
    waitress, unknown = waitress_settings(environ)
    return Settings(
        application=environ.get("APP", "app:app"),
        read_timeout=seconds(environ, "READ_TIMEOUT", "10", smallest=0.1),
        shutdown_delay=seconds(environ, "SHUTDOWN_DELAY", "0"),
        shutdown_timeout=seconds(environ, "SHUTDOWN_TIMEOUT", "8"),
        access_log=one_of(environ, "ACCESS_LOG", "1", ["0", "1"]) == "1",
        log_level=one_of(environ, "LOG_LEVEL", "INFO", ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]),
        waitress=waitress,
        unknown=unknown,
    )


def seconds(environ: Mapping[str, str], variable: str, default: str, smallest: float = 0) -> float:
    """Return a variable's number of seconds, at most a day; raises SettingError."""
    value = environ.get(variable, default)
    if not re.fullmatch(r"[0-9]{1,5}(\.[0-9]{1,3})?", value) or not smallest <= float(value) <= DAY:
        raise SettingError(variable, value, f"takes seconds, from {smallest} to {DAY}")
    return float(value)


def one_of(environ: Mapping[str, str], variable: str, default: str, words: list[str]) -> str:
    """Return a variable's value in upper case, if that is one of `words`; raises SettingError."""
    value = environ.get(variable, default)
    if value.upper() not in words:
        raise SettingError(variable, value, f"takes {', '.join(words[:-1])} or {words[-1]}")
    return value.upper()


def waitress_settings(environ: Mapping[str, str]) -> tuple[Adjustments, list[str]]:
    """Return waitress's settings, and the variables with its prefix that are none; raises SettingError."""
    bind, port = environ.get("BIND", "*"), environ.get("PORT", "5000")
    if not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:  # getaddrinfo() takes 70000 for 4464
        raise SettingError("PORT", port, "takes a whole number from 0 to 65535")
    # Without ipv6 where the kernel, started with ipv6.disable=1, makes no such socket.
    address = {"host": bind, "port": port, "ipv6": socket.has_dualstack_ipv6()}
    try:
        Adjustments(**address)
    except ValueError:
        raise SettingError("BIND", bind, "takes *, or one name or IP address of this machine") from None

    settings, unknown = DEFAULTS | address, []
    for variable in sorted(environ):
        value, name = environ[variable], variable.removeprefix(PREFIX).lower()
        if not variable.startswith(PREFIX):
            continue
        # Kubernetes sets WAITRESS_PORT=tcp://... and others beside a Service named waitress.
        if name not in READERS or not variable.isupper() or "://" in value:
            unknown.append(variable)
        elif problem := problem_with(name, value):
            raise SettingError(variable, value, problem)
        else:
            settings[name] = value
    try:
        return Adjustments(**settings), unknown
    except ValueError as error:  # settings that exclude each other; it names them
        raise SettingError(f"{PREFIX}*", None, str(error)) from error


def problem_with(name: str, value: str) -> str | None:
    """Return what is wrong with the value of one of waitress's settings, where waitress would not say it clearly."""
    if name in LISTEN:
        return "use BIND and PORT instead"
    if not (value.isascii() and value.isprintable()):
        return "takes printable ASCII"
    if READERS[name] is asbool and value.lower() not in BOOLEANS:
        return "takes true or false"
    if READERS[name] is int:
        smallest = 0 if name == "channel_request_lookahead" else 1
        if not re.fullmatch("[0-9]{1,12}", value) or int(value) < smallest:
            return f"takes a whole number from {smallest}"
    if name == "trusted_proxy" and not re.fullmatch(r"[0-9a-f.:]+|\*", value):  # waitress compares the text
        return "takes the proxy's IP address (no network, no name), or * for any client"
    return None
