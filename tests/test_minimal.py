"""The minimal image on a real engine: it is a whole Python, on record, and what it leaves out is what README says."""

import json
import pathlib
import re
import sys
import uuid
from collections.abc import Callable, Iterator

import pytest

from tests.support import ROOT, Project, get, run
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
            except BaseException as error:
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
    name = "flask-helloworld-test:runtime-to-compare"
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
        import multiprocessing, os, pathlib, pwd, sqlite3, socket, ssl, subprocess, sys, tempfile, threading, zoneinfo

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
        thread = threading.Thread(target=lambda: ctypes.CDLL(None).pthread_exit(None))
        thread.start()  # which takes libgcc_s
        print("whole", pathlib.Path("/etc/os-release").read_text().count("ID="))
        os._exit(0)
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
    return {(found["type"], found["name"], found["version"]) for found in json.loads(done.stdout)["artifacts"]}


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
    versions = run("docker", "run", "--rm", runtime, "dpkg-query", "--show", "--showformat", r"${Package} ${Version}\n")
    version_of = dict(line.split() for line in versions.stdout.splitlines())
    for line in done.stdout.splitlines():
        owner, _, path = line.partition(": ")
        if owner:
            package = owner.partition(":")[0]
            assert ("deb", package, version_of[package]) in found, path
        elif path.startswith("/opt/venv/"):
            assert [name for kind, name, _ in found if kind == "python" and f"/{name.lower()}/" in path.lower()], path
        else:
            assert path.startswith(prefix)
            # By its version, which syft finds where that is a string of its own: not so where it is in a folder's name.
            assert ("binary", "python", version) in found or named == "False", path
    assert {(name, version) for kind, name, version in found if kind == "python"} >= set(
        re.findall(r"^(\S+)==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    )


def test_records_are_those_of_the_base(image: str, runtime: str) -> None:
    """A record is dpkg's own, its sums are those of the files, and where the base has a license of it, so has this."""
    code = """
        import hashlib, json, pathlib
        records = pathlib.Path("/var/lib/dpkg/status.d")
        for sums in records.glob("*.md5sums"):
            for line in sums.read_text().splitlines():
                digest, path = line.split(maxsplit=1)
                assert hashlib.md5(pathlib.Path("/", path).read_bytes()).hexdigest() == digest, path
        names = [path.name for path in records.iterdir() if path.suffix != ".md5sums"]
        notices = [name for name in names if pathlib.Path("/usr/share/doc", name, "copyright").exists()]
        print(json.dumps([{name: (records / name).read_text() for name in names}, notices]))
        """
    records, notices = json.loads(python(image, code))
    assert {"libc6", "base-files", "ca-certificates", "tzdata"} <= records.keys()
    status = run("docker", "run", "--rm", runtime, "cat", "/var/lib/dpkg/status").stdout
    assert all(record in status + "\n" for record in records.values())
    whole = run("docker", "run", "--rm", runtime, "sh", "-c", "cd /usr/share/doc && echo */copyright").stdout
    assert set(notices) == {name for name in records if f"{name}/copyright" in whole.split()}


def test_extensions_bring_their_libraries(project: Project, container: Callable) -> None:
    """A wheel that links a library of the base, and one that has its own, work like any other dependency."""
    with (project.folder / "requirements.in").open("a") as file:
        file.write("greenlet\npsycopg[binary]\n")
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
    assert get(url(name) + "/Joe") == (200, "Hello, Joe!\n")


def test_an_edit_of_the_code_changes_one_layer(project: Project) -> None:
    """After an edit of app.py the layers with Python and the environment are the same, to the last byte."""
    layers = []
    for _ in range(2):
        with (project.folder / "app.py").open("a") as file:
            file.write(f"\n# {uuid.uuid4()}\n")
        project.build("--target", "minimal")
        layers.append(inspect(project.environ["COMPOSE_PROJECT_NAME"], ".RootFS.Layers"))
    assert [one == other for one, other in zip(*layers, strict=True)][:3] == [True, True, False]


def test_another_base_is_refused(project: Project, base: str) -> None:
    """From a base whose packages cannot be named, `minimal` is not made; one line says what it takes."""
    name = f"{project.environ['COMPOSE_PROJECT_NAME']}-base"
    (project.folder / "base.Dockerfile").write_text(f"FROM {base}\nRUN rm /var/lib/dpkg/status\n")
    project.run("docker", "build", "--file", "base.Dockerfile", "--tag", name, ".")
    try:
        done = project.build("--target", "minimal", "--progress=plain", check=False, environ={"PYTHON_IMAGE": name})
    finally:
        run("docker", "image", "rm", "--force", name)
    assert done.returncode != 0
    takes = "takes a base of Debian's packages, such as python:3.14-slim"
    assert f"minimal: /var/lib/dpkg/status is missing: {takes}" in done.stderr
