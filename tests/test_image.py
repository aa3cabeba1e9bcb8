"""The built image on a real engine: its properties, its life as a container, its layers."""

import json
import pathlib
import re
import sys
import textwrap
from collections.abc import Callable

import pytest

from tests.support import ROOT, get, run, unanswered_until_gone, wait_until


def inspect(container: str, field: str) -> object:
    """Return a field of `docker inspect`."""
    return json.loads(run("docker", "inspect", "--format", f"{{{{json {field}}}}}", container).stdout)


def inspect_image(image: str) -> dict:
    """Return the configuration of an image."""
    return json.loads(run("docker", "image", "inspect", "--format", "{{json .Config}}", image).stdout)


def url(container: str) -> str:
    """Return where the engine has published a container's port 5000."""
    return "http://" + run("docker", "port", container, "5000/tcp").stdout.splitlines()[0]


def until_health(container: str, status: str) -> None:
    """Wait until the engine finds the container `status`: healthy or unhealthy."""
    wait_until(lambda: inspect(container, ".State.Health.Status") == status, 60, f"{container} to be {status}")


def python(image: str, code: str, *options: str) -> str:
    """Run Python code in a container of the image and return what it prints."""
    command = ["docker", "run", "--rm", *options, image, "python", "-c", textwrap.dedent(code)]
    return run(*command).stdout.strip()


def test_properties(image: str) -> None:
    """User, command, folder, port, probe and variables are those that the contract with its users names."""
    config = inspect_image(image)
    assert (config["User"], config["WorkingDir"], config["Cmd"]) == ("65532:65532", "/app", ["python", "-m", "serve"])
    assert list(config["ExposedPorts"]) == ["5000/tcp"]
    assert config["Healthcheck"]["Test"] == ["CMD", "python", "-IS", "/app/healthcheck.py"]
    assert config["Env"][0].startswith("PATH=/opt/venv/bin:/")
    assert "PYTHONUNBUFFERED=1" in config["Env"]
    assert not [variable for variable in config["Env"] if variable.startswith(("PIP_", "FLASK", "PYTHONDONTWRITE"))]


def test_the_code_is_root_s(image: str) -> None:
    """The application, what serves it and what it needs are there, readable for all, and not the process's own."""
    code = """
        import os, pathlib
        for path in sorted(p for p in pathlib.Path("/app").rglob("*") if "__pycache__" not in p.parts):
            stat = path.stat()
            print(path, stat.st_uid, stat.st_gid, oct(stat.st_mode & 0o777))
        print(os.getuid(), os.getgid(), os.getgroups())
        """
    *files, process = python(image, code).splitlines()
    own = [f"/app/serve/{path.name}" for path in (ROOT / "serve").glob("*.py")]
    expected = dict.fromkeys([*own, "/app/app.py", "/app/healthcheck.py"], "0o644") | {"/app/serve": "0o755"}
    assert sorted(files) == sorted(f"{path} 0 0 {mode}" for path, mode in expected.items())
    assert process == "65532 65532 [65532]"


def test_the_environment_is_the_lock(image: str) -> None:
    """The environment has what requirements.txt names, in those versions, and nothing else."""
    code = """
        import importlib.metadata, site
        for found in importlib.metadata.distributions(path=[p for p in site.getsitepackages() if "/opt/venv" in p]):
            print(found.name.lower().replace("_", "-") + "==" + found.version)
        """
    locked = re.findall(r"^(\S+==\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert sorted(python(image, code).splitlines()) == sorted(locked)
    done = run("docker", "run", "--rm", image, "python", "-m", "pip", "--version", check=False)
    assert (done.returncode, "No module named pip" in done.stderr) == (1, True)


def test_lives_as_a_tutorial_says(image: str, container: Callable) -> None:
    """With docker run, curl, docker logs, docker stop it serves, says where, and ends with exit code 0, not killed."""
    name = container("--publish", "127.0.0.1::5000", image)
    until_health(name, "healthy")
    assert get(url(name) + "/health")[0] == 200
    assert run("docker", "logs", name).stderr.count("Serving on http://") == 2
    run("docker", "stop", name)
    assert inspect(name, ".State.ExitCode") == 0


@pytest.mark.skipif(sys.platform != "linux", reason="containers have addresses of their own on Linux")
def test_a_stop_loses_nothing(image: str, container: Callable) -> None:
    """`docker stop` while clients ask without a pause: each request is answered, and it ends by itself."""
    name = container(image)
    until_health(name, "healthy")
    # Not the published port: what publishes it accepts connections that the container no longer does.
    [network] = inspect(name, ".NetworkSettings.Networks").values()
    assert unanswered_until_gone((network["IPAddress"], 5000), lambda: run("docker", "stop", name)) == []
    assert inspect(name, ".State.ExitCode") == 0
    assert '"Stopped"' in run("docker", "logs", name).stderr


def test_ends_on_sigint(image: str, container: Callable) -> None:
    """Ctrl-C in `docker run` ends it with exit code 0."""
    name = container(image)
    until_health(name, "healthy")
    run("docker", "kill", "--signal", "INT", name)
    assert run("docker", "wait", name).stdout.strip() == "0"


def test_stops_while_it_starts(image: str, container: Callable, tmp_path: pathlib.Path) -> None:
    """A stop that comes while the server still imports is heeded, not left to SIGKILL."""
    (tmp_path / "slow.py").write_text("import time; print('importing', flush=True); time.sleep(600)")
    (tmp_path / "slow.py").chmod(0o644)
    name = container("--env", "APP=slow:app", "--volume", f"{tmp_path / 'slow.py'}:/app/slow.py:ro,z", image)
    wait_until(lambda: "importing" in run("docker", "logs", name).stdout, 30, "the import to begin")
    run("docker", "stop", name)
    assert inspect(name, ".State.ExitCode") == 0


def test_a_wrong_setting_ends_it(image: str) -> None:
    """In a container too a wrong variable is one line and exit code 2."""
    done = run("docker", "run", "--rm", "--env", "WAITRESS_THREADS=many", image, check=False)
    assert done.returncode == 2
    assert done.stderr == "serve: WAITRESS_THREADS='many': takes a whole number from 1\n"


def test_too_many_threads_end_it(image: str) -> None:
    """Where the container's limits do not allow so many threads, that is one line and exit code 2."""
    done = run("docker", "run", "--rm", "--pids-limit", "20", "--env", "WAITRESS_THREADS=50", image, check=False)
    assert done.returncode == 2
    assert done.stderr == "serve: cannot start 50 threads: can't start new thread\n"


def test_without_ipv6(image: str, container: Callable, tmp_path: pathlib.Path) -> None:
    """On a kernel that has no IPv6 at all it serves on IPv4."""
    refuse = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "syscalls": [
            {
                "names": ["socket"],
                "action": "SCMP_ACT_ERRNO",
                "errnoRet": 97,  # EAFNOSUPPORT
                "args": [{"index": 0, "value": 10, "op": "SCMP_CMP_EQ"}],  # AF_INET6
            }
        ],
    }
    profile = tmp_path / "no-ipv6.json"
    profile.write_text(json.dumps(refuse))
    name = container("--security-opt", f"seccomp={profile}", image)
    until_health(name, "healthy")
    assert "Serving on http://0.0.0.0:5000" in run("docker", "logs", name).stderr


