"""Copy into a folder what Python needs of a Debian base: the root file system of the target `minimal`.

    python -X no_debug_ranges -IB tools/minimal.py ROOT FOLDER...

The FOLDERs are copied elsewhere; here they say what has to come along. All goes by rule, not by what some run touched:
the interpreter; the standard library but for LEFT_OUT; DATA; the shared libraries that the dynamic linker finds for
these and for the binaries in the FOLDERs. Each module of the standard library is there once: as bytecode where the
base has some, which it has been given of what the environment and the service import, else as source.

The packages that the files are from go on record in /var/lib/dpkg/status.d, with md5sums and licenses, as in distroless
images (https://github.com/GoogleContainerTools/distroless), so that scanners find them.
"""

import fnmatch
import functools
import importlib.util
import os
import pathlib
import py_compile
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable

MULTIARCH = sysconfig.get_config_var("MULTIARCH")  # x86_64-linux-gnu, say
# Of the standard library, by names; README has them too.
LEFT_OUT = {
    "tests of Python itself": "test tests _test* _ctypes_test* _xxtestfuzz* xxlimited* xxsubtype*",
    "need a display": "idlelib tkinter _tkinter* turtle.py turtledemo",
    "pip, and what it installs": "ensurepip site-packages dist-packages EXTERNALLY-MANAGED",
    "to build extensions, to debug the interpreter, the language's manual": "config-* *.cpython-*d-* pydoc_data",
    "bytecode, see add_standard_library()": "__pycache__",
}
# Of the base, by patterns, where it has them.
DATA = {
    "users, the distribution, types of files": "etc/passwd etc/group etc/os-release etc/debian_version etc/mime.types",
    "names and addresses": "etc/nsswitch.conf etc/host.conf etc/gai.conf etc/networks etc/services etc/protocols",
    "time zones (posix/, right/: again)": "etc/localtime usr/share/zoneinfo/[!pr]* usr/share/zoneinfo/posixrules",
    "locales, terminals": "usr/lib/locale lib/terminfo usr/share/terminfo",
    "certificates": "etc/ssl/certs/ca-certificates.crt usr/lib/ssl/cert.pem",
    "OpenSSL opens them": f"usr/lib/ssl/openssl.cnf usr/lib/{MULTIARCH}/ossl-modules",
    "the C library opens it when a thread is cancelled": f"lib/{MULTIARCH}/libgcc_s.so.*",
}

BASE = pathlib.Path("/")
CERTIFICATES = BASE / "etc/ssl/certs/ca-certificates.crt"
DPKG = BASE / "var/lib/dpkg"
LICENSE = re.compile(r"/usr/share/common-licenses/[\w.+-]*[\w+]")
# What the scripts of these packages make is in no list of files, and else they would not be on record.
MADE_BY = {CERTIFICATES: "ca-certificates", BASE / "etc/passwd": "base-passwd", BASE / "etc/group": "base-passwd"}


class Root:
    """The root file system that is being made."""

    def __init__(self, folder: pathlib.Path) -> None:
        """Make it in a folder."""
        self.folder = folder
        self.paths: set[pathlib.Path] = set()  # what of the base is in it, but for folders; no link on the way there

    def place(self, path: pathlib.Path) -> pathlib.Path:
        """Return where something is to be made that will be `path`; its folder is there."""
        place = self.folder / path.relative_to(BASE)
        place.parent.mkdir(parents=True, exist_ok=True)
        return place

    def real(self, path: pathlib.Path) -> pathlib.Path:
        """Make the links on the way to `path`, and `path` if it is one, as in the base; return where they lead."""
        for part in (*reversed(path.parents), path):
            if part.is_symlink():
                target = part.readlink()
                if part not in self.paths:
                    self.paths.add(part)
                    self.place(part).symlink_to(target)
                return self.real(lexical(part.parent / target / path.relative_to(part)))
        return path

    def add(self, path: pathlib.Path) -> None:
        """Copy a file, or all that is in a folder."""
        path = self.real(lexical(path))
        if path.is_dir():
            for inner in sorted(path.iterdir()):
                self.add(inner)
        elif path.is_file() and path not in self.paths:
            self.paths.add(path)
            shutil.copy2(path, self.place(path))

    def add_compiled(self, source: pathlib.Path) -> None:
        """Put a module's bytecode where its source would be, which is what it names in a traceback."""
        self.paths.add(source)
        mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
        py_compile.compile(str(source), str(self.place(source)) + "c", doraise=True, invalidation_mode=mode)


