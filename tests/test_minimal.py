"""The minimal image on a real engine: a whole Python, on record; what it leaves out is what docs/minimal.md says."""

import json
import re
from collections.abc import Callable, Iterator

import pytest

from tests.support import ROOT, Project, run
from tests.test_image import inspect_image, python

if not (ROOT / "docker").is_dir():
    pytest.skip("the image has no docker/", allow_module_level=True)

# Prints the modules of the standard library that import, of NAMES or of all.
MODULES = """
    import contextlib, importlib, io, os, pkgutil, sys, warnings

    warnings.simplefilter("ignore")
    sys.path[:] = [path for path in sys.path if path.startswith(sys.base_prefix) and "-packages" not in path]
    names, failed = set(sys.builtin_module_names) | set(sys.stdlib_module_names), []

    def walk(path, prefix):
        for module in pkgutil.iter_modules(path, prefix):
            names.add(module.name)
            if module.ispkg:
                with contextlib.suppress(BaseException):
                    walk(importlib.import_module(module.name).__path__, f"{module.name}.")

    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        if "NAMES" in os.environ:
            names = set(os.environ["NAMES"].split())
        else:
            walk(sys.path, "")
        for name in sorted(names):
            if name.rpartition(".")[2] in ("__main__", "antigravity") or name.startswith("idlelib."):
                failed.append(name)
                continue
            try:
                importlib.import_module(name)
            except BaseException:
                failed.append(name)
    print(*sorted(names - set(failed)))
    """


@pytest.fixture(scope="module")
def images(images: Callable[[str], str]) -> Iterator[tuple[str, str]]:
    """The minimal image, and the runtime image to compare it with."""
    return images("minimal"), images("runtime")


def test_every_module_imports(images: tuple[str, str]) -> None:
    """Each module that imports in the runtime image does so here, but for those that docs/minimal.md leaves out."""
    image, runtime = images
    [row] = re.findall(r"^\| modules \| (.*?) \|", (ROOT / "docs/minimal.md").read_text(), re.MULTILINE)
    left_out = "|".join(name.replace("*", r"\w*") for name in re.findall(r"`([\w*.]+)`", row))
    whole = set(python(runtime, MODULES).split())
    expected = {name for name in whole if not re.fullmatch(rf"({left_out})(\..*)?", name)}
    assert len(expected) > 450
    here = set(python(image, MODULES, "--env", f"NAMES={' '.join(whole)}").split())
    missing = {name for name in expected - here if not name.startswith("_pyrepl.")}  # the prompt, which takes curses
    assert missing <= {"xxsubtype"}  # which can be built in
    assert here - {"xxsubtype"} <= expected


def test_is_configured_as_the_runtime_image(images: tuple[str, str]) -> None:
    """User, command, probe, port and folder are the same; only the base's own variables are missing."""
    here, whole = (inspect_image(name) for name in images)
    its, others = (dict(variable.split("=", 1) for variable in config.pop("Env")) for config in (here, whole))
    assert here == whole
    assert its.pop("PATH").startswith("/opt/venv/bin:")
    others.pop("PATH")
    assert its.items() <= others.items()


def test_is_a_whole_python(images: tuple[str, str]) -> None:
    """Databases, time zones, foreign functions, processes, names, encodings, TLS, threads work, without network."""
    code = """
        import concurrent.futures, ctypes, datetime, decimal, hashlib, lzma, multiprocessing, os, pwd, sqlite3, socket
        import ssl, subprocess, sys, tempfile, threading, time, zoneinfo

        assert sqlite3.connect(":memory:").execute("select json_extract('{\\"a\\": 6}', '$.a') * 7").fetchone() == (42,)
        summer = datetime.datetime(2026, 7, 1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin"))
        assert summer.utcoffset() == datetime.timedelta(hours=2)
        assert ctypes.CDLL(None).getpid() == ctypes.CDLL("libc.so.6").getpid() == os.getpid()
        for method in multiprocessing.get_all_start_methods():
            context = multiprocessing.get_context(method)
            with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
                assert list(pool.map(abs, [-1, -2])) == [1, 2], method
        assert subprocess.check_output([sys.executable, "-c", "print(6 * 7)"]) == b"42\\n"
        assert subprocess.check_output(["python", "-c", "print(6 * 7)"]) == b"42\\n"
        assert (pwd.getpwuid(0).pw_name, socket.getservbyname("https")) == ("root", 443)
        assert ("127.0.0.1", 0) in [found[4] for found in socket.getaddrinfo("localhost", None)]
        assert sys.getfilesystemencoding() == "utf-8" and "é".encode("shift_jis_2004")
        assert hashlib.scrypt(b"a", salt=b"b", n=2, r=1, p=1) and lzma.compress(b"a")
        assert ssl.create_default_context().get_ca_certs()
        with tempfile.NamedTemporaryFile() as file:
            assert file.name.startswith("/tmp/")
        threads = len(os.listdir("/proc/self/task"))
        threading.Thread(target=lambda: ctypes.CDLL(None).pthread_exit(None)).start()  # which takes libgcc_s, or aborts
        deadline = time.monotonic() + 10
        while len(os.listdir("/proc/self/task")) > threads:
            assert time.monotonic() < deadline
        print("whole", flush=True)
        os._exit(0)  # Python would wait for that thread
        """
    assert python(images[0], code, "--network", "none", "--read-only", "--tmpfs", "/tmp") == "whole"


