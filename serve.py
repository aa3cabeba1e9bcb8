"""Run a WSGI application under waitress as a container should be run.

    python serve.py

APP names the application (default app:app), WAITRESS_<NAME> is waitress's setting <name>. Ends with exit code 0 on
SIGTERM and SIGINT, 1 where it cannot listen, 2 where a variable is wrong; an error is one line on standard error.
"""

import signal


class Stopped(SystemExit):
    """The process was told to stop. waitress's run() takes SystemExit as the word to close everything and return."""


def stop(_signum: int, _frame: object) -> None:
    """Handle a signal by ending the process with exit code 0."""
    raise Stopped(0)


if __name__ == "__main__":
    # The kernel keeps from the first process of a container each signal that it has no handler for, and a shell starts
    # its background jobs with SIGINT ignored: `docker stop` would take ten seconds and kill. Before the other imports,
    # because they are most of the time that it takes to start.
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)

import difflib
import logging
import os
import pathlib
import pkgutil
import socket
import sys
import traceback
from collections.abc import Callable, Mapping

from waitress.adjustments import Adjustments, asbool, asoctal
from waitress.server import BaseWSGIServer, MultiSocketServer, create_server
from waitress.wasyncore import file_dispatcher

log = logging.getLogger("serve")
LOG_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

# --- Settings ---------------------------------------------------------------------------------------------------------

PREFIX = "WAITRESS_"

# Where no address is set: every one of IPv4 and IPv6, port 5000. waitress's own default is IPv4 alone, port 8080.
DEFAULT_ADDRESS = {"host": "*", "port": "5000"}

DEFAULTS = {
    # No Server header: a client has no use for the name of what answers, an attacker has.
    "ident": "",
    # select() fails, and the server with it, as soon as there are more than 1024 connections and files.
    "asyncore_use_poll": "true",
    # 1 MiB. waitress's own 1 GiB is kept in /tmp, which is memory, and one request would get the container killed.
    "max_request_body_size": str(2**20),
}

# The settings of waitress and how it reads each. It has no public list; a test gives each its own default to read.
# `sockets` takes socket objects, which no variable can hold.
READERS: dict[str, Callable] = {name: read for name, read in Adjustments._params if name != "sockets"}  # noqa: SLF001

# waitress reads any word that it does not know as false, "ture" too.
BOOLEANS = {"1", "on", "t", "true", "y", "yes", "0", "f", "false", "n", "no", "off"}