def lexical(path: pathlib.Path) -> pathlib.Path:
    """Return a path without `..`, where what comes before is no link."""
    return pathlib.Path(os.path.normpath(path))


def add_standard_library(root: Root, library: pathlib.Path) -> None:
    """Add the standard library, but for LEFT_OUT."""
    for path in sorted(library.rglob("*")):
        if matches(path.relative_to(library).parts, LEFT_OUT) or not path.is_file():
            continue
        if path.suffix == ".py" and pathlib.Path(importlib.util.cache_from_source(path)).exists():
            root.add_compiled(path)
        else:
            # A link as the file, which may be there as bytecode alone.
            root.paths |= {path, path.resolve()}
            shutil.copy2(path, root.place(path))


def matches(names: Iterable[str], table: dict[str, str]) -> bool:
    """Tell whether one of the names is in a table of patterns."""
    patterns = " ".join(table.values()).split()
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)


def binaries(paths: Iterable[pathlib.Path]) -> list[pathlib.Path]:
    """Return which of the paths are programs or shared libraries."""
    found = []
    for path in sorted(paths):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                if file.read(4) == b"\x7fELF":
                    found.append(path)
    return found


def add_libraries(root: Root, folders: list[pathlib.Path]) -> None:
    """Add what the dynamic linker finds for the binaries in `root` and in `folders`, and its cache."""
    found = set()
    for binary in binaries([*root.paths, *(path for folder in folders for path in folder.rglob("*"))]):
        said = subprocess.run(["ldd", binary], capture_output=True, text=True, check=False).stdout
        for name in re.findall(r"^\t(.*) => not found$", said, re.MULTILINE):
            print(f"minimal: {binary} asks for {name}, which the base has not either", file=sys.stderr)
        for path in re.findall(r"(?:^\t|=> )(/.*) \(0x\w+\)$", said, re.MULTILINE):
            # Not a variant for this machine's processor: the image is to run on others.
            plain = pathlib.Path(re.sub("/glibc-hwcaps/[^/]+/", "/", path))
            found.add(plain if plain.exists() else pathlib.Path(path))
    for path in sorted(found):
        if not any(path.is_relative_to(folder) for folder in folders):
            root.add(path)
    # Named one by one, because the linker may have found them through a variable of the base, which is not here.
    places = sorted({path.parent for path in root.paths if fnmatch.fnmatch(path.name, "lib*.so*")})
    subprocess.run(["ldconfig", "-X", "-r", root.folder, *places], check=True)
    shutil.rmtree(root.folder / "var/cache", ignore_errors=True)  # of ldconfig, with times
    # ctypes.util.find_library() asks ldconfig what there is. That does not change, so a list does for the program.
    said = subprocess.run(["ldconfig", "-r", root.folder, "-p"], check=True, capture_output=True, text=True).stdout
    ldconfig = root.place(root.real(BASE / "sbin/ldconfig"))
    ldconfig.write_text(f"#!{pathlib.Path(sys.executable).resolve()} -IS\nprint({said!r})\n")
    ldconfig.chmod(0o755)


