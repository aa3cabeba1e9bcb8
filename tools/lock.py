"""The locks: make them, and tell what is wrong with them.

    python tools/lock.py check             what can be said of the files alone; takes no package, no network
    python tools/lock.py pin FOLDER ...    write fresh locks into FOLDER; what follows is for pip-compile
    python tools/lock.py diff FOLDER       compare the locks with those

Each problem is one line that names the file, the line and what would be right; one of them makes the exit code 1.
"""

import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
from collections.abc import Iterator
from typing import NamedTuple

# In this order: the second is constrained by the first.
SOURCES = ("requirements.in", "requirements-dev.in")
RUNTIME, DEV = LOCKS = ("requirements.txt", "requirements-dev.txt")
# Where the base is named beside the Dockerfile.
DOCUMENTS = ("README.md", ".github/base/Dockerfile")

CONFLICT = re.compile(r"<<<<<<<|=======|>>>>>>>|\|\|\|\|\|\|\|")
PIN = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[^\s;]+)(\s*;.*?)?(?P<hashes>(\s+--hash=\S+)*)")
HASH = re.compile(r"sha256:[0-9a-f]{64}")
IMAGE = re.compile(r"(?P<name>[\w./-]+(:\d+/[\w./-]+)?):(?P<tag>[\w.-]+)@sha256:[0-9a-f]{64}")


class Pin(NamedTuple):
    """One package of a lock: where it stands, what it is locked to, and where each hash stands."""

    place: str
    version: str
    hashes: dict[str, str]


def normal(name: str) -> str:
    """Return a package's name as the index compares it: https://packaging.python.org/en/latest/specifications/name-normalization/."""
    return re.sub(r"[-_.]+", "-", name).lower()


