"""Copy into a folder what Python needs of a Debian base: the root file system of the target `minimal`.

    python -X no_debug_ranges -IB tools/minimal.py ROOT FOLDER...

The FOLDERs are copied elsewhere; here they say what has to come along. All goes by rule, not by what some run touched:
the interpreter; the standard library but for LEFT_OUT; DATA; the shared libraries that the dynamic linker finds for
these and for the binaries in the FOLDERs. Each module of the standard library is there once: as bytecode where the
base has been given some, because the service imports it, else as source.

The packages that the files are from go on record in /var/lib/dpkg/status.d, with md5sums and licenses, as in distroless
images (https://github.com/GoogleContainerTools/distroless), so that scanners find them.
"""

import collections
import fnmatch
import functools
import importlib.util
import os
import pathlib
import py_compile
import re
import shutil
import ssl
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections.abc import Iterable

# Of the standard library, by names; README has them too.
LEFT_OUT = (
    *("test", "tests", "_test*", "_ctypes_test*", "_xxtestfuzz*", "xxlimited*", "xxsubtype*"),  # CPython's own tests
    *("idlelib", "tkinter", "_tkinter*", "turtle.py", "turtledemo"),  # need a display
    *("ensurepip", "site-packages", "dist-packages", "EXTERNALLY-MANAGED"),  # pip, and what it installs into the base
    *("config-*", "*.cpython-*d-*"),  # to build extensions; to debug the interpreter
    *("pydoc_data", "__pycache__"),  # the language's manual; bytecode, see add_standard_library()
)
# Of the base, by patterns, where it has them.
DATA = (
    *("etc/passwd", "etc/group", "etc/os-release", "etc/debian_version", "etc/mime.types"),
    *("etc/nsswitch.conf", "etc/host.conf", "etc/gai.conf", "etc/networks", "etc/services", "etc/protocols"),
    *("etc/localtime", "usr/share/zoneinfo/[!pr]*", "usr/lib/locale/C.*"),  # without posix/ and right/, the same again
    *("lib/terminfo", "usr/share/terminfo"),
    *("lib/*/libnss_files.so.*", "lib/*/libnss_dns.so.*", "lib/*/libgcc_s.so.*"),  # opened by the C library on demand
    *("etc/ssl/certs/ca-certificates.crt", "usr/lib/ssl/cert.pem", "usr/lib/ssl/openssl.cnf", "usr/lib/*/ossl-modules"),
)

BASE = pathlib.Path("/")
CERTIFICATES = BASE / "etc/ssl/certs/ca-certificates.crt"
DPKG = BASE / "var/lib/dpkg"
LICENSE = re.compile(r"/usr/share/common-licenses/[\w.+-]*[\w+]")
# What the scripts of a package make is in no list of its files.
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
        path = self.real(path)
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


def add_standard_library(root: Root, folder: pathlib.Path) -> None:
    """Add the standard library in `folder`, but for LEFT_OUT."""
    for path in sorted(folder.iterdir()):
        if any(fnmatch.fnmatch(path.name, pattern) for pattern in LEFT_OUT):
            continue
        if path.is_dir() and not path.is_symlink():
            add_standard_library(root, path)
        elif path.suffix == ".py" and pathlib.Path(importlib.util.cache_from_source(path)).exists():
            root.add_compiled(path)
        else:
            root.add(path)


def pack_standard_library(root: Root, folder: pathlib.Path) -> None:
    """Pack each module and each package of which more is source than bytecode: what the service uses little of.

    Python looks into such an archive first (https://docs.python.org/3/library/sys_path_init.html). Bytecode is not
    compressed in it, so that it loads as quickly as from a file.
    """
    place = root.folder / folder.relative_to(BASE)
    archive = next(pathlib.Path(path) for path in sys.path if path.endswith(".zip"))
    # By os.py Python knows its library's folder; and what a link leads to has to be where it leads.
    stays = {folder / "os.py", *(path.resolve() for path in folder.rglob("*") if path.is_symlink())}
    with zipfile.ZipFile(root.place(archive), "w") as packed:
        for top in sorted(place.iterdir()):
            files = sorted(path for path in (top.rglob("*") if top.is_dir() else [top]) if not path.is_dir())
            size = collections.Counter()
            for path in files:
                kind = "link" if path.is_symlink() else path.suffix
                size[kind] += path.lstat().st_size
            if size[".py"] <= size[".pyc"] or size.keys() - {".py", ".pyc"} or folder / top.name in stays:
                continue
            for path in files:
                entry = zipfile.ZipInfo(str(path.relative_to(place)))
                entry.compress_type = zipfile.ZIP_DEFLATED if path.suffix == ".py" else zipfile.ZIP_STORED
                packed.writestr(entry, path.read_bytes(), compresslevel=9)
            shutil.rmtree(top) if top.is_dir() else top.unlink()


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
        found.update(map(pathlib.Path, re.findall(r"(?:^\t|=> )(/.*) \(0x\w+\)$", said, re.MULTILINE)))
    libraries = sorted(path for path in found if not any(path.is_relative_to(folder) for folder in folders))
    for path in libraries:
        root.add(path)
    # Named one by one, because the linker may have found them through a variable of the base, which is not here.
    places = sorted({path.resolve().parent for path in libraries})
    subprocess.run(["ldconfig", "-X", "-r", root.folder, *places], check=True)
    shutil.rmtree(root.folder / "var/cache", ignore_errors=True)  # of ldconfig, with times
    # ctypes.util.find_library() asks ldconfig what there is. That does not change, so this need not be ldconfig.
    said = subprocess.run(["ldconfig", "-r", root.folder, "-p"], check=True, capture_output=True, text=True).stdout
    list_of_libraries = root.place(root.real(BASE / "sbin/ldconfig"))
    list_of_libraries.write_text(f"#!{pathlib.Path(sys.executable).resolve()} -IS\nprint({said!r})\n")
    list_of_libraries.chmod(0o755)