def packages() -> dict[pathlib.Path, str]:
    """Return which package each file of the base is from, as dpkg names its lists: NAME or NAME:ARCHITECTURE."""
    found, real = {}, functools.cache(pathlib.Path.resolve)
    # NAME.list, or NAME:ARCHITECTURE.list, of which a base can have more than one.
    native = subprocess.run(["dpkg", "--print-architecture"], check=True, capture_output=True, text=True).stdout.strip()
    lists = [path for path in sorted(DPKG.glob("info/*.list")) if path.stem.partition(":")[2] in ("", native)]
    for path in lists:
        for file in map(pathlib.Path, path.read_text().splitlines()):
            found[real(file.parent) / file.name] = path.stem
    by_name = {path.stem.partition(":")[0]: path.stem for path in lists}
    return found | {path: by_name[name] for path, name in MADE_BY.items() if name in by_name}


def copied(root: Root, path: pathlib.Path) -> bool:
    """Tell whether a file is there as the base has it."""
    return path.resolve() in root.paths and (root.folder / path.relative_to(BASE)).is_file()


def add_records(root: Root, library: pathlib.Path) -> None:
    """Put on record what packages the files are from, with their licenses, and the texts that these refer to."""
    package_of = packages()
    recorded: set[str] = set()
    # Again until nothing is new: a license may be a file of another package.
    while new := {package_of[path] for path in root.paths if path in package_of} - recorded:
        recorded |= new
        for notice in (BASE / f"usr/share/doc/{package.partition(':')[0]}/copyright" for package in sorted(new)):
            if notice.exists():
                root.add(notice)
                for path in LICENSE.findall(notice.read_text(errors="replace")):
                    root.add(pathlib.Path(path))
    for path in binaries(root.paths - package_of.keys()):
        # Of the interpreter they know by its version.
        if not path.is_relative_to(library) and not re.match(r"(lib)?python\d", path.name):
            print(f"minimal: {path} is from no package: scanners will not know of it", file=sys.stderr)
    status = {}
    for stanza in re.split(r"\n\n+", (DPKG / "status").read_text().strip()):
        fields = dict(re.findall(r"^(Package|Architecture): (.*)$", stanza, re.MULTILINE))
        status.setdefault(fields["Package"], stanza)
        status[f"{fields['Package']}:{fields['Architecture']}"] = stanza
    for package in sorted(recorded):
        record = root.place(DPKG / "status.d" / package.partition(":")[0])
        record.write_text(status[package] + "\n")
        sums = DPKG / f"info/{package}.md5sums"
        lines = sums.read_text().splitlines(keepends=True) if sums.exists() else []
        there = [line for line in lines if copied(root, BASE / line.split(maxsplit=1)[1].strip())]
        record.with_name(f"{record.name}.md5sums").write_text("".join(there))


def main() -> None:
    """Make ROOT."""
    folder, *folders = map(pathlib.Path, sys.argv[1:])
    if not (DPKG / "status").exists():
        sys.exit(f"minimal: {DPKG / 'status'} is missing: takes a base of Debian's packages, such as python:3.14-slim")
    os.umask(0o022)
    root = Root(folder)
    # Where the environment's own link to it leads.
    python = pathlib.Path(sys.executable)
    root.add(python.parent / python.readlink())
    library = pathlib.Path(sysconfig.get_path("stdlib")).resolve()
    add_standard_library(root, library)
    for pattern in " ".join(DATA.values()).split():
        for path in sorted(BASE.glob(pattern)):
            root.add(path)
    for path in (CERTIFICATES, BASE / "usr/share/zoneinfo"):
        if not path.exists():
            print(f"minimal: the base has no {path}, so this has not either", file=sys.stderr)
    add_libraries(root, folders)
    add_records(root, library)
    (folder / "tmp").mkdir()
    (folder / "tmp").chmod(0o1777)
    # What is younger gets the interpreter's time: with its own, what has been made here would be another in each build.
    made = python.stat().st_mtime
    for path in (folder, *folder.rglob("*")):
        if path.lstat().st_mtime > made:
            os.utime(path, (made, made), follow_symlinks=False)


if __name__ == "__main__":
    main()
