"""The minimal image on a real engine: it is a whole Python, on record, and what it leaves out is what README says."""

import json
import pathlib
import re
import sys
import textwrap
import uuid
from collections.abc import Callable, Iterator

import pytest

from tests.support import ROOT, Project, edit, get, run
from tests.test_image import inspect, python, until_health, url

if not (ROOT / "tools").is_dir():
    pytest.skip("the image has no tools", allow_module_level=True)

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


@pytest.fixture(scope="session", params=["minimal"])
def target(request: pytest.FixtureRequest) -> str:
    """The target that these tests are about."""
    return request.param


@pytest.fixture(scope="session")
def runtime(base: str) -> Iterator[str]:
    """The runtime image, to compare with."""
    name = f"flask-helloworld-test:{uuid.uuid4().hex[:12]}"
    run("docker", "build", "--build-arg", f"PYTHON_IMAGE={base}", "--target", "runtime", "--tag", name, ROOT)
    yield name
    run("docker", "image", "rm", "--force", name)


def left_out() -> list[str]:
    """Return the modules that README says are left out."""
    [row] = re.findall(r"^\| of the standard library: (.*?)\|", (ROOT / "README.md").read_text(), re.MULTILINE)
    return re.findall(r"`([\w*]+)`", row)


def test_every_module_imports(image: str, runtime: str) -> None:
    """Each module that imports in the runtime image does so here, but for those that README says are left out."""
    whole = set(python(runtime, MODULES).split())
    pattern = "|".join(name.replace("*", r"\w*") for name in left_out())
    expected = {name for name in whole if not re.fullmatch(rf"({pattern})(\..*)?", name)}
    assert len(expected) > 450
    here = set(python(image, MODULES, "--env", f"NAMES={' '.join(whole)}").split())
    assert here - {"xxsubtype"} == expected - {"xxsubtype"}  # which can be built in


def test_is_configured_as_the_runtime_image(image: str, runtime: str) -> None:
    """User, command, probe, labels, port, folder, variables are the same; only the base's own variables are missing."""
    here, whole = (inspect(name, ".Config") for name in (image, runtime))
    its, others = (dict(variable.split("=", 1) for variable in config.pop("Env")) for config in (here, whole))
    assert here == whole
    assert its.pop("PATH").split(":") == list(dict.fromkeys(others.pop("PATH").split(":")))  # which names some twice
    assert its.items() <= others.items()


def test_is_a_whole_python(image: str) -> None:
    """Databases, time zones, foreign functions, processes, names, locales, types, terminals work, without network."""
    code = """
        import concurrent.futures, ctypes.util, curses, datetime, decimal, getpass, hashlib, lzma, mimetypes
        import multiprocessing, os, pathlib, pwd, sqlite3, socket, ssl, subprocess, sys, tempfile, threading, time
        import zoneinfo

        assert sqlite3.connect(":memory:").execute("select json_extract('{\\"a\\": 6}', '$.a') * 7").fetchone() == (42,)
        summer = datetime.datetime(2026, 7, 1, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin"))
        assert summer.utcoffset() == datetime.timedelta(hours=2)
        assert ctypes.util.find_library("c") == "libc.so.6"
        assert ctypes.CDLL(None).getpid() == ctypes.CDLL("libc.so.6").getpid() == os.getpid()
        for method in multiprocessing.get_all_start_methods():
            context = multiprocessing.get_context(method)
            with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
                assert list(pool.map(abs, [-1, -2])) == [1, 2], method
        assert subprocess.check_output([sys.executable, "-c", "print(6 * 7)"]) == b"42\\n"
        assert subprocess.check_output(["python", "-c", "print(6 * 7)"]) == b"42\\n"
        assert (pwd.getpwuid(0).pw_name, socket.getservbyname("https")) == ("root", 443)
        assert socket.getprotobyname("tcp") == socket.IPPROTO_TCP
        assert ("127.0.0.1", 0) in [found[4] for found in socket.getaddrinfo("localhost", None)]
        assert sys.getfilesystemencoding() == "utf-8" and "é".encode("shift_jis_2004")
        assert mimetypes.guess_type("a.svg") == ("image/svg+xml", None)
        curses.setupterm("xterm")
        assert hashlib.scrypt(b"a", salt=b"b", n=2, r=1, p=1) and lzma.compress(b"a")
        assert ssl.create_default_context().get_ca_certs()
        with tempfile.NamedTemporaryFile() as file:
            assert file.name.startswith("/tmp/")
        threads = len(os.listdir("/proc/self/task"))
        threading.Thread(target=lambda: ctypes.CDLL(None).pthread_exit(None)).start()  # which takes libgcc_s, or aborts
        deadline = time.monotonic() + 10
        while len(os.listdir("/proc/self/task")) > threads:
            assert time.monotonic() < deadline
        print("whole", pathlib.Path("/etc/os-release").read_text().count("ID="))
        sys.stdout.flush()
        os._exit(0)  # Python would wait for that thread
        """
    assert python(image, code, "--network", "none", "--read-only", "--tmpfs", "/tmp").startswith("whole ")


