"""The locks: make them, and tell what is wrong with them.

    python tools/lock.py check          what can be said of the files alone; takes no package, no network
    python tools/lock.py ready          of that, what would keep pip-compile from reading them
    python tools/lock.py pin FOLDER     write fresh locks into FOLDER; PIP_COMPILE_OPTIONS goes to pip-compile
    python tools/lock.py diff FOLDER    compare the locks with those

Each problem is one line that names the file, the line and what would be right; one of them makes the exit code 1.
"""

import os
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
OWN_SOURCES = ("requirements.in", "requirements-dev.in")
RUNTIME, DEV = ("requirements.txt", "requirements-dev.txt")
# Folders of which, by .dockerignore, a build does not know; as it does not of hidden ones.
UNSEEN = {"bench", "build", "deploy", "dist", "env", "instance", "node_modules", "tools", "venv", "wheelhouse"}

CONFLICT = re.compile(r"<<<<<<<|=======|>>>>>>>|\|\|\|\|\|\|\|")
PIN = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[^\s;]+)(\s*;.*?)?(?P<hashes>(\s+--hash=\S+)*)")
HASH = re.compile(r"sha256:[0-9a-f]{64}")
# The settings of pyproject.toml, which are for pip-compile by itself: what the locks are held to must not hang on them.
SETTINGS = (
    *("--no-config", "--generate-hashes", "--no-reuse-hashes", "--strip-extras", "--allow-unsafe", "--newline=lf"),
    *("--no-header", "--no-emit-index-url", "--no-emit-find-links", "--no-emit-trusted-host"),
)

# https://packaging.python.org/en/latest/specifications/dependency-specifiers/, without addresses.
REQUIREMENT = re.compile(r"[A-Za-z0-9][\w.-]*\s*(\[[\w\s.,-]*\])?\s*\(?((===|~=|==|!=|<=|>=|<|>)[^@/;]*)?(;.*)?")
IMAGE = re.compile(r"[\w./:-]+:[\w.-]+@sha256:[0-9a-f]{64}")


class Pin(NamedTuple):
    """One package of a lock: where it stands, what it is locked to, and where each hash stands."""

    place: str
    version: str
    hashes: dict[str, str]


def normal(name: str) -> str:
    """Return a package's name as the index compares it: https://packaging.python.org/en/latest/specifications/name-normalization/."""
    return re.sub(r"[-_.]+", "-", name).lower()


def sources(folder: pathlib.Path) -> list[str]:
    """Return the files that ask for packages: the project's own, and those of applications in folders (APP_DIR)."""
    deeper = []
    for top, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in UNSEEN]
        path = pathlib.Path(top).relative_to(folder)
        if path.parts and OWN_SOURCES[0] in files:
            deeper.append((path / OWN_SOURCES[0]).as_posix())
    return [*OWN_SOURCES, *sorted(deeper)]


def locks(folder: pathlib.Path) -> list[str]:
    """Return the locks that a folder's sources are pinned in, there or not."""
    return [name.removesuffix(".in") + ".txt" for name in sources(folder)]


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
    """Tell what keeps a file from being read, or from being read as here: not there, another encoding, a conflict."""
    if not path.is_file():
        yield f"{path} is missing; `git checkout {path}` restores it"
        return
    text = path.read_text(encoding="utf-8", errors="replace")
    if text.startswith("\ufeff") or "\ufffd" in text or re.search("#.*coding[:=]", text):
        yield f"{path}: takes UTF-8, without a byte order mark and without a coding line"
    for number, line in enumerate(text.splitlines(), start=1):
        if CONFLICT.match(line):
            yield (
                f"{path}:{number}: {line!r}: a conflict of a merge; take one side whole "
                f"(git checkout --ours {path}) and run: make lock"
            )
            return


