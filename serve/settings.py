"""Reads the settings from the environment, or says which variable is wrong."""

import re
import socket
from collections.abc import Mapping
from typing import NamedTuple

from waitress.adjustments import Adjustments, asbool

PREFIX = "WAITRESS_"
DAY = 86400  # seconds

# The function that parses each setting of waitress. There is no public list.
PARSERS = dict(Adjustments._params)  # noqa: SLF001

# waitress's settings for where to listen. BIND and PORT take their place.
LISTEN = {"listen", "host", "port", "ipv4", "ipv6", "unix_socket", "unix_socket_perms", "sockets"}

# waitress reads any other word as false, even "ture".
BOOLEANS = {"1", "on", "t", "true", "y", "yes", "0", "f", "false", "n", "no", "off"}

# Our defaults, where waitress's do not suit a container of 256 MB.
DEFAULTS = {
    # No Server header: it helps attackers more than clients.
    "ident": "",
    # Slow clients soon take up waitress's 100. An idle connection costs about 3 KiB.
    "connection_limit": 2000,
    # A burst waits in the kernel (up to net.core.somaxconn). Beyond the backlog, clients retry a second later.
    "backlog": 4096,
    # Request line and headers. RFC 9112, section 3, asks for 8000 bytes or more; waitress allows 256 KiB.
    "max_request_header_size": 2**14,
    # waitress allows 1 GiB. It goes to /tmp, which is memory: one request could fill it.
    "max_request_body_size": 2**20,
    # A larger body or response goes to /tmp.
    "inbuf_overflow": 2**15,
    "outbuf_overflow": 2**15,
    # While more than this of a response is unsent, its thread waits. waitress's 16 MiB would let a few fill /tmp.
    "outbuf_high_watermark": 2**20,
    # Read on while a request is being answered: to notice if the client leaves, and to have its next request ready.
    "channel_request_lookahead": 1,
}


class SettingError(ValueError):
    """A variable is wrong. The message is one line: the variable, its value, what it must be."""

    def __init__(self, variable: str, value: str | None, problem: str) -> None:
        """Format the message; line breaks in `problem` become spaces."""
        named = variable if value is None else f"{variable}={value!r}"
        super().__init__(f"{named}: {' '.join(problem.split())}")


class Settings(NamedTuple):
    """The checked settings. Times are in seconds."""

    application: str
    read_timeout: float
    shutdown_delay: float
    shutdown_timeout: float
    access_log: bool
    log_level: str
    waitress: Adjustments
    unknown: list[str]  # WAITRESS_ variables that are not settings of waitress


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Return the settings in `environ`. Raises SettingError for the first wrong variable."""
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
    """Return the value of a variable in seconds, from `smallest` to a day. Raises SettingError."""
    value = environ.get(variable, default)
    if not re.fullmatch(r"[0-9]*\.?[0-9]+", value) or not smallest <= float(value) <= DAY:
        raise SettingError(variable, value, f"must be a number of seconds from {smallest} to {DAY}")
    return float(value)


def one_of(environ: Mapping[str, str], variable: str, default: str, words: list[str]) -> str:
    """Return the value of a variable in upper case. Raises SettingError if it is not one of `words`."""
    value = environ.get(variable, default)
    if value.upper() not in words:
        raise SettingError(variable, value, f"must be {', '.join(words[:-1])} or {words[-1]}")
    return value.upper()


def waitress_settings(environ: Mapping[str, str]) -> tuple[Adjustments, list[str]]:
    """Return waitress's settings, and the WAITRESS_ variables that are not among them. Raises SettingError."""
    bind, port = environ.get("BIND", "*"), environ.get("PORT", "5000")
    if not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:  # getaddrinfo() takes 70000 for 4464
        raise SettingError("PORT", port, "must be a whole number from 0 to 65535")
    # No IPv6 if the kernel was booted with ipv6.disable=1: it cannot create such sockets.
    address = {"host": bind, "port": port, "ipv6": socket.has_dualstack_ipv6()}
    try:
        Adjustments(**address)
    except ValueError:
        raise SettingError("BIND", bind, "must be *, or one name or IP address of this machine") from None

    settings, unknown = DEFAULTS | address, []
    for variable in sorted(environ):
        value, name = environ[variable], variable.removeprefix(PREFIX).lower()
        if not variable.startswith(PREFIX):
            continue
        # Kubernetes sets WAITRESS_PORT=tcp://... and others for a Service named waitress.
        if name not in PARSERS or not variable.isupper() or "://" in value:
            unknown.append(variable)
        elif problem := problem_with(name, value):
            raise SettingError(variable, value, problem)
        else:
            settings[name] = value
    try:
        return Adjustments(**settings), unknown
    except ValueError as error:  # settings that exclude each other; the message names them
        raise SettingError(f"{PREFIX}*", None, str(error)) from error


def problem_with(name: str, value: str) -> str | None:
    """Return what is wrong with a waitress setting, where waitress would accept it or not explain it clearly."""
    if name in LISTEN:
        return "use BIND and PORT instead"
    if not (value.isascii() and value.isprintable()):
        return "must be printable ASCII"
    if PARSERS[name] is asbool and value.lower() not in BOOLEANS:
        return "must be true or false"
    if PARSERS[name] is int:
        smallest = 0 if name == "channel_request_lookahead" else 1
        if not re.fullmatch("[0-9]{1,12}", value) or int(value) < smallest:
            return f"must be a whole number, {smallest} or more"
    # waitress compares addresses as strings.
    if name == "trusted_proxy" and not re.fullmatch(r"[0-9]+(\.[0-9]+){3}|[0-9a-f]*:[0-9a-f.:]*|\*", value):
        return "must be the proxy's IP address (no network, no name), or * for any client"
    return None
