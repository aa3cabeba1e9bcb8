"""The settings: what the environment comes to, or which variable is wrong."""

import difflib
import re
import socket
import sys
from collections.abc import Callable, Mapping
from typing import NamedTuple

from waitress.adjustments import Adjustments, asbool

PREFIX = "WAITRESS_"

# waitress's own settings for where to listen. They are refused, because BIND and PORT say it.
LISTEN = {"listen", "host", "port", "ipv4", "ipv6", "unix_socket", "unix_socket_perms", "sockets"}

DEFAULTS = {
    # No Server header: a client has no use for the name of what answers, an attacker has.
    "ident": "",
    # select() fails, and the server with it, as soon as there are more than 1024 connections and files.
    "asyncore_use_poll": "true",
    # With waitress's own 100, that many clients who send half a request keep everybody else out for READ_TIMEOUT. One
    # that waits costs the process some 3 KiB, and the half that it has sent, 32 KiB at most: 64 MiB for all of them.
    "connection_limit": "2000",
    # A burst waits in the kernel, as long a queue as Linux allows (net.core.somaxconn), instead of retrying after 1 s.
    "backlog": "4096",
    # 16 KiB, line and headers: twice what RFC 9112 wants taken for a line alone. waitress's own 256 KiB would be kept
    # for each connection.
    "max_request_header_size": str(2**14),
    # An answer of more than 1 MiB holds its thread until the client has taken all but that. With waitress's own 16 MiB
    # a few slow downloads filled /tmp, and cut each other off.
    "outbuf_high_watermark": str(2**20),
    # 1 MiB. waitress's own 1 GiB is kept in /tmp, which is memory, and one request would get the container killed.
    "max_request_body_size": str(2**20),
    # 32 KiB of a body are kept in the process, the rest in /tmp, which compose bounds too: clients that stop in the
    # middle of their uploads fill it at worst, and get 503. With waitress's own 512 KiB, 500 of them got it killed.
    "inbuf_overflow": str(2**15),
}

# The other settings and how waitress reads each. It has no public list; a test gives each its own default to read.
READERS: dict[str, Callable] = {name: read for name, read in Adjustments._params if name not in LISTEN}  # noqa: SLF001

# waitress reads any word that it does not know as false, "ture" too.
BOOLEANS = {"1", "on", "t", "true", "y", "yes", "0", "f", "false", "n", "no", "off"}

