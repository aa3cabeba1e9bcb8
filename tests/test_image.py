"""The built image on a real engine: its properties, its life as a container, its layers."""

import json
import pathlib
import re
import sys
import textwrap
import uuid
from collections.abc import Callable

import pytest

from tests.support import ROOT, Project, get, run, unanswered_until_gone, wait_until


def inspect(container: str, field: str) -> object:
    """Return a field of `docker inspect`."""
    return json.loads(run("docker", "inspect", "--format", f"{{{{json {field}}}}}", container).stdout)


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


def test_properties(image: str, target: str) -> None:
    """User, command, labels, the files that are there and are not: as image.yaml and minimal.yaml have them."""
    tool = pathlib.Path(sys.executable).parent / "container-structure-test"
    files = ["image.yaml", *(["minimal.yaml"] if target == "minimal" else [])]
    run(tool, "test", "--image", image, *(f"--config={ROOT / 'tests' / file}" for file in files))


def test_the_environment_is_the_lock(image: str) -> None:
    """The environment has what requirements.txt names, in those versions, and nothing else."""
    code = """
        import importlib.metadata, site
        for found in importlib.metadata.distributions(path=[p for p in site.getsitepackages() if "/opt/venv" in p]):
            print(found.name.lower().replace("_", "-") + "==" + found.version)
        """
    locked = re.findall(r"^(\S+==\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert sorted(python(image, code).splitlines()) == sorted(locked)


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
    assert done.stderr == "serve: WAITRESS_THREADS='many': takes a whole number from 1 to 10000\n"


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


def steps_run(project: Project) -> list[str]:
    """Build the copy; return the steps of the Dockerfile (their instructions, in short) that the cache did not have."""
    done = project.build("--progress", "plain")
    steps = re.findall(r"^#(\d+) (\[\S+ \d+/\d+\] (?!FROM).+)$", done.stderr, re.MULTILINE)
    assert steps
    cached = re.findall(r"^#(\d+) CACHED$", done.stderr, re.MULTILINE)
    return [instruction for number, instruction in steps if number not in cached]


def test_an_edit_of_the_code_runs_no_pip(project: Project) -> None:
    """After an edit of app.py only the steps that take the code in run again; after one of the lock, pip does."""
    steps_run(project)
    assert steps_run(project) == []
    for name, expected in ("app.py", ["COPY .", "compileall"]), ("requirements.txt", ["pip wheel"]):
        with (project.folder / name).open("a") as file:
            file.write(f"\n# {uuid.uuid4()}\n")  # unlike any edit that an earlier run has left in the build cache
        again = steps_run(project)
        assert all(any(text in step for step in again) for text in expected)
        assert any("pip" in step for step in again) == (name == "requirements.txt")


def test_a_tampered_hash_stops_the_build(project: Project) -> None:
    """If a wheel is not what the lock says, pip's own message ends the build."""
    lock = project.folder / "requirements.txt"
    text = lock.read_text()
    start = text.index("waitress==")
    lock.write_text(text[:start] + re.sub(r"sha256:[0-9a-f]{4}", "sha256:0000", text[start:]))
    done = project.build(check=False)
    assert done.returncode != 0
    assert "THESE PACKAGES DO NOT MATCH THE HASHES FROM THE REQUIREMENTS FILE" in done.stderr


def test_the_lock_has_to_be_whole(project: Project) -> None:
    """If something that is needed is not in the lock, pip's own message ends the build."""
    lock = project.folder / "requirements.txt"
    lock.write_text(re.sub(r"werkzeug==(.|\n)*?\n(?=\S|\Z)", "", lock.read_text()))
    done = project.build(check=False)
    assert done.returncode != 0
    assert "all requirements must have their versions pinned with ==" in done.stderr


def test_a_syntax_error_stops_the_build(project: Project) -> None:
    """Code that does not compile never becomes an image; the message has its line."""
    (project.folder / "app.py").write_text("app = (\n")
    done = project.build(check=False)
    assert done.returncode != 0
    assert "SyntaxError" in done.stderr


def test_a_private_clone_builds_a_readable_image(project: Project, container: Callable) -> None:
    """A clone made under umask 077 gives an image that its user can read, and no mode of a file gets into it."""
    for path in project.folder.rglob("*"):
        path.chmod(path.stat().st_mode & 0o700)
    (project.folder / "app.py").chmod(0o777)
    project.build()
    name = container(project.environ["COMPOSE_PROJECT_NAME"])
    until_health(name, "healthy")
    assert (
        run("docker", "exec", name, "stat", "-c", "%a", "app.py", "serve/log.py", "serve").stdout == "644\n644\n755\n"
    )


KEPT_OUT = [
    *(f"mine/{name}" for name in ("venv/x.py", "instance/x.py", "pip.conf", "x.p12", "id_rsa", "prod.env", "x.db-wal")),
    *(".env", ".git/config", ".venv/bin/activate", "venv/lib/x.py", "env/lib/x.py", "node_modules/x/x.js"),
    *(
        "loose.sql",
        "data.bin",
        "secret.pem",
        "mine/secret.key",
        "mine/certificates/secret.pem",
        "mine/.env",
        "mine/.x/secret",
    ),
    *("mine/data.sqlite3", "mine/data.sqlite3-wal", "mine/data.db", "instance/config.py", "wheelhouse/x.whl"),
    *("mine/__pycache__/x.pyc", "mine/deep/__pycache__/x.pyc", "mine/node_modules/x.js", "mine/README.md"),
    *("bench/x.py", "deploy/x.py", "tools/x.py", "README.md", "Makefile", "compose.yaml", ".github/workflows/ci.yml"),
]
LET_IN = [
    "static/.well-known/security.txt",
    "more.py",
    "mine/__init__.py",
    "mine/deep/schema.sql",
    "templates/x.html",
    "static/x/y.css",
    "data/x.csv",
]


def test_the_context_is_what_the_dockerfile_names(project: Project, tmp_path: pathlib.Path) -> None:
    """Of the folder, an application's modules and folders are sent to the engine: no secret, no data, no cache."""
    for name in (*KEPT_OUT, *LET_IN):
        (project.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (project.folder / name).write_text("x = 1\n")
    (project.folder / "all.Dockerfile").write_text("FROM scratch\nCOPY . /\n")
    project.run("docker", "build", "--file", "all.Dockerfile", "--output", tmp_path / "context", ".")
    sent = {path.relative_to(tmp_path / "context").as_posix() for path in (tmp_path / "context").rglob("*")}
    assert sent.isdisjoint(KEPT_OUT)
    assert sent >= set(LET_IN)
    names = ("examples", "healthcheck.py", "pyproject.toml", "serve", "tests", "tools", "app.py")
    locks = {path.name for path in ROOT.glob("requirements*")}
    assert {name.partition("/")[0] for name in sent} == {name.partition("/")[0] for name in LET_IN} | {*names, *locks}


def test_the_image_has_what_was_sent(project: Project) -> None:
    """What is sent of the application is in the image, where it was; the project's own files are not."""
    for name in LET_IN:
        (project.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (project.folder / name).write_text("x = 1\n")
    project.build()
    code = """
        import pathlib
        print(*(path for path in pathlib.Path().rglob("*") if path.is_file() and path.suffix != ".pyc"))
        """
    listed = sorted(python(project.environ["COMPOSE_PROJECT_NAME"], code).split())
    own = [f"serve/{path.name}" for path in (ROOT / "serve").glob("*.py")]
    assert listed == sorted([*LET_IN, *own, "app.py", "healthcheck.py"])
