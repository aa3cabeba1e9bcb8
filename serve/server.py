"""The server: the loop that it runs in, and how it ends."""

import logging
import select
import signal
import time
from collections.abc import Callable
from functools import partial

from waitress.adjustments import asbool
from waitress.server import BaseWSGIServer, create_server

from serve.connection import Channel, Connections, State, Wakeup
from serve.log import Outlet
from serve.settings import Settings

log = logging.getLogger("serve")

CHECK = 0.25  # seconds between two looks at all connections, for clients that have been waited for too long
CHECK_CLOSING = 0.05  # the same, while somebody waits for the end
LAST_LINES = 0.5  # seconds for the rest of the access log to be written
REPORT = 10.0  # seconds between two reports of the same trouble


class Server:
    """Serves until it is told to stop, and then for as long as what is in work takes.

    1. SIGTERM or SIGINT: it drains. The application is told, so that its /health fails; for SHUTDOWN_DELAY all else
       goes on, until load balancers have noticed.
    2. It closes. Whoever has a connection is accepted, then nobody is any more, and only then clients are told that
       their answer was the last on its connection: told before, they would come back while the door is being shut.
    3. When the last connection is gone, or after SHUTDOWN_TIMEOUT, or at a second signal, it ends.
    """

    def __init__(self, application: Callable, settings: Settings) -> None:
        """Listen; raises OSError where that fails, and RuntimeError if threads cannot be started."""
        self.settings = settings
        self.state = State(Outlet(1) if settings.access_log else None, settings.read_timeout)
        self.connections = Connections(use_poll=asbool(settings.waitress["asyncore_use_poll"]))
        server = create_server(application, map=self.connections, **settings.waitress)
        self.adj, self.tasks = server.adj, server.task_dispatcher
        wakeup = Wakeup(self.connections)
        self.listeners = [each for each in self.connections.values() if isinstance(each, BaseWSGIServer)]
        for listener in self.listeners:
            # Relied upon: a listener calls its channel_class for each connection that it accepts, and a channel its
            # listener's pull_trigger() when there is something to send, or to read again.
            listener.channel_class = partial(Channel, self.state)
            listener.pull_trigger = wakeup.pull
        self.without_clients = len(self.connections)
        self.signals = 0
        self.checked = self.reported = self.drained_at = self.closed_at = 0.0
        self.deepest_queue = 0

    def run(self) -> int:
        """Serve; return the exit code."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.count_signal)
        for listener in self.listeners:
            log.info("Serving on %s", address(listener))
        code = None
        while code is None:
            self.connections.turn(self.patience())
            now = time.monotonic()
            if self.signals:
                code = self.shut_down(now)
            if now >= self.checked + (CHECK_CLOSING if self.state.closing else CHECK):
                self.check(now)
            if self.state.access_log:
                self.state.access_log.flush()
        if self.state.access_log:
            self.state.access_log.finish(LAST_LINES)
        self.report(now)
        return code

    def count_signal(self, _signum: int, _frame: object) -> None:
        """Handle a signal."""
        self.signals += 1

    def patience(self) -> float:
        """Return for how many seconds to wait for something to happen."""
        if self.state.closing:
            return CHECK_CLOSING
        return CHECK if self.signals or len(self.connections) > self.without_clients else self.adj.asyncore_loop_timeout

    def check(self, now: float) -> None:
        """Close the connections that have waited too long, and report trouble."""
        self.checked = now
        self.state.full = any(listener.in_connection_overflow for listener in self.listeners)
        self.connections.changed.update(self.connections)
        for channel in self.connections.channels():
            channel.check(now)
        self.deepest_queue = max(self.deepest_queue, len(self.tasks.queue))
        if now >= self.reported + REPORT:
            self.report(now)

    def report(self, now: float) -> None:
        """Log what has gone wrong since the last report, if anything has."""
        if self.deepest_queue:
            log.warning("Requests seen waiting for one of %d threads: %d", self.adj.threads, self.deepest_queue)
            self.deepest_queue = 0
            self.reported = now
        if self.state.access_log and (lost := self.state.access_log.count_lost()):
            log.warning("Lines of the access log that could not be written: %d", lost)
            self.reported = now

    def shut_down(self, now: float) -> int | None:
        """Take the next step that is due; return the exit code once it was the last."""
        if not self.state.draining:
            self.state.draining, self.drained_at = True, now
            log.info("Draining: accepting connections for %g s more", self.settings.shutdown_delay)
        if not self.state.closing and now >= self.drained_at + self.settings.shutdown_delay:
            self.close_listeners()
            self.state.closing, self.closed_at = True, now
            log.info(
                "Closing: waiting at most %g s; requests in work: %d", self.settings.shutdown_timeout, self.unanswered()
            )
        if self.signals > 1 or (self.state.closing and now >= self.closed_at + self.settings.shutdown_timeout):
            if unanswered := self.unanswered():
                log.error("Abandoned requests: %d", unanswered)
            return 1 if unanswered or self.signals > 1 else 0
        if self.state.closing and not self.connections.channels():
            log.info("Stopped")
            return 0
        return None

    def close_listeners(self) -> None:
        """Accept whoever waits to be, then listen no more."""
        for listener in self.listeners:
            waiting = select.poll()
            waiting.register(listener.socket, select.POLLIN)
            for _ in range(self.adj.backlog):
                before = len(self.connections)
                if waiting.poll(0):
                    listener.handle_accept()
                if len(self.connections) == before:  # nobody, or no descriptor for them
                    break
            # At once, before all else that close() does: who comes between the last look and this is reset.
            listener.socket.close()
            listener.close()

    def unanswered(self) -> int:
        """Return how many requests are arriving, in work or on their way out."""
        return sum(channel.unanswered() for channel in self.connections.channels())


def address(listener: BaseWSGIServer) -> str:
    """Return the URL of where it listens, an IPv6 address in brackets."""
    host, port = listener.effective_host, listener.effective_port
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
