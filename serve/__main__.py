"""Run a WSGI application as a container should be run.

    python -m serve

APP names the application (default app:app) or a factory, such as myapp:create_app(). BIND and PORT say where to
listen. WAITRESS_<NAME> sets waitress's <name>. README.md lists the rest.
Exit codes: 0 after draining on SIGTERM or SIGINT, 1 if it cannot listen or did not stop cleanly, 2 for a wrong setting.
"""

import os
import signal

if __name__ == "__main__":
    # PID 1 receives only the signals it handles, and background jobs of a shell ignore SIGINT. Handled before the other
    # imports, which take most of the startup time. Nothing needs draining until Server.run() replaces these handlers.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(0))

import pathlib
import pkgutil
import resource
import sys
import threading
import traceback
from collections.abc import Callable

from waitress.adjustments import Adjustments

from serve.log import finish_logs, log, log_as_json, restore_logging
from serve.server import Server
from serve.settings import SettingError, read_settings

SPARE_FILES = 64  # file descriptors kept for the application; a connection may use two: its socket and a temporary file
EXIT_TIMEOUT = 1  # seconds for the application's own threads and atexit functions


def main() -> int:
    """Serve until told to stop; return the exit code."""
    try:
        settings = read_settings(os.environ)
        handler = log_as_json(settings.log_level)
        application = load_application(settings.application)
    except SettingError as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2
    restore_logging(handler, settings.log_level)
    if settings.unknown:
        log.warning("Ignored, not recognized as settings of waitress: %s", ", ".join(settings.unknown))
    limit_connections(settings.waitress)
    try:
        server = Server(application, settings)
    except (OSError, OverflowError) as error:
        place = f"{settings.waitress.host}:{settings.waitress.port}"
        reason = os.strerror(error.errno) if getattr(error, "errno", None) else error
        print(f"serve: cannot listen on {place}: {reason}", file=sys.stderr)
        return 1
    except RuntimeError as error:  # from threading: the container or machine allows no more threads
        print(f"serve: cannot start {settings.waitress.threads} threads: {error}", file=sys.stderr)
        return 2
    code = server.run()
    start_exit_timer(code)
    return code


def load_application(name: str) -> Callable:
    """Import and return the WSGI application `name`: module:attribute, or the result of module:factory().

    Raises SettingError if there is none, or if its module or factory fails; the message then names the line.
    """
    module, _, attribute = name.removesuffix("()").partition(":")
    if not (module and attribute) or "(" in attribute:
        raise SettingError("APP", name, "must be module:attribute, such as app:app, or module:factory()")
    try:
        # With this set, Flask skips an app.run() that was left in the module, and prints a warning.
        os.environ["FLASK_RUN_FROM_CLI"] = "true"
        application = pkgutil.resolve_name(f"{module}:{attribute}")
        if name.endswith("()"):
            application = application()
    except (Exception, SystemExit) as failure:
        problem = f"{type(failure).__name__}: {failure}{location(failure)}"
        raise SettingError("APP", name, problem) from failure
    if not callable(application):
        raise SettingError("APP", name, f"is of type {type(application).__name__}, not a WSGI application")
    return application


def location(failure: BaseException) -> str:
    """Return the last line of the application's own code in the traceback, as " (path, line 3)", or "" if none."""
    here, libraries = pathlib.Path.cwd(), {"site-packages", "serve"}
    for frame in reversed(traceback.extract_tb(failure.__traceback__)):
        path = pathlib.Path(frame.filename)
        if path.is_relative_to(here) and not libraries & set(path.relative_to(here).parts):
            return f" ({path}, line {frame.lineno})"
    return ""


def limit_connections(adj: Adjustments) -> None:
    """Raise the limit of open files to its hard limit; lower connection_limit if that is not enough."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):  # macOS reports "unlimited" but accepts less
        log.debug("The limit of open files cannot be raised")
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted, fits = adj.connection_limit, (files - min(SPARE_FILES, files // 2)) // 2
    if files != resource.RLIM_INFINITY and wanted > fits:
        adj.connection_limit = fits
        log.warning("A limit of %d open files is too low for connection_limit=%d: lowered to %d", files, wanted, fits)


def start_exit_timer(code: int) -> None:
    """Give the application's threads and atexit functions a second to end; a signal exits at once."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(code or 1))

    def end() -> None:
        log.error("Ended with threads or atexit functions of the application still running")
        finish_logs()
        os._exit(code or 1)

    timer = threading.Timer(EXIT_TIMEOUT, end)
    timer.daemon = True  # otherwise the interpreter would wait for it
    timer.start()


if __name__ == "__main__":
    sys.exit(main())
