"""Run a WSGI application as a container should be run.

    python -m serve

APP names the application (default app:app; or a factory, myapp:create_app()), BIND and PORT say where to listen,
WAITRESS_<NAME> is waitress's setting <name>; README.md lists the rest.
Ends with exit code 0 once it has drained after SIGTERM or SIGINT; 1 where it cannot listen, or gave up waiting for
requests; 2 where a variable is wrong.
"""

import os
import signal

if __name__ == "__main__":
    # PID 1 receives only the signals that it handles, and a shell's background jobs ignore SIGINT. Before the other
    # imports, which take most of the start. There is nothing to drain until Server.run() replaces these handlers.
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

from serve.log import finish_logs, log, log_after_all, log_as_json
from serve.server import Server
from serve.settings import SettingError, read_settings

SPARE_FILES = 64  # descriptors that are left to the application; a connection may need two, with a temporary file
LAST_SECONDS = 1  # for the application's own threads and atexit functions


def main() -> int:
    """Serve until told to stop; return the exit code."""
    try:
        settings = read_settings(os.environ)
        handler = log_as_json(settings.log_level)
        application = load_application(settings.application)
    except SettingError as error:
        print(f"serve: {error}", file=sys.stderr)
        return 2
    log_after_all(handler, settings.log_level)
    if settings.unknown:
        log.warning("Ignored, because they are no settings of waitress: %s", ", ".join(settings.unknown))
    limit_connections(settings.waitress)
    try:
        server = Server(application, settings)
    except (OSError, OverflowError) as error:
        place = f"{settings.waitress.host}:{settings.waitress.port}"
        reason = os.strerror(error.errno) if getattr(error, "errno", None) else error
        print(f"serve: cannot listen on {place}: {reason}", file=sys.stderr)
        return 1
    except RuntimeError as error:  # from the threading module: a limit of the container or the machine
        print(f"serve: cannot start {settings.waitress.threads} threads: {error}", file=sys.stderr)
        return 2
    code = server.run()
    end_soon(code)
    return code


def load_application(name: str) -> Callable:
    """Import and return the WSGI application that `name` stands for: module:attribute, or what module:factory() gives.

    Raises SettingError if there is none, or if its module or factory fails; the message then names the line.
    """
    module, _, attribute = name.removesuffix("()").partition(":")
    if not (module and attribute) or "(" in attribute:
        raise SettingError("APP", name, "takes module:attribute such as app:app, or module:factory()")
    try:
        # By this Flask knows that it is served already: an app.run() left in the module is then skipped with a warning.
        os.environ["FLASK_RUN_FROM_CLI"] = "true"
        application = pkgutil.resolve_name(f"{module}:{attribute}")
        if name.endswith("()"):
            application = application()
    except (Exception, SystemExit) as failure:
        problem = f"{type(failure).__name__}: {failure}{where(failure)}"
        raise SettingError("APP", name, problem) from failure
    if not callable(application):
        raise SettingError("APP", name, f"is of type {type(application).__name__}, not a WSGI application")
    return application


def where(failure: BaseException) -> str:
    """Return the last line of the application's own code that `failure` came through, as text, or nothing."""
    here, libraries = pathlib.Path.cwd(), {"site-packages", "serve"}
    for frame in reversed(traceback.extract_tb(failure.__traceback__)):
        path = pathlib.Path(frame.filename)
        if path.is_relative_to(here) and not libraries & set(path.relative_to(here).parts):
            return f" ({path}, line {frame.lineno})"
    return ""


def limit_connections(adj: Adjustments) -> None:
    """Raise the process's limit of open files as far as it goes, and lower connection_limit to what it then holds."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    except (OSError, ValueError):  # macOS says "unlimited" and takes less
        log.debug("The limit of open files cannot be raised")
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted, fits = adj.connection_limit, (files - min(SPARE_FILES, files // 2)) // 2
    if files != resource.RLIM_INFINITY and wanted > fits:
        adj.connection_limit = fits
        log.warning("A limit of %d open files does not hold connection_limit=%d: it is now %d", files, wanted, fits)


def end_soon(code: int) -> None:
    """Give the application's threads and atexit functions a second to end. A signal now ends the process at once."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: os._exit(code or 1))

    def end() -> None:
        log.error("Ended with threads or atexit functions of the application still running")
        finish_logs()
        os._exit(code or 1)

    timer = threading.Timer(LAST_SECONDS, end)
    timer.daemon = True  # or the interpreter would wait for it
    timer.start()


if __name__ == "__main__":
    sys.exit(main())
