"""Run a WSGI application under waitress as a container should be run.

    python serve.py

APP names the application (default app:app), WAITRESS_<NAME> is waitress's setting <name>. Ends with exit code 0 on
SIGTERM and SIGINT, 1 where it cannot listen, 2 where a variable is wrong; an error is one line on standard error.
"""

import difflib
import logging
import os
import pathlib
import pkgutil
import signal
import socket
import sys
import traceback
from collections.abc import Callable, Mapping
from types import FrameType
from typing import NoReturn

from waitress.adjustments import Adjustments, asbool, asoctal
from waitress.server import BaseWSGIServer, MultiSocketServer, create_server
from waitress.wasyncore import file_dispatcher

log = logging.getLogger("serve")

# --- Settings ---------------------------------------------------------------------------------------------------------

PREFIX = "WAITRESS_"

# Where no address is set: every one of IPv4 and IPv6, port 5000. waitress's own default is IPv4 alone, port 8080.
DEFAULT_ADDRESS = {"host": "*", "port": "5000"}

# The settings of waitress and how it reads each; it has no public list (a test sees to it that this one stays what it
# is). `sockets` takes socket objects, which no variable can hold.
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
    # waitress counts its two listeners, their pipes and our own (wake_on_signal) too: with 5 it would accept nobody.
    "connection_limit": (6, INT_MAX),
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
        # waitress says what it refuses, not whose fault it is: a variable's without which the others will do.
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
    # No Server header: a client has no use for the name of what answers, an attacker has.
    return {"ident": ""} | settings


def refusal(settings: Mapping[str, str]) -> str | None:
    """Return what speaks against `settings` taken together, in waitress's words, or None."""
    try:
        adjustments = Adjustments(**settings)
    except ValueError as error:
        return str(error)
    # waitress would take neither for both.
    return None if adjustments.ipv4 or adjustments.ipv6 else "one of ipv4 and ipv6 has to be on"


def setting(variable: str) -> str:
    """Return waitress's own name for `variable`: threads for WAITRESS_THREADS."""
    return variable.removeprefix(PREFIX).lower()


def problem_with(variable: str, value: str) -> str | None:
    """Return what is wrong with a WAITRESS_ variable, of that which waitress itself lets pass or words badly."""
    name = setting(variable)
    if name not in READERS or not variable.isupper():
        near = difflib.get_close_matches(name, READERS, n=1)
        return "waitress has no such setting" + (f"; did you mean {PREFIX}{near[0].upper()}?" if near else "")
    if READERS[name] is asbool and value.strip().lower() not in BOOLEANS:
        return "takes true or false"
    if READERS[name] is asoctal and not (value and set(value) <= set("01234567")):
        return "takes permissions as octal digits, such as 660"
    if READERS[name] is int:
        smallest, largest = RANGES.get(name, (1, INT_MAX))
        if not is_whole_number(value, smallest, largest):
            return f"takes a whole number from {smallest} to {largest}"
    if name == "unix_socket" and not value:
        return "takes a path"
    if name == "listen":
        ports = [address.rpartition(":")[2] for address in value.split()]
        # getaddrinfo() would take port 70000 for 4464.
        if not ports or any(port.isdigit() and not is_whole_number(port, *RANGES["port"]) for port in ports):
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
        application = pkgutil.resolve_name(name)
    except Exception as failure:
        problem = f"{type(failure).__name__}: {failure}{where(failure)}"
        raise SettingError("APP", name, problem) from failure
    if not callable(application):
        raise SettingError("APP", name, f"is of type {type(application).__name__}, not a WSGI application")
    return application


def where(failure: Exception) -> str:
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
    """Return where `server` listens, as a client would write it."""
    pairs = getattr(server, "effective_listen", None) or [(server.effective_host, server.effective_port)]
    urls = [f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}" for host, port in pairs]
    return [url.replace("http://unix:", "unix:") for url in urls]


def stop(_signum: int, _frame: FrameType | None) -> NoReturn:
    """Handle a signal: waitress's run() takes SystemExit as the word to close everything and return."""
    raise SystemExit(0)


def wake_on_signal(channels: dict) -> None:
    """Let a signal end waitress's select(), which waits on `channels`.

    Python runs a handler between two steps of the program only. A signal that comes after the last step before
    select(), but before the kernel has begun to wait, would else be noticed when select() times out, a second later.
    """
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)
    file_dispatcher(read_end, map=channels)


def main() -> int:
    """Serve until told to stop; return the exit code."""
    # The kernel keeps from the first process of a container each signal that it has no handler for, and a shell starts
    # its background jobs with SIGINT ignored: without these two lines `docker stop` takes ten seconds and kills.
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        settings = waitress_settings(os.environ)
        application = load_application(os.environ.get("APP", "app:app"))
    except SettingError as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2
    if not has_ipv6():
        settings = {"ipv6": "false"} | settings
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
    wake_on_signal(channels)
    for address in addresses(server):
        log.info("Serving on %s", address)
    server.run()
    return 0


if __name__ == "__main__":
    sys.exit(main())
