"""The minimal image on a real engine: complete but for a list of modules, with its packages on record."""

import json
import re
from collections.abc import Callable

import pytest

from tests.support import ROOT, inspect, python, run

if not (ROOT / "docker").is_dir():
    pytest.skip("the image has no docker/", allow_module_level=True)

# Prints which standard library modules can be imported, of those in NAMES or of all.
MODULES = """
    import contextlib, importlib, io, os, pkgutil, sys, warnings

    warnings.simplefilter("ignore")
    path = sys.path[:] = [path for path in sys.path if path.startswith(sys.base_prefix) and "-packages" not in path]
    names, found = set(os.environ.get("NAMES", "").split()), []
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        if not names:
            walked = {module.name for module in pkgutil.walk_packages(path, onerror=lambda name: None)}
            names = walked | sys.stdlib_module_names | set(sys.builtin_module_names)
        for name in sorted(names):
            if name.rpartition(".")[2] not in ("__main__", "antigravity") and not name.startswith("idlelib."):
                with contextlib.suppress(BaseException):
                    importlib.import_module(name)
                    found.append(name)
    print(*found)
    """


# The modules that docker/rootfs.py leaves out, and those that need one of them.
LEFT_OUT = r"""
    test _test\w* _ctypes_test _xxtestfuzz xxlimited\w* xxsubtype idlelib tkinter _tkinter turtle turtledemo ensurepip
    venv _remote_debugging asyncio\.tools readline curses _curses\w* pydoc_data _pydecimal _pyio _pydatetime _dbm
    _gdbm dbm\.ndbm dbm\.gnu
    """


def test_every_module_imports(services: Callable[[str], str]) -> None:
    """Compared with the runtime image, exactly the modules of LEFT_OUT are missing."""
    left_out = "|".join(LEFT_OUT.split())
    runtime = set(python(services("runtime"), MODULES).split())
    expected = {name for name in runtime if not re.fullmatch(rf"({left_out})(\..*)?", name)}
    assert len(expected) > 450
    minimal = set(python(services("minimal"), MODULES, "--env", f"NAMES={' '.join(runtime)}").split())
    missing = {name for name in expected - minimal if not name.startswith("_pyrepl.")}  # the prompt, which needs curses
    assert missing <= {"xxsubtype"}  # may be built in
    assert minimal - {"xxsubtype"} <= expected


def test_same_configuration(images: Callable[[str], str]) -> None:
    """User, command, probe, port and folder are the runtime image's; no environment variable is added."""
    minimal, runtime = (inspect(images(target), ".Config") for target in ("minimal", "runtime"))
    env, runtime_env = (dict(variable.split("=", 1) for variable in config.pop("Env")) for config in (minimal, runtime))
    assert minimal == runtime
    assert env.pop("PATH").startswith("/opt/venv/bin:")
    runtime_env.pop("PATH")
    assert env.items() <= runtime_env.items()


