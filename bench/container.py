"""Measure the image as its user meets it: size, start, stop, rebuild. Prints a Markdown table.

    python bench/container.py [--runs 7]

Needs a Docker Engine and the base image; PYTHON_IMAGE names another base. Whatever is compared is measured in turn
within one run, A B A B, and given as the median, because machines differ and drift; a figure in seconds holds for
this machine only, a ratio travels.
"""

import argparse
import gzip
import os
import pathlib
import re
import shutil
import socket
import statistics
import subprocess
import tarfile
import tempfile
import time
import urllib.request
import uuid
from collections.abc import Callable

ROOT = pathlib.Path(__file__).parent.parent
NAME = f"flask-helloworld-bench-{uuid.uuid4().hex[:8]}"


def run(*command: object, **options: object) -> str:
    """Run a command, fail if it fails, return what it prints."""
    options = {"check": True, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run([str(part) for part in command], **options).stdout


def seconds(action: Callable[[], object]) -> float:
    """Return how long `action` takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def compressed(image: str) -> int:
    """Return the size of `docker save IMAGE | gzip` in bytes."""
    with tempfile.TemporaryFile() as target:
        with (
            subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE) as save,
            gzip.GzipFile(fileobj=target, mode="wb", compresslevel=6) as packed,
        ):
            shutil.copyfileobj(save.stdout, packed, 1 << 20)
        if save.returncode:
            raise subprocess.CalledProcessError(save.returncode, save.args)
        return target.tell()


def content(image: str) -> tuple[int, int]:
    """Return the size of `docker export | gzip -6` of an image, and that of its files, in bytes.

    Not of `docker save`, which may give layers as an earlier command had them packed.
    """
    run("docker", "create", "--name", NAME, image)
    with tempfile.TemporaryFile() as unpacked, tempfile.TemporaryFile() as packed:
        run("docker", "export", NAME, stdout=unpacked)
        unpacked.seek(0)
        with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=6) as file:
            shutil.copyfileobj(unpacked, file, 1 << 20)
        unpacked.seek(0)
        with tarfile.open(fileobj=unpacked) as files:
            sizes = packed.tell(), sum(file.size for file in files)
    run("docker", "rm", NAME)
    return sizes


def memory(image: str, requests: int = 200) -> int:
    """Return the most that the server has had in memory after so many requests, in KiB."""
    port = free_port()
    run("docker", "run", "--detach", "--name", NAME, "--publish", f"127.0.0.1:{port}:5000", image)
    for _ in range(requests):
        deadline = time.perf_counter() + 60
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/Joe", timeout=10):
                    break
            except OSError:
                if time.perf_counter() > deadline:
                    raise
                time.sleep(0.01)
    status = run("docker", "exec", NAME, "python", "-c", "print(open('/proc/1/status').read())")
    run("docker", "rm", "--force", NAME)
    return int(re.search(r"VmHWM:\s+(\d+)", status)[1])


def free_port() -> int:
    """Return a port on which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def first_answer(image: str) -> float:
    """Return the seconds from `docker run --detach` to the first 200 of /health."""
    port = free_port()
    start = time.perf_counter()
    with subprocess.Popen(
        ["docker", "run", "--detach", "--name", NAME, "--publish", f"127.0.0.1:{port}:5000", image],
        stdout=subprocess.DEVNULL,
    ):
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
                    break
            except OSError:
                if time.perf_counter() - start > 60:
                    raise
                time.sleep(0.002)
        taken = time.perf_counter() - start
    run("docker", "rm", "--force", NAME)
    return taken


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7, help="how often to measure each figure (default: 7)")
    runs = parser.parse_args().runs

    default = re.search(r"^FROM (\S+) AS pinned$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[1]
    base = os.environ.setdefault("PYTHON_IMAGE", default)
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary) / "project"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv", ".env"))
        (folder / "override.yaml").write_text(f"services: {{web: {{image: {NAME}}}}}\n")
        os.environ |= {"COMPOSE_FILE": "compose.yaml:override.yaml", "COMPOSE_PROJECT_NAME": NAME, "PORT": "0"}
        try:
            table = measure(folder, base, runs)
        finally:
            run("docker", "rm", "--force", NAME)
            run("docker", "compose", "down", "--rmi", "all", cwd=folder)
            run("docker", "image", "rm", "--force", f"{NAME}:minimal")
    print(f"Medians of {runs} (smallest to largest)\n\n| figure | |\n|---|---|")
    for figure, value in table:
        print(f"| {figure} | {value} |")


