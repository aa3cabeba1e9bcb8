"""Connections: how each is served, and how the process waits for all of them."""

import fcntl
import os
import select
import signal
import socket
import sys
import termios
from collections.abc import Callable
from contextlib import nullcontext, suppress

from waitress import wasyncore
from waitress.buffers import ReadOnlyFileBasedBuffer
from waitress.channel import ClientDisconnected, HTTPChannel

from serve.answer import Application, ErrorAnswer
from serve.log import Outlet
from serve.request import Parser, refusal

QUIET = 0.5  # seconds after which a connection on which nothing happens counts as idle, once the server closes
LARGE = 2**16  # bytes, from which on copying costs more than it saves
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
LINGER = 2.0  # seconds for a client to notice that it has had its last answer


class State:
    """What all connections look at."""

    draining = False  # the application is told, so that its /health fails
    closing = False  # every answer is the last on its connection
    full = False  # no more connections are accepted

    def __init__(self, access_log: Outlet | None, read_timeout: float) -> None:
        """Begin to serve, with an access log or without; `read_timeout` is in seconds."""
        self.access_log = access_log
        self.read_timeout = read_timeout


class Channel(HTTPChannel):
    """A connection.

    Relied upon: `request` is the one that is arriving, `requests` are those that have arrived, in the order of their
    answers, and a thread works on the first, which service() makes it do; total_outbufs_len is what the client has
    still to take, through write_soon(); last_activity changes when it takes some, or sends; close_when_flushed is set
    when nothing else is to be answered, and handle_write() then closes the connection.
    """

    task_class = Application
    error_task_class = ErrorAnswer
    parser_class = Parser

    bodiless = False  # the answer that is being made has no body, whatever the application gives
    header = b""  # of the answer that is being made, until its body begins
    body_sent = 0  # bytes of it; with what chunks add, as nginx counts them
    lingers = False  # after its last answer it reads on for a while
    lingering = False
    awaited: object = None
    awaited_since = 0.0

    def __init__(self, state: State, *arguments: object, **keywords: object) -> None:
        """Take what waitress gives, and the state that all connections share."""
        self.state = state
        super().__init__(*arguments, **keywords)

    def check(self, now: float) -> None:
        """Do what is due if the client has been waited for long enough; `now` is time.monotonic()'s."""
        awaited, limit, act = self.awaits()
        if awaited is None or awaited != self.awaited:
            self.awaited, self.awaited_since = awaited, now
        elif now - self.awaited_since >= limit:
            act()

    def awaits(self) -> tuple[object, float, Callable[[], None]]:
        """Return what is to come from the client, for how many seconds it is waited for, and what is done then.

        As long as the first is equal, nothing has come of it; it is None while the next step is not the client's.
        """
        patience, close = self.state.read_timeout, self.handle_close
        if self.lingering:
            return "the end", QUIET if self.state.closing else LINGER, close
        if self.total_outbufs_len:
            if self.requests and self.total_outbufs_len < self.adj.send_bytes:
                return None, patience, close  # waitress waits for more before it sends any
            return (self.last_activity, unacknowledged(self.socket)), patience, close
        if self.requests or self.close_when_flushed:
            return None, patience, close
        if self.arriving():
            return self.request, patience, self.time_out
        # Idle.
        last = "empty lines" if self.request else self.last_activity
        if self.state.closing:
            return last, QUIET, close
        return last, patience if self.state.full else self.adj.channel_timeout, close

    def arriving(self) -> bool:
        """Tell whether a request has begun to arrive. Empty lines before it (RFC 9112, section 2.2) are none."""
        return bool(self.request) and (self.request.headers_finished or bool(self.request.header_plus.strip(b"\r\n")))

    def unanswered(self) -> int:
        """Return how many requests are arriving, in work or on their way out."""
        if self.lingering:
            return 0
        return len(self.requests) + self.arriving() or bool(self.total_outbufs_len)

    def time_out(self) -> None:
        """Answer 408 to the request that is arriving."""
        self.request.error = refusal(408, "Request Timeout", "the request took too long to arrive")
        self.request.completed = True
        self.requests.append(self.request)
        self.request = None
        self.service()  # in this thread: there is no application to wait for

    def write_soon(self, data: bytes | ReadOnlyFileBasedBuffer) -> int:
        """Send a part of the body; return how many bytes it has.

        The header goes with the first part. waitress sends each by itself: two system calls, at each of which the
        threads contend for the interpreter, and two packets.
        """
        size = len(data)  # before: what is left of a file shrinks as it is sent
        if not size:
            return 0
        is_file = isinstance(data, ReadOnlyFileBasedBuffer)
        if self.bodiless:
            self.send_header()
            if is_file:
                data.close()
            return size
        if self.header and not is_file and size <= LARGE:
            self.keep(self.header + data)
            self.header = b""
        else:
            self.send_header()
            self.keep(data)
        self.body_sent += size
        return size

    def keep(self, data: bytes | ReadOnlyFileBasedBuffer) -> None:
        """Send what the client takes, and keep the rest; close the connection if there is no room for that."""
        try:
            super().write_soon(data)
        except OSError as error:
            self.logger.warning("No room for an answer to wait in: %s", error)
            self.will_close = True
            self.server.pull_trigger()
            raise ClientDisconnected from error

    def send_continue(self) -> None:
        """Have "100 Continue" sent by the main thread.

        A thread of waitress's sends it itself: while the main thread may send as well, or close the connection.
        """
        self.request.expect_continue = False
        self.sent_continue = True
        with self.outbuf_lock:
            self.outbufs[-1].append(CONTINUE)
            self.current_outbuf_count += len(CONTINUE)
            self.total_outbufs_len += len(CONTINUE)

    def send_header(self) -> None:
        """Send the header, if that has not been done."""
        if self.header:
            self.keep(self.header)
            self.header = b""

    def received(self, data: bytes) -> bool:
        """Take what the client sends, unless nothing of it will be answered."""
        return not self.lingering and super().received(data)

    def handle_write(self) -> None:
        """Send what waits to be sent.

        After an answer that the client may not expect, only our side of the connection is closed: if it were closed
        while the client still sends, the answer would be lost (RFC 9112, section 9.6).
        """
        ends = self.close_when_flushed and self.lingers
        if ends:
            self.close_when_flushed = False
        # waitress sends without the lock where no request is in work; see send_continue().
        with nullcontext() if self.requests else self.outbuf_lock:
            super().handle_write()
        if not (ends and self.connected):
            return
        if self.total_outbufs_len:
            self.close_when_flushed = True
        else:
            self.lingering = True
            self.socket.shutdown(socket.SHUT_WR)


