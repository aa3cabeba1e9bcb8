"""The container's probe: exit code 0 if the server here answers GET /health with 200, else 1 and a line that says why.

    python -IS healthcheck.py

It runs every few seconds beside the server, so it is light: no site-packages (-S), and a bare socket, because
http.client would double the time it takes. It asks where serve listens, by the same variables.
"""

import os
import socket
import sys
import time
from collections.abc import Mapping

TIMEOUT = 2  # seconds for the whole probe; the engine's --timeout is longer, so that our reason is what it records
REQUEST = b"GET /health HTTP/1.0\r\nHost: localhost\r\nUser-Agent: healthcheck\r\n\r\n"

# Where to find a server that listens on every address.
LOOPBACK = {"*": ["127.0.0.1", "::1"], "0.0.0.0": ["127.0.0.1"], "::": ["::1"]}


def address(environ: Mapping[str, str]) -> tuple[str, str]:
    """Return the host and port on which serve listens."""
    return environ.get("BIND", "*").strip("[]"), environ.get("PORT", "5000")


def connect(host: str, port: str, deadline: float) -> socket.socket:
    """Return a connection to the server; raises OSError if there is none by `deadline` (in time.monotonic()'s seconds).

    The first of the host's addresses that takes the connection is the one: `*` may be IPv6 alone.
    """
    refusal = OSError()
    for candidate in LOOPBACK.get(host, [host]):
        try:
            # As bytes: for a str, getaddrinfo() would import the IDNA codec first.
            return socket.create_connection((candidate.encode(), port), seconds_to(deadline))
        except OSError as error:
            refusal = error
    raise refusal


def status_line(connection: socket.socket, deadline: float) -> str:
    """Return the first line of the answer; raises OSError if it is not there, whole, by `deadline`."""
    line = b""
    while not line.endswith(b"\n"):
        connection.settimeout(seconds_to(deadline))
        byte = connection.recv(1)
        if not byte or len(line) == 100:
            raise ConnectionError(f"no HTTP answer: {line!r}")
        line += byte
    return line.decode("latin-1").rstrip()


def seconds_to(deadline: float) -> float:
    """Return the time left; raises TimeoutError if there is none, however little came at a time."""
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("timed out")
    return left


def main() -> int:
    """Probe once; return the exit code."""
    deadline = time.monotonic() + TIMEOUT
    try:
        with connect(*address(os.environ), deadline) as connection:
            connection.sendall(REQUEST)
            line = status_line(connection, deadline)
    except OSError as error:
        print(f"unhealthy: {error}")
        return 1
    if line.split(" ")[:2] not in (["HTTP/1.1", "200"], ["HTTP/1.0", "200"]):
        print(f"unhealthy: {line!r}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