def logical_lines(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Yield the lines of a requirements file with the number that each begins at: continued ones joined, no comments.

    As pip reads them: https://pip.pypa.io/en/stable/reference/requirements-file-format/
    """
    begin, parts = 0, []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        begin = begin if parts else number
        text = re.sub(r"(^|\s)#.*", "", line)
        parts.append(text.removesuffix("\\").strip())
        if not text.endswith("\\"):
            if joined := " ".join(parts).strip():
                yield begin, joined
            parts = []
    if joined := " ".join(parts).strip():
        yield begin, joined


def unreadable(path: pathlib.Path) -> Iterator[str]:
    """Tell what keeps pip-compile from reading a file: it is not there, or a merge has left its conflict in it."""
    if not path.is_file():
        yield f"{path.name} is missing; `git checkout {path.name}` restores it"
        return
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        if CONFLICT.match(line):
            yield (
                f"{path.name}:{number}: {line!r}: a conflict of a merge; take one side whole "
                f"(git checkout --ours {path.name}) and run: make lock"
            )
            return


def wrong_in_source(path: pathlib.Path) -> Iterator[str]:
    """Tell what a file of requirements asks for that no lock can hold."""
    for number, line in logical_lines(path):
        place = f"{path.name}:{number}: {line!r}"
        if re.match(r"(-r|-c|--requirement|--constraint)\b", line):
            continue
        if re.match(r"(-e|--editable)\b|\.|/|[A-Za-z]:\\|[\w+]+:", line) or re.search(r"\s@\s|@\s*\w+:", line):
            yield f"{place}: a path or an address; a lock takes names and versions from a package index"
        elif line.startswith("-"):
            yield f"{place}: an option; an index belongs into the settings of the machine (PIP_INDEX_URL, pip.conf)"


def read_lock(path: pathlib.Path) -> tuple[dict[str, Pin], list[str]]:
    """Return the packages that a lock pins, by name, and one line for each that is wrong by itself."""
    pins: dict[str, Pin] = {}
    problems = []
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in logical_lines(path):
        place = f"{path.name}:{number}"
        if line.startswith("-"):
            problems.append(f"{place}: {line!r}: an option; a lock has none, so that it means the same everywhere")
            continue
        if not (match := PIN.fullmatch(line)):
            problems.append(f"{place}: {line[:80]!r}: not name==version with hashes")
            continue
        found = re.findall(r"--hash=(\S+)", match["hashes"])
        problems += [f"{place}: {match['name']}: {h!r} is no SHA-256" for h in found if not HASH.fullmatch(h)]
        if not found:
            problems.append(f"{place}: {match['name']}=={match['version']} has no hash")
        places = {
            text: f"{path.name}:{n}" for text in found for n in range(number, len(texts) + 1) if text in texts[n - 1]
        }
        name = normal(match["name"])
        if name in pins:
            problems.append(f"{place}: {name} is pinned already, at {pins[name].place}")
        pins[name] = Pin(place, match["version"], places)
    return pins, problems


def contradictions(runtime: dict[str, Pin], dev: dict[str, Pin]) -> Iterator[str]:
    """Tell where what the project is worked on with is not what it runs with."""
    for name in runtime.keys() & dev.keys():
        ours, theirs = runtime[name], dev[name]
        if theirs.version != ours.version:
            yield f"{theirs.place}: {name}=={theirs.version} contradicts {name}=={ours.version} at {ours.place}"
        elif theirs.hashes.keys() != ours.hashes.keys():
            yield f"{theirs.place}: {name}=={theirs.version} has other hashes than at {ours.place}"


def unlocked_images(dockerfile: list[str]) -> Iterator[str]:
    """Tell which images enter a build other than by PYTHON_IMAGE or by digest."""
    known = {"scratch", "${PYTHON_IMAGE}"}
    for number, line in enumerate(dockerfile, start=1):
        stage = re.match(r"FROM\s+(?:--\S+\s+)*(\S+)(?:\s+AS\s+(\S+))?", line)
        images = [stage[1]] if stage else re.findall(r"[-,]from=([^\s,]+)", line)
        images += re.findall(r"# *syntax *= *(\S+)", line)
        for image in images:
            if image not in known and not re.search(r"@sha256:[0-9a-f]{64}$", image):
                yield f"Dockerfile:{number}: {image}: neither a stage nor an image by digest"
        if stage:
            known.add(stage[2])


def wrong_base(folder: pathlib.Path, dockerfile: list[str]) -> Iterator[str]:
    """Tell if the base has no digest, and where another base is named than the build stands on."""
    defaults = {
        n: line.partition("=")[2] for n, line in enumerate(dockerfile, 1) if line.startswith("ARG PYTHON_IMAGE=")
    }
    if len(defaults) != 1:
        yield "Dockerfile: takes one line `ARG PYTHON_IMAGE=name:tag@sha256:…`"
        return
    ((at, base),) = defaults.items()
    if not IMAGE.fullmatch(base):
        yield f"Dockerfile:{at}: PYTHON_IMAGE={base}: takes name:tag@sha256:…; make upgrade finds the digest"
    for name in DOCUMENTS:
        lines = (folder / name).read_text().splitlines() if (folder / name).is_file() else []
        for number, line in enumerate(lines, start=1):
            for found in IMAGE.finditer(line):
                if found["name"] == base.partition(":")[0] and found[0] != base:
                    yield f"{name}:{number}: {found[0]} is not the base of Dockerfile:{at}, {base}"


def check(folder: pathlib.Path) -> list[str]:
    """Return what is wrong with the locks and the base, as far as the files of a folder tell."""
    problems = [problem for name in (*SOURCES, *LOCKS) for problem in unreadable(folder / name)]
    if not problems:
        for name in SOURCES:
            problems += wrong_in_source(folder / name)
        (runtime, wrong), (dev, wrong_too) = (read_lock(folder / name) for name in LOCKS)
        problems += [*wrong, *wrong_too, *contradictions(runtime, dev)]
    dockerfile = (folder / "Dockerfile").read_text().splitlines()
    return [*problems, *unlocked_images(dockerfile), *wrong_base(folder, dockerfile)]


def pin(folder: pathlib.Path, into: pathlib.Path, options: list[str]) -> list[str]:
    """Write fresh locks; return what keeps them from being made, and then write none.

    Args:
        folder: has the sources, and the locks whose pins stay where the sources allow it.
        into: where the fresh ones go, once both are there.
        options: go to pip-compile.

    """
    for name in SOURCES:
        if problems := [*unreadable(folder / name)] or [*wrong_in_source(folder / name)]:
            return problems
    there = [folder / name for name in LOCKS if (folder / name).is_file()]
    if problems := [problem for lock in there for problem in unreadable(lock)]:
        return problems
    names = {name for lock in there for name in read_lock(lock)[0]}
    for option in options:
        wanted = re.match(r"--upgrade-package=([\w.-]*)", option)
        if wanted and normal(wanted[1]) not in names:
            return [f"PACKAGE={wanted[1]}: not in {' or '.join(LOCKS)}"]
    with tempfile.TemporaryDirectory() as scratch:
        for path in [folder / "pyproject.toml", *folder.glob("requirements*.in"), *there]:
            shutil.copy(path, scratch)
        for name in SOURCES:
            # The third -v makes pip say why it has left out an index. All of it is only read here.
            command = [pathlib.Path(sys.executable).with_name("pip-compile"), "-vvv", *options, name]
            done = subprocess.run(command, cwd=scratch, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if problem := (explain if done.returncode else yanked)(done.stdout, folder / name):
                return [problem]
        for name in LOCKS:
            shutil.copy(pathlib.Path(scratch) / name, into)
    return []


def yanked(output: str, source: pathlib.Path) -> str | None:
    """Say which release that its authors have taken back pip-compile has pinned, if any.

    https://packaging.python.org/en/latest/specifications/file-yanking/
    """
    found = re.search(r"yanked version: '(\S+)' candidate \(version (\S+) .*\n.*being yanked: (.*)", output)
    if not found:
        return None
    return f"{place_of(found[1], source)}: {found[1]}=={found[2]} is yanked ({found[3].strip()}); take another"


def explain(output: str, source: pathlib.Path) -> str:
    """Say in one line why pip-compile has failed, by all that it has printed about a source."""
    for address, reason in re.findall(r"Could not fetch URL (\S+): (.+) - skipping", output):
        if "404 Client Error" not in reason:  # that index has no such package: another one may
            cause = re.search(r"\[Errno.*?\] [\w ]+|too many \d+ error responses|\d{3} \w+ Error|timed out", reason)
            host = urllib.parse.urlsplit(address).hostname  # without what may stand in the address to log in
            return f"the package index {host} cannot be read: {cause[0] if cause else reason[:200]}"
    if swapped := re.search(r"Expected sha256 (\w+)(?:.|\n)*?Got\s+(\w+)", output):
        return f"{place_of_hash(swapped[1], source)}: the index has another file than is locked, sha256:{swapped[2]}"
    if clash := re.search(
        r"ERROR: (Cannot install .*) because .*\n(?:.*\n)*?.*conflict is caused by:((?:\n +.+)+)", output
    ):
        reasons = "; ".join(line.strip() for line in clash[2].strip().splitlines())
        return f"{source.name}: {clash[1]} because of conflicts: {reasons}"
    if missing := re.search(r"ERROR: Could not find a version .* requirement (.+) \(from versions: (.*)\)", output):
        wanted, versions = missing.groups()
        if versions == "none":
            return f"{place_of(wanted, source)}: no package {wanted} on the index; is the name right?"
        return f"{place_of(wanted, source)}: no release is {wanted}; the newest is {versions.split(', ')[-1]}"
    last = re.split(r"\n(?=[\w.]+: )", output.strip())[-1]
    message = re.sub(r"\s+", " ", re.sub(r"^[\w.]+: ", "", last))
    if number := re.search(r" \(from line (\d+) of (\S+)\)", message):
        return f"{number[2]}:{number[1]}: {message.replace(number[0], '')}"
    return f"{source.name}: {message[-300:]}"


def place_of(requirement: str, source: pathlib.Path) -> str:
    """Return the line of a file that asks for a package; only the file's name if none does, but a package does."""
    for number, line in logical_lines(source):
        if normal(re.match(r"[\w.-]*", line)[0]) == normal(re.match(r"[\w.-]*", requirement)[0]):
            return f"{source.name}:{number}"
    return source.name


def place_of_hash(digest: str, source: pathlib.Path) -> str:
    """Return the line of the lock, beside a source, that has a hash."""
    for name in LOCKS:
        lines = (source.parent / name).read_text().splitlines() if (source.parent / name).is_file() else []
        for number, line in enumerate(lines, start=1):
            if digest in line:
                return f"{name}:{number}"
    return source.name


def diff(folder: pathlib.Path, fresh: pathlib.Path) -> Iterator[str]:
    """Tell where the locks are not what pip-compile makes of the sources and the index."""
    for name in LOCKS:
        if (folder / name).read_bytes() == (fresh / name).read_bytes():
            continue
        ours, theirs = read_lock(folder / name)[0], read_lock(fresh / name)[0]
        problems = []
        for package in sorted(ours.keys() | theirs.keys()):
            mine, right = ours.get(package), theirs.get(package)
            if not right:
                problems.append(f"{mine.place}: {package}=={mine.version}: nothing asks for it")
            elif not mine:
                problems.append(f"{name}: {package}=={right.version} is missing")
            elif mine.version != right.version:
                problems.append(f"{mine.place}: {package}=={mine.version} should be {right.version}")
            else:
                pinned = f"{package}=={mine.version}"
                unknown, lacking = mine.hashes.keys() - right.hashes.keys(), right.hashes.keys() - mine.hashes.keys()
                problems += [f"{mine.hashes[h]}: {pinned}: the index has no file {h}" for h in sorted(unknown)]
                problems += [f"{mine.place}: {pinned}: the index also has {h}" for h in sorted(lacking)]
        if not problems:  # a comment, or the order
            pairs = zip(*((where / name).read_text().splitlines() for where in (folder, fresh)), strict=False)
            differing = (n for n, (mine, right) in enumerate(pairs, start=1) if mine != right)
            problems = [f"{name}:{next(differing, 'end')}: not as pip-compile writes it"]
        yield from problems


def main(arguments: list[str]) -> int:
    """Run one command, print what is wrong; return the exit code."""
    here = pathlib.Path()
    match arguments:
        case ["check"]:
            problems, remedy = check(here), ""
        case ["pin", into, *options]:
            problems, remedy = pin(here, pathlib.Path(into), options), ""
        case ["diff", fresh]:
            problems = list(diff(here, pathlib.Path(fresh)))
            remedy = "the locks are not what the .in files and the index come to; if that is no surprise: make lock"
        case _:
            problems, remedy = ["takes: check | pin FOLDER [OPTION...] | diff FOLDER"], ""
    for problem in [*problems, remedy] if problems and remedy else problems:
        print(f"lock: {problem}", file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
