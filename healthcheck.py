"""The container's health check: exits with 0 if GET /health returns 200, else with 1 and one line that says why.

    python -IS healthcheck.py

It runs every few seconds, so it is light: a bare socket, and no site-packages (-S).
"""

import os
import signal
import socket
import sys

TIMEOUT = 2  # seconds for the whole check; below the engine's --timeout, so that the engine records our line
REQUEST = b"GET /health HTTP/1.0\r\nHost: localhost\r\nUser-Agent: healthcheck\r\n\r\n"
HEALTHY = (b"HTTP/1.0 200 ", b"HTTP/1.1 200 ")


def connect() -> socket.socket:
    """Connect to PORT at BIND, or at 127.0.0.1 or ::1 if BIND is every address. Raises the first OSError."""
    bind, port = os.environ.get("BIND", "*").strip("[]"), os.environ.get("PORT", "5000")
    failures = []
    for host in ["127.0.0.1", "::1"] if bind in {"*", "0.0.0.0", "::"} else [bind]:
        try:
            return socket.create_connection((os.fsencode(host), port))  # for a str, Python would import its IDNA codec
        except OSError as failure:
            failures.append(failure)
    raise failures[0]


def fail(why: object) -> None:
    """Print the reason and exit with 1."""
    print(f"unhealthy: {why}")
    sys.exit(1)


if __name__ == "__main__":
    # The alarm limits the whole check. A socket timeout would start again with every byte.
    signal.signal(signal.SIGALRM, lambda *_: fail("timed out"))
    signal.alarm(TIMEOUT)
    try:
        with connect() as connection, connection.makefile("rb") as response:
            connection.sendall(REQUEST)
            line = response.readline(1000)
    except OSError as failure:
        fail(failure)
    if not (line.startswith(HEALTHY) and line.endswith(b"\n")):
        fail(f"answered {line!r}")
