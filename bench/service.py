"""Measure the service under load, compared with other servers that run the same application. Prints Markdown tables.

    python bench/service.py [--only throughput] [--runs 5] [--seconds 3] [--quick] [--image NAME]...

Needs Linux with two CPUs, a Docker Engine on it, the base image (PYTHON_IMAGE names another), wrk and slowhttptest.
Servers are measured in turn (A B C A B C). A ratio compares two servers within a round; the median, the smallest and
the largest are given. Between machines, compare ratios, not seconds or requests.
"""

import argparse
import contextlib
import errno
import os
import pathlib
import re
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

ROOT = pathlib.Path(__file__).parent.parent
NAME = f"flask-helloworld-bench-{uuid.uuid4().hex[:8]}"
MEASURES = ["latency", "throughput", "stops", "slow", "memory"]
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"
RESPONSE_START, RESPONSE_END = b"HTTP/1.1 200 ", b"\r\n\r\nHello, world!\n"

# For each setup, the options of `docker run` and the CPUs of the load generator.
COMPOSE = ["--cpus=1", "--cpuset-cpus=0,1", "--memory=256m"]
CPU_SETUPS = {
    "As in compose: a quota of one CPU (`--cpus=1`), on two CPUs shared with the load generator": (COMPOSE, {0, 1}),
    "A CPU of its own (`--cpuset-cpus=0`); the load generator has the other": (["--cpuset-cpus=0"], {1}),
}

# The image with gunicorn and granian, for this measurement only.
RIVALS_DOCKERFILE = """
ARG PYTHON_IMAGE IMAGE
FROM $PYTHON_IMAGE AS builder
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf --mount=type=cache,target=/root/.cache/pip \\
    pip install --only-binary=:all: --target=/rivals gunicorn granian
FROM $IMAGE
COPY --from=builder /rivals /rivals
ENV PYTHONPATH=/rivals
"""
VERSIONS = "import importlib.metadata as m; [print(n, m.version(n)) for n in ('waitress', 'gunicorn', 'granian')]"
TUNING = ["--asyncore-use-poll", "--connection-limit=2000", "--backlog=4096"]
LEGEND = f"""
All serve the same application, from the same image layers, with four threads. gunicorn sync has no threads and no
keep-alive: it runs four workers, and each request needs a new connection.

- Access log: only the service writes one, and the engine reads it (`local` driver): both cost it speed. By default,
  the others write none.
- Tuning or code: `waitress-serve, tuned` has `{" ".join(TUNING)}`, as the
  service has by default. Its lead over `waitress-serve` is tuning; the lead of the service over it is code. gunicorn
  and granian are not tuned. Untuned, waitress-serve accepts 100 connections: of 256, the others wait.
- Versions:"""
WAITRESS, TUNED = "waitress-serve", "waitress-serve, tuned"


def other_servers(image: str, rivals: str) -> dict[str, list[str]]:
    """Return the image and command of each other server, by name."""
    waitress = [image, "waitress-serve", "--listen=*:5000", "--threads=4"]
    gunicorn = [rivals, "python", "-m", "gunicorn", "--bind=0.0.0.0:5000"]
    granian = [rivals, "python", "-m", "granian", "--host=0.0.0.0", "--port=5000", "--interface=wsgi"]
    return {
        WAITRESS: [*waitress, "app:app"],
        TUNED: [*waitress, *TUNING, "app:app"],
        "gunicorn sync": [*gunicorn, "--workers=4", "app:app"],
        "gunicorn gthread": [*gunicorn, "--worker-class=gthread", "--workers=1", "--threads=4", "app:app"],
        "granian": [*granian, "--workers=1", "--blocking-threads=4", "app:app"],
    }


def run(*command: object, **options: object) -> str:
    """Run a command and return its output; raises CalledProcessError."""
    options = {"check": True, "text": True, "stdout": subprocess.PIPE} | options
    return subprocess.run([str(part) for part in command], **options).stdout


@contextlib.contextmanager
def container(*arguments: str) -> Iterator[tuple[str, str]]:
    """Run a container for a `with` block; yield its id and address once it answers."""
    name = run("docker", "run", "--detach", "--log-driver=local", *arguments).strip()
    try:
        field = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
        address = run("docker", "inspect", f"--format={field}", name).strip()
        for _ in range(600):
            with contextlib.suppress(OSError), connect(address) as connection:
                request(connection)
                break
            time.sleep(0.05)
        else:
            raise TimeoutError(run("docker", "logs", name, stderr=subprocess.STDOUT))
        yield name, address
    finally:
        run("docker", "rm", "--force", name)


def connect(address: str) -> socket.socket:
    """Connect to a server, with a timeout of 20 s."""
    return socket.create_connection((address, 5000), 20)


def request(connection: socket.socket) -> bool:
    """Send a request and read the whole response; return whether the connection stays open. Raises OSError."""
    connection.sendall(REQUEST)
    response = b""
    while not response.endswith(RESPONSE_END):
        part = connection.recv(4096)
        response += part
        if not part or not RESPONSE_START.startswith(response[: len(RESPONSE_START)]):
            raise ConnectionError(f"not a complete response with status 200: {response!r}")
    return b"connection: close" not in response.lower()


