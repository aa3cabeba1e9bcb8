"""The built images on a real engine: their contents, and how a container starts, serves and stops."""

import json
import pathlib
import re
import sys
from collections.abc import Callable

import pytest

from tests.support import ROOT, errors_while_stopping, get, inspect, python, run, until_health, wait_until

# Hangs while /tmp/hang exists.
HANGS = """
import os, time

def app(environ, start_response):
    while os.path.exists("/tmp/hang"):
        time.sleep(0.05)
    start_response("200 OK", [])
    return [b"mine"]
"""


def url(container: str) -> str:
    """Return the URL at which a container's port 5000 is published."""
    return "http://" + run("docker", "port", container, "5000/tcp").stdout.splitlines()[0]


@pytest.fixture
def mount_app(tmp_path: pathlib.Path) -> Callable[[str], str]:
    """A function that returns the `docker run` option to mount some code over the image's app.py."""

    def mount(code: str) -> str:
        (tmp_path / "app.py").write_text(code)
        (tmp_path / "app.py").chmod(0o644)
        return f"--volume={tmp_path / 'app.py'}:/app/app.py:ro,z"

    return mount


# ---- Contents --------------------------------------------------------------------------------------------------------


def test_user_command_port_and_probe(image: str) -> None:
    """User, command, folder, port, probe and environment variables are as documented."""
    config = inspect(image, ".Config")
    assert (config["User"], config["WorkingDir"], config["Cmd"]) == ("65532:65532", "/app", ["python", "-m", "serve"])
    assert list(config["ExposedPorts"]) == ["5000/tcp"]
    assert config["Healthcheck"]["Test"] == ["CMD", "python", "-IS", "/app/healthcheck.py"]
    assert config["Env"][0].startswith("PATH=/opt/venv/bin:/")
    assert "PYTHONUNBUFFERED=1" in config["Env"]
    assert not [variable for variable in config["Env"] if variable.startswith(("PIP_", "FLASK", "PYTHONDONTWRITE"))]


def test_the_code_belongs_to_root(service: str) -> None:
    """Root owns the code, everyone can read it; the service's own user can change neither code nor programs."""
    code = """
        import json, os, pathlib
        found = [path for path in pathlib.Path("/app").rglob("*") if "__pycache__" not in path.parts]
        modes = {str(path): [path.stat().st_uid, path.stat().st_gid, path.stat().st_mode & 0o777] for path in found}
        writable = []
        for top, folders, files in os.walk("/"):
            folders[:] = [f for f in folders if os.path.join(top, f) not in ("/proc", "/sys", "/dev")]
            paths = [top, *(os.path.join(top, f) for f in files)]
            writable += [path for path in paths if os.access(path, os.W_OK) and not os.path.islink(path)]
        print(json.dumps([modes, [os.getuid(), os.getgid(), os.getgroups()], writable]))
        """
    modes, process, writable = json.loads(python(service, code))
    own = {f"/app/serve/{path.name}" for path in (ROOT / "serve").glob("*.py")}
    assert {*own, "/app/app.py", "/app/healthcheck.py"} <= modes.keys()
    assert all(mode in ([0, 0, 0o644], [0, 0, 0o755]) for mode in modes.values())
    assert process == [65532, 65532, [65532]]
    assert {"/tmp", "/data"} <= set(writable)
    assert not [path for path in writable if path.startswith(("/app", "/opt", "/usr", "/etc", "/bin", "/lib"))]