# Smallest and largest whole numbers, where waitress looks only whether it is a number. INT_MAX is the largest C int,
# which listen() takes; a setting that is not named here takes 1 to INT_MAX.
INT_MAX = 2**31 - 1
RANGES = {
    # A million threads would be started, until the machine has no more.
    "threads": (1, 10_000),
    # In seconds; poll() takes milliseconds.
    "asyncore_loop_timeout": (1, INT_MAX // 1000),
    "channel_request_lookahead": (0, INT_MAX),
    "inbuf_overflow": (0, sys.maxsize),
    "outbuf_overflow": (0, sys.maxsize),
    "outbuf_high_watermark": (0, sys.maxsize),
    "max_request_body_size": (0, sys.maxsize),
}


class SettingError(ValueError):
    """A variable of the environment is wrong. The message is one line: the variable, its value, what it takes."""

    def __init__(self, variable: str, value: str, problem: str) -> None:
        """Take the variable's name and value, and the problem, of which line breaks become spaces."""
        super().__init__(f"{variable}={value!r}: {' '.join(problem.split())}")


DAY = 86400  # seconds


class Settings(NamedTuple):
    """What the environment comes to. Times are in seconds."""

    application: str
    read_timeout: float
    shutdown_delay: float
    shutdown_timeout: float
    access_log: bool
    log_level: str
    waitress: dict[str, str]


def read_settings(environ: Mapping[str, str]) -> Settings:
    """Return the settings in `environ`; raises SettingError for the first variable that is wrong."""
    return Settings(
        application=environ.get("APP", "app:app"),
        read_timeout=seconds(environ, "READ_TIMEOUT", "10", smallest=0.1),
        shutdown_delay=seconds(environ, "SHUTDOWN_DELAY", "0"),
        shutdown_timeout=seconds(environ, "SHUTDOWN_TIMEOUT", "8"),
        access_log=one_of(environ, "ACCESS_LOG", "1", ["0", "1"]) == "1",
        log_level=one_of(environ, "LOG_LEVEL", "INFO", ["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"]),
        waitress=waitress_settings(environ),
    )


def seconds(environ: Mapping[str, str], variable: str, default: str, smallest: float = 0) -> float:
    """Return a variable's number of seconds, at most a day; raises SettingError."""
    value = environ.get(variable, default)
    if not re.fullmatch(r"[0-9]{1,5}(\.[0-9]{1,3})?", value) or not smallest <= float(value) <= DAY:
        raise SettingError(variable, value, f"takes seconds, from {smallest} to {DAY}")
    return float(value)


def one_of(environ: Mapping[str, str], variable: str, default: str, words: list[str]) -> str:
    """Return a variable's value, which has to be one of `words`; raises SettingError."""
    value = environ.get(variable, default)
    if value not in words:
        raise SettingError(variable, value, f"takes {', '.join(words[:-1])} or {words[-1]}")
    return value


def waitress_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the arguments for waitress's create_server that `environ` and our defaults come to.

    Raises SettingError for a variable that is no setting of waitress, or whose value waitress cannot use.
    """
    given = {variable: environ[variable] for variable in sorted(environ) if variable.startswith(PREFIX)}
    for variable, value in given.items():
        if problem := problem_with(variable, value):
            raise SettingError(variable, value, problem)
    ours = DEFAULTS | address(environ)
    settings = ours | {setting(variable): value for variable, value in given.items()}
    if problem := conflict(settings):
        # waitress says what it refuses, not which variable is wrong. It is one without which the others are accepted.
        for variable, value in given.items():
            if not conflict(ours | {setting(other): given[other] for other in given if other != variable}):
                raise SettingError(variable, value, problem)
        raise SettingError(PREFIX + "*", " ".join(given.values()), problem)
    return settings


def address(environ: Mapping[str, str]) -> dict[str, str]:
    """Return waitress's settings for BIND and PORT; raises SettingError."""
    bind, port = environ.get("BIND", "*"), environ.get("PORT", "5000")
    if not is_whole_number(port, 0, 65535):  # getaddrinfo() would take 70000 for 4464
        raise SettingError("PORT", port, "takes a whole number from 0 to 65535")
    settings = {"host": bind, "port": port, "ipv6": str(has_ipv6())}
    if conflict(settings):
        raise SettingError("BIND", bind, "takes *, or one name or IP address of this machine")
    return settings


def has_ipv6() -> bool:
    """Tell whether the kernel has IPv6: one that was started with ipv6.disable=1 refuses even to make a socket."""
    try:
        socket.socket(socket.AF_INET6).close()
    except OSError:
        return False
    return True


def conflict(settings: Mapping[str, str]) -> str | None:
    """Return what speaks against `settings` taken together, or None."""
    try:
        adjustments = Adjustments(**settings)
    except ValueError as error:
        return str(error)
    # waitress counts each listener, its pipe and the pipe of ours as connections: at that limit it would accept nobody.
    taken = 2 * len(adjustments.listen) + 1
    if adjustments.connection_limit <= taken:
        return f"connection_limit has to be more than {taken}, which the server needs itself"
    return None


def setting(variable: str) -> str:
    """Return waitress's own name for `variable`: threads for WAITRESS_THREADS."""
    return variable.removeprefix(PREFIX).lower()


def problem_with(variable: str, value: str) -> str | None:
    """Return what is wrong with one WAITRESS_ variable, where waitress would accept it or not say it clearly."""
    name = setting(variable)
    if name in LISTEN:
        return "use BIND and PORT instead"
    if name not in READERS or not variable.isupper():
        near = difflib.get_close_matches(name, READERS, n=1)
        return "waitress has no such setting" + (f"; did you mean {PREFIX}{near[0].upper()}?" if near else "")
    if not value.isprintable():
        return "takes printable characters"
    if READERS[name] is asbool and value.strip().lower() not in BOOLEANS:
        return "takes true or false"
    if READERS[name] is int:
        smallest, largest = RANGES.get(name, (1, INT_MAX))
        if not is_whole_number(value, smallest, largest):
            return f"takes a whole number from {smallest} to {largest}"
    if name in TAKES and not TAKES[name][0](value):
        return TAKES[name][1]
    return None


def is_whole_number(value: str, smallest: int, largest: int) -> bool:
    """Tell whether `value` is plain ASCII digits (int() takes more: 1_000, +5) for a number within the bounds."""
    return value.isascii() and value.isdigit() and len(value) < 20 and smallest <= int(value) <= largest


def is_address(value: str) -> bool:
    """Tell whether `value` is an IP address, written as the system writes it: waitress compares the text."""
    family = socket.AF_INET6 if ":" in value else socket.AF_INET
    try:
        return socket.inet_ntop(family, socket.inet_pton(family, value)) == value
    except OSError:
        return False


# What some settings take, and how that is told: waitress would take more and mean something else by it, or nothing.
TAKES: dict[str, tuple[Callable[[str], object], str]] = {
    "ident": (str.isascii, "takes ASCII"),
    "server_name": (str.isascii, "takes ASCII"),
    "url_scheme": ({"http", "https"}.__contains__, "takes http or https"),
    "trusted_proxy": (
        lambda value: value in {"*", "localhost"} or is_address(value),
        "takes the proxy's IP address as the system writes it (no network, no name), or * for any client",
    ),
}
