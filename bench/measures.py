"""The measures. Each yields the title of a figure, the name of a contestant, and a value.

Contestants take turns (A B C A B C), because the speed of a machine drifts.
"""

import errno
import gzip
import itertools
import os
import pathlib
import re
import select
import shutil
import signal
import subprocess
import tarfile
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial

from bench.contestants import BARE_SERVER, BASE, COMPOSE, CONTESTANTS, NAME, ROOT, Contestant, connect, request, run
from tests.support import statuses
from tests.test_http import NEXT, REQUESTS

Contestants = dict[str, Contestant]
Values = Iterator[tuple[str, str, float]]


def seconds(action: Callable[..., object], *arguments: object) -> float:
    """Return how long `action` takes."""
    start = time.perf_counter()
    action(*arguments)
    return time.perf_counter() - start


# ---- The image ---------------------------------------------------------------------------------------------------


def content(image: str) -> dict[str, float]:
    """Return what an image contains: its size as `docker export | gzip -6` and unpacked, packages, files by kind.

    Not `docker save`: its layers may be compressed already, depending on which command made them.
    """
    name = run("docker", "create", f"--label={NAME}", image).strip()
    packages = setuid = shells = total = 0
    with tempfile.TemporaryFile() as unpacked, tempfile.TemporaryFile() as packed:
        run("docker", "export", name, stdout=unpacked)
        unpacked.seek(0)
        with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=6) as file:
            shutil.copyfileobj(unpacked, file, 1 << 20)
        unpacked.seek(0)
        with tarfile.open(fileobj=unpacked) as files:
            for file in files:
                total += file.size
                setuid += file.isfile() and bool(file.mode & 0o6000)
                shells += file.isfile() and bool(
                    re.fullmatch(r"(usr/)?bin/(ba|da|a|z)?sh|(usr/)?bin/busybox", file.name)
                )
                packages += file.name.endswith(".dist-info/METADATA")
                if file.isfile() and re.match(r"var/lib/dpkg/status(\.d/[^.]+)?$", file.name):
                    packages += len(re.findall(rb"^Package: ", files.extractfile(file).read(), re.MULTILINE))
        size = packed.tell()
    run("docker", "rm", name)
    return {
        "compressed, MB": size / 1e6,
        "unpacked, MB": total / 1e6,
        "packages (Debian and Python)": packages,
        "setuid and setgid files": setuid,
        "shells": shells,
    }


def size(contestants: Contestants, workspace: pathlib.Path, runs: int) -> Values:
    """What is in the images."""
    with ThreadPoolExecutor(2) as pool:
        base, *contents = pool.map(content, [BASE, *(each.image for each in contestants.values())])
    for name, found in zip(contestants, contents, strict=True):
        for title, value in found.items():
            yield title, name, value
            if title.endswith("MB") and name != "minimal":  # which is not built on the base image
                yield f"{title.removesuffix(', MB')}, added to the base image, MB", name, value - base[title]


def build(contestants: Contestants, workspace: pathlib.Path, runs: int) -> Values:
    """Seconds to build."""
    for _, (name, each) in itertools.product(range(runs), contestants.items()):
        folder = workspace / each.context
        app, lock, dockerfile = folder / "app.py", folder / "requirements.txt", folder / "Dockerfile"
        pins = lock.read_text()
        # Empty caches for pip, too. The next build uses those that this one has filled.
        cache = f"--mount=type=cache,id={uuid.uuid4()},"
        dockerfile.write_text(re.sub("--mount=type=cache,(id=[^,]+,)?", cache, dockerfile.read_text()))
        yield "build without cache, s", name, seconds(each.build, workspace, "--no-cache")
        hashes = " --hash=sha256:63c132bbbed01578a06712a2d1f497bb62d9c1c0d329b7903a866228027263b2"
        pin = f"click==8.1.8{hashes if 'sha256' in pins else ''} # {uuid.uuid4()}"
        lock.write_text(re.sub(r"^click==(\S| \\\n.*--hash)+$", pin, pins, flags=re.MULTILINE))
        yield "rebuild after a change of requirements.txt, s", name, seconds(each.build, workspace)
        lock.write_text(pins)
        each.build(workspace)
        with app.open("a") as code:
            code.write(f"# {uuid.uuid4()}\n")
        yield "rebuild after an edit of app.py, s", name, seconds(each.build, workspace)


def lint(contestants: Contestants, workspace: pathlib.Path, runs: int) -> Values:
    """What hadolint finds in the Dockerfiles."""
    for name, each in contestants.items():
        command = [ROOT / ".venv-bench/bin/hadolint", "--no-fail", "--format=json"]
        yield "findings of hadolint", name, run(*command, workspace / each.context / "Dockerfile").count('"code"')


# ---- A container ---------------------------------------------------------------------------------------------------


