"""Measure what a user of the image notices: size, build, start, stop, memory. Prints a Markdown table.

    python bench/container.py [--runs 7]

Compares the image that many tutorials show with `runtime` and `minimal`, on one base image; PYTHON_IMAGE names another
base. The images take turns (A B C A B C), because the speed of a machine drifts. Between machines, compare ratios.
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
BUILDS = {  # image: options of `docker build`
    "tutorial": ["--file", "docs/tutorial.Dockerfile"],
    "runtime": ["--target", "runtime"],
    "minimal": ["--target", "minimal"],
}


def run(*command: object, **options: object) -> str:
    """Run a command and return its output; raises CalledProcessError."""
    options = {"check": True, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.run([str(part) for part in command], **options).stdout


def seconds(action: Callable[[], object]) -> float:
    """Return how long `action` takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def exported(image: str) -> tuple[float, float]:
    """Return the size of `docker export | gzip -6` of an image, and the total size of its files, in MB.

    Not `docker save`: its layers may be compressed already, depending on which command made them.
    """
    run("docker", "create", "--name", NAME, image)
    with tempfile.TemporaryFile() as unpacked, tempfile.TemporaryFile() as packed:
        run("docker", "export", NAME, stdout=unpacked)
        unpacked.seek(0)
        with gzip.GzipFile(fileobj=packed, mode="wb", compresslevel=6) as file:
            shutil.copyfileobj(unpacked, file, 1 << 20)
        unpacked.seek(0)
        with tarfile.open(fileobj=unpacked) as files:
            sizes = packed.tell() / 1e6, sum(file.size for file in files) / 1e6
    run("docker", "rm", NAME)
    return sizes


def until_200(url: str) -> None:
    """Ask until the response has status 200; raises the last error after 60 s."""
    deadline = time.perf_counter() + 60
    while True:
        try:
            with urllib.request.urlopen(url, timeout=1):
                return
        except OSError:
            if time.perf_counter() > deadline:
                raise
            time.sleep(0.002)


def life(image: str) -> tuple[float, float, float]:
    """Run a container. Return the seconds to its first 200, its peak memory in MB, the seconds that its stop takes.

    The memory is that of all its processes after 200 requests, and the stop comes when it is idle.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    url = f"http://127.0.0.1:{port}/health"
    start = time.perf_counter()
    with subprocess.Popen(
        ["docker", "run", "--detach", "--name", NAME, "--publish", f"127.0.0.1:{port}:5000", image],
        stdout=subprocess.DEVNULL,
    ):
        until_200(url)
    first = time.perf_counter() - start
    for _ in range(200):
        until_200(url)
    code = """if True:
        import glob, re
        for path in glob.glob("/proc/[0-9]*/status"):
            print(re.search(r"VmHWM:\\s+(\\d+)", open(path).read())[1])
        """
    peaks = run("docker", "exec", NAME, "python", "-c", code).split()[:-1]  # the last one is this Python itself
    stop = seconds(lambda: run("docker", "stop", NAME))
    run("docker", "rm", NAME)
    return first, sum(map(int, peaks)) * 1024 / 1e6, stop


def measure(folder: pathlib.Path, base: str, runs: int) -> dict[str, dict[str, str]]:
    """Measure the images of the project's copy in `folder`; return the rows of the table, each by image."""

    def build(image: str, *options: str) -> None:
        arguments = [f"--build-arg=PYTHON_IMAGE={base}", f"--tag={NAME}:{image}", *BUILDS[image], *options]
        run("docker", "build", *arguments, ".", cwd=folder)

    def rebuild(image: str) -> float:
        with (folder / "app.py").open("a") as code:
            code.write(f"# {uuid.uuid4()}\n")
        return seconds(lambda: build(image))

    def by_image(measurement: Callable[[str], object], times: int) -> dict[str, list]:
        rounds = [{image: measurement(image) for image in BUILDS} for _ in range(times)]
        return {image: [values[image] for values in rounds] for image in BUILDS}

    cold = by_image(lambda image: seconds(lambda: build(image, "--no-cache")), min(runs, 3))
    sizes = by_image(lambda image: exported(f"{NAME}:{image}"), 1)
    lives = by_image(lambda image: life(f"{NAME}:{image}"), runs)
    pythons = by_image(
        lambda image: seconds(lambda: run("docker", "run", "--rm", f"{NAME}:{image}", "python", "-IS", "-c", "pass")),
        runs,
    )
    rebuilds = by_image(rebuild, runs)
    packed, unpacked = exported(base)

    def row(cell: Callable[[str], str]) -> dict[str, str]:
        return {image: cell(image) for image in BUILDS}

    return {
        "compressed, MB": row(lambda image: f"{sizes[image][0][0]:.1f}"),
        "compressed, over the base image, MB": row(lambda image: f"{sizes[image][0][0] - packed:+.1f}"),
        "files, MB": row(lambda image: f"{sizes[image][0][1]:.1f}"),
        "files, over the base image, MB": row(lambda image: f"{sizes[image][0][1] - unpacked:+.1f}"),
        f"build without cache, s ({min(runs, 3)} runs)": row(lambda image: summary(cold[image])),
        "rebuild after an edit of app.py, s": row(lambda image: summary(rebuilds[image])),
        "start: `docker run` to the first response, s": row(lambda image: summary([v[0] for v in lives[image]])),
        "a container that runs `python -IS -c pass`, s": row(lambda image: summary(pythons[image])),
        "memory at its peak, MB": row(lambda image: summary([v[1] for v in lives[image]])),
        "stop when idle, s": row(lambda image: summary([v[2] for v in lives[image]])),
    }


def summary(values: list[float]) -> str:
    """Return the median, the smallest and the largest of `values` as text."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=7, help="measurements of each figure (default: 7)")
    runs = parser.parse_args().runs
    dockerfile = (ROOT / "Dockerfile").read_text()
    base = os.environ.get("PYTHON_IMAGE") or re.search(r"^FROM (\S+) AS pinned$", dockerfile, re.MULTILINE)[1]
    with tempfile.TemporaryDirectory() as temporary:
        folder = pathlib.Path(temporary) / "project"
        shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns(".git", ".venv*", ".env"))
        tutorial = folder / "docs" / "tutorial.Dockerfile"
        tutorial.write_text(re.sub(r"(?m)^FROM .*", f"FROM {base}", tutorial.read_text()))
        try:
            table = measure(folder, base, runs)
        finally:
            run("docker", "rm", "--force", NAME)
            run("docker", "image", "rm", "--force", *(f"{NAME}:{image}" for image in BUILDS))
    print(f"Medians of {runs} runs (smallest to largest)\n\n| | {' | '.join(BUILDS)} |\n|---|{'---|' * len(BUILDS)}")
    for name, cells in table.items():
        print(f"| {name} | {' | '.join(cells.values())} |")


if __name__ == "__main__":
    main()
