"""Measure the service under load, beside the same application under waitress-serve. Prints Markdown tables.

    python bench/service.py [--runs 5]

Needs a Docker Engine, the base image (PYTHON_IMAGE names another), wrk and slowhttptest; it asks the containers at
their own addresses, so it runs on the engine's own Linux machine. What is compared is measured in turn within one run,
A B A B, and given as the median; a figure in seconds or requests holds for this machine only, a ratio travels.
"""

import argparse
import contextlib
import errno
import json
import os
import pathlib
import re
import shutil
import socket
import statistics
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterable, Iterator

ROOT = pathlib.Path(__file__).parent.parent
NAME = f"flask-helloworld-bench-{uuid.uuid4().hex[:8]}"
THREADS = "4"
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"

# The same image, application and threads, served as the documentation of waitress has it: no access log there is.
WAITRESS_SERVE = ["--entrypoint", "waitress-serve", NAME, "--listen=*:5000", f"--threads={THREADS}", "app:app"]
VARIANTS = {
    "waitress-serve": WAITRESS_SERVE,
    "access log off": ["--env", "ACCESS_LOG=0", "--env", f"WAITRESS_THREADS={THREADS}", NAME],
    "access log on": ["--env", f"WAITRESS_THREADS={THREADS}", NAME],
}