def test_knows_what_the_runtime_image_knows(image: str, runtime: str) -> None:
    """Time zones, trusted certificates, users, services, types of files and encodings are the same."""
    code = """
        import locale, mimetypes, pwd, socket, ssl, sys, zoneinfo
        mimetypes.init()
        print(sorted(zoneinfo.available_timezones()), sorted(map(str, ssl.create_default_context().get_ca_certs())))
        print(pwd.getpwall(), sorted(mimetypes.types_map.items()))
        print([socket.getservbyname(name) for name in ("http", "postgresql", "redis")])
        print(locale.getpreferredencoding().lower(), sys.getfilesystemencoding(), sys.stdout.encoding)
        """
    assert python(image, code) == python(runtime, code)


def test_tracebacks_have_their_lines(image: str) -> None:
    """A traceback shows the lines of application and dependencies, and says where in the standard library it passed."""
    code = """
        import traceback, flask.json, werkzeug.routing
        try:
            flask.json.loads("{")
        except ValueError:
            print(traceback.format_exc())
        """
    said = python(image, code)
    assert re.search(r'flask/json/__init__.py", line \d+, in loads\n +return _json.loads\(', said)
    assert re.search(r'/json/decoder.py", line \d+, in decode\n', said)
    assert re.search(r"return _json.loads\(.*\)\n  File", said)  # no ^^^^: the bytecode has no columns


def test_tls(image: str, runtime: str, tmp_path: pathlib.Path) -> None:
    """A server with a certificate of a private CA is trusted where SSL_CERT_FILE names that CA, and only there."""
    commands = """
        cd /certificates
        openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=ca -keyout ca.key -out ca.pem -addext keyUsage=keyCertSign
        openssl req -newkey rsa:2048 -nodes -subj /CN=localhost -keyout server.key -out server.csr
        echo subjectAltName=DNS:localhost >extensions
        openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -extfile extensions -out server.pem
        chmod -R a+rX .
        """
    mount = f"--volume={tmp_path}:/certificates:z"
    run("docker", "run", "--rm", "--user", "0", mount, runtime, "sh", "-ec", commands)
    code = """
        import http.server, ssl, threading, urllib.request

        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain("/certificates/server.pem", "/certificates/server.key")
        server = http.server.HTTPServer(("localhost", 0), http.server.SimpleHTTPRequestHandler)
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            print(urllib.request.urlopen(f"https://localhost:{server.server_port}/").status)
        except OSError as error:
            print(error)
        """
    assert python(image, code, mount, "--env", "SSL_CERT_FILE=/certificates/ca.pem") == "200"
    assert "CERTIFICATE_VERIFY_FAILED" in python(image, code, mount)


def test_names_of_services_resolve(project: Project) -> None:
    """In a network of compose it finds itself by the service's name."""
    project.environ["TARGET"] = "minimal"
    project.compose("up", "--build", "--wait")
    code = "import urllib.request; print(urllib.request.urlopen('http://web:5000/health').status)"
    assert project.compose("run", "--rm", "--no-TTY", "web", "python", "-c", code).stdout == "200\n"


def listed(base: str, folder: pathlib.Path) -> set[tuple[str, str, str]]:
    """Return type, name and version of each package that syft finds in the image."""
    archive = folder / "image.tar"
    build = ("docker", "buildx", "build", "--provenance", "false", "--build-arg", f"PYTHON_IMAGE={base}")
    run(*build, "--target", "minimal", "--output", f"type=oci,dest={archive}", ROOT)
    environ = {"SYFT_CHECK_FOR_APP_UPDATE": "false", "HOME": str(folder)}
    tool = pathlib.Path(sys.executable).parent / "syft"
    done = run(tool, "scan", "--quiet", "--output", "syft-json", f"oci-archive:{archive}", env=environ)
    return {(found["type"], found["name"].lower(), found["version"]) for found in json.loads(done.stdout)["artifacts"]}


