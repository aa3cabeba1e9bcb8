"""The container's probe: exit code 0 if the server answers GET /health with 200, else 1 and one line that says why.

    python -IS healthcheck.py

It runs every few seconds, so it is light: a bare socket, and no site-packages (-S).
"""

import os
import signal
import socket
import sys

TIMEOUT = 2  # seconds for the whole probe; less than the engine's --timeout, so that our line is what it records
REQUEST = b"GET /health HTTP/1.0\r\nHost: localhost\r\nUser-Agent: healthcheck\r\n\r\n"
HEALTHY = (b"HTTP/1.0 200 ", b"HTTP/1.1 200 ")


def connect() -> socket.socket:
    """Connect to PORT, at BIND if that is one address, else at 127.0.0.1 or ::1; raises OSError, the first one's."""
    bind, port = os.environ.get("BIND", "*").strip("[]"), os.environ.get("PORT", "5000")
    failures = []
    for host in ["127.0.0.1", "::1"] if bind in {"*", "0.0.0.0", "::"} else [bind]:
        try:
            return socket.create_connection((os.fsencode(host), port))  # for a str, Python first imports its IDNA codec
        except OSError as failure:
            failures.append(failure)
    raise failures[0]


def fail(why: object) -> None:
    """Say why, and end with exit code 1."""
    print(f"unhealthy: {why}")
    sys.exit(1)


if __name__ == "__main__":
    # An alarm ends it however slowly bytes arrive; a socket's timeout would start anew with each.
    signal.signal(signal.SIGALRM, lambda *_: fail("timed out"))
    signal.alarm(TIMEOUT)
    try:
        with connect() as connection, connection.makefile("rb") as answer:
            connection.sendall(REQUEST)
            line = answer.readline(1000)
    except OSError as failure:
        fail(failure)
    if not (line.startswith(HEALTHY) and line.endswith(b"\n")):
        fail(f"answered {line!r}")