def latency(seconds: float, address: str) -> float:
    """Return the inverse of the median request time of one client, reconnects included: higher is better."""
    durations, connection = [], connect(address)
    end = time.perf_counter() + seconds
    while (start := time.perf_counter()) < end:
        if not request(connection):
            connection.close()
            connection = connect(address)
        durations.append(time.perf_counter() - start)
    connection.close()
    return 1 / statistics.median(durations)


def throughput(connections: int, seconds: float, address: str) -> float:
    """Return the requests per second of `connections` busy clients."""
    # wrk's default, 2 s, would report clients that a server keeps waiting as errors.
    options = ["--threads=1", "--timeout=60s", f"--connections={connections}", f"--duration={seconds}s"]
    report = run("wrk", *options, f"http://{address}:5000/")
    if "Non-2xx" in report or "Socket errors" in report:
        raise RuntimeError(report)
    return float(re.search(r"Requests/sec: +([0-9.]+)", report)[1])


def speed(addresses: list[str], options: argparse.Namespace) -> Iterator[list[str]]:
    """Yield a row for each figure: the first server's value, then the values of the others with their ratios to it."""
    figures = {}
    if "latency" in options.only:
        figures["median latency of one keep-alive client (ratio: inverse)"] = partial(latency, options.seconds)
    for connections in (1, 16, 64, 256) if "throughput" in options.only else ():
        figures[f"requests/s, connections: {connections}"] = partial(throughput, connections, options.seconds)
    for address in addresses:
        throughput(16, 1, address)  # warm up
    for name, figure in figures.items():
        rounds = [[figure(address) for address in addresses] for _ in range(options.runs)]
        cells = []
        for rates in zip(*rounds, strict=True):
            rate = statistics.median(rates)
            ratios = [rate / first for rate, (first, *_) in zip(rates, rounds, strict=True)]
            value = f"{1e6 / rate:.0f} us" if figure.func is latency else f"{rate:,.0f}"
            ratio = f": {statistics.median(ratios):.2f} x ({min(ratios):.2f} to {max(ratios):.2f})"
            cells.append(value + ratio if cells else value)
        yield [name, *cells]


def request_until_refused(address: str, succeeded: list[bool]) -> None:
    """Send requests, with keep-alive, until nothing listens any more; append to `succeeded` whether each one did."""
    while True:
        try:
            connection = connect(address)
        except OSError as error:
            if error.errno not in {errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH}:
                succeeded.append(False)
            return
        with connection:
            try:
                is_open = True
                while is_open:
                    is_open = request(connection)
                    succeeded.append(True)
            except OSError:
                succeeded.append(False)


def stops(name: str, command: list[str], count: int) -> list[str]:
    """Return a row: `docker stop`, `count` times, while 16 clients with keep-alive send requests."""
    succeeded, durations = [], []
    for _ in range(count):
        with ThreadPoolExecutor(16) as clients, container(*COMPOSE, *command) as (container_id, address):
            for _ in range(16):
                clients.submit(request_until_refused, address, succeeded)
            time.sleep(1)  # under load before the stop
            start = time.perf_counter()
            run("docker", "stop", container_id)
            durations.append(time.perf_counter() - start)
    failed = f"{succeeded.count(False):,} of {len(succeeded):,}"
    return [name, failed, f"{max(durations):.2f} s", f"{statistics.median(durations):.2f} s"]


def time_request(address: str, delay: float) -> float:
    """Wait `delay` seconds; return the seconds for one request on a new connection, infinity if it fails."""
    time.sleep(delay)
    start = time.perf_counter()
    try:
        with connect(address) as connection:
            request(connection)
    except OSError:
        return float("inf")
    return time.perf_counter() - start


def slow(name: str, command: list[str], kind: str, count: int) -> list[str]:
    """Return a row: 40 normal requests while `count` clients send their headers (-H) or bodies (-B) slowly."""
    with container(*COMPOSE, *command) as (_, address), ThreadPoolExecutor(40) as pool:
        options = [kind, "-c", str(count), "-r", "1000", "-i", "1", "-l", "60", "-u", f"http://{address}:5000/"]
        with subprocess.Popen(["slowhttptest", *options], stdout=subprocess.DEVNULL) as attack:
            time.sleep(count / 1000 + 1)  # until all are connected
            durations = list(pool.map(partial(time_request, address), [number / 4 for number in range(40)]))
            attack.terminate()
    within = [f"{sum(each <= limit for each in durations)} of {len(durations)}" for limit in (1, 2)]
    slowest = f"{max(durations):.2f} s" if max(durations) < float("inf") else "over 20 s, or failed"
    return [f"{count:,} {'headers' if kind == '-H' else 'bodies'}, {name}", *within, slowest]