def memory(container: str) -> float:
    """Return the memory of all processes in a container, in MB, without files (the kernel can drop these)."""
    code = """if True:
        import glob, os, re
        for path in glob.glob("/proc/[0-9]*/smaps_rollup"):
            if path != f"/proc/{os.getpid()}/smaps_rollup":
                print(re.search(r"Pss_Anon:\\s+(\\d+)", open(path).read())[1])
        """
    return sum(map(int, run("docker", "exec", container, "python", "-IS", "-c", code).split())) * 1024 / 1e6


def life(contestants: Contestants, workspace: pathlib.Path, runs: int) -> Values:
    """Start, memory and stop of a container."""
    for _ in range(2 * runs if runs > 1 else 1):
        start = time.perf_counter()
        with BARE_SERVER.container(*COMPOSE):
            bare = time.perf_counter() - start
        for name, each in contestants.items():
            start = time.perf_counter()
            with each.container(*COMPOSE) as (container, address):
                first = time.perf_counter() - start
                yield "`docker run` to the first response, s", name, first
                yield "the same, divided by that of a bare socket in Python", name, first / bare
                if '"Healthcheck"' in run("docker", "inspect", container):
                    while run("docker", "inspect", "--format={{.State.Health.Status}}", container) != "healthy\n":
                        time.sleep(0.02)
                    yield "`docker run` to healthy, s", name, time.perf_counter() - start
                time.sleep(2)  # until all its processes have started
                load(16, 320, address)
                time.sleep(1)
                yield "memory when idle, MB", name, memory(container)
                with subprocess.Popen(load_command(64, 1_000_000, address), stdout=subprocess.DEVNULL) as clients:
                    time.sleep(2)
                    try:
                        yield "memory with 64 busy connections, MB", name, memory(container)
                    finally:
                        clients.terminate()
                time.sleep(1)
                yield "`docker stop` when idle, s", name, seconds(run, "docker", "stop", container)


def until_refused(address: str, pause: float) -> bool:
    """Send requests until one fails or nothing listens any more; return whether one failed."""
    try:
        while True:
            with connect(address) as connection:
                while request(connection):
                    # A connection that is readable now has been closed. Clients check that before they send.
                    if select.select([connection], [], [], pause)[0]:
                        break
                else:
                    time.sleep(pause)
    except OSError as error:
        return error.errno not in {errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH}


def stop(contestants: Contestants, workspace: pathlib.Path, runs: int) -> Values:
    """Stop under load.

    Sixteen clients send requests without a pause, 32 pause for 0.05 s after each; they keep their connection if the
    server lets them. A client is cut off if its request gets no answer, even if the server had not accepted it yet.
    """
    for _, (name, each) in itertools.product(range(runs), contestants.items()):
        with ThreadPoolExecutor(48) as pool, each.container(*COMPOSE) as (container, address):
            clients = [pool.submit(until_refused, address, pause) for pause in [0.0] * 16 + [0.05] * 32]
            time.sleep(2)
            if any(client.done() for client in clients):
                raise RuntimeError(f"{name}: a request failed before the stop")
            yield "`docker stop` under load, s", name, seconds(run, "docker", "stop", container)
        yield "of 48 clients, cut off by a stop", name, sum(client.result() for client in clients)


# ---- Load ----------------------------------------------------------------------------------------------------------


def load_command(connections: int, count: int, address: str) -> list[str]:
    """Return the command that sends `count` requests, as many on each connection."""
    options = ["--h1", f"--clients={connections}", f"--requests={count}", "--log-file=/dev/stdout"]
    return ["h2load", *options, f"http://{address}:5000/"]


