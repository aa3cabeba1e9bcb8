"""Logs in JSON, one object a line: requests on standard output, everything else on standard error."""

import atexit
import io
import json
import logging
import os
import sys
import threading
import time
from contextvars import ContextVar
from functools import lru_cache
from json.encoder import encode_basestring_ascii

log = logging.getLogger("serve")

REPORT_INTERVAL = 10.0  # seconds between two reports of the same problem

# The id of the request that the current thread is answering.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


class Writer(threading.Thread):
    """Writes lines in a thread of its own: a stalled reader of the log must not stall requests.

    With `delay` (seconds) it writes in batches. Writing each line at once takes a third of a small request's time.
    """

    LIMIT = 1_000_000  # bytes that may wait; further lines are lost

    def __init__(self, fd: int, name: str, delay: float = 0) -> None:
        """Write to the file descriptor `fd`, which reports call `name`."""
        super().__init__(name=name, daemon=True)
        self.fd, self.delay, self.pid = fd, delay, os.getpid()
        self.lock, self.pending = threading.Lock(), threading.Event()
        self.lines: list[bytes] = []
        self.waiting = 0  # bytes
        self.lost = 0  # lines
        self.reported = -REPORT_INTERVAL
        self.start()
        writers.append(self)

    def write(self, line: str) -> None:
        """Queue `line`, which must end with a newline."""
        encoded = line.encode()
        if os.getpid() != self.pid:  # a forked child does not run the thread
            os.write(self.fd, encoded)
            return
        with self.lock:
            if self.waiting > self.LIMIT:
                self.lost += 1
                return
            self.lines.append(encoded)
            self.waiting += len(encoded)
        if not self.pending.is_set():
            self.pending.set()

    def run(self) -> None:
        """Write queued lines forever."""
        while self.pending.wait():
            time.sleep(self.delay)
            self.pending.clear()
            lines = self.lines[:]
            data, failed = b"".join(lines), 0
            while data:
                try:
                    data = data[os.write(self.fd, data) :]
                except BlockingIOError:  # another process that shares the descriptor made it non-blocking
                    time.sleep(0.02)
                except OSError:  # the reader is gone, or the disk is full
                    data, failed = b"", data.count(b"\n")
            with self.lock:
                del self.lines[: len(lines)]
                self.waiting -= sum(map(len, lines))
                self.lost += failed
            self.report()

    def report(self) -> None:
        """Log how many lines were lost, if any, at most every REPORT_INTERVAL."""
        with self.lock:
            if not self.lost or time.monotonic() < self.reported + REPORT_INTERVAL:
                return
            lost, self.lost, self.reported = self.lost, 0, time.monotonic()
        log.warning("Lines of %s that could not be written: %d", self.name, lost)

    def finish(self) -> None:
        """Wait up to half a second until everything is written; the rest is lost."""
        if os.getpid() != self.pid:
            return
        self.reported = -REPORT_INTERVAL
        self.report()
        deadline = time.monotonic() + 0.5
        while self.waiting and time.monotonic() < deadline:
            time.sleep(0.005)
        with self.lock:
            self.lost += len(self.lines)
            self.reported = -REPORT_INTERVAL
        self.report()


writers: list[Writer] = []


@atexit.register  # registered before the application's functions, so it runs last
def finish_logs() -> None:
    """Finish all writers, standard error last: the access log reports its lost lines there."""
    for writer in reversed(writers):
        writer.finish()


class JSONFormatter(logging.Formatter):
    """Formats records as JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """Return `record` as a JSON object, without a newline."""
        entry = {"time": timestamp(record.created), "level": record.levelname, "logger": record.name}
        try:
            entry["message"] = record.getMessage()
        except Exception as error:  # logging would print a traceback instead
            entry["message"] = f"{record.msg if isinstance(record.msg, str) else type(record.msg)} ({error})"
        if identity := getattr(record, "request_id", None) or request_id.get():
            entry["request_id"] = str(identity)
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            entry["stack"] = record.stack_info
        return json.dumps(entry)


class ErrorStream(io.TextIOBase):
    """environ["wsgi.errors"] (PEP 3333): logs what the application writes to it."""

    def write(self, text: str) -> int:
        """Log `text` without trailing white space."""
        if text.strip():
            logging.getLogger("wsgi.errors").error("%s", text.rstrip())
        return len(text)


def log_as_json(level: str) -> logging.Handler:
    """Send logs from `level` up, warnings and uncaught exceptions to standard error; return the handler."""

    def log_thread(ended: threading.ExceptHookArgs) -> None:
        if not issubclass(ended.exc_type, SystemExit):
            log.error("Uncaught exception in thread %s", ended.thread and ended.thread.name, exc_info=ended[:3])

    handler = logging.StreamHandler(Writer(2, "standard error"))
    handler.setFormatter(JSONFormatter())
    logging.basicConfig(level=level, handlers=[handler])
    logging.captureWarnings(capture=True)
    # Not through the root logger: an application may send that to wsgi.errors, which would be a loop.
    logging.getLogger("wsgi.errors").addHandler(handler)
    logging.getLogger("wsgi.errors").propagate = False
    sys.excepthook = lambda *failure: log.critical("Uncaught exception", exc_info=failure)
    sys.unraisablehook = lambda what: log.error("Exception ignored in %r", what.object, exc_info=what[:3])
    threading.excepthook = log_thread
    return handler


def restore_logging(handler: logging.Handler, level: str) -> None:
    """Restore our handler and loggers if logging.config.dictConfig() in the application removed or disabled them."""
    logging.basicConfig(handlers=[handler])
    for name in ("serve", "waitress", "wsgi.errors"):
        logging.getLogger(name).disabled = False
    log.setLevel(level)


def quoted(text: str | None) -> str:
    """Return `text` as JSON in printable ASCII."""
    return "null" if text is None else encode_basestring_ascii(text)


def timestamp(when: float) -> str:
    """Format `when` (seconds since the epoch) as in RFC 3339, in UTC with milliseconds."""
    return f"{to_the_second(int(when))}.{int(when % 1 * 1000):03d}Z"


@lru_cache(maxsize=1)
def to_the_second(second: int) -> str:
    """Format a time without its fraction. Cached, because many requests share a second."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