def memory(name: str, command: list[str]) -> list[str]:
    """Return a row: the memory of the server's process after 1,000 and after 100,000 requests."""
    with container(*COMPOSE, *command) as (container_id, address):
        process = run("docker", "inspect", "--format={{.State.Pid}}", container_id).strip()
        with connect(address) as connection:
            for _ in range(1_000):
                request(connection)
        first, sent = resident_memory(process), 1_000
        while sent < 100_000:
            report = run("wrk", "--threads=1", "--connections=16", "--duration=10s", f"http://{address}:5000/")
            sent += int(re.search(r"(\d+) requests in", report)[1])
        last = resident_memory(process)
    return [name, f"{first:.1f} MiB", f"{last:.1f} MiB", f"{last / first:.3f} x"]


def resident_memory(process: str) -> float:
    """Return the resident memory of a process, in MiB."""
    status = pathlib.Path(f"/proc/{process}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024


def table(title: str, head: list[str], rows: Iterable[list[str]]) -> None:
    """Print a Markdown table, each row as soon as it is measured."""
    print(f"\n{title}\n\n| | {' | '.join(head)} |\n|---|{'---|' * len(head)}", flush=True)
    for row in rows:
        print(f"| {' | '.join(row)} |", flush=True)


def measure(options: argparse.Namespace) -> None:
    """Build the images, measure and print."""
    secret = [f"--secret=id=pip_conf,src={os.environ['PIP_CONF']}"] if os.environ.get("PIP_CONF") else []
    build = ["docker", "build", "--quiet", "--build-arg=PYTHON_IMAGE", *secret]
    images, rivals = options.image or [NAME], f"{NAME}-rivals"
    if not options.image:
        run(*build, f"--tag={NAME}", ROOT)
    ours = {"this image" if image == NAME else image: ["--env=WAITRESS_THREADS=4", image] for image in images}
    servers = other_servers(images[0], rivals) | ours
    names = [WAITRESS, *ours] if options.quick else list(servers)
    if {"latency", "throughput"} & set(options.only):
        run(*build, f"--build-arg=IMAGE={images[0]}", f"--tag={rivals}", "-", input=RIVALS_DOCKERFILE)
        print(LEGEND, run("docker", "run", "--rm", rivals, "python", "-c", VERSIONS).strip())
        for setup, (limits, cpus) in CPU_SETUPS.items():
            with contextlib.ExitStack() as stack:
                addresses = [stack.enter_context(container(*limits, *servers[name]))[1] for name in names]
                os.sched_setaffinity(0, cpus)
                table(f"{setup} (medians of {options.runs})", names, speed(addresses, options))
                os.sched_setaffinity(0, {0, 1})
    if "stops" in options.only:
        rows = (stops(name, servers[name], options.stops) for name in (WAITRESS, *ours))
        table(f"{options.stops} x `docker stop` under 16 clients", ["failed requests", "slowest", "median"], rows)
    if "slow" in options.only:
        waitresses = [name for name in names if name in {WAITRESS, TUNED, *ours}]
        attacks = [(name, "-H", count) for count in (1_000, 3_000) for name in waitresses]
        attacks += [(name, "-B", 1_000) for name in ours]
        rows = (slow(name, servers[name], kind, count) for name, kind, count in attacks)
        caption = f"Of 40 requests in 10 s, answered beside slow clients (tuned: `{' '.join(TUNING)}`)"
        table(caption, ["within 1 s", "within 2 s", "slowest"], rows)
    if "memory" in options.only:
        rows = (memory(name, servers[name]) for name in (WAITRESS, *ours))
        table("Resident memory", ["after 1,000 requests", "after 100,000", "ratio"], rows)


def main() -> None:
    """Read the options, check the requirements, measure, clean up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=MEASURES, default=MEASURES, help="what to measure (default: all)")
    parser.add_argument("--runs", type=int, default=5, help="rounds of latency and throughput (default: 5)")
    parser.add_argument("--seconds", type=int, default=3, help="seconds for a figure in each round (default: 3)")
    parser.add_argument("--stops", type=int, default=10, help="stops of each server (default: 10)")
    parser.add_argument("--quick", action="store_true", help="only waitress-serve at its defaults and the service")
    parser.add_argument("--image", action="append", help="a built image to measure instead; may be repeated")
    options = parser.parse_args()
    if missing := [tool for tool in ("wrk", "slowhttptest") if not shutil.which(tool)]:
        sys.exit(f"bench/service.py needs {' and '.join(missing)}: apt-get install wrk slowhttptest")
    if not {0, 1} <= os.sched_getaffinity(0):
        sys.exit("bench/service.py needs two CPUs, 0 and 1")
    os.sched_setaffinity(0, {0, 1})
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))  # 3,000 slow clients need more than the usual 1,024
    default = re.search(r"^FROM (\S+) AS pinned$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[1]
    os.environ.setdefault("PYTHON_IMAGE", default)
    try:
        measure(options)
    finally:
        # Either may be missing.
        run("docker", "image", "rm", "--force", NAME, f"{NAME}-rivals", check=False, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