def load(connections: int, count: int, address: str) -> tuple[float, float, float]:
    """Return requests per second, and the median and 99th percentile of their time in ms.

    Each connection sends the same number, so those that a server keeps waiting count. Raises RuntimeError if one fails.
    """
    report = run(*load_command(connections, count, address))
    if ", 0 failed, 0 errored, 0 timeout" not in report:
        raise RuntimeError(report[-1000:])
    times = sorted(int(time) for time in re.findall(r"^\d+\t200\t(\d+)$", report, re.MULTILINE))
    rate = float(re.search(r"([\d.]+) req/s", report)[1])
    return rate, times[len(times) // 2] / 1000, times[len(times) * 99 // 100] / 1000


def speed(contestants: Contestants, workspace: pathlib.Path, runs: int) -> Values:
    """Requests per second and their time.

    Quota: `--cpus=1` on two CPUs, shared with h2load. A CPU of its own: `--cpuset-cpus=0`, no limit of memory, h2load
    on the other one. All containers run, but only one is asked at a time.
    """
    setups = {
        "quota of one CPU": (["--cpuset-cpus=0,1", *COMPOSE], {0, 1}),
        "a CPU of its own": (["--cpuset-cpus=0"], {1}),
    }
    counts = (1, 16, 64, 256) if runs > 1 else (64,)
    contestants = {name: each for name, each in CONTESTANTS.items() if name in {*contestants, "runtime, no log"}}
    for setup, (options, cpus) in setups.items():
        with ExitStack() as stack:
            addresses = {name: stack.enter_context(each.container(*options))[1] for name, each in contestants.items()}
            os.sched_setaffinity(0, cpus)  # of h2load
            rates = {name: load(16, 1600, address)[0] for name, address in addresses.items()}
            # Twice as many, but short: a server's speed depends on which CPUs its threads happen to run on.
            for connections, _, name in itertools.product(counts, range(2 * runs if runs > 1 else 1), contestants):
                each = max(10, round(rates[name] / connections))  # about a second
                found = load(connections, each * connections, addresses[name])
                for title, value in zip(("requests/s", "median time, ms", "99th percentile, ms"), found, strict=True):
                    yield f"{title}: {setup}, {connections} connection{'s' * (connections > 1)}", name, value
            os.sched_setaffinity(0, {0, 1})


def is_quick(address: str, delay: float) -> bool:
    """Wait `delay` seconds; return whether a request on a new connection is answered within a second."""
    time.sleep(delay)
    start = time.perf_counter()
    with suppress(OSError), connect(address, 1) as connection:
        request(connection)
        return time.perf_counter() - start < 1
    return False


READS_ALL = f"--volume={ROOT}/bench/reads_all.py:/app/app.py:ro"


def slow(contestants: Contestants, workspace: pathlib.Path, runs: int) -> Values:
    """Requests beside slow clients.

    Twenty requests, one every 0.2 s, while slow clients send a header or a body, a few bytes a second. When all
    connections are in use, ours close slow ones to make room.
    """
    attacks = [("headers", "-H", 1000), ("headers", "-H", 3000), ("bodies", "-B", 1000)]
    for _, (what, kind, count), (name, each) in itertools.product(range(runs), attacks, contestants.items()):
        with each.container(*COMPOSE, READS_ALL) as (_, address), ThreadPoolExecutor(20) as pool:
            options = [kind, "-c", count, "-r", 1000, "-i", 1, "-l", 60, "-u", f"http://{address}:5000/"]
            with subprocess.Popen(["slowhttptest", *map(str, options)], stdout=subprocess.PIPE, text=True) as attack:
                time.sleep(count / 1000 + 1)  # until all are connected
                quick = list(pool.map(partial(is_quick, address), [number / 5 for number in range(20)]))
                attack.send_signal(signal.SIGINT)  # SIGTERM would lose what it has printed
                connected = int(re.findall(r"connected:\D*1;32m +(\d+)", attack.stdout.read())[-1])
        beside = f"{count:,} clients with slow {what}"
        yield f"of 20 requests, answered within 1 s beside {beside}", name, sum(quick)
        yield f"slow clients connected after 5 s, of {beside}", name, connected


# Where the RFCs let a server choose, and our own limits: beginnings of names in tests/test_http.py.
NOT_COMPARED = (
    *("the same length", "a list of lengths", "length and encoding", "encoding", "chunked twice", "an empty encoding"),
    *("LF ", "CR ", "NUL in a value", "NUL in a trailer", "ESC in a value", "a folded", "a header folded", "OPTIONS"),
    *("a space before the first", "a space before the request", "a space after the request", "two spaces", "tabs"),
    *("two Content", "HTTP/0", "HTTP/1"),
    *("a method in", "an unknown method", "CONNECT", "an invalid second", "an ambiguous second", "control characters"),
    *("the longest", "an extension one byte", "a long trailer", "a trailer that", "an unknown coding"),
    *("an empty Host", "no Host in HTTP/1.0"),
)


def http(contestants: Contestants, workspace: pathlib.Path, runs: int) -> Values:
    """Unusual requests.

    Those of tests/test_http.py for which RFC 9110 or 9112 says (MUST or SHOULD) whether to answer or to refuse. They
    are our tests, so ours pass. Any refusal is right, whatever its status, and so is silence for a second. After a
    refusal, the next request on the connection must not be answered.
    """
    requests = {
        name: (sent + NEXT, expected)
        for name, (sent, expected) in REQUESTS.items()
        if not name.startswith(NOT_COMPARED) and not {413, 431} & set(expected)
    }
    for name, each in contestants.items():
        with each.container(*COMPOSE, READS_ALL) as (_, address), ThreadPoolExecutor(4) as pool:
            found = pool.map(partial(answers, address), *zip(*requests.values(), strict=True))
            yield f"right, of {len(requests)} requests", name, sum(found)


def answers(address: str, sent: bytes, expected: list[int]) -> bool:
    """Send bytes on a new connection; return whether the statuses that arrive within 1 s are as expected."""
    received = b""
    with suppress(OSError), connect(address, 1) as connection:
        connection.sendall(sent)
        while part := connection.recv(65536):
            received += part
    found = [status for status in statuses(received) if status != 100]
    # A server may close its connection after each response, as some do: then the next request is not answered.
    return found in ([200], expected) if expected[0] == 200 else 200 not in found


MEASURES = {each.__name__: each for each in (size, build, lint, life, stop, speed, slow, http)}
