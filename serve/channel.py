"""Connections: they read requests, pass them to the workers in order, and enforce the timeouts."""

import enum
import fcntl
import math
import socket
import sys
import termios
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from selectors import EVENT_READ, EVENT_WRITE
from typing import TYPE_CHECKING

from waitress.buffers import OverflowableBuffer, ReadOnlyFileBasedBuffer
from waitress.channel import ClientDisconnected

from serve.http import Request, refusal
from serve.log import log
from serve.response import Response

if TYPE_CHECKING:
    from serve.server import Server

# Bytes per second, averaged over READ_TIMEOUT, at which a client must send a body or take a response. Mobile networks
# are faster. Without a minimum, a client that takes a byte now and then would hold a thread.
MIN_RATE = 1024
LINGER = 2.0  # seconds for a client to close its side after its last response
SHORT_TIMEOUT = 1.0  # seconds for a client to send or close, while the server is closing or full


class State(enum.Enum):
    """What a connection is waiting for."""

    IDLE = "the next request"
    HEADER = "the rest of its header"
    BODY = "the rest of its body"
    WORK = "the application"
    RESPONSE = "the client, to take its response"
    HALF_CLOSED = "the client, to close its side"


class Channel:
    """A connection.

    The main thread reads, closes, and sends what a client did not take at once. A worker thread calls service() to
    answer a request. `lock`, which is reentrant, protects what both change.

    waitress's WSGITask, the base of Response, uses `addr`, `server`, write_soon() and check_client_disconnected().
    """

    def __init__(self, server: "Server", connection: socket.socket, address: tuple) -> None:
        self.server, self.adj = server, server.adj
        self.socket, self.addr = connection, address
        self.lock = threading.Condition()
        self.request: Request | None = None  # the one still arriving
        self.requests: list[Request] = []  # complete ones; the first is queued or being answered
        self.unparsed = b""  # received after the last of these
        self.outgoing: list[OverflowableBuffer | ReadOnlyFileBasedBuffer] = []  # buffered for the client
        self.tail_bytes = 0  # written to outgoing[-1] so far
        self.sent = 0  # bytes
        self.events = 0  # for which the event loop waits
        self.finished = False  # no further request will be answered
        self.client_eof = False  # the client has closed its side
        self.half_closed = self.closed = False
        self.state, self.since, self.progress_then = State.IDLE, time.monotonic(), 0

    # ---- in the main thread ----

    def on_events(self, events: int) -> None:
        """Send and read what is possible without blocking."""
        with self.guard():
            if events & EVENT_WRITE:
                self.flush()
            if events & EVENT_READ and not self.closed:
                self.read()
            self.settle()

    @contextmanager
    def guard(self) -> Iterator[None]:
        """Log any error and close the connection: the error must not end the server."""
        try:
            yield
        except Exception:
            log.exception("A connection is closed because of an error")
            self.close()

    def read(self) -> None:
        """Receive and parse what the client has sent; hand a request to the workers if none is in flight."""
        try:
            data = self.socket.recv(self.adj.recv_bytes)
        except BlockingIOError:
            return
        except OSError:
            self.close()
            return
        with self.lock:
            if not data:
                self.client_eof, self.request = True, None
            idle = not self.requests
            self.parse(data)
            if idle and self.requests:
                self.server.start(self)
            self.update()

    def flush(self) -> None:
        """Send from the buffers what the client takes now."""
        with self.lock:
            try:
                for _ in range(4):  # blocks at most, then it is another connection's turn
                    if not self.outgoing:
                        break
                    block = self.outgoing[0].get(2**18)
                    sent = self.socket.send(block) if block else 0
                    self.sent += sent
                    self.outgoing[0].skip(sent, True)
                    if not block:
                        if len(self.outgoing[0]):  # a file became shorter: other data must not take its place
                            self.close()
                            break
                        self.outgoing.pop(0).close()
            except BlockingIOError:
                pass
            except OSError:
                self.close()
            self.update()
            self.lock.notify()

    def settle(self) -> None:
        """Close the connection if it is done, else update the events that the loop waits for."""
        with self.lock:
            if self.closed:
                return
            if (self.finished or self.client_eof) and not (self.requests or self.outgoing):
                if self.client_eof or self.server.full:
                    self.close()
                    return
                if not self.half_closed:
                    # Half-close: close() would reset a client that is still sending, and it would lose its response
                    # (RFC 9112, section 9.6).
                    self.half_closed = True
                    self.update()
                    with suppress(OSError):
                        self.socket.shutdown(socket.SHUT_WR)
            if (wanted := self.wanted()) != self.events:
                self.server.watch(self, wanted)

    def close(self) -> None:
        """Close the connection. A worker that is still sending gets ClientDisconnected."""
        with self.lock:
            self.closed = True
            self.server.forget(self)
            with suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)  # a child that the application forked has the socket too
            self.socket.close()
            while self.outgoing:
                with suppress(Exception):  # closing a file flushes it, which fails on a full disk
                    self.outgoing.pop().close()
            del self.requests[1:]
            self.lock.notify()

    def check(self, now: float) -> None:
        """Close the connection, or answer 408, if its timeout has expired. `now` is time.monotonic()."""
        with self.guard():
            with self.lock:
                self.update()
            waited = now - self.since
            if self.closed or waited < self.timeout():
                return
            if self.state in {State.BODY, State.RESPONSE} and self.progress() - self.progress_then >= MIN_RATE * waited:
                self.since, self.progress_then = now, self.progress()
            elif self.state in {State.HEADER, State.BODY}:
                self.time_out()
            elif self.state == State.IDLE:
                since = self.since
                self.on_events(EVENT_READ)  # a request may have arrived just now
                if self.since == since:
                    self.close()
            else:
                self.close()

    def timeout(self) -> float:
        """Return how many seconds after `since` the client may keep us waiting."""
        timeouts = {State.IDLE: self.adj.channel_timeout, State.WORK: math.inf, State.HALF_CLOSED: LINGER}
        timeout = timeouts.get(self.state, self.server.settings.read_timeout)
        if (self.server.closing or self.server.full) and self.state not in {State.WORK, State.RESPONSE}:
            return min(timeout, SHORT_TIMEOUT)
        return timeout

    def progress(self) -> int:
        """Return how many bytes of the body have arrived, or how many sent bytes the client has acknowledged."""
        return self.request.body_bytes_received if self.state == State.BODY else self.sent - self.unacknowledged()

    def unacknowledged(self) -> int:
        """Return how many bytes (up to megabytes) the kernel keeps until the client acknowledges them; 0 if unknown."""
        with suppress(OSError):
            return int.from_bytes(fcntl.ioctl(self.socket, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
        return 0

    def time_out(self) -> None:
        """Answer 408 to the request that is arriving. It is the only one, so no worker uses this connection."""
        self.request.error = refusal("the request took too long to arrive", 408, "Request Timeout")
        self.requests.append(self.request)
        self.request = None
        self.service()  # in the main thread, as there is no application to wait for
        self.settle()

    # ---- in a worker thread ----

    def service(self) -> None:
        """Answer the first request; queue the next, if it has arrived."""
        request = self.requests[0]
        self.response = Response(self, request)
        self.response.make()
        request.close()
        with self.lock:
            self.requests.pop(0)
            self.finished |= self.response.close_on_finish
            self.response = None  # frees the environ, where the application may store a lot
            if self.finished or self.closed:
                self.requests.clear()
            self.parse(b"")
            self.update()
            if self.requests:
                self.server.tasks.put(self)
            else:
                self.server.in_flight.discard(self)
            if self.finished or self.client_eof or self.server.closing or self.wanted() != self.events:
                self.server.wake(self)

    def write_soon(self, *parts: bytes | ReadOnlyFileBasedBuffer) -> None:
        """Send or buffer parts of a response; first wait while more than outbuf_high_watermark is buffered.

        Raises ClientDisconnected if the connection is closed or fails.
        """
        with self.lock:
            if isinstance(parts[0], ReadOnlyFileBasedBuffer) and not self.response.has_body:
                parts[0].close()
                return
            while sum(map(len, self.outgoing)) > self.adj.outbuf_high_watermark:
                self.lock.wait()
            size = len(parts[-1])
            self.send(*parts)
            self.response.body_sent += size
            if self.outgoing:
                self.update()
                if not self.events & EVENT_WRITE:
                    self.server.wake(self)

    def check_client_disconnected(self) -> bool:
        """Return whether the client has left. The application calls it as environ["waitress.client_disconnected"]()."""
        return self.closed or self.client_eof

    # ---- in either thread, with the lock held ----

    def parse(self, data: bytes) -> None:
        """Parse requests, but no more than the lookahead allows: one packet may hold hundreds."""
        self.unparsed += data
        while self.unparsed and len(self.requests) <= self.adj.channel_request_lookahead:
            if self.finished or self.closed or (self.requests and self.requests[-1].error):
                self.unparsed = b""  # it will not be answered
                return
            self.request = self.request or Request(self.adj)
            self.unparsed = self.unparsed[self.request.received(self.unparsed) :]
            if self.request.completed:
                self.requests.append(self.request)
                self.request = None

    def send(self, *parts: bytes | ReadOnlyFileBasedBuffer) -> None:
        """Send what the socket takes now and buffer the rest. Raises ClientDisconnected."""
        if self.closed:
            raise ClientDisconnected
        sent = 0
        try:
            if not self.outgoing and not isinstance(parts[0], ReadOnlyFileBasedBuffer):
                with suppress(BlockingIOError):
                    sent = self.socket.sendmsg(parts)
                self.sent += sent
            for part in parts:
                if len(part) > sent:
                    self.buffer(part[sent:] if sent else part)
                sent = max(0, sent - len(part))
        except OSError as error:
            if not isinstance(error, (ConnectionError, TimeoutError)):
                log.error("A response is cut short: %s", error)  # no room for it in a temporary file
            self.finished = True
            raise ClientDisconnected from error

    def buffer(self, part: bytes | ReadOnlyFileBasedBuffer) -> None:
        """Buffer `part` until the client takes it."""
        limit = self.adj.outbuf_high_watermark
        if isinstance(part, ReadOnlyFileBasedBuffer):
            self.outgoing.append(part)
            self.tail_bytes = limit
            return
        if not self.outgoing or self.tail_bytes >= limit:  # a buffer frees its room only when all is sent
            self.outgoing.append(OverflowableBuffer(self.adj.outbuf_overflow))
            self.tail_bytes = 0
        self.outgoing[-1].append(part)
        self.tail_bytes += len(part)

    def update(self) -> None:
        """Update `state` and `since`. Send 100 Continue if the client waits for it (RFC 9110, section 10.1.1)."""
        if self.closed:
            return
        arriving = self.request and self.request.began
        if arriving and self.request.expect_continue and not (self.requests or self.finished):
            self.request.expect_continue = False
            with suppress(ClientDisconnected):
                self.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        # If the container ended now, what the client has not acknowledged would be lost.
        ends = (self.half_closed or self.server.closing) and not self.requests
        if self.outgoing or (ends and self.unacknowledged()):
            state = State.RESPONSE
        elif self.half_closed:
            state = State.HALF_CLOSED
        elif self.requests:
            state = State.WORK
        elif arriving:
            state = State.BODY if self.request.headers_finished else State.HEADER
        else:
            state = State.IDLE
        if state != self.state:
            self.state, self.since = state, time.monotonic()
            self.progress_then = self.progress() if state in {State.BODY, State.RESPONSE} else 0

    def wanted(self) -> int:
        """Return the events that the loop should wait for."""
        if self.half_closed:
            return EVENT_READ
        reads = not (self.finished or self.client_eof) and len(self.requests) <= self.adj.channel_request_lookahead
        return (EVENT_READ if reads else 0) | (EVENT_WRITE if self.outgoing else 0)

    def unanswered(self) -> int:
        """Return how many complete requests have not been answered in full."""
        return len(self.requests) or self.state == State.RESPONSE
