"""The log: JSON, a line an entry; requests on standard output, everything else on standard error."""

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

# The id of the request that the current thread works on.
request_id: ContextVar[str | None] = ContextVar("request_id", default=None)


class Writer(threading.Thread):
    """Writes lines to a file descriptor in a thread of its own: a stalled reader must not stall the server.

    It may collect them for a moment: to wake the reader for every request costs a third of a small one.
    """

    LIMIT = 1_000_000  # bytes that wait; lines beyond that are lost
    REPORT = 10.0  # seconds between two reports of lost lines

    def __init__(self, fd: int, name: str, moment: float = 0) -> None:
        """Write to `fd`, which `name` names in reports; collect for `moment` seconds."""
        super().__init__(name=name, daemon=True)
        self.fd, self.moment, self.process = fd, moment, os.getpid()
        self.lock, self.some = threading.Lock(), threading.Event()
        self.lines: list[bytes] = []
        self.waiting = 0  # bytes
        self.lost = 0  # lines
        self.reported = -self.REPORT
        self.start()
        writers.append(self)

    def write(self, line: str) -> None:
        """Have a line written, which ends with a newline."""
        encoded = line.encode()
        if os.getpid() != self.process:  # a fork of the application's, where this thread does not run
            os.write(self.fd, encoded)
            return
        with self.lock:
            fits = self.waiting <= self.LIMIT
            if fits:
                self.lines.append(encoded)
                self.waiting += len(encoded)
            else:
                self.lost += 1
        if not self.some.is_set():
            self.some.set()
        if not fits:
            self.report()

    def run(self) -> None:
        """Write what there is, again and again."""
        while self.some.wait():
            time.sleep(self.moment)
            self.some.clear()
            lines = self.lines[:]
            data, failed = b"".join(lines), 0
            try:
                while data:
                    data = data[os.write(self.fd, data) :]
            except OSError:  # nobody reads any more, or the disk is full
                failed = data.count(b"\n")
            with self.lock:
                del self.lines[: len(lines)]
                self.waiting -= sum(map(len, lines))
                self.lost += failed
            self.report()

    def report(self) -> None:
        """Log how many lines are lost, if any are, now and then."""
        with self.lock:
            if not self.lost or time.monotonic() < self.reported + self.REPORT:
                return
            lost, self.lost, self.reported = self.lost, 0, time.monotonic()
        log.warning("Lines of %s that could not be written: %d", self.name, lost)

    def finish(self) -> None:
        """Wait until all is written, for half a second at most; the rest is lost."""
        deadline = time.monotonic() + 0.5
        while self.waiting and time.monotonic() < deadline:
            time.sleep(0.005)
        with self.lock:
            self.lost += len(self.lines)
            self.reported = -self.REPORT
        self.report()


writers: list[Writer] = []


@atexit.register  # before the application registers its functions, so after they have run
def finish_logs() -> None:
    """Write what is left; to standard error last, because the others report there."""
    for writer in reversed(writers):
        writer.finish()


class JSONFormatter(logging.Formatter):
    """Makes an object of each record."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as JSON, without a newline."""
        entry = {"time": timestamp(record.created), "level": record.levelname, "logger": record.name}
        try:
            entry["message"] = record.getMessage()
        except Exception as error:  # logging would print a traceback in place of the message
            entry["message"] = f"{record.msg} ({error})"
        if identity := getattr(record, "request_id", None):
            entry["request_id"] = identity
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            entry["stack"] = record.stack_info
        return json.dumps(entry).replace("\x7f", "\\u007f")


class ErrorStream(io.TextIOBase):
    """What an application writes to environ["wsgi.errors"] (PEP 3333), as entries of the log."""

    def write(self, text: str) -> int:
        """Log a text, without the white space at its end."""
        if text.strip():
            logging.getLogger("wsgi.errors").error("%s", text.rstrip())
        return len(text)


def log_as_json(level: str) -> logging.Handler:
    """Send what the process logs and warns of to standard error, from `level` on; return the handler that does it."""
    make = logging.getLogRecordFactory()

    def make_record(*args: object, **named: object) -> logging.LogRecord:
        record = make(*args, **named)
        record.request_id = request_id.get()
        return record

    logging.setLogRecordFactory(make_record)
    handler = logging.StreamHandler(Writer(2, "standard error"))
    handler.setFormatter(JSONFormatter())
    logging.basicConfig(level=level, handlers=[handler])
    logging.captureWarnings(capture=True)
    sys.excepthook = lambda *failure: log.critical("Ended by an exception", exc_info=failure)
    threading.excepthook = lambda ended: log.error("Thread %s has ended", ended.thread.name, exc_info=ended[:3])
    sys.unraisablehook = lambda what: log.error("Exception ignored in %r", what.object, exc_info=what[:3])
    return handler


def log_after_all(handler: logging.Handler, level: str) -> None:
    """Undo what an application's logging.config.dictConfig() does to loggers and handlers that it does not name."""
    logging.basicConfig(handlers=[handler])
    for logger in (log, logging.getLogger("waitress")):
        logger.disabled = False
    log.setLevel(level)


def quoted(text: str | None) -> str:
    """Return a text as JSON that no terminal acts upon: delete is the one control character that JSON leaves."""
    return "null" if text is None else encode_basestring_ascii(text).replace("\x7f", "\\u007f")


def timestamp(when: float) -> str:
    """Return a time (seconds since the epoch) as RFC 3339 has it, in UTC, with milliseconds."""
    return f"{to_the_second(int(when))}.{int(when % 1 * 1000):03d}Z"


@lru_cache(maxsize=1)
def to_the_second(second: int) -> str:
    """Return the larger part of a time, which is the same for many requests."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