def test_nothing_is_writable_but_tmp(image: str) -> None:
    """As compose runs it the process can write to /tmp alone; and read-only or not, never to code or interpreter."""
    code = """
        import os
        for top, folders, files in os.walk("/"):
            folders[:] = [f for f in folders if os.path.join(top, f) not in ("/proc", "/sys", "/dev")]
            for path in [top, *(os.path.join(top, f) for f in files)]:
                if os.access(path, os.W_OK) and not os.path.islink(path):
                    print(path)
        """
    assert python(image, code, "--read-only", "--tmpfs", "/tmp") == "/tmp"
    writable = python(image, code).splitlines()
    assert not [path for path in writable if path.startswith(("/app", "/opt", "/usr", "/etc", "/bin", "/lib"))]


def test_nothing_is_compiled_at_run_time(image: str, container: Callable) -> None:
    """Start, probes and answers find the bytecode of all that they import: as root, who could, none is written."""
    name = container("--user", "0", "--publish", "127.0.0.1::5000", image)
    until_health(name, "healthy")
    assert get(url(name) + "/health")[0] == 200
    assert get(url(name) + "/no/such/path")[0] == 404
    assert run("docker", "diff", name).stdout == ""


def test_bytecode_is_by_hash(image: str) -> None:
    """Of what is installed no bytecode depends on a time stamp; the code's own is checked against its source."""
    code = """
        import importlib.util, pathlib, sys
        import flask, waitress.server, serve.server
        found = {path: path.read_bytes() for top in ("/app", "/opt/venv") for path in pathlib.Path(top).rglob("*.pyc")}
        for module in list(sys.modules.values()):
            if getattr(module, "__cached__", None):
                found[pathlib.Path(module.__cached__)] = module.__loader__.get_data(module.__cached__)
        for path, data in found.items():
            assert data[:4] == importlib.util.MAGIC_NUMBER, path
            print(path.parts[1], data[4])  # flags (PEP 552): 0 time stamp, 1 hash, 3 hash that is checked
        """
    counted = python(image, code).splitlines()
    assert set(counted) == {"app 3", "opt 1", "usr 1"}  # folder and flags
    assert counted.count("app 3") == len([ROOT / "app.py", ROOT / "healthcheck.py", *(ROOT / "serve").glob("*.py")])


def test_a_mounted_file_takes_effect(image: str, container: Callable, tmp_path: pathlib.Path) -> None:
    """An app.py mounted over the image's own is what runs, in spite of the bytecode beside it."""
    mine = tmp_path / "app.py"
    mine.write_text("def app(environ, start_response):\n    start_response('200 OK', [])\n    return [b'mine']\n")
    mine.chmod(0o644)
    name = container("--publish", "127.0.0.1::5000", "--volume", f"{mine}:/app/app.py:ro,z", image)
    until_health(name, "healthy")
    assert get(url(name) + "/") == (200, "mine")


def test_unhealthy_while_the_application_hangs(image: str, container: Callable, tmp_path: pathlib.Path) -> None:
    """An application that answers no more makes the container unhealthy, reason on record; then it recovers."""
    (tmp_path / "app.py").write_text(
        textwrap.dedent("""
            import os, time

            def app(environ, start_response):
                while os.path.exists("/tmp/hang"):
                    time.sleep(0.05)
                start_response("200 OK", [])
                return []
            """)
    )
    (tmp_path / "app.py").chmod(0o644)
    mount = f"{tmp_path / 'app.py'}:/app/app.py:ro,z"
    name = container("--health-interval", "0.5s", "--health-retries", "1", "--volume", mount, image)
    until_health(name, "healthy")
    run("docker", "exec", name, "python", "-c", "open('/tmp/hang', 'w')")
    until_health(name, "unhealthy")
    record = inspect(name, ".State.Health.Log")
    assert any((probe["ExitCode"], probe["Output"]) == (1, "unhealthy: timed out\n") for probe in record)
    run("docker", "exec", name, "python", "-c", "import os; os.remove('/tmp/hang')")
    until_health(name, "healthy")
