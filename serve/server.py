"""The server: the event loop, and how it stops."""

import errno
import os
import queue
import selectors
import signal
import socket
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from waitress.proxy_headers import proxy_headers_middleware

from serve.channel import Channel
from serve.log import REPORT_INTERVAL, Writer, log
from serve.settings import Settings

CHECK_INTERVAL = 0.25  # seconds between two checks of all timeouts
CLOSING_CHECK_INTERVAL = 0.05  # the same while closing, so that the stop is quick
PAUSED = 0.5  # seconds; if a check is later than this, the process was paused
OUT_OF_RESOURCES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}
# Otherwise the kernel buffers megabytes for each client that does not read, and no other limit covers them.
SOCKET_OPTIONS = [(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 2**17)] if hasattr(socket, "TCP_NOTSENT_LOWAT") else []


class Server:
    """Serves until it is told to stop, then finishes the requests in flight.

    The main thread runs the event loop: it accepts, reads, and hands requests to worker threads, which answer them.

    1. On SIGTERM or SIGINT it drains. The application learns of it, so that /health fails. All else goes on for
       SHUTDOWN_DELAY, until load balancers have noticed.
    2. It closes. It accepts the connections in the backlog, closes the listeners, and only then tells clients that a
       response is the last on its connection. Told earlier, they would reconnect and be reset.
    3. It ends when the last connection is closed, after SHUTDOWN_TIMEOUT, or on a second signal.
    """

    signals = 0
    draining = False  # the application sees it in its environ
    closing = False  # every response is the last on its connection
    full = False  # accepting is paused
    full_at = 0  # the number of connections when it was paused
    queued = 0  # requests that waited for a thread at the last check
    asleep = False  # in select(), or about to be
    checked = draining_since = closing_since = 0.0
    reported_full = reported_queue = -REPORT_INTERVAL

    def __init__(self, application: Callable, settings: Settings) -> None:
        """Listen and start the workers. Raises OSError if it cannot listen, RuntimeError if it cannot start threads."""
        self.settings = settings
        self.adj = adj = settings.waitress
        self.access_log = Writer(1, "the access log", delay=0.02) if settings.access_log else None
        self.application = proxy_headers_middleware(
            application,
            adj.trusted_proxy,
            adj.trusted_proxy_count,
            adj.trusted_proxy_headers,
            adj.clear_untrusted_proxy_headers,
            adj.log_untrusted_proxy_headers,
        )
        self.selector = selectors.DefaultSelector()  # epoll, on Linux
        self.channels: set[Channel] = set()
        self.listeners = [self.listen(family, address) for family, _, _, address in adj.listen]
        self.resume_accepting()
        self.server_name, self.effective_port = adj.server_name, self.listeners[0].getsockname()[1]
        self.tasks: queue.SimpleQueue[Channel] = queue.SimpleQueue()
        self.in_flight: set[Channel] = set()
        self.to_start: list[Channel] = []
        for number in range(adj.threads):
            threading.Thread(target=self.work, name=f"worker-{number}", daemon=True).start()
        # Workers write to this pipe to wake the loop; Python does so when a signal arrives.
        self.to_settle: deque[Channel] = deque()
        pipe, self.wakeup = os.pipe()
        os.set_blocking(self.wakeup, False)
        signal.set_wakeup_fd(self.wakeup, warn_on_full_buffer=False)
        self.selector.register(pipe, selectors.EVENT_READ, lambda _: os.read(pipe, 4096))

    def listen(self, family: int, address: tuple) -> socket.socket:
        """Return a listening socket."""
        listener = socket.create_server(address, family=family, backlog=self.adj.backlog)
        listener.setblocking(False)
        return listener

    def run(self) -> int:
        """Serve until told to stop; return the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.count_signal)
        for listener in self.listeners:
            host, port = listener.getsockname()[:2]
            log.info("Serving on http://%s:%d", f"[{host}]" if ":" in host else host, port)
        code = None
        while code is None:
            self.poll_once()
            now = time.monotonic()
            if self.signals:
                code = self.shut_down(now)
            if now >= self.checked + (CLOSING_CHECK_INTERVAL if self.closing else CHECK_INTERVAL):
                self.check(now)
        return code

    def count_signal(self, _signum: int, _frame: object) -> None:
        """Count a signal; the loop acts on it."""
        self.signals += 1

    # ---- the event loop ----

    def poll_once(self) -> None:
        """Wait for events and handle them."""
        for channel in self.to_start:
            self.tasks.put(channel)
        self.to_start.clear()
        busy = self.channels or self.signals or self.full
        timeout = CLOSING_CHECK_INTERVAL if self.closing else CHECK_INTERVAL if busy else REPORT_INTERVAL
        self.asleep = True  # before reading `to_settle`: wake() uses the opposite order, so no wake-up is lost
        events = self.selector.select(0 if self.to_settle else timeout)
        self.asleep = False
        for key, ready in events:
            key.data(ready)
        while self.to_settle:
            self.to_settle.popleft().on_events(0)
        if self.full and len(self.channels) < self.full_at:
            self.resume_accepting()

    def wake(self, channel: Channel) -> None:
        """Have the loop settle a connection; for any thread. Makes no system call if the loop is awake."""
        self.to_settle.append(channel)
        if self.asleep:
            self.asleep = False
            with suppress(BlockingIOError):  # a full pipe wakes the loop too
                os.write(self.wakeup, b"x")

    def check(self, now: float) -> None:
        """Apply the timeouts; report if requests waited for a thread at two checks in a row."""
        late, self.checked = now - self.checked - CHECK_INTERVAL, now
        if self.access_log:
            self.access_log.report()
        for channel in list(self.channels):
            # After `docker pause`, or on a starved machine: the client was not slow. (An idle server checks late too.)
            if late > PAUSED:
                channel.since = min(now, channel.since + late)
            channel.check(now)
        if self.full and len(self.channels) < self.adj.connection_limit:
            self.resume_accepting()
        before, self.queued = self.queued, max(0, len(self.in_flight) - self.adj.threads)
        if before and self.queued and now >= self.reported_queue + REPORT_INTERVAL:
            self.reported_queue = now
            log.warning("Requests seen waiting for one of %d threads: %d", self.adj.threads, self.queued)

    def work(self) -> None:
        """Answer requests, forever: the body of a worker thread."""
        while True:
            channel = self.tasks.get()
            with channel.guard():
                channel.service()

    def start(self, channel: Channel) -> None:
        """Queue a connection's first request for the workers.

        They get it right before the loop sleeps: woken earlier, a worker would only wait for the GIL.
        """
        self.in_flight.add(channel)
        self.to_start.append(channel)

    # ---- connections ----

    def accept(self, listener: socket.socket, _events: int = 0) -> bool:
        """Accept a connection; return whether there was one."""
        try:
            connection, address = listener.accept()
        except OSError as error:
            if error.errno in OUT_OF_RESOURCES:
                self.pause_accepting(f"no connection can be accepted ({error.strerror})")
            return False
        connection.setblocking(False)
        for option in (*self.adj.socket_options, *SOCKET_OPTIONS):
            with suppress(OSError):  # on macOS, if the client has left already
                connection.setsockopt(*option)
        channel = Channel(self, connection, address)
        self.channels.add(channel)
        channel.on_events(0)
        if len(self.channels) >= self.adj.connection_limit:
            self.pause_accepting(
                "total open connections reached the connection limit, no longer accepting new connections"
            )
        return True

    def pause_accepting(self, reason: str) -> None:
        """Stop accepting until a connection closes (or the next check, if below connection_limit); log `reason`."""
        self.full_at = len(self.channels)
        if not self.full:
            self.full = True
            for listener in self.listeners:
                self.selector.unregister(listener)
        if (now := time.monotonic()) >= self.reported_full + REPORT_INTERVAL:
            self.reported_full = now
            log.warning(reason)

    def resume_accepting(self) -> None:
        """Have the loop accept connections."""
        self.full = False
        for listener in self.listeners:
            self.selector.register(listener, selectors.EVENT_READ, partial(self.accept, listener))

    def watch(self, channel: Channel, events: int) -> None:
        """Wait for events of a connection. Without any, unregister it: epoll would report a hang-up again and again."""
        if not channel.events:
            self.selector.register(channel.socket, events, channel.on_events)
        elif events:
            self.selector.modify(channel.socket, events, channel.on_events)
        else:
            self.selector.unregister(channel.socket)
        channel.events = events

    def forget(self, channel: Channel) -> None:
        """Stop watching and counting a connection that is about to be closed."""
        if channel.events:
            self.watch(channel, 0)
        self.channels.discard(channel)

    # ---- shutdown ----

    def shut_down(self, now: float) -> int | None:
        """Take the next step that is due; return the exit code after the last."""
        delay, timeout = self.settings.shutdown_delay, self.settings.shutdown_timeout
        if not self.draining:
            self.draining, self.draining_since = True, now
            log.info("Draining: accepting connections for %g s more", delay)
        if not self.closing and now >= self.draining_since + delay:
            self.close_listeners()
            self.closing, self.closing_since = True, now
            log.info("Closing: waiting at most %g s; requests in flight: %d", timeout, self.unanswered())
        if self.signals > 1 or (self.closing and now >= self.closing_since + timeout):
            if unanswered := self.unanswered():
                log.error("Abandoned requests: %d", unanswered)
            return 1 if unanswered or self.signals > 1 else 0
        if self.closing and not (self.channels or self.in_flight):
            log.info("Stopped")
            return 0
        return None

    def close_listeners(self) -> None:
        """Accept the connections in the backlog, then stop listening."""
        while self.listeners:
            listener = self.listeners[0]
            while self.accept(listener):
                pass
            if not self.full:
                self.selector.unregister(listener)
            with suppress(OSError):  # raised on macOS
                # Not only close(): a child that the application forked has the socket too, and would go on listening.
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            self.listeners.pop(0)
        self.full = False

    def unanswered(self) -> int:
        """Return how many complete requests have not been answered in full, on all connections."""
        return sum(channel.unanswered() for channel in self.channels | self.in_flight)