def measure(folder: pathlib.Path, base: str, runs: int) -> list[tuple[str, str]]:
    """Return the rows of the table, measured with the copy of the project in `folder`."""
    minimal = f"{NAME}:minimal"

    def build(*options: str, target: str = "runtime", name: str = NAME) -> None:
        command = ["docker", "build", "--build-arg", "PYTHON_IMAGE", "--target", target, "--tag", name, *options, "."]
        run(*command, cwd=folder)

    def edit() -> None:
        with (folder / "app.py").open("a") as code:
            code.write(f"# {uuid.uuid4()}\n")

    def bare() -> None:
        run("docker", "run", "--rm", "--entrypoint", "python", NAME, "-IS", "-c", "pass")

    build()
    build(target="minimal", name=minimal)
    added = compressed(f"{NAME}:latest") - compressed(base)  # without a tag, docker would save them all

    bare()
    starts = [(first_answer(NAME), seconds(bare)) for _ in range(runs)]

    answers = [[first_answer(image) for image in (minimal, NAME)] for _ in range(runs)]
    memories = [[memory(image) for image in (minimal, NAME)] for _ in range(runs)]

    ups, stops = [], []
    for _ in range(runs):
        ups.append(seconds(lambda: run("docker", "compose", "up", "--wait", cwd=folder)))
        container = run("docker", "compose", "ps", "--quiet", cwd=folder).strip()
        stops.append(seconds(lambda container=container: run("docker", "stop", container)))
        run("docker", "compose", "down", cwd=folder)

    cold = [seconds(lambda: build("--no-cache")) for _ in range(min(runs, 3))]
    rebuilds = []
    for _ in range(runs):
        unchanged = seconds(build)
        edit()
        rebuilds.append(seconds(build) - unchanged)

    return [
        ("`docker save \\| gzip`, over its base", f"{added / 1e6:.2f} MB"),
        ("`docker run -d` to the first 200", spread([answer for answer, _ in starts])),
        ("`docker run --rm --entrypoint python IMAGE -IS -c pass`", spread([python for _, python in starts])),
        ("the first by the second", spread([answer / python for answer, python in starts], "x")),
        ("`docker compose up --wait`, image built", spread(ups)),
        ("`docker stop`, idle", spread(stops)),
        ("`docker build --no-cache`", spread(cold)),
        ("`docker build` after an edit of app.py, over one without", spread(rebuilds)),
        (
            "`minimal`: `docker export \\| gzip`, files",
            " and ".join(f"{size / 1e6:.2f} MB" for size in content(minimal)),
        ),
        ("`runtime`: `docker export \\| gzip`, files", " and ".join(f"{size / 1e6:.2f} MB" for size in content(NAME))),
        ("`minimal`: `docker save \\| gzip`", f"{compressed(minimal) / 1e6:.2f} MB"),
        ("`minimal`: first 200, by that of `runtime`", spread([mine / other for mine, other in answers], "x")),
        ("`minimal`: memory, by that of `runtime`", spread([mine / other for mine, other in memories], "x")),
    ]


def spread(values: list[float], unit: str = "s") -> str:
    """Return the median of `values`, the smallest and the largest as text."""
    return f"{statistics.median(values):.2f} {unit} ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    main()
