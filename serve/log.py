"""The log: JSON, a line an entry; requests on standard output, everything else on standard error."""

import io
import json
import logging
import os
import select
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from functools import lru_cache
from types import TracebackType

log = logging.getLogger("serve")


class Outlet:
    """A file descriptor for lines of a log. It does not wait: who reads it may have stopped, and would stop us.

    That holds for a pipe of its own, a file and a terminal. What an application prints to the same pipe may take the
    room between the question whether there is some and the writing.
    """

    LIMIT = 1_000_000  # bytes that wait to be written; what does not fit is lost

    def __init__(self, fd: int) -> None:
        """Write to `fd`, which stays blocking: it may be somebody else's terminal too."""
        self.fd = fd
        if os.isatty(fd):
            # A terminal has room for less than a pipe when it says that it has any. Opened anew, it can be told not to
            # wait without telling everybody who has it.
            with suppress(OSError):
                self.fd = os.open(os.ttyname(fd), os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY)
        self.room = select.poll()
        self.room.register(self.fd, select.POLLOUT)
        self.lines: deque[bytes] = deque()
        self.waiting = 0
        self.lost = 0
        self.lock = threading.Lock()

    def write(self, line: str) -> None:
        """Keep a line, which ends with a newline, to be written by flush()."""
        with self.lock:
            if self.waiting > self.LIMIT:
                self.lost += 1
                return
            encoded = line.encode()
            self.lines.append(encoded)
            self.waiting += len(encoded)

    def flush(self) -> None:
        """Write what can be written now, in one thread at a time: whole lines where they are not very long."""
        while self.lines and self.room.poll(0):
            chunk = self.lines.popleft()
            while self.lines and len(chunk) + len(self.lines[0]) <= select.PIPE_BUF:
                chunk += self.lines.popleft()
            failed = 0
            try:
                # So much a pipe takes at once, if it takes anything (POSIX, write()).
                written = os.write(self.fd, chunk[: select.PIPE_BUF])
            except BlockingIOError:
                self.lines.appendleft(chunk)
                return
            except OSError:  # nobody reads any more, or the disk is full
                written, failed = len(chunk), chunk.count(b"\n")
            if written < len(chunk):
                self.lines.appendleft(chunk[written:])
            with self.lock:
                self.waiting -= written
                self.lost += failed

    def finish(self, seconds: float) -> None:
        """Write what is left, for at most so long; the rest is lost."""
        deadline = time.monotonic() + seconds
        while self.lines and time.monotonic() < deadline:
            self.room.poll(50)
            self.flush()
        with self.lock:
            self.lost += b"".join(self.lines).count(b"\n")
            self.lines.clear()

    def count_lost(self) -> int:
        """Return how many lines have been lost since the last call."""
        with self.lock:
            lost, self.lost = self.lost, 0
        return lost


class ErrorStream(io.TextIOBase):
    """What an application writes to environ["wsgi.errors"] (PEP 3333), as entries of the log."""

    def write(self, text: str) -> int:
        """Log a text, without the white space at its end."""
        if text.strip():
            logging.getLogger("wsgi.errors").error("%s", text.rstrip())
        return len(text)


class JSONFormatter(logging.Formatter):
    """Makes an object of each record."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as one line of JSON."""
        entry = {
            "time": timestamp(record.created),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            entry["stack"] = record.stack_info
        return json_line(entry).rstrip()


def json_line(entry: dict) -> str:
    """Return an object as a line that no terminal acts upon: of ASCII, and delete is the one control JSON leaves."""
    return json.dumps(entry).replace("\x7f", "\\u007f") + "\n"


def timestamp(when: float) -> str:
    """Return a time (seconds since the epoch) as RFC 3339 has it, in UTC, with milliseconds."""
    second = int(when)
    return f"{to_the_second(second)}.{int((when - second) * 1000):03d}Z"


@lru_cache(maxsize=1)
def to_the_second(second: int) -> str:
    """Return the larger part of a time, which is the same for many requests."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))


def log_as_json(level: str) -> logging.Handler:
    """Send what the process logs and warns of to standard error, from `level` on; return the handler that does it."""
    handler = logging.StreamHandler(Outlet(2))
    handler.setFormatter(JSONFormatter())
    logging.basicConfig(level=level, handlers=[handler])
    logging.captureWarnings(capture=True)
    # waitress warns once for each request that finds no thread idle; Server.report() sums up.
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    sys.excepthook = log_crash
    threading.excepthook = log_thread
    sys.unraisablehook = log_unraisable
    return handler


def log_crash(kind: type, failure: BaseException, trace: TracebackType | None) -> None:
    """Log what has ended the process."""
    log.critical("Ended by an exception", exc_info=(kind, failure, trace))


def log_thread(ended: threading.ExceptHookArgs) -> None:
    """Log what has ended a thread of the application."""
    failure = (ended.exc_type, ended.exc_value, ended.exc_traceback)
    log.error("Thread %s has ended", ended.thread and ended.thread.name, exc_info=failure)


def log_unraisable(unraisable: object) -> None:
    """Log what failed where nobody could be told: when an object was thrown away, mostly."""
    failure = (unraisable.exc_type, unraisable.exc_value, unraisable.exc_traceback)
    log.error("%s: %r", unraisable.err_msg or "Exception ignored in", unraisable.object, exc_info=failure)


def log_after_all(handler: logging.Handler, level: str) -> None:
    """Undo what an application's logging.config.dictConfig() does to loggers and handlers that it does not name."""
    logging.basicConfig(handlers=[handler])
    for logger in (log, logging.getLogger("waitress")):
        logger.disabled = False
    log.setLevel(level)
