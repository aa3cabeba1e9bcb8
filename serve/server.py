"""The server: the loop that it runs in, and how it ends."""

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
from serve.log import REPORT, Writer, log
from serve.settings import Settings

CHECK = 0.25  # seconds between two checks of all timeouts
CHECK_CLOSING = 0.05  # the same, while somebody waits for the end
PAUSED = 0.5  # seconds: a check later than this finds a process that was stopped
NO_ROOM = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}  # for one more open file
# Without it, the system buffers megabytes for each client that does not read: memory that nothing here limits.
SOCKET_OPTIONS = [(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 2**17)] if hasattr(socket, "TCP_NOTSENT_LOWAT") else []


class Server:
    """Serves until it is told to stop, then finishes what is in work.

    The main thread runs the loop: it accepts, reads, and hands requests to worker threads, which answer them.

    1. SIGTERM or SIGINT: it drains. The application is told, so that its /health fails; for SHUTDOWN_DELAY all else
       goes on, until load balancers have noticed.
    2. It closes: it accepts whoever has connected, closes the listeners, and only then tells clients that a response is
       the last on its connection. Told earlier, they would connect again, and be reset.
    3. When the last connection is gone, or after SHUTDOWN_TIMEOUT, or at a second signal, it ends.
    """

    signals = 0
    draining = False  # the application is told
    closing = False  # every response is the last on its connection
    full = False  # no more connections are accepted for now
    full_at = 0  # so many connections
    queued = 0  # requests for which no thread was free at the last look
    asleep = False  # in select(), or about to be
    checked = draining_since = closing_since = 0.0
    reported_full = reported_queue = -REPORT

    def __init__(self, application: Callable, settings: Settings) -> None:
        """Listen; raises OSError where that fails, and RuntimeError if threads cannot be started."""
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
        self.in_work: set[Channel] = set()
        self.to_start: list[Channel] = []
        for number in range(adj.threads):
            threading.Thread(target=self.work, name=f"worker-{number}", daemon=True).start()
        # Workers, and Python when a signal comes, write to this pipe to end the loop's waiting.
        self.to_settle: deque[Channel] = deque()
        pipe, self.wakeup = os.pipe()
        os.set_blocking(self.wakeup, False)
        signal.set_wakeup_fd(self.wakeup, warn_on_full_buffer=False)
        self.selector.register(pipe, selectors.EVENT_READ, lambda _: os.read(pipe, 4096))

    def listen(self, family: int, address: tuple) -> socket.socket:
        """Return a socket that listens."""
        listener = socket.create_server(address, family=family, backlog=self.adj.backlog)
        listener.setblocking(False)
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
        for channel in self.to_start:
            self.tasks.put(channel)
        self.to_start.clear()
        busy = self.channels or self.signals or self.full
        timeout = CHECK_CLOSING if self.closing else CHECK if busy else REPORT
        self.asleep = True  # before the look at `to_settle`: wake() does the two in the opposite order
        events = self.selector.select(0 if self.to_settle else timeout)
        self.asleep = False
        for key, ready in events:
            key.data(ready)
        while self.to_settle:
            self.to_settle.popleft().on_events(0)
        if self.full and len(self.channels) < self.full_at:
            self.resume_accepting()

    def wake(self, channel: Channel) -> None:
        """Have the loop settle a connection, from any thread. No system call if the loop is awake."""
        self.to_settle.append(channel)
        if self.asleep:
            self.asleep = False
            with suppress(BlockingIOError):  # there is enough in the pipe
                os.write(self.wakeup, b"x")

    def check(self, now: float) -> None:
        """Apply the timeouts; report requests if some waited for a thread at the last check, and do now."""
        late, self.checked = now - self.checked - CHECK, now
        if self.access_log:
            self.access_log.report()
        for channel in list(self.channels):
            # By `docker pause`, or on a starved machine: it was not the client who was slow. (A server without
            # connections checks late too.)
            if late > PAUSED:
                channel.since = min(now, channel.since + late)
            channel.check(now)
        if self.full and len(self.channels) < self.adj.connection_limit:
            self.resume_accepting()
        before, self.queued = self.queued, max(0, len(self.in_work) - self.adj.threads)
        if before and self.queued and now >= self.reported_queue + REPORT:
            self.reported_queue = now
            log.warning("Requests seen waiting for one of %d threads: %d", self.adj.threads, self.queued)

    def work(self) -> None:
        """Answer requests: what a worker thread does."""
        while True:
            channel = self.tasks.get()
            with channel.guard():
                channel.service()

    def start(self, channel: Channel) -> None:
        """Have a connection's first request answered as soon as a worker is free.

        It is handed over right before the loop sleeps: woken earlier, a worker would only wait for the GIL.
        """
        self.in_work.add(channel)
        self.to_start.append(channel)

    # ---- connections ----

    def accept(self, listener: socket.socket, _events: int = 0) -> bool:
        """Accept a connection; tell whether there was one."""
        try:
            connection, address = listener.accept()
        except OSError as error:
            if error.errno in NO_ROOM:
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
        """Accept no more connections until one has closed."""
        self.full_at = len(self.channels)
        if not self.full:
            self.full = True
            for listener in self.listeners:
                self.selector.unregister(listener)
        if (now := time.monotonic()) >= self.reported_full + REPORT:
            self.reported_full = now
            log.warning(reason)

    def resume_accepting(self) -> None:
        """Have the loop wait for connections, and accept them."""
        self.full = False
        for listener in self.listeners:
            self.selector.register(listener, selectors.EVENT_READ, partial(self.accept, listener))

    def watch(self, channel: Channel, events: int) -> None:
        """Wait for events of a connection. For none it is unregistered: epoll would report hang-ups without end."""
        if not channel.events:
            self.selector.register(channel.socket, events, channel.on_events)
        elif events:
            self.selector.modify(channel.socket, events, channel.on_events)
        else:
            self.selector.unregister(channel.socket)
        channel.events = events

    def forget(self, channel: Channel) -> None:
        """Wait no more for a connection that is about to be closed."""
        if channel.events:
            self.watch(channel, 0)
        self.channels.discard(channel)

    # ---- the end ----

    def shut_down(self, now: float) -> int | None:
        """Take the next step that is due; return the exit code once it was the last."""
        delay, timeout = self.settings.shutdown_delay, self.settings.shutdown_timeout
        if not self.draining:
            self.draining, self.draining_since = True, now
            log.info("Draining: accepting connections for %g s more", delay)
        if not self.closing and now >= self.draining_since + delay:
            self.close_listeners()
            self.closing, self.closing_since = True, now
            log.info("Closing: waiting at most %g s; requests in work: %d", timeout, self.unanswered())
        if self.signals > 1 or (self.closing and now >= self.closing_since + timeout):
            if unanswered := self.unanswered():
                log.error("Abandoned requests: %d", unanswered)
            return 1 if unanswered or self.signals > 1 else 0
        if self.closing and not (self.channels or self.in_work):
            log.info("Stopped")
            return 0
        return None

    def close_listeners(self) -> None:
        """Accept whoever waits to be, then listen no more."""
        while self.listeners:
            listener = self.listeners[0]
            while self.accept(listener):
                pass
            if not self.full:
                self.selector.unregister(listener)
            with suppress(OSError):  # of macOS
                # Not only close(): a child that the application has forked has the socket too, and would listen on.
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            self.listeners.pop(0)
        self.full = False

    def unanswered(self) -> int:
        """Return how many requests have arrived, are in work or on their way out."""
        return sum(channel.unanswered() for channel in self.channels | self.in_work)