def test_knows_what_the_runtime_image_knows(images: tuple[str, str]) -> None:
    """Time zones, trusted certificates, users, services and encodings are the same."""
    code = """
        import locale, pwd, socket, ssl, sys, zoneinfo
        print(sorted(zoneinfo.available_timezones() - {'localtime'}))
        print(sorted(map(str, ssl.create_default_context().get_ca_certs())))
        print(pwd.getpwall(), [socket.getservbyname(name) for name in ("http", "postgresql", "redis")])
        print(locale.getpreferredencoding().lower(), sys.getfilesystemencoding(), sys.stdout.encoding)
        """
    image, runtime = images
    assert python(image, code) == python(runtime, code)


def test_tracebacks_name_their_lines(images: tuple[str, str]) -> None:
    """A traceback shows the lines of the application, and says where in dependencies and library it passed."""
    code = """
        import traceback, app, flask.json
        try:
            app.is_name(None)
        except TypeError:
            print(traceback.format_exc())
        try:
            flask.json.loads("{")
        except ValueError:
            print(traceback.format_exc())
        """
    said = python(images[0], code)
    assert re.search(r'/app/app.py", line \d+, in is_name\n +return len\(name\)', said)
    assert re.search(r'flask/json/__init__.py", line \d+, in loads\n', said)
    assert re.search(r'/json/decoder.py", line \d+, in decode\n', said)


def test_programs_and_libraries_are_on_record(images: tuple[str, str]) -> None:
    """Each file that a Debian package has brought is on record by that package, with version and license."""
    code = """
        import json, os, pathlib, re
        elf = []
        for top, folders, files in os.walk("/"):
            folders[:] = [f for f in folders if os.path.join(top, f) not in ("/proc", "/sys", "/dev", "/opt")]
            elf += [path for path in (os.path.join(top, file) for file in files)
                    if os.path.isfile(path) and open(path, "rb").read(4) == b"\\x7fELF"]
        records = {path.name: re.search("^Version: (.*)$", path.read_text(), re.M)[1]
                   for path in pathlib.Path("/var/lib/dpkg/status.d").iterdir()}
        assert all(pathlib.Path("/usr/share/doc", name, "copyright").exists() for name in records)
        print(json.dumps([elf, records]))
        """
    image, runtime = images
    elf, records = json.loads(python(image, code, "--user", "0"))
    assert len(elf) > 40
    commands = r"""
        for path; do
            path=$(realpath "$path")
            dpkg-query --search "$path" 2>/dev/null || dpkg-query --search "${path#/usr}" 2>/dev/null
        done | sed 's/: .*//' | sort -u | xargs dpkg-query --show --showformat='${Package} ${Version}\n'
        """
    done = run("docker", "run", "--rm", runtime, "sh", "-c", commands, "sh", *elf)
    owners = dict(line.split() for line in done.stdout.splitlines())
    assert len(owners) > 8
    assert owners.items() <= records.items()


def test_has_no_tools(images: tuple[str, str]) -> None:
    """The programs on the path are Python, and what the environment brings; there is no pip beside it either."""
    code = """
        import os, pathlib, subprocess, sys
        folders = [pathlib.Path(folder) for folder in os.get_exec_path()[1:]]
        print(*sorted({p.resolve().name for f in folders if f.is_dir() for p in f.iterdir()}))
        print(subprocess.run([sys._base_executable, "-m", "pip"], capture_output=True, text=True).stderr)
        """
    said = python(images[0], code)
    assert re.fullmatch(r"python3\.\d+\n.*No module named pip", said)


def test_another_base_is_refused(project: Project, base: str) -> None:
    """From a base whose packages cannot be named, `minimal` is not made; one line says what it takes."""
    name = f"{project.name}-base"
    (project.folder / "base.Dockerfile").write_text(f"FROM {base}\nRUN rm $(which dpkg-query)\n")
    project.run("docker", "build", "--file", "base.Dockerfile", "--tag", name, ".")
    done = project.build("--target", "minimal", check=False, environ={"PYTHON_IMAGE": name})
    run("docker", "image", "rm", "--force", name)
    assert done.returncode != 0
    assert "rootfs: the base has no dpkg-query; minimal takes a base of Debian's packages" in done.stderr