def test_only_locked_packages_are_installed(service: str) -> None:
    """The environment has exactly the packages and versions that requirements.txt pins; there is no pip."""
    code = """
        import importlib.metadata, importlib.util, site
        for found in importlib.metadata.distributions(path=[p for p in site.getsitepackages() if "/opt/venv" in p]):
            print(found.name.lower().replace("_", "-") + "==" + found.version)
        assert not importlib.util.find_spec("pip")
        """
    locked = re.findall(r"^(\S+==\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert sorted(python(service, code).splitlines()) == sorted(locked)


def test_bytecode_is_hash_based(service: str) -> None:
    """Bytecode is validated by hash, not by file times; only that in /app is checked against its source."""
    code = """
        import importlib.util, pathlib, sys
        import flask, waitress.server, serve.server
        found = {path: path.read_bytes() for top in ("/app", "/opt/venv") for path in pathlib.Path(top).rglob("*.pyc")}
        for module in list(sys.modules.values()):
            if getattr(module, "__cached__", None):
                found[pathlib.Path(module.__cached__)] = module.__loader__.get_data(module.__cached__)
        for path, data in found.items():
            assert data[:4] == importlib.util.MAGIC_NUMBER, path
            print(path.parts[1], data[4])  # flags (PEP 552): 0 timestamp, 1 unchecked hash, 3 checked hash
        assert len(list(pathlib.Path("/app").rglob("*.py"))) == len(list(pathlib.Path("/app").rglob("*.pyc")))
        """
    assert set(python(service, code).splitlines()) == {"app 3", "opt 1", "usr 1"}  # folder and flags


# ---- Start, service, stop --------------------------------------------------------------------------------------------


def test_serves_until_ctrl_c(image: str, container: Callable) -> None:
    """A published container serves, logs its addresses, and ends with exit code 0 on Ctrl-C."""
    name = container("--publish", "127.0.0.1::5000", image)
    until_health(name)
    assert get(url(name) + "/health")[0] == 200
    assert run("docker", "logs", name).stderr.count("Serving on http://") == 2
    run("docker", "kill", "--signal", "INT", name)
    assert run("docker", "wait", name).stdout == "0\n"


@pytest.mark.skipif(sys.platform != "linux", reason="only on Linux can the host reach a container's address")
def test_docker_stop_loses_no_request(image: str, container: Callable) -> None:
    """`docker stop` under constant requests leaves none unanswered, and the container ends with exit code 0."""
    name = container(image)
    until_health(name)
    # Not the published port: Docker's proxy accepts connections that the container no longer accepts.
    [network] = inspect(name, ".NetworkSettings.Networks").values()
    assert errors_while_stopping((network["IPAddress"], 5000), lambda: run("docker", "stop", name)) == []
    assert inspect(name, ".State.ExitCode") == 0
    assert '"Stopped"' in run("docker", "logs", name).stderr


def test_stop_during_import(image: str, container: Callable, mount_app: Callable) -> None:
    """`docker stop` during the application's import ends the container with exit code 0, without SIGKILL."""
    name = container(mount_app("import time; print('importing', flush=True); time.sleep(600)"), image)
    wait_until(lambda: "importing" in run("docker", "logs", name).stdout, 30, "the import to begin")
    run("docker", "stop", name)
    assert inspect(name, ".State.ExitCode") == 0


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--env=WAITRESS_THREADS=many"], "WAITRESS_THREADS='many': must be a whole number, 1 or more"),
        (["--env=WAITRESS_THREADS=50", "--pids-limit=20"], "cannot start 50 threads: can't start new thread"),
    ],
    ids=["wrong setting", "too many threads"],
)
def test_startup_errors(image: str, options: list[str], line: str) -> None:
    """A wrong setting, or more threads than the container allows, ends the start with one line and exit code 2."""
    done = run("docker", "run", "--rm", *options, image, check=False)
    assert (done.returncode, done.stderr) == (2, f"serve: {line}\n")


def test_serves_without_ipv6(images: Callable, container: Callable, tmp_path: pathlib.Path) -> None:
    """On a kernel without IPv6, it serves on IPv4."""
    inet6 = {"index": 0, "value": 10, "op": "SCMP_CMP_EQ"}
    refused = {"names": ["socket"], "action": "SCMP_ACT_ERRNO", "errnoRet": 97, "args": [inet6]}  # EAFNOSUPPORT
    profile = tmp_path / "no-ipv6.json"
    profile.write_text(json.dumps({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [refused]}))
    name = container("--security-opt", f"seccomp={profile}", images("runtime"))
    until_health(name)
    assert "Serving on http://0.0.0.0:5000" in run("docker", "logs", name).stderr


def test_serves_as_any_user_read_only(image: str, container: Callable, mount_app: Callable) -> None:
    """It serves as any user that a platform chooses, on a read-only file system too."""
    name = container("--user", "12345:0", "--read-only", mount_app(HANGS), image)
    until_health(name)
    assert python(name, "import os; print(os.getuid(), os.getgid())") == "12345 0"


def test_nothing_is_compiled_at_run_time(image: str, container: Callable) -> None:
    """The image has all bytecode: start, probes and requests write no file but the application's, not even as root."""
    name = container("--user", "0", "--publish", "127.0.0.1::5000", image)
    until_health(name)
    assert [get(url(name) + path)[0] for path in ("/health", "/no/such/path")] == [200, 404]
    assert [line for line in run("docker", "diff", name).stdout.splitlines() if " /data" not in line] == []


def test_a_mounted_file_takes_effect(image: str, container: Callable, mount_app: Callable) -> None:
    """An app.py mounted over the image's own runs, despite the old bytecode beside it."""
    name = container("--publish", "127.0.0.1::5000", mount_app(HANGS), image)
    until_health(name)
    assert get(url(name) + "/") == (200, "mine")


def test_unhealthy_while_the_application_hangs(images: Callable, container: Callable, mount_app: Callable) -> None:
    """A hanging application makes the container unhealthy, with the reason in the health log, until it recovers."""
    name = container("--health-interval", "0.5s", "--health-retries", "1", mount_app(HANGS), images("runtime"))
    until_health(name)
    python(name, "open('/tmp/hang', 'w')")
    until_health(name, "unhealthy")
    record = inspect(name, ".State.Health.Log")
    assert any((probe["ExitCode"], probe["Output"]) == (1, "unhealthy: timed out\n") for probe in record)
    python(name, "import os; os.remove('/tmp/hang')")
    until_health(name)
