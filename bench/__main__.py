"""Compare our images with those that people use instead: `make bench`, or `make bench QUICK=1` in three minutes.

Needs Linux with two CPUs, a Docker Engine on it, the base image (PYTHON_IMAGE names another), h2load, slowhttptest.
Writes bench/results.json, docs/comparison.md and docs/comparison.svg. Between machines, compare ratios.
"""

import argparse
import datetime
import json
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.contestants import BASE, IMAGES, ROOT, SERVERS, run, workspace
from bench.measures import MEASURES, seconds
from bench.report import table, write

RESULTS = ROOT / "bench/results.json"
OF_IMAGES = {"size", "build", "lint"}
QUICK, NOT_QUICK = {"runtime", "tutorial", "waitress"}, {"slow", "http"}


def main() -> None:
    """Read the options, check the requirements, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=MEASURES, help="what to measure (default: all)")
    parser.add_argument("--runs", type=int, default=3, help="measurements of each figure (default: 3)")
    parser.add_argument("--quick", action="store_true", help="three contestants, one run, nothing is written")
    parser.add_argument("--report", action="store_true", help="measure nothing, write the report again")
    options = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if options.report:
        write(results)
        return
    if missing := [tool for tool in ("docker", "h2load", "slowhttptest") if not shutil.which(tool)]:
        sys.exit(f"bench: needs {', '.join(missing)} (on Debian: apt-get install nghttp2-client slowhttptest)")
    if sys.platform != "linux" or not {0, 1} <= os.sched_getaffinity(0):
        sys.exit("bench: needs Linux with two CPUs, 0 and 1")
    os.sched_setaffinity(0, {0, 1})
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if files < 4096:  # for 3,000 slow clients
        sys.exit(f"bench: the limit of open files is {files} (`ulimit -Hn`), must be 4096 or more")
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)
    try:
        measure(options, results)
    except subprocess.CalledProcessError as error:
        sys.exit(f"bench: `{' '.join(error.cmd)}` failed:\n{error.stderr}")
    except KeyboardInterrupt:
        sys.exit("bench: interrupted; its containers and images are removed, the build cache is Docker's")


def measure(options: argparse.Namespace, results: dict) -> None:
    """Build the images and measure. Print each value; after each measure write the results, unless options.quick."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary, workspace(temporary) as folder:
        for name, each in IMAGES.items():
            if not options.quick or name in QUICK:
                print(f"building {name}", flush=True)
                each.build(folder)
        for measure in options.only or [each for each in MEASURES if not options.quick or each not in NOT_QUICK]:
            contestants = IMAGES if measure in OF_IMAGES else SERVERS
            if options.quick:
                contestants = {name: each for name, each in contestants.items() if name in QUICK}
            figures, noise = {}, [seconds(sum, range(10_000_000)) for _ in range(3)]
            for title, name, value in MEASURES[measure](contestants, folder, 1 if options.quick else options.runs):
                figures.setdefault(title, {}).setdefault(name, []).append(round(value, 4))
                print(f"{time.monotonic() - started:5.0f} s  {title}: {name}: {value:.2f}", flush=True)
            noise += [seconds(sum, range(10_000_000)) for _ in range(3)]
            if options.quick:
                print(f"\n{table(measure, figures)}\n")
                continue
            results[measure] = {"run": environment() | {"noise": [min(noise), max(noise)]}, "figures": figures}
            results = {each: results[each] for each in MEASURES if each in results}
            RESULTS.write_text(json.dumps(results).replace("}, ", "},\n") + "\n")  # a line for each figure
            write(results)
            print(
                "bench: wrote docs/comparison.md; now update the figures that tests/test_docs.py compares", flush=True
            )


def environment() -> dict[str, str]:
    """Return what the results depend on."""
    processor = re.search("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text())
    processor = processor[1] if processor else platform.machine()
    code = "import platform as p; print('Python', p.python_version(), 'on', p.freedesktop_os_release()['PRETTY_NAME'])"
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{os.cpu_count()} x {processor}, Linux {platform.release()}",
        "engine": "Docker " + run("docker", "version", "--format", "{{.Server.Version}}").strip(),
        "base image": f"the base image {BASE}{', not the pinned one' * bool(os.environ.get('PYTHON_IMAGE'))}, "
        f"with {run('docker', 'run', '--rm', BASE, 'python', '-c', code).strip()}",
    }


main()