def wrong_in_source(path: pathlib.Path) -> Iterator[str]:
    """Tell what a file of requirements asks for that no lock can hold; a name and versions is all that it may."""
    for number, line in logical_lines(path):
        place = f"{path}:{number}: {line!r}"
        if line == f"-c {RUNTIME}" and path.name != OWN_SOURCES[0]:
            continue
        if line.startswith("-") and not re.match(r"(-e|--editable)\b", line):
            yield f"{place}: an option; indexes are named in pip's own configuration, for a build in that of the base"
        elif re.match(r"-e|--editable|\.|/|\w[\w+]*:", line) or re.search(r"[/@\\$]|\.(whl|zip|tar\.\w+)\b", line):
            yield f"{place}: a path or an address; a lock takes names and versions from a package index"
        elif not REQUIREMENT.fullmatch(line):
            yield f"{place}: not a requirement; takes a name, and versions as in Flask ~= 3.1"


def read_lock(path: pathlib.Path) -> tuple[dict[str, Pin], list[str]]:
    """Return the packages that a lock pins, by name, and one line for each that is wrong by itself."""
    pins: dict[str, Pin] = {}
    problems = []
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in logical_lines(path):
        place = f"{path}:{number}"
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
        places = {text: f"{path}:{n}" for text in found for n in range(number, len(texts) + 1) if text in texts[n - 1]}
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


def unlocked(dockerfile: list[str]) -> Iterator[str]:
    """Tell what enters a build other than by PYTHON_IMAGE, by digest, by hash or from the folder."""
    known = {"scratch", "${PYTHON_IMAGE}"}
    heredoc = None
    for number, line in enumerate(dockerfile, start=1):
        if heredoc:
            heredoc = None if line == heredoc else heredoc
            continue
        if begins := re.match(r"\s*(?:COPY|RUN|ADD)\b.*<<-?['\"]?(\w+)", line, re.IGNORECASE):
            heredoc = begins[1]
        place = f"Dockerfile:{number}"
        stage = re.match(r"\s*FROM\s+(?:--\S+\s+)*(\S+)(?:\s+AS\s+(\S+))?", line, re.IGNORECASE)
        images = [stage[1]] if stage else re.findall(r"\bfrom=[\"']?([^\s,\"']+)", line)
        images += re.findall(r"^#\s*syntax\s*=\s*(\S+)", line, re.IGNORECASE)
        for image in images:
            if image not in known and not re.search(r"@sha256:[0-9a-f]{64}$", image):
                yield f"{place}: {image}: neither a stage nor an image by digest"
        if stage:
            known.add(stage[2])
        if re.match(r"\s*ADD\b.*://", line, re.IGNORECASE) and "--checksum=sha256:" not in line:
            yield f"{place}: an address without --checksum=sha256:…"


def wrong_base(folder: pathlib.Path, dockerfile: list[str]) -> Iterator[str]:
    """Tell if the base has no digest, and where it is not named as the one that the build stands on."""
    default = re.compile(r"\s*ARG\b.*PYTHON_IMAGE\s*=", re.IGNORECASE)
    defaults = {number: line for number, line in enumerate(dockerfile, start=1) if default.match(line)}
    if len(defaults) != 1:
        yield f"Dockerfile: takes one line `ARG PYTHON_IMAGE=name:tag@sha256:…`, not {len(defaults)}"
        return
    ((at, line),) = defaults.items()
    base = line.removeprefix("ARG PYTHON_IMAGE=")
    if not IMAGE.fullmatch(base):
        yield f"Dockerfile:{at}: {line}: takes PYTHON_IMAGE=name:tag@sha256:…; make upgrade finds the digest"
    for name, begins in (("README.md", ""), (".github/base/Dockerfile", "FROM ")):
        lines = (folder / name).read_text().splitlines() if (folder / name).is_file() else [begins + base]
        if not any(begins + base in line for line in lines):
            number = next(
                (n for n, line in enumerate(lines, start=1) if IMAGE.search(line) or line.startswith("FROM")), 1
            )
            yield f"{name}:{number}: does not name the base of Dockerfile:{at}, {base}"
    for number, line in enumerate((folder / "compose.yaml").read_text().splitlines(), start=1):
        if re.search(r"PYTHON_IMAGE\s*[=:]", line):
            yield f"compose.yaml:{number}: {line.strip()!r}: the base is the Dockerfile's; takes PYTHON_IMAGE alone"


