"""The server: the loop that it runs in, and how it ends."""

import errno
import logging
import os
import selectors
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from functools import partial

from waitress.proxy_headers import proxy_headers_middleware
from waitress.task import ThreadedTaskDispatcher

from serve.channel import Channel
from serve.log import Writer
from serve.settings import Settings

log = logging.getLogger("serve")

CHECK = 0.25  # seconds between two looks at all connections, for clients that keep us waiting
CHECK_CLOSING = 0.05  # the same, while somebody waits for the end
REPORT = 10.0  # seconds between two reports of the same trouble
NO_FILES = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class Server:
    """Serves until it is told to stop, and then for as long as what is in work takes.

    1. SIGTERM or SIGINT: it drains. The application is told, so that its /health fails; for SHUTDOWN_DELAY all else
       goes on, until load balancers have noticed.
    2. It closes. Whoever has connected is accepted, then nobody is any more, and only then clients are told that their
       response is the last on its connection: told before, they would come back while the door is being shut.
    3. When the last connection is gone, or after SHUTDOWN_TIMEOUT, or at a second signal, it ends.
    """

    draining = False  # the application is told
    closing = False  # every response is the last on its connection
    full = False  # no more connections are accepted for now

    def __init__(self, application: Callable, settings: Settings) -> None:
        """Listen; raises OSError where that fails, and RuntimeError if threads cannot be started."""
        self.settings = settings
        self.adj = adj = settings.waitress
        self.read_timeout = settings.read_timeout
        self.access_log = Writer(1, "the access log", moment=0.02) if settings.access_log else None
        self.application = proxy_headers_middleware(
            application,
            adj.trusted_proxy,
            adj.trusted_proxy_count,
            adj.trusted_proxy_headers,
            adj.clear_untrusted_proxy_headers,
            adj.log_untrusted_proxy_headers,
        )
        self.selector = selectors.DefaultSelector()
        self.channels: set[Channel] = set()
        self.in_work: set[Channel] = set()  # of these the first request is
        self.listeners = [self.listen(*address) for address in adj.listen]
        self.server_name, self.effective_port = adj.server_name, self.listeners[0].getsockname()[1]
        self.tasks = ThreadedTaskDispatcher()
        self.tasks.set_thread_count(adj.threads)
        # Threads and Python's handlers of signals end the loop's waiting by writing to a pipe.
        self.calls: deque[Channel] = deque()
        self.waiting = False
        pipe, self.wakeup = os.pipe()
        os.set_blocking(self.wakeup, False)
        signal.set_wakeup_fd(self.wakeup, warn_on_full_buffer=False)
        self.selector.register(pipe, selectors.EVENT_READ, lambda _: os.read(pipe, 4096))
        self.signals = 0
        self.checked = self.drained_at = self.closed_at = 0.0
        self.reported = self.filled = -REPORT
        self.room = 0  # connections, when it was full
        self.queued = 0  # requests that no thread was free for

    def listen(self, family: int, kind: int, protocol: int, address: tuple) -> socket.socket:
        """Return a socket that listens, watched by the loop."""
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.setblocking(False)
        listener.bind(address)
        listener.listen(self.adj.backlog)
        self.selector.register(listener, selectors.EVENT_READ, partial(self.accept, listener))
        return listener

    def run(self) -> int:
        """Serve; return the exit code."""
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
            if now >= self.checked + (CHECK_CLOSING if self.closing else CHECK):
                self.check(now)
        return code

    def count_signal(self, _signum: int, _frame: object) -> None:
        """Handle a signal."""
        self.signals += 1

    # ---- the loop ----

    def poll_once(self) -> None:
        """Wait until there is something to do, and do it."""
        timeout = CHECK_CLOSING if self.closing else CHECK if self.channels or self.signals else REPORT
        self.waiting = True  # before the look at `calls`: see call()
        events = self.selector.select(0 if self.calls else timeout)
        self.waiting = False
        for key, ready in events:
            key.data(ready)
        while self.calls:
            self.calls.popleft().attend()
        if self.full and len(self.channels) < self.room:
            self.resume()

    def call(self, channel: Channel) -> None:
        """Have the main thread attend to a connection, from any thread."""
        self.calls.append(channel)
        if self.waiting:
            self.waiting = False
            with suppress(BlockingIOError):  # enough is in the pipe to wake it
                os.write(self.wakeup, b"x")

    def accept(self, listener: socket.socket, _events: int = 0) -> bool:
        """Accept a connection; tell whether there was one."""
        try:
            connection, address = listener.accept()
        except OSError as error:
            if error.errno in NO_FILES:
                self.fill(f"no connection can be accepted ({error.strerror})")
            return False
        connection.setblocking(False)
        for option in self.adj.socket_options:
            with suppress(OSError):  # on macOS, if the client has left already
                connection.setsockopt(*option)
        channel = Channel(self, connection, address)
        self.channels.add(channel)
        channel.attend()
        if len(self.channels) >= self.adj.connection_limit:
            self.fill("total open connections reached the connection limit, no longer accepting new connections")
        return True

    def fill(self, reason: str) -> None:
        """Accept no more connections until one has closed."""
        self.room = len(self.channels)
        if not self.full:
            self.full = True
            for listener in self.listeners:
                self.selector.unregister(listener)
        if (now := time.monotonic()) >= self.filled + REPORT:
            self.filled = now
            log.warning(reason)

    def resume(self) -> None:
        """Accept connections."""
        self.full = False
        for listener in self.listeners:
            self.selector.register(listener, selectors.EVENT_READ, partial(self.accept, listener))

    def watch(self, channel: Channel, events: int) -> None:
        """Wait for a connection's events. For none it is not registered: epoll would report those that hang up."""
        if not events:
            self.selector.unregister(channel.socket)
        elif channel.events:
            self.selector.modify(channel.socket, events, channel.ready)
        else:
            self.selector.register(channel.socket, events, channel.ready)
        channel.events = events

    def forget(self, channel: Channel) -> None:
        """Wait for a connection no more."""
        if channel.events:
            self.watch(channel, 0)
        self.channels.discard(channel)

    def start(self, channel: Channel) -> None:
        """Have a connection's first request answered by one of waitress's threads, from any thread."""
        self.in_work.add(channel)
        self.tasks.add_task(channel)

    def check(self, now: float) -> None:
        """Close the connections that keep us waiting, and report requests that wait for a thread."""
        self.checked = now
        for channel in list(self.channels):
            channel.check(now)
        if self.full and len(self.channels) < self.adj.connection_limit:
            self.resume()
        idle = len(self.tasks.threads) - self.tasks.active_count
        queued = len(self.tasks.queue) - idle
        if min(queued, self.queued) > 0 and now >= self.reported + REPORT:
            log.warning("Requests seen waiting for one of %d threads: %d", self.adj.threads, queued)
            self.reported = now
        self.queued = queued

    # ---- the end ----

    def shut_down(self, now: float) -> int | None:
        """Take the next step that is due; return the exit code once it was the last."""
        if not self.draining:
            self.draining, self.drained_at = True, now
            log.info("Draining: accepting connections for %g s more", self.settings.shutdown_delay)
        if not self.closing and now >= self.drained_at + self.settings.shutdown_delay:
            self.close_listeners()
            self.closing, self.closed_at = True, now
            log.info(
                "Closing: waiting at most %g s; requests in work: %d", self.settings.shutdown_timeout, self.unanswered()
            )
        if self.signals > 1 or (self.closing and now >= self.closed_at + self.settings.shutdown_timeout):
            if unanswered := self.unanswered():
                log.error("Abandoned requests: %d", unanswered)
            return 1 if unanswered or self.signals > 1 else 0
        if self.closing and not (self.channels or self.in_work):
            log.info("Stopped")
            return 0
        return None

    def close_listeners(self) -> None:
        """Accept whoever waits to be, then listen no more."""
        for listener in self.listeners:
            while self.accept(listener):
                pass
            # Not only close(): a child that the application has forked has the socket too, and would listen on.
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            if not self.full:
                self.selector.unregister(listener)
            listener.close()
        self.listeners, self.full = [], False

    def unanswered(self) -> int:
        """Return how many requests have arrived, are in work or on their way out."""
        return sum(channel.unanswered() for channel in self.channels | self.in_work)
