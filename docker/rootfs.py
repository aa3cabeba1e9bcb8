"""Make the root file system of the minimal image: Python, the dependencies, and what both need of the base.

    python -X no_debug_ranges -IS rootfs.py ROOT VENV

ROOT gets the interpreter, the standard library and the virtual environment VENV as bytecode, the files that these open
by name (DATA), and the shared libraries that they are linked with. The Debian packages that the files come from are
recorded as in distroless images, so that scanners find them.
"""

import compileall
import pathlib
import py_compile
import re
import shutil
import subprocess
import sys
import sysconfig

# Left out of the standard library: regular expressions for a file's name up to its first dot.
LEFT_OUT = {
    "tests of Python itself": "test _test.* _ctypes_test _xxtestfuzz xxlimited.* xxsubtype",
    "need a display": "idlelib tkinter _tkinter turtle turtledemo",
    "for making virtual environments; packages of the base": "venv ensurepip .*-packages EXTERNALLY-MANAGED",
    "for building extensions; inspects other processes": "config-.* _remote_debugging",
    "for terminals; the text of help()": "readline curses _curses.* pydoc_data",
    "Python versions of C modules": "_pydecimal _pyio _pydatetime",
    "need a dbm library": "_dbm _gdbm",
    "bytecode: compiled anew, without docstrings": "__pycache__",
}
# Copied from the base, if it has them: paths and glob patterns.
DATA = {
    "users, groups, name lookup, services": "etc/passwd etc/group etc/nsswitch.conf etc/services etc/protocols",
    "OpenSSL: certificates and configuration": "etc/ssl/certs/ca-certificates.crt usr/lib/ssl/*.*",
    "time zones": "etc/localtime usr/share/zoneinfo/[A-Z]*",
    "loaded by glibc when a thread exits": "usr/lib/*-linux-gnu/libgcc_s.so.1",
    "search path of the dynamic linker": "etc/ld.so.conf etc/ld.so.conf.d",
    "name and version of the distribution": "etc/os-release",
}
BASE = pathlib.Path("/")
ROOT, VENV = map(pathlib.Path, sys.argv[1:])


def in_root(path: pathlib.Path) -> pathlib.Path:
    """Return the path in ROOT for a path of the base, and create its parent folder."""
    copy = ROOT / path.relative_to(BASE)
    copy.parent.mkdir(parents=True, exist_ok=True)
    return copy


def add_link(link: pathlib.Path) -> None:
    """Copy a symbolic link, but not its target."""
    link = link.parent.resolve() / link.name
    if not in_root(link).is_symlink():
        in_root(link).symlink_to(link.readlink())


def add(path: pathlib.Path) -> None:
    """Copy a file, a folder without its bytecode, or a link with its target; and each link on the path."""
    for folder in path.parents:
        if folder.is_symlink():
            add_link(folder)
    path = path.parent.resolve() / path.name
    if path.is_symlink():
        add_link(path)
        add(path.parent / path.readlink())
    elif path.is_dir():
        for inner in path.iterdir():
            if inner.name != "__pycache__":
                add(inner)
    elif path.is_file():
        shutil.copy2(path, in_root(path))


def compile_modules(folder: pathlib.Path, optimize: int) -> None:
    """Replace each .py with a .pyc beside it: without source, Python does not look in __pycache__ (PEP 3147)."""
    compileall.compile_dir(
        in_root(folder),
        stripdir=ROOT,
        prependdir=BASE,
        legacy=True,
        optimize=optimize,
        quiet=1,
        invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
    )
    for source in in_root(folder).rglob("*.py"):
        if source.with_suffix(".pyc").exists():
            source.unlink()


def add_python() -> None:
    """Add the interpreter, the standard library without docstrings and assertions, and VENV."""
    add(pathlib.Path(sys.executable))
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    left_out = re.compile("|".join(" ".join(LEFT_OUT.values()).split()))
    extensions = library / "lib-dynload"
    for path in (*library.iterdir(), *extensions.iterdir()):
        if path != extensions and not left_out.fullmatch(path.name.partition(".")[0]):
            add(path)
    compile_modules(library, optimize=2)
    add(VENV)
    compile_modules(VENV / "lib", optimize=0)


def add_libraries() -> None:
    """Add the shared libraries that the binaries in ROOT are linked with, and the cache of the dynamic linker."""
    files = [path for path in ROOT.rglob("*") if path.is_file()]
    binaries = [path for path in files if path.open("rb").read(4) == b"\x7fELF"]
    found = subprocess.run(["ldd", *binaries], stdout=subprocess.PIPE, text=True).stdout
    for path in map(pathlib.Path, set(re.findall(r"(/\S+) \(0x", found))):
        if not path.is_relative_to(ROOT):
            add(path)
    subprocess.run(["ldconfig", "-r", ROOT], check=True)


def add_records() -> None:
    """Record the Debian packages that the files come from, with version and license."""
    paths = [path for path in ROOT.rglob("*") if not (path.is_dir() or path.is_relative_to(in_root(VENV)))]
    files = [f"/{path.relative_to(ROOT)}" for path in paths]
    # Before Debian 13, packages list some files without /usr: /lib is a link to /usr/lib.
    search = ["dpkg-query", "--search", *files, *(file.removeprefix("/usr") for file in files)]
    found = subprocess.run(search, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True).stdout
    for package in set(re.findall(r"^(\S+): /", found, re.MULTILINE)):
        name = package.partition(":")[0]
        license = BASE / "usr/share/doc" / name / "copyright"
        if license.exists():
            add(license)
            for text in re.findall(r"/usr/share/common-licenses/[\w.+-]*\w", license.read_text(errors="replace")):
                add(BASE / text)
        with in_root(BASE / "var/lib/dpkg/status.d" / name).open("w") as record:
            subprocess.run(["dpkg-query", "--status", package], check=True, stdout=record)


if not shutil.which("dpkg-query"):
    sys.exit("rootfs: the base image has no dpkg-query; minimal needs Debian packages, as in python:3.14-slim")
ROOT.mkdir()
add_python()
for pattern in " ".join(DATA.values()).split():
    for path in BASE.glob(pattern):
        add(path)
add_libraries()
add_records()
(ROOT / "tmp").mkdir()
(ROOT / "tmp").chmod(0o1777)