def check(folder: pathlib.Path) -> list[str]:
    """Return what is wrong with the locks and the base, as far as the files of a folder tell."""
    missing = [folder / name for name in locks(folder) if name != DEV and not (folder / name).is_file()]
    problems = [problem for path in missing for problem in unreadable(path)] + ready(folder)
    if not problems:
        problems += contradictions(*(read_lock(folder / name)[0] for name in (RUNTIME, DEV)))
    dockerfile = (folder / "Dockerfile").read_text().splitlines()
    return [*problems, *unlocked(dockerfile), *wrong_base(folder, dockerfile)]


def ready(folder: pathlib.Path) -> list[str]:
    """Return what keeps pip-compile from reading a folder's files; that there is no lock for the runtime does not."""
    asking = [folder / name for name in sources(folder)]
    there = [folder / name for name in locks(folder) if name == DEV or (folder / name).is_file()]
    problems = [problem for path in [*asking, *there] for problem in unreadable(path)]
    if not problems:
        problems += [problem for path in asking for problem in wrong_in_source(path)]
        problems += [problem for lock in there for problem in read_lock(lock)[1]]
    return problems


def pin(folder: pathlib.Path, into: pathlib.Path, options: list[str]) -> list[str]:
    """Write fresh locks; return what keeps them from being made, and then write none.

    Args:
        folder: has the sources, and the locks whose pins stay where the sources allow it.
        into: where the fresh ones go, once both are there.
        options: go to pip-compile.

    """
    if problems := ready(folder):
        return problems
    there = [name for name in locks(folder) if (folder / name).is_file()]
    names = {name for lock in there for name in read_lock(folder / lock)[0]}
    for option in options:
        wanted = re.match(r"--upgrade-package=([\w.-]*)", option)
        if wanted and normal(wanted[1]) not in names:
            return [f"PACKAGE={wanted[1]}: not in {' or '.join(there)}"]
    with tempfile.TemporaryDirectory() as scratch:
        for name in [*sources(folder), *there]:
            copy(folder, pathlib.Path(scratch), name)
        for name in sources(folder):
            # The third -v makes pip say why it has left out an index. All of it is only read here.
            command = [pathlib.Path(sys.executable).with_name("pip-compile"), "-vvv", *SETTINGS, *options, name]
            done = subprocess.run(command, cwd=scratch, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if problem := (explain if done.returncode else yanked)(done.stdout, folder / name):
                return [problem]
        for name in locks(folder):
            copy(pathlib.Path(scratch), into, name)
    return []


def copy(folder: pathlib.Path, into: pathlib.Path, name: str) -> None:
    """Copy one file from a folder to the same place in another."""
    (into / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(folder / name, into / name)


def yanked(output: str, source: pathlib.Path) -> str | None:
    """Say which release that its authors have taken back pip-compile has pinned, if any.

    https://packaging.python.org/en/latest/specifications/file-yanking/
    """
    found = re.search(r"yanked version: '(\S+)' candidate \(version (\S+) .*\n.*being yanked: (.*)", output)
    if not found:
        return None
    name, version, reason = found.groups()
    remedy = f"ask for another, or: make upgrade PACKAGE={name}"
    return f"{place_of(name, source)}: {name}=={version} is yanked ({reason.strip()}); {remedy}"


def explain(output: str, source: pathlib.Path) -> str:
    """Say in one line why pip-compile has failed, by all that it has printed about a source."""
    for address, reason in re.findall(r"Could not fetch URL (\S+): (.+) - skipping", output):
        if "404 Client Error" not in reason:  # that index has no such package: another one may
            cause = re.search(
                r"\[Errno.*?\] [\w ]+|too many \d+ error responses|\d{3} \w+ Error|timed out|CERTIFICATE[^(]*", reason
            )
            host = urllib.parse.urlsplit(address).hostname  # without what may stand in the address to log in
            return f"the package index {host} cannot be read: {cause[0] if cause else reason[:200]}"
    if swapped := re.search(r"Expected sha256 (\w+)(?:.|\n)*?Got\s+(\w+)", output):
        return f"{place_of_hash(swapped[1], source)}: the index has another file than is locked, sha256:{swapped[2]}"
    if clash := re.search(
        r"ERROR: (Cannot install .*) because .*\n(?:.*\n)*?.*conflict is caused by:((?:\n +\S.*)+)", output
    ):
        reasons = "; ".join(line.strip() for line in clash[2].strip().splitlines())
        none = re.search(r"no matching distributions available for your environment:\s+(\S+)", output)
        hint = f"; the index has no release of {none[1]} that would fit" if none else ""
        return f"{source}: {clash[1]} because of conflicts: {reasons}{hint}"
    if missing := re.search(r"ERROR: Could not find a version .* requirement (.+) \(from versions: (.*)\)", output):
        wanted, versions = missing.groups()
        if versions == "none":
            return f"{place_of(wanted, source)}: no package {wanted} on the index; is the name right?"
        return f"{place_of(wanted, source)}: no release is {wanted}; the newest is {versions.split(', ')[-1]}"
    last = re.split(r"\n(?=[\w.]+: )", output.strip())[-1]
    message = re.sub(r"\s+", " ", re.sub(r"^[\w.]+: ", "", last))
    if number := re.search(r" \(from line (\d+) of (\S+)\)", message):
        return f"{number[2]}:{number[1]}: {message.replace(number[0], '')}"
    return f"{source}: {message[-300:]}"


def place_of(requirement: str, source: pathlib.Path) -> str:
    """Return the line of a source that asks for a package; the source alone if another package asks for it."""
    for number, line in logical_lines(source):
        if normal(re.match(r"[\w.-]*", line)[0]) == normal(re.match(r"[\w.-]*", requirement)[0]):
            return f"{source}:{number}"
    return str(source)


def place_of_hash(digest: str, source: pathlib.Path) -> str:
    """Return the line of the lock, beside a source, that has a hash."""
    for lock in (source.with_suffix(".txt"), source.with_name(RUNTIME)):
        pins = read_lock(lock)[0] if lock.is_file() else {}
        for pin in pins.values():
            if place := pin.hashes.get(f"sha256:{digest}"):
                return place
    return str(source)


def diff(folder: pathlib.Path, fresh: pathlib.Path) -> Iterator[str]:
    """Tell where the locks are not what pip-compile makes of the sources and the index."""
    for name in locks(folder):
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
        if not problems:  # a comment, the order, the ends of the lines
            pairs = zip(*((where / name).read_bytes().splitlines(True) for where in (folder, fresh)), strict=False)  # noqa: FBT003
            differing = (n for n, (mine, right) in enumerate(pairs, start=1) if mine != right)
            problems = [f"{name}:{next(differing, 'end')}: not as pip-compile writes it"]
        yield from problems


def main(arguments: list[str]) -> int:
    """Run one command, print what is wrong; return the exit code."""
    here, remedy = pathlib.Path(), ""
    match arguments:
        case ["check"]:
            problems = check(here)
        case ["ready"]:
            problems = ready(here)
        case ["pin", into] if into:
            problems = pin(here, pathlib.Path(into), os.environ.get("PIP_COMPILE_OPTIONS", "").split())
        case ["diff", fresh] if fresh:
            problems = list(diff(here, pathlib.Path(fresh)))
            remedy = "the locks are not what the .in files and the index come to; if that is no surprise: make lock"
        case _:
            problems = ["takes: check | ready | pin FOLDER | diff FOLDER"]
    for problem in [*problems, remedy] if problems and remedy else problems:
        print("lock: " + re.sub(r"//[^/\s]*@", "//****@", problem), file=sys.stderr)  # CI's logs are read by many
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