def run(*command: object, **options: object) -> str:
    """Run a command, fail if it fails, return what it prints."""
    options = {"check": True, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run([str(part) for part in command], **options).stdout


@contextlib.contextmanager
def container(arguments: list[str]) -> Iterator[tuple[str, str]]:
    """Run a container until the end; give its id and address, once it answers."""
    name = run("docker", "run", "--detach", *arguments).strip()
    try:
        [facts] = json.loads(run("docker", "inspect", name))
        [network] = facts["NetworkSettings"]["Networks"].values()
        address = network["IPAddress"]
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection((address, 5000), 1).close()
                break
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
        yield name, address
    finally:
        run("docker", "rm", "--force", name)


def throughput(runs: int, connections: int) -> Iterator[list[str]]:
    """Give a row for each variant: requests per second, and by how much they differ from waitress-serve's."""
    rates: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    with contextlib.ExitStack() as stack:
        running = {variant: stack.enter_context(container(VARIANTS[variant])) for variant in VARIANTS}
        for _ in range(runs):
            for variant, (_, address) in running.items():
                report = run("wrk", "--threads=1", f"--connections={connections}", "--duration=3s", url(address))
                if "Non-2xx" in report or "Socket errors" in report:
                    raise RuntimeError(f"{variant}: {report}")
                rates[variant].append(float(re.search(r"Requests/sec: +([0-9.]+)", report)[1]))
    base = rates["waitress-serve"]
    for variant, measured in rates.items():
        ratios = [one / other for one, other in zip(measured, base, strict=True)]
        yield [f"{variant}, {connections} connections", f"{statistics.median(measured):.0f}/s", spread(ratios, "x")]


def url(address: str) -> str:
    """Return what to ask a container for."""
    return f"http://{address}:5000/"


class KeepAlive(threading.Thread):
    """A client that asks again and again on one connection, and takes another when told that this was the last."""

    def __init__(self, address: str) -> None:
        """Be ready to ask the server at `address`."""
        super().__init__()
        self.address = address
        self.answered, self.failed = 0, 0

    def run(self) -> None:
        """Ask until nobody listens any more."""
        while True:
            try:
                connection = socket.create_connection((self.address, 5000), 20)
            except ConnectionRefusedError:
                return
            except OSError as error:
                if error.errno not in {errno.EHOSTUNREACH, errno.ENETUNREACH}:
                    self.failed += 1
                return
            with connection:
                try:
                    while self.ask(connection):
                        pass
                except OSError:
                    self.failed += 1

    def ask(self, connection: socket.socket) -> bool:
        """Send one request, take its answer, tell whether another can follow; raises OSError if it is not answered."""
        connection.sendall(REQUEST)
        answer = b""
        while b"\r\n\r\n" not in answer or not answer.endswith(b"!\n"):
            if not (part := connection.recv(4096)):
                raise ConnectionError("closed without a whole answer")
            answer += part
        self.answered += 1
        return b"connection: close" not in answer.lower()


def stops(variant: str, count: int) -> list[str]:
    """Return a row: `docker stop`, so many times, while 16 clients with keep-alive connections ask."""
    answered, failed, taken = 0, 0, []
    for _ in range(count):
        with container(VARIANTS[variant]) as (name, address):
            clients = [KeepAlive(address) for _ in range(16)]
            for client in clients:
                client.start()
            deadline = time.monotonic() + 60
            while sum(client.answered for client in clients) < 600:
                if time.monotonic() > deadline:
                    raise RuntimeError(f"{variant}: fewer than 600 answers in a minute")
                time.sleep(0.01)
            start = time.perf_counter()
            run("docker", "stop", name)
            taken.append(time.perf_counter() - start)
            for client in clients:
                client.join(30)
            answered += sum(client.answered for client in clients)
            failed += sum(client.failed for client in clients)
    return [variant, f"{failed} of {answered}", f"{max(taken):.2f} s", f"{statistics.median(taken):.2f} s"]


def honest(address: str, count: int) -> list[float]:
    """Return the seconds that each of `count` requests takes, one after another, each on a connection of its own."""
    taken = []
    for _ in range(count):
        start = time.perf_counter()
        with socket.create_connection((address, 5000), 5) as connection:
            connection.settimeout(5)
            connection.sendall(REQUEST.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
            answer = b"".join(iter(lambda: connection.recv(4096), b""))
        taken.append(time.perf_counter() - start if answer.startswith(b"HTTP/1.1 200") else float("inf"))
        time.sleep(0.05)
    return taken


def slow(variant: str, kind: str) -> list[str]:
    """Return a row: 40 honest requests alone, and while a thousand clients drip their headers (-H) or bodies (-B)."""
    with container(VARIANTS[variant]) as (_, address):
        alone = honest(address, 40)
        command = ["slowhttptest", kind, "-c", "1000", "-r", "500", "-i", "1", "-l", "30", "-u", url(address)]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as attack:
            time.sleep(3)  # for all of them to be there
            try:
                beside = honest(address, 40)
            except OSError:
                beside = [float("inf")] * 40
            attack.terminate()
    return [
        f"{variant}, {'headers' if kind == '-H' else 'bodies'}",
        f"{sum(each < 1 for each in beside)} of {len(beside)}",
        f"{statistics.median(beside) / statistics.median(alone):.2f} x",
    ]


def memory(variant: str) -> list[str]:
    """Return a row: what the server's process holds after 1,000 and after 100,000 requests."""
    with container(VARIANTS[variant]) as (name, address):
        process = run("docker", "inspect", "--format", "{{.State.Pid}}", name).strip()
        resident, asked = [], 0
        client = KeepAlive(address)
        with socket.create_connection((address, 5000), 20) as connection:
            for _ in range(1_000):
                client.ask(connection)
        resident.append(megabytes(process))
        while asked < 99_000:
            report = run("wrk", "--threads=1", "--connections=16", "--duration=10s", url(address))
            asked += int(re.search(r"(\d+) requests in", report)[1])
        resident.append(megabytes(process))
    return [variant, f"{resident[0]:.1f} MiB", f"{resident[1]:.1f} MiB", f"{resident[1] / resident[0]:.3f} x"]


def megabytes(process: str) -> float:
    """Return what a process holds in memory, in MiB."""
    status = pathlib.Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


def spread(values: list[float], unit: str) -> str:
    """Return the median of `values`, the smallest and the largest as text."""
    return f"{statistics.median(values):.2f} {unit} ({min(values):.2f} to {max(values):.2f})"


def table(title: str, head: list[str], rows: Iterable[list[str]]) -> None:
    """Print a Markdown table."""
    print(f"\n{title}\n\n| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=5, help="how often to measure throughput (default: 5)")
    parser.add_argument("--stops", type=int, default=20, help="how often to stop a container (default: 20)")
    options = parser.parse_args()
    if missing := [tool for tool in ("wrk", "slowhttptest") if not shutil.which(tool)]:
        sys.exit(f"bench/service.py needs {' and '.join(missing)}: apt-get install wrk slowhttptest")
    default = re.search(r"^FROM (\S+) AS pinned$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[1]
    os.environ.setdefault("PYTHON_IMAGE", default)
    run("docker", "build", "--build-arg", "PYTHON_IMAGE", "--tag", NAME, ROOT)
    try:
        rows = (row for connections in (16, 64) for row in throughput(options.runs, connections))
        table(f"Throughput (wrk, medians of {options.runs})", ["", "requests", "beside waitress-serve"], rows)
        rows = (stops(variant, options.stops) for variant in ("waitress-serve", "access log on"))
        table(f"{options.stops} x `docker stop`, 16 clients", ["", "failed", "slowest", "median"], rows)
        kinds = [("waitress-serve", "-H"), ("access log on", "-H"), ("access log on", "-B")]
        head = ["", "answered within 1 s", "median, beside that without them"]
        table("40 requests beside 1000 slow clients", head, (slow(*kind) for kind in kinds))
        head = ["", "after 1,000", "after 100,000 requests", ""]
        table("Resident memory", head, (memory(variant) for variant in VARIANTS))
    finally:
        run("docker", "image", "rm", "--force", NAME)


if __name__ == "__main__":
    main()