def unacknowledged(connection: socket.socket) -> int:
    """Return how many bytes the system holds that the other end has not acknowledged, where that can be told.

    It takes more from us only when a good part of its buffer, of maybe megabytes, is free: with a slow client, seldom.
    """
    try:
        return int.from_bytes(fcntl.ioctl(connection, termios.TIOCOUTQ, bytes(4)), sys.byteorder)
    except OSError:
        return 0


class Connections(dict):
    """The map of all that waitress waits for, by file descriptor. It belongs to the main thread.

    waitress asks every connection, before it waits, whether it wants to read or to write. With a thousand of them that
    takes longer than a request does. Here epoll keeps the answers, and only those are asked that may have changed:
    those that had something to read or write, those with a request in work, the listeners; now and then, all.

    Relied upon: waitress waits for what it adds to this map; readable() and writable() say for what; readwrite() then
    takes poll()'s flags, which have epoll's values.
    """

    def __init__(self, *, use_poll: bool) -> None:
        """Begin without any; wait by epoll where the system has it, unless waitress is to use select()."""
        self.epoll = select.epoll() if use_poll and hasattr(select, "epoll") else None
        self.use_poll = use_poll
        self.awaited: dict[int, int] = {}  # what epoll waits for, for each that it knows
        self.changed: set[int] = set()

    def __setitem__(self, fd: int, dispatcher: wasyncore.dispatcher) -> None:
        """Add one."""
        super().__setitem__(fd, dispatcher)
        self.changed.add(fd)

    def __delitem__(self, fd: int) -> None:
        """Remove one. It may be closed already, and epoll knows no more of it then."""
        super().__delitem__(fd)
        self.changed.discard(fd)
        with suppress(OSError):
            self.await_events(fd, 0)

    def channels(self) -> list[Channel]:
        """Return the connections: all but the listeners and the pipes."""
        return [dispatcher for dispatcher in self.values() if isinstance(dispatcher, Channel)]

    def turn(self, timeout: float) -> None:
        """Wait until something can be read or written, at most `timeout` seconds, and let it be."""
        if not self.epoll:
            wasyncore.loop(timeout, use_poll=self.use_poll, map=self, count=1)
            return
        for fd in list(self.changed):
            dispatcher = self[fd]
            # Before it is asked: what a thread changes after that, it changes while there is a request in work.
            busy = dispatcher.accepting or getattr(dispatcher, "requests", None)
            wanted = wants(dispatcher)
            # That nothing is to be read while a request is in work is not worth a system call: few clients send then.
            if wanted or self.awaited.get(fd, 0) != select.POLLIN:
                self.await_events(fd, wanted)
            if not busy:
                self.changed.discard(fd)
        for fd, events in self.epoll.poll(timeout):
            dispatcher = self.get(fd)
            if dispatcher is None:
                continue
            self.changed.add(fd)
            wanted = wants(dispatcher)
            due = events & (wanted | select.POLLHUP | select.POLLERR)
            if wanted and due:
                wasyncore.readwrite(dispatcher, due)
            else:  # what has come of it is waited for no more
                self.await_events(fd, wanted)

    def await_events(self, fd: int, wanted: int) -> None:
        """Let epoll wait for `wanted`. For nothing, `fd` is taken out: epoll reports those that hang up in any case."""
        known = self.awaited.get(fd, 0)
        if wanted == known:
            return
        if not wanted:
            del self.awaited[fd]
            self.epoll.unregister(fd)
            return
        (self.epoll.modify if known else self.epoll.register)(fd, wanted)
        self.awaited[fd] = wanted