def test_scanners_find_what_is_in_it(image: str, runtime: str, base: str, tmp_path: pathlib.Path) -> None:
    """Each program and each library is from a package that syft lists, in its version."""
    found = listed(base, tmp_path)
    code = """
        import os, sys
        version, named = "{}.{}.{}".format(*sys.version_info), False
        for top, folders, files in os.walk("/"):
            folders[:] = [f for f in folders if os.path.join(top, f) not in ("/proc", "/sys", "/dev")]
            for path in (os.path.join(top, file) for file in files):
                if os.path.isfile(path) and not os.path.islink(path) and open(path, "rb").read(4) == b"\\x7fELF":
                    print(path)
                    named = named or version.encode().join([b"\\0", b"\\0"]) in open(path, "rb").read()
        print(sys.base_prefix, version, named)
        """
    *binaries, last = python(image, code, "--user", "0").splitlines()
    prefix, version, named = last.split()
    assert len(binaries) > 50
    commands = r"""
        for path; do
            dpkg-query --search "$path" 2>/dev/null || dpkg-query --search "${path#/usr}" 2>/dev/null || echo ": $path"
        done
        """
    done = run("docker", "run", "--rm", runtime, "sh", "-c", commands, "sh", *binaries)
    code = """
        import importlib.metadata
        for found in importlib.metadata.distributions():
            for file in found.files:
                print(f"{found.locate_file(file)} {found.name}=={found.version}")
        """
    distributions = dict(line.rsplit(maxsplit=1) for line in python(image, code).splitlines())
    versions = run("docker", "run", "--rm", runtime, "dpkg-query", "--show", "--showformat", r"${Package} ${Version}\n")
    version_of = dict(line.split() for line in versions.stdout.splitlines())
    for line in done.stdout.splitlines():
        owner, _, path = line.partition(": ")
        if owner:
            package = owner.partition(":")[0]
            assert ("deb", package, version_of[package]) in found, path
        elif path.startswith("/opt/venv/"):
            name, _, its_version = distributions[path].partition("==")
            assert ("python", name.lower(), its_version) in found, path
        else:
            assert path.startswith(prefix)
            # By its version, which syft finds where that is a string of its own: not so where it is in a folder's name.
            assert ("binary", "python", version) in found or named == "False", path
    assert {(name, version) for kind, name, version in found if kind == "python"} >= set(
        re.findall(r"^(\S+)==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    )


def test_records_are_those_of_the_base(image: str, runtime: str) -> None:
    """Each file that dpkg knows is on record: dpkg's own, with its sum, its license, and what this refers to."""
    code = """
        import json, os, pathlib
        files = [os.path.join(top, file) for top, folders, names in os.walk("/") for file in names]
        records = {path.name: path.read_text() for path in pathlib.Path("/var/lib/dpkg/status.d").iterdir()}
        print(json.dumps([files, records]))
        """
    files, records = json.loads(python(image, code, "--user", "0"))
    code = r"""
        import json, pathlib, re, sys
        files, dpkg = set(json.load(sys.stdin)), pathlib.Path("/var/lib/dpkg")
        status = (dpkg / "status").read_text().strip().split("\n\n")
        stanzas = {re.search("^Package: (.*)", stanza)[1]: stanza for stanza in status}
        expected = {}
        for path in dpkg.glob("info/*.list"):
            name = path.stem.partition(":")[0]
            its = {str(p.parent.resolve() / p.name) for p in map(pathlib.Path, path.read_text().splitlines())}
            there = its & files
            if not there and name not in ("ca-certificates", "base-passwd"):
                continue
            expected[name] = stanzas[name].strip() + "\n"
            sums = path.with_suffix(".md5sums")
            lines = sums.read_text().splitlines(True) if sums.exists() else []
            where = lambda line: pathlib.Path("/", line.split(maxsplit=1)[1].strip())
            expected[f"{name}.md5sums"] = "".join(
                line for line in lines if str(where(line).resolve()) in files
                and str(where(line).resolve()) != "/usr/sbin/ldconfig"
            )
            notice = pathlib.Path("/usr/share/doc", name, "copyright")
            if notice.exists():
                assert str(notice.resolve()) in files, notice
                for license in re.findall("/usr/share/common-licenses/[A-Za-z0-9.-]*[A-Za-z0-9]", notice.read_text()):
                    assert not pathlib.Path(license).exists() or str(pathlib.Path(license).resolve()) in files, license
        print(json.dumps(expected))
        """
    done = run(
        *("docker", "run", "--rm", "--interactive", runtime, "python", "-c", textwrap.dedent(code)),
        input=json.dumps(files),
        stdin=None,
    )
    expected = json.loads(done.stdout)
    assert len(expected) > 40
    assert records == expected
    sums = [line for name, text in records.items() if name.endswith(".md5sums") for line in text.splitlines()]
    code = """
        import hashlib, sys
        for line in sys.stdin:
            digest, path = line.split(maxsplit=1)
            assert hashlib.md5(open("/" + path.strip(), "rb").read()).hexdigest() == digest, path
        """
    command = ("docker", "run", "--rm", "--interactive", "--user", "0", image, "python", "-c", textwrap.dedent(code))
    run(*command, input="\n".join(sums), stdin=None)


def test_extensions_bring_their_libraries(project: Project, container: Callable) -> None:
    """A wheel that links a library of the base, and one that has its own, work like any other dependency."""
    with (project.folder / "requirements.in").open("a") as file:
        file.write("greenlet==3.5.6\npsycopg[binary]==3.3.9\n")
    project.run("docker", "build", "--build-arg", "PYTHON_IMAGE", "--target", "lock", "--output", ".", ".")
    project.build("--target", "minimal")
    code = """
        import greenlet, pathlib, psycopg
        assert greenlet.greenlet(lambda: psycopg.pq.version()).switch() > 150000
        maps = pathlib.Path("/proc/self/maps").read_text()
        libraries = sorted({line.split()[-1] for line in maps.splitlines() if ".so" in line})
        print([path for path in libraries if "libstdc++" in path or "libpq" in path])
        print(pathlib.Path("/var/lib/dpkg/status.d/libstdc++6").exists())
        """
    libraries, recorded = python(project.environ["COMPOSE_PROJECT_NAME"], code).splitlines()
    assert re.search(r"'/usr/lib/[^']*/libstdc\+\+\.so", libraries)
    assert re.search(r"'/opt/venv/[^']*/libpq", libraries)
    assert recorded == "True"
    name = container("--publish", "127.0.0.1::5000", project.environ["COMPOSE_PROJECT_NAME"])
    until_health(name, "healthy")
    assert get(url(name) + "/health")[0] == 200


def test_an_edit_of_the_code_changes_one_layer(project: Project) -> None:
    """After an edit of app.py the layers of Python and environment are the same; after a new import the second is."""
    layers = []
    for line in ("", "# edited", "import wave"):
        with (project.folder / "app.py").open("a") as file:
            file.write(f"\n{line}  # {uuid.uuid4()}\n")
        # Without what the cache has of another time: each build by itself has to come to the same.
        project.build("--target", "minimal", "--no-cache-filter=compact,root")
        layers.append(inspect(project.environ["COMPOSE_PROJECT_NAME"], ".RootFS.Layers"))
    same = [[one == other for one, other in zip(before, layers[2], strict=True)] for before in layers[:2]]
    assert layers[0][:2] == layers[1][:2]
    assert [one[:3] for one in same] == [[False, True, False]] * 2


@pytest.fixture
def another_base(project: Project, base: str) -> Iterator[Callable[[str], None]]:
    """A function that makes the project's base one that a step of a Dockerfile has changed; it goes with the test."""
    name = f"{project.environ['COMPOSE_PROJECT_NAME']}-base"

    def change(step: str) -> None:
        (project.folder / "base.Dockerfile").write_text(f"FROM {base}\n{step}\n")
        project.run("docker", "build", "--file", "base.Dockerfile", "--tag", name, ".")
        project.environ["PYTHON_IMAGE"] = name

    yield change
    run("docker", "image", "rm", "--force", name)


def test_a_library_that_is_added(project: Project, another_base: Callable) -> None:
    """What the tool's table of DATA names comes along, is found by the linker, and noted if it is of no package."""
    code = """
        import glob, pathlib
        library = pathlib.Path(glob.glob("/lib/*/liblzma.so.5")[0]).read_bytes()
        pathlib.Path("/opt/mine").mkdir()
        pathlib.Path("/opt/mine/libmine.so.5").write_bytes(library.replace(b"liblzma.so.5", b"libmine.so.5"))
        """
    another_base(f"RUN {json.dumps(['python', '-c', textwrap.dedent(code)])}")
    edit(project.folder / "tools/minimal.py", "^DATA = {$", 'DATA = {\n    "mine": "opt/mine",')
    said = project.build("--target", "minimal", "--progress=plain", "--no-cache-filter=root").stderr
    assert "minimal: /opt/mine/libmine.so.5 is from no package: scanners will not know of it" in said
    code = (
        "import ctypes.util; print(ctypes.CDLL('libmine.so.5').lzma_version_number(), ctypes.util.find_library('mine'))"
    )
    assert re.fullmatch(r"\d+ libmine.so.5", python(project.environ["COMPOSE_PROJECT_NAME"], code))


def test_what_the_base_lacks_is_said(project: Project, another_base: Callable) -> None:
    """From a base without time zones comes an image without, and one line that says so."""
    another_base("RUN rm -r /usr/share/zoneinfo")
    said = project.build("--target", "minimal", "--progress=plain", "--no-cache-filter=root").stderr
    assert "minimal: the base has no /usr/share/zoneinfo, so this has not either" in said


def test_another_base_is_refused(project: Project, another_base: Callable) -> None:
    """From a base whose packages cannot be named, `minimal` is not made; one line says what it takes."""
    another_base("RUN rm /var/lib/dpkg/status")
    done = project.build("--target", "minimal", "--progress=plain", check=False)
    assert done.returncode != 0
    takes = "takes a base of Debian's packages, such as python:3.14-slim"
    assert f"minimal: /var/lib/dpkg/status is missing: {takes}" in done.stderr
