"""The container's probe: exit code 0 if the server answers GET /health with 200, else 1 and one line that says why.

    python -IS healthcheck.py

BIND and PORT say where to ask. It runs every few seconds, so it is light: a bare socket, and no site-packages (-S).
"""

import os
import signal
import socket
import sys

TIMEOUT = 2  # seconds for the whole probe; less than the engine's --timeout, so that our line is what it records
REQUEST = b"GET /health HTTP/1.0\r\nHost: localhost\r\nUser-Agent: healthcheck\r\n\r\n"
HEALTHY = (b"HTTP/1.0 200 ", b"HTTP/1.1 200 ")
LOOPBACK = {"*": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}


def problem() -> object:
    """Return why the server is not healthy, or None if it is."""
    bind, port = os.environ.get("BIND", "*").strip("[]"), os.environ.get("PORT", "5000")
    if not (port.isdecimal() and len(port) <= 5 and int(port) <= 65535):  # getaddrinfo() would take 70000 for 4464
        return f"PORT={port!a} is not a port"
    host = os.fsencode(LOOPBACK.get(bind, bind))  # for a str, Python would first import its IDNA codec
    try:
        with socket.create_connection((host, port)) as connection, connection.makefile("rb") as answer:
            connection.sendall(REQUEST)
            line = answer.readline(1000)
    except OSError as error:
        return error
    return None if line.startswith(HEALTHY) and line.endswith(b"\n") else f"answered {line!r}"


def fail(why: object) -> None:
    """Say why, and end with exit code 1."""
    print(f"unhealthy: {why}")
    sys.exit(1)


if __name__ == "__main__":
    # An alarm ends it however slowly bytes arrive; a socket's timeout would start anew with each.
    signal.signal(signal.SIGALRM, lambda *_: fail("timed out"))
    signal.alarm(TIMEOUT)
    if why := problem():
        fail(why)