# Smallest and largest whole numbers, where waitress looks only whether it is a number. INT_MAX is the largest C int,
# which listen() takes; a setting that is not named here takes 1 to INT_MAX.
INT_MAX = 2**31 - 1
RANGES = {
    "port": (0, 65535),
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


def waitress_settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the arguments for waitress's create_server that `environ` and our defaults come to.

    Raises SettingError for a variable that is no setting of waitress, or whose value waitress cannot use.
    """
    given = {variable: environ[variable] for variable in sorted(environ) if variable.startswith(PREFIX)}
    for variable, value in given.items():
        if problem := problem_with(variable, value):
            raise SettingError(variable, value, problem)
    settings = with_defaults(given)
    if problem := refusal(settings):
        # waitress says what it refuses, not which variable is wrong. It is one without which the others are accepted.
        for variable, value in given.items():
            if not refusal(with_defaults({other: given[other] for other in given if other != variable})):
                raise SettingError(variable, value, problem)
        raise SettingError(PREFIX + "*", " ".join(given.values()), problem)
    return settings


def with_defaults(given: Mapping[str, str]) -> dict[str, str]:
    """Return waitress's settings for the variables in `given`, with our defaults for the rest."""
    settings = {setting(variable): value for variable, value in given.items()}
    if settings.keys().isdisjoint({"listen", "unix_socket"}):
        settings = DEFAULT_ADDRESS | settings
    return DEFAULTS | settings


def refusal(settings: Mapping[str, str]) -> str | None:
    """Return what speaks against `settings` taken together, or None."""
    try:
        adjustments = Adjustments(**settings)
    except ValueError as error:
        return str(error)
    if not (adjustments.ipv4 or adjustments.ipv6):  # waitress would take it for both
        return "one of ipv4 and ipv6 has to be on"
    # waitress counts each listener, its pipe and our SignalPipe as connections: at that limit it would accept nobody.
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
    if name not in READERS or not variable.isupper():
        near = difflib.get_close_matches(name, READERS, n=1)
        return "waitress has no such setting" + (f"; did you mean {PREFIX}{near[0].upper()}?" if near else "")
    if not value.isprintable():
        return "takes printable characters"
    if READERS[name] is asbool and value.strip().lower() not in BOOLEANS:
        return "takes true or false"
    if READERS[name] is asoctal and not (0 < len(value) <= 4 and set(value) <= set("01234567")):
        return "takes permissions as octal digits, such as 660"
    if READERS[name] is int:
        smallest, largest = RANGES.get(name, (1, INT_MAX))
        if not is_whole_number(value, smallest, largest):
            return f"takes a whole number from {smallest} to {largest}"
    if name == "unix_socket" and not value:
        return "takes a path"
    if name == "listen":
        ports = [address.rpartition(":")[2] for address in value.split()]
        # getaddrinfo() would take port 70000 for 4464, waitress an address without a port for its own 8080.
        if not ports or not all(is_whole_number(port, *RANGES["port"]) for port in ports):
            return "takes addresses such as *:5000, with ports from 0 to 65535"
    return None


def is_whole_number(value: str, smallest: int, largest: int) -> bool:
    """Tell whether `value` is plain ASCII digits (int() takes more: 1_000, +5) for a number within the bounds."""
    return value.isascii() and value.isdigit() and len(value) < 20 and smallest <= int(value) <= largest


# --- Server -----------------------------------------------------------------------------------------------------------


def load_application(name: str) -> Callable:
    """Import and return the WSGI application that `name` (module:attribute) stands for.

    Raises SettingError if there is none, or if its module fails; the message then has the line where it failed.
    """
    module, _, attribute = name.partition(":")
    if not (module and attribute):
        raise SettingError("APP", name, "takes module:attribute, such as app:app")
    try:
        # By this Flask knows that it is served already: an app.run() left in the module is then skipped with a warning.
        os.environ["FLASK_RUN_FROM_CLI"] = "true"
        application = pkgutil.resolve_name(name)
    except Stopped:
        raise
    except (Exception, SystemExit) as failure:
        problem = f"{type(failure).__name__}: {failure}{where(failure)}"
        raise SettingError("APP", name, problem) from failure
    if not callable(application):
        raise SettingError("APP", name, f"is of type {type(application).__name__}, not a WSGI application")
    return application


def where(failure: BaseException) -> str:
    """Return the last line of the application's own code that `failure` came through, as text, or nothing."""
    here = pathlib.Path(__file__).parent
    frames = [frame for frame in traceback.extract_tb(failure.__traceback__) if frame.filename != __file__]
    paths = [(pathlib.Path(frame.filename), frame.lineno) for frame in frames]
    own = [(path, line) for path, line in paths if path.is_relative_to(here) and "site-packages" not in path.parts]
    return f" ({own[-1][0]}, line {own[-1][1]})" if own else ""


def has_ipv6() -> bool:
    """Tell whether the kernel has IPv6: one that was started with ipv6.disable=1 refuses even to make a socket."""
    try:
        socket.socket(socket.AF_INET6).close()
    except OSError:
        return False
    return True


def addresses(server: BaseWSGIServer | MultiSocketServer) -> list[str]:
    """Return where `server` listens: URLs, an IPv6 address in brackets, or a Unix socket's path after "unix:"."""
    pairs = getattr(server, "effective_listen", None) or [(server.effective_host, server.effective_port)]
    if pairs[0][0] == "unix":
        return [f"unix:{pairs[0][1]}"]
    return [f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}" for host, port in pairs]


class SignalPipe(file_dispatcher):
    """A pipe among waitress's connections, into which Python writes a byte for each signal: it ends poll().

    Python runs a signal's handler only between two steps of the program. A signal that comes after the last step before
    poll(), but before the kernel begins to wait, would else be noticed when poll() times out, a second later.
    """

    def __init__(self, channels: dict) -> None:
        """Join waitress's `channels`, the map of all that it waits for."""
        read_end, write_end = os.pipe()
        os.set_blocking(write_end, False)
        signal.set_wakeup_fd(write_end)
        super().__init__(read_end, map=channels)

    def writable(self) -> bool:
        """Tell waitress that there is nothing to write."""
        return False

    def handle_read(self) -> None:
        """Throw the bytes away: by now the handlers have run."""
        self.recv(4096)


def main() -> int:
    """Serve until told to stop; return the exit code."""
    logging.basicConfig(level=logging.INFO, format=LOG_FORMAT)
    environ = dict(os.environ) if has_ipv6() else {**os.environ, "WAITRESS_IPV6": "false"}
    try:
        settings = waitress_settings(environ)
        application = load_application(environ.get("APP", "app:app"))
    except SettingError as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2
    # An application's logging.config.dictConfig() disables the loggers and drops the handlers that it does not name.
    logging.basicConfig(format=LOG_FORMAT)
    log.disabled = False
    log.setLevel(logging.INFO)
    channels: dict = {}
    try:
        server = create_server(application, map=channels, **settings)
    except OSError as error:
        address = settings.get("listen") or settings.get("unix_socket") or f"{settings['host']}:{settings['port']}"
        print(f"serve: cannot listen on {address}: {error.strerror or error}", file=sys.stderr)
        return 1
    except RuntimeError as error:  # from the threading module: a limit of the container or the machine
        print(f"serve: cannot start {settings.get('threads', Adjustments.threads)} threads: {error}", file=sys.stderr)
        return 2
    SignalPipe(channels)
    for address in addresses(server):
        log.info("Serving on %s", address)
    server.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
