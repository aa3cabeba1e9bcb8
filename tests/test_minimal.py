"""The minimal image on a real engine: a whole Python, on record; what it leaves out is what docs/minimal.md says."""

import json
import re
from collections.abc import Callable

import pytest

from tests.support import ROOT, inspect, python, run

if not (ROOT / "docker").is_dir():
    pytest.skip("the image has no docker/", allow_module_level=True)

# Prints those modules of the standard library that import, of NAMES or of all.
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


def test_every_module_imports(services: Callable[[str], str]) -> None:
    """Each module that imports in the runtime image does so here, but for those that docs/minimal.md leaves out."""
    [row] = re.findall(r"^\| modules \| (.*?) \|", (ROOT / "docs/minimal.md").read_text(), re.MULTILINE)
    left_out = "|".join(name.replace("*", r"\w*") for name in re.findall(r"`([\w*.]+)`", row))
    whole = set(python(services("runtime"), MODULES).split())
    expected = {name for name in whole if not re.fullmatch(rf"({left_out})(\..*)?", name)}
    assert len(expected) > 450
    here = set(python(services("minimal"), MODULES, "--env", f"NAMES={' '.join(whole)}").split())
    missing = {name for name in expected - here if not name.startswith("_pyrepl.")}  # the prompt, which takes curses
    assert missing <= {"xxsubtype"}  # which can be built in
    assert here - {"xxsubtype"} <= expected


def test_is_configured_as_the_runtime_image(images: Callable[[str], str]) -> None:
    """User, command, probe, port and folder are the same; only the base's own variables are missing."""
    here, whole = (inspect(images(target), ".Config") for target in ("minimal", "runtime"))
    its, others = (dict(variable.split("=", 1) for variable in config.pop("Env")) for config in (here, whole))
    assert here == whole
    assert its.pop("PATH").startswith("/opt/venv/bin:")
    others.pop("PATH")
    assert its.items() <= others.items()


def test_is_a_whole_python(services: Callable[[str], str]) -> None:
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
        threading.Thread(target=lambda: ctypes.CDLL(None).pthread_exit(None)).start()  # which takes libgcc_s, or aborts
        deadline = time.monotonic() + 10
        while len(os.listdir("/proc/self/task")) > threads:
            assert time.monotonic() < deadline
        print("whole", flush=True)
        os._exit(0)  # Python would wait for that thread
        """
    assert python(services("minimal"), code) == "whole"


def test_knows_what_the_runtime_image_knows(services: Callable[[str], str]) -> None:
    """Time zones, trusted certificates, users, services and encodings are the same."""
    code = """
        import locale, pwd, socket, ssl, sys, zoneinfo
        print(sorted(zoneinfo.available_timezones() - {'localtime'}))
        print(sorted(map(str, ssl.create_default_context().get_ca_certs())))
        print(pwd.getpwall(), [socket.getservbyname(name) for name in ("http", "postgresql", "redis")])
        print(locale.getpreferredencoding().lower(), sys.getfilesystemencoding(), sys.stdout.encoding)
        """
    assert python(services("minimal"), code) == python(services("runtime"), code)


def test_tracebacks_name_their_lines(services: Callable[[str], str]) -> None:
    """A traceback shows the lines of the application, and says where in dependencies and library it passed."""
    code = """
        import traceback, flask.json, serve.log
        for wrong in (lambda: serve.log.timestamp(None), lambda: flask.json.loads("{")):
            try:
                wrong()
            except (TypeError, ValueError):
                print(traceback.format_exc())
        """
    said = python(services("minimal"), code)
    assert re.search(r'/app/serve/log.py", line \d+, in timestamp\n +\S', said)
    assert re.search(r'flask/json/__init__.py", line \d+, in loads\n', said)
    assert re.search(r'/json/decoder.py", line \d+, in decode\n', said)


def test_what_comes_from_debian_is_on_record(services: Callable[[str], str]) -> None:
    """Each file that a Debian package has brought is on record by that package, with version and license."""
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
    # Before Debian 13, packages name some files without /usr.
    found = run(*query, "--search", *files, *(path.removeprefix("/usr") for path in files), check=False).stdout
    packages = set(re.findall(r"^(\S+): /", found, re.MULTILINE))
    shown = run(*query, "--show", "--showformat=${Package} ${Version}\n", *packages).stdout
    owners = dict(line.split() for line in shown.splitlines())
    assert len(owners) > 8
    assert owners.items() <= records.items()


def test_has_no_tools(services: Callable[[str], str]) -> None:
    """The programs on the path are Python, and what the environment brings; there is no pip beside it either."""
    code = """
        import os, pathlib, subprocess, sys
        folders = [pathlib.Path(folder) for folder in os.get_exec_path()[1:]]
        print(*sorted({p.resolve().name for f in folders if f.is_dir() for p in f.iterdir()}))
        print(subprocess.run([sys._base_executable, "-m", "pip"], capture_output=True, text=True).stderr)
        """
    assert re.fullmatch(r"python3\.\d+\n.*No module named pip", python(services("minimal"), code))


def test_another_base_is_refused(services: Callable[[str], str]) -> None:
    """From a base whose packages cannot be named, as this one, no such image is made; one line says what it takes."""
    command = ["docker", "exec", "--interactive", services("minimal"), "python", "-IS", "-", "/tmp/rootfs", "/opt/venv"]
    with (ROOT / "docker/rootfs.py").open() as program:
        done = run(*command, check=False, stdin=program)
    assert done.returncode == 1
    assert done.stderr.startswith("rootfs: the base has no dpkg-query; minimal takes a base of Debian's packages")