def packages() -> dict[pathlib.Path, str]:
    """Return which package each file of the base is from, as dpkg names its lists: NAME or NAME:ARCHITECTURE."""
    found, real = {}, functools.cache(pathlib.Path.resolve)
    lists = sorted(DPKG.glob("info/*.list"))
    for path in lists:
        for file in map(pathlib.Path, path.read_text().splitlines()):
            found[real(file.parent) / file.name] = path.stem
    by_name = {path.stem.partition(":")[0]: path.stem for path in lists}
    return found | {path: by_name[name] for path, name in MADE_BY.items() if name in by_name}


def copied(root: Root, path: pathlib.Path) -> bool:
    """Tell whether a file is there as the base has it."""
    return path.resolve() in root.paths and (root.folder / path.relative_to(BASE)).is_file()


def add_records(root: Root) -> None:
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
        if not path.is_relative_to(sys.base_prefix):
            print(f"minimal: {path} is from no package: scanners will not know of it", file=sys.stderr)
    status = {}
    for stanza in re.split(r"\n\n+", (DPKG / "status").read_text().strip()):
        fields = dict(re.findall(r"^(Package|Architecture): (.*)$", stanza, re.MULTILINE))
        status[fields["Package"]] = status[f"{fields['Package']}:{fields.get('Architecture')}"] = stanza
    for package in recorded:
        record = root.place(DPKG / "status.d" / package.partition(":")[0])
        record.write_text(status[package] + "\n")
        sums = DPKG / f"info/{package}.md5sums"
        lines = sums.read_text().splitlines(keepends=True) if sums.exists() else []
        there = [line for line in lines if copied(root, BASE / line.split(maxsplit=1)[1].strip())]
        record.with_name(f"{record.name}.md5sums").write_text("".join(there))


def main() -> None:
    """Make ROOT."""
    started = time.time()
    folder, *folders = map(pathlib.Path, sys.argv[1:])
    if not (DPKG / "status").exists():
        sys.exit(f"minimal: {DPKG / 'status'} is missing: takes a base of Debian's packages, such as python:3.14-slim")
    os.umask(0o022)
    root = Root(folder)
    # The interpreter is where a link in the environment leads.
    for link in sorted(path for folder in folders for path in folder.rglob("*") if path.is_symlink()):
        target = lexical(link.parent / link.readlink())
        if not any(target.is_relative_to(folder) for folder in folders):
            root.add(target)
    library = pathlib.Path(sysconfig.get_path("stdlib")).resolve()
    add_standard_library(root, library)
    for pattern in DATA:
        for path in sorted(BASE.glob(pattern)):
            root.add(path)
    # Where OpenSSL looks for one file with all certificates. Without it, it would take a folder of single ones.
    trusted = pathlib.Path(ssl.get_default_verify_paths().openssl_cafile)
    if CERTIFICATES in root.paths and not trusted.exists():
        root.place(trusted).symlink_to(CERTIFICATES)
    pack_standard_library(root, library)
    add_libraries(root, folders)
    add_records(root)
    (folder / "tmp").mkdir()
    (folder / "tmp").chmod(0o1777)
    # What has been made gets the interpreter's time: with its own, each build's layer would be another.
    made = pathlib.Path(sys.executable).stat().st_mtime
    for path in (folder, *folder.rglob("*")):
        if path.lstat().st_mtime >= started - 1:
            os.utime(path, (made, made), follow_symlinks=False)


if __name__ == "__main__":
    main()
