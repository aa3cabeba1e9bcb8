"""The log: one JSON object a line; requests on standard output, everything else on standard error."""

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

REPORT = 10.0  # seconds between two reports of the same trouble

# The id of the request that the current thread works on.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


class Writer(threading.Thread):
    """Writes lines from a thread of its own, so that a stalled reader of the log stalls no request.

    With `delay` (seconds) it collects lines: to write each at once takes a third of a small request's time.
    """

    LIMIT = 1_000_000  # bytes that may wait; lines beyond that are lost

    def __init__(self, fd: int, name: str, delay: float = 0) -> None:
        """Write to the file descriptor `fd`; `name` says in reports what that is."""
        super().__init__(name=name, daemon=True)
        self.fd, self.delay, self.pid = fd, delay, os.getpid()
        self.lock, self.pending = threading.Lock(), threading.Event()
        self.lines: list[bytes] = []
        self.waiting = 0  # bytes
        self.lost = 0  # lines
        self.reported = -REPORT
        self.start()
        writers.append(self)

    def write(self, line: str) -> None:
        """Queue a line, which ends with a newline."""
        encoded = line.encode()
        if os.getpid() != self.pid:  # a forked child does not have the thread
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
        """Write what is queued, again and again."""
        while self.pending.wait():
            time.sleep(self.delay)
            self.pending.clear()
            lines = self.lines[:]
            data, failed = b"".join(lines), 0
            while data:
                try:
                    data = data[os.write(self.fd, data) :]
                except BlockingIOError:  # whoever shares the descriptor has made it non-blocking
                    time.sleep(0.02)
                except OSError:  # nobody reads any more, or the disk is full
                    data, failed = b"", data.count(b"\n")
            with self.lock:
                del self.lines[: len(lines)]
                self.waiting -= sum(map(len, lines))
                self.lost += failed
            self.report()

    def report(self) -> None:
        """Log how many lines are lost, if any are, now and then."""
        with self.lock:
            if not self.lost or time.monotonic() < self.reported + REPORT:
                return
            lost, self.lost, self.reported = self.lost, 0, time.monotonic()
        log.warning("Lines of %s that could not be written: %d", self.name, lost)

    def finish(self) -> None:
        """Wait until all is written, for half a second at most; the rest is lost."""
        if os.getpid() != self.pid:
            return
        self.reported = -REPORT
        self.report()
        deadline = time.monotonic() + 0.5
        while self.waiting and time.monotonic() < deadline:
            time.sleep(0.005)
        with self.lock:
            self.lost += len(self.lines)
            self.reported = -REPORT
        self.report()


writers: list[Writer] = []


@atexit.register  # registered first, so it runs after the application's functions
def finish_logs() -> None:
    """Write what is left; to standard error last, because the others report there."""
    for writer in reversed(writers):
        writer.finish()


class JSONFormatter(logging.Formatter):
    """Makes a JSON object of each record."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON, without a newline."""
        entry = {"time": timestamp(record.created), "level": record.levelname, "logger": record.name}
        try:
            entry["message"] = record.getMessage()
        except Exception as error:  # logging would print a traceback in place of the message
            entry["message"] = f"{record.msg if isinstance(record.msg, str) else type(record.msg)} ({error})"
        if identity := getattr(record, "request_id", None) or request_id.get():
            entry["request_id"] = str(identity)
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            entry["stack"] = record.stack_info
        return json.dumps(entry)


class ErrorStream(io.TextIOBase):
    """environ["wsgi.errors"] (PEP 3333): logs what an application writes to it."""

    def write(self, text: str) -> int:
        """Log a text, without the white space at its end."""
        if text.strip():
            logging.getLogger("wsgi.errors").error("%s", text.rstrip())
        return len(text)


def log_as_json(level: str) -> logging.Handler:
    """Send what the process logs and warns of to standard error, from `level` on; return the handler that does it."""

    def log_thread(ended: threading.ExceptHookArgs) -> None:
        if not issubclass(ended.exc_type, SystemExit):
            log.error("Thread %s has ended", ended.thread and ended.thread.name, exc_info=ended[:3])

    handler = logging.StreamHandler(Writer(2, "standard error"))
    handler.setFormatter(JSONFormatter())
    logging.basicConfig(level=level, handlers=[handler])
    logging.captureWarnings(capture=True)
    # Not to the root logger: an application may make that write to wsgi.errors, which would be a loop.
    logging.getLogger("wsgi.errors").addHandler(handler)
    logging.getLogger("wsgi.errors").propagate = False
    sys.excepthook = lambda *failure: log.critical("Uncaught exception", exc_info=failure)
    sys.unraisablehook = lambda what: log.error("Exception ignored in %r", what.object, exc_info=what[:3])
    threading.excepthook = log_thread
    return handler


def log_after_all(handler: logging.Handler, level: str) -> None:
    """Restore what an application's logging.config.dictConfig() has removed or disabled of ours."""
    logging.basicConfig(handlers=[handler])
    for name in ("serve", "waitress", "wsgi.errors"):
        logging.getLogger(name).disabled = False
    log.setLevel(level)


def quoted(text: str | None) -> str:
    """Return a text as JSON, in printable ASCII."""
    return "null" if text is None else encode_basestring_ascii(text)


def timestamp(when: float) -> str:
    """Return a time (seconds since the epoch) as RFC 3339 has it, in UTC, with milliseconds."""
    return f"{to_the_second(int(when))}.{int(when % 1 * 1000):03d}Z"


@lru_cache(maxsize=1)
def to_the_second(second: int) -> str:
    """Return a time without the fraction; cached, because many requests share it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