def wants(dispatcher: wasyncore.dispatcher) -> int:
    """Return the events that waitress would wait for, less urgent data: it would log each byte, and never read it."""
    wanted = select.POLLIN if dispatcher.readable() else 0
    if not dispatcher.accepting and dispatcher.writable():
        wanted |= select.POLLOUT
    return wanted


class Wakeup(wasyncore.file_dispatcher):
    """A pipe among the connections, to end the waiting: threads write to it when an answer is made, Python at a signal.

    waitress has one for each listener, and writes to it at each answer; here once until it is read, which may be after
    many. Of signals: Python runs a handler only between two steps of the program. A signal that comes after the last
    step before the kernel is asked to wait would else be noticed when that times out.
    """

    def __init__(self, connections: Connections) -> None:
        """Join the connections."""
        read_end, self.write_end = os.pipe()
        os.set_blocking(self.write_end, False)
        signal.set_wakeup_fd(self.write_end)
        super().__init__(read_end, map=connections)
        os.close(read_end)  # waitress has made a copy
        self.pulled = False

    def pull(self) -> None:
        """End the waiting, in any thread."""
        if not self.pulled:
            self.pulled = True
            os.write(self.write_end, b"x")

    def writable(self) -> bool:
        """Tell waitress that there is nothing to write."""
        return False

    def handle_read(self) -> None:
        """Throw the bytes away: the handlers have run by now, and the connections are looked at next."""
        self.recv(4096)
        self.pulled = False