def test_python_is_complete(services: Callable[[str], str]) -> None:
    """SQLite, time zones, ctypes, processes, name lookups, encodings, TLS and threads work in the minimal image."""
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
        for program in (sys.executable, "python"):
            assert subprocess.check_output([program, "-c", "print(6 * 7)"]) == b"42\\n"
        assert (pwd.getpwuid(0).pw_name, socket.getservbyname("https")) == ("root", 443)
        assert ("127.0.0.1", 0) in [found[4] for found in socket.getaddrinfo("localhost", None)]
        assert sys.getfilesystemencoding() == "utf-8" and "é".encode("shift_jis_2004")
        assert hashlib.scrypt(b"a", salt=b"b", n=2, r=1, p=1) and lzma.compress(b"a")
        assert ssl.create_default_context().get_ca_certs()
        with tempfile.NamedTemporaryFile() as file:
            assert file.name.startswith("/tmp/")
        threads = len(os.listdir("/proc/self/task"))
        threading.Thread(target=lambda: ctypes.CDLL(None).pthread_exit(None)).start()  # aborts without libgcc_s
        deadline = time.monotonic() + 10
        while len(os.listdir("/proc/self/task")) > threads:
            assert time.monotonic() < deadline
        print("complete", flush=True)
        os._exit(0)  # Python would wait for that thread
        """
    assert python(services("minimal"), code) == "complete"


def test_same_system_data(services: Callable[[str], str]) -> None:
    """Time zones, trusted certificates, users, services and encodings are those of the runtime image."""
    code = """
        import locale, pwd, socket, ssl, sys, zoneinfo
        print(sorted(zoneinfo.available_timezones() - {'localtime'}))
        print(sorted(map(str, ssl.create_default_context().get_ca_certs())))
        print(pwd.getpwall(), [socket.getservbyname(name) for name in ("http", "postgresql", "redis")])
        print(locale.getpreferredencoding().lower(), sys.getfilesystemencoding(), sys.stdout.encoding)
        """
    assert python(services("minimal"), code) == python(services("runtime"), code)


def test_tracebacks(services: Callable[[str], str]) -> None:
    """A traceback shows the source lines of code in /app, and file and line number of all other code."""
    code = """
        import traceback, flask.json, serve.log
        for wrong in (lambda: serve.log.timestamp(None), lambda: flask.json.loads("{")):
            try:
                wrong()
            except (TypeError, ValueError):
                print(traceback.format_exc())
        """
    output = python(services("minimal"), code)
    assert re.search(r'/app/serve/log.py", line \d+, in timestamp\n +\S', output)
    assert re.search(r'flask/json/__init__.py", line \d+, in loads\n', output)
    assert re.search(r'/json/decoder.py", line \d+, in decode\n', output)


def test_debian_packages_are_recorded(services: Callable[[str], str]) -> None:
    """Every Debian package that a file comes from is recorded, with version and license."""
    code = """
        import json, os, pathlib, re
        files, others = [], ("/proc", "/sys", "/dev", "/opt", "/app", "/usr/share/doc")
        for top, folders, names in os.walk("/"):
            folders[:] = [folder for folder in folders if os.path.join(top, folder) not in others]
            files += [os.path.join(top, name) for name in names if not name.endswith(".pyc")]
        records = {path.name: re.search("^Version: (.*)$", path.read_text(), re.M)[1]
                   for path in pathlib.Path("/var/lib/dpkg/status.d").iterdir()}
        assert all(pathlib.Path("/usr/share/doc", name, "copyright").exists() for name in records)
        print(json.dumps([files, records]))
        """
    files, records = json.loads(python(services("minimal"), code, "--user", "0"))
    query = ["docker", "exec", services("runtime"), "dpkg-query"]
    # Before Debian 13, packages list some files without /usr.
    found = run(*query, "--search", *files, *(path.removeprefix("/usr") for path in files), check=False).stdout
    packages = set(re.findall(r"^(\S+): /", found, re.MULTILINE))
    shown = run(*query, "--show", "--showformat=${Package} ${Version}\n", *packages).stdout
    owners = dict(line.split() for line in shown.splitlines())
    assert len(owners) > 8
    assert owners.items() <= records.items()


def test_has_no_tools(services: Callable[[str], str]) -> None:
    """Outside the virtual environment, Python is the only program on the PATH, and it has no pip."""
    code = """
        import os, pathlib, subprocess, sys
        folders = [pathlib.Path(folder) for folder in os.get_exec_path()[1:]]
        print(*sorted({p.resolve().name for f in folders if f.is_dir() for p in f.iterdir()}))
        print(subprocess.run([sys._base_executable, "-m", "pip"], capture_output=True, text=True).stderr)
        """
    assert re.fullmatch(r"python3\.\d+\n.*No module named pip", python(services("minimal"), code))


def test_base_without_dpkg_is_refused(services: Callable[[str], str]) -> None:
    """rootfs.py refuses a base without dpkg, such as the minimal image itself, and says what base it needs."""
    command = ["docker", "exec", "--interactive", services("minimal"), "python", "-IS", "-", "/tmp/rootfs", "/opt/venv"]
    with (ROOT / "docker/rootfs.py").open() as program:
        done = run(*command, check=False, stdin=program)
    assert done.returncode == 1
    assert done.stderr.startswith("rootfs: the base image has no dpkg-query; minimal needs Debian packages")
