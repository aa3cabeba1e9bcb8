"""docker compose with a copy of the project: up, what it may do, down; the tests inside of the image."""

import json
import socket
from contextlib import ExitStack, suppress

import pytest

from tests.support import Project, edit, free_port, get, many_files, run


def container_of(project: Project) -> dict:
    """Return what the engine says of the container that runs web."""
    [facts] = json.loads(run("docker", "inspect", project.compose("ps", "--quiet", "web").stdout.strip()).stdout)
    return facts


@pytest.mark.parametrize("kind", ["runtime", "minimal"])
def test_up_serves_and_down_removes(project: Project, kind: str) -> None:
    """`up --wait` waits until it is healthy, on 127.0.0.1 alone; `stop` kills nothing, `down` leaves nothing."""
    project.environ["TARGET"] = kind
    project.compose("up", "--build", "--wait")
    url = project.url()
    assert url.startswith("http://127.0.0.1:")
    assert get(url + "/health")[0] == 200
    shell = project.compose("exec", "web", "sh", "-c", "true", check=False).returncode == 0
    assert shell == (kind == "runtime")
    code = "import urllib.request; print(urllib.request.urlopen('http://web:5000/health').status)"
    assert project.compose("run", "--rm", "--no-TTY", "web", "python", "-c", code).stdout == "200\n"
    name = container_of(project)["Id"]
    project.compose("stop")
    assert run("docker", "inspect", "--format", "{{.State.ExitCode}}", name).stdout == "0\n"
    project.compose("down")
    assert project.compose("ps", "--all", "--quiet").stdout == ""


def test_what_the_container_may_not_do(project: Project) -> None:
    """It is read-only but for /tmp, has no capabilities and cannot get any; memory, CPU and processes are bounded."""
    project.compose("up", "--build", "--wait")
    facts = container_of(project)
    host = facts["HostConfig"]
    assert host["ReadonlyRootfs"] is True
    assert host["Tmpfs"] == {"/tmp": "size=64m"}
    assert host["CapDrop"] == ["ALL"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert host["Memory"] == 256 * 1024 * 1024
    assert host["NanoCpus"] == 1_000_000_000
    assert host["PidsLimit"] == 100
    assert host["RestartPolicy"]["Name"] == "unless-stopped"
    assert facts["Config"]["StopTimeout"] > 10
    process = project.compose("exec", "web", "python", "-c", "print(open('/proc/1/status').read())").stdout
    assert "CapEff:\t0000000000000000" in process
    assert "NoNewPrivs:\t1" in process


def test_published_where_asked(project: Project) -> None:
    """BIND and PORT, from the environment or from .env, say where it is published."""
    port = free_port("127.0.0.2")
    del project.environ["BIND"], project.environ["PORT"]
    (project.folder / ".env").write_text(f"BIND=127.0.0.2\nPORT={port}\n")
    project.compose("up", "--build", "--wait")
    assert project.url() == f"http://127.0.0.2:{port}"
    assert get(project.url() + "/health")[0] == 200


def test_defaults(copy: Project, engine: None) -> None:
    """With nothing set, it is 127.0.0.1:5000 and the Dockerfile's own base image."""
    for variable in ("BIND", "PORT", "PYTHON_IMAGE", "COMPOSE_FILE", "TARGET"):
        copy.environ.pop(variable, None)
    web = json.loads(copy.compose("config", "--format", "json").stdout)["services"]["web"]
    assert web["image"] == "flask-helloworld"
    assert (web["ports"][0]["host_ip"], web["ports"][0]["published"]) == ("127.0.0.1", "5000")
    assert not web["build"].get("args")
    assert web["build"]["target"] == "runtime"


def test_dev_and_test_are_kept_apart(copy: Project, engine: None) -> None:
    """The debugger stays on this machine even if BIND opens the service; neither dev nor test gets its data."""
    edit(copy.folder / "compose.yaml", "^    read_only: true$", '    read_only: true\n    volumes: ["data:/data"]')
    edit(copy.folder / "compose.yaml", "^secrets:$", "volumes: { data: }\nsecrets:")
    config = copy.compose("--profile", "*", "config", "--format", "json", environ={"BIND": "0.0.0.0"}).stdout
    services = json.loads(config)["services"]
    published = {name: [port["host_ip"] for port in service.get("ports", [])] for name, service in services.items()}
    assert published == {"web": ["0.0.0.0"], "dev": ["127.0.0.1"], "test": []}
    mounted = {name: [volume["target"] for volume in services[name].get("volumes", [])] for name in services}
    assert mounted == {"web": ["/data"], "dev": ["/src"], "test": []}


def test_any_user(project: Project) -> None:
    """It serves as whatever user a platform gives it."""
    (project.folder / "user.yaml").write_text("services: {web: {user: '12345:0'}}")
    project.environ["COMPOSE_FILE"] += ":user.yaml"
    project.compose("up", "--build", "--wait")
    assert get(project.url() + "/health")[0] == 200
    who = "import os; print(os.getuid(), os.getgid(), sep=':')"
    assert project.compose("exec", "--no-TTY", "web", "python", "-c", who).stdout == "12345:0\n"


def test_the_tests_pass_inside_of_the_image(project: Project) -> None:
    """The profile `test` runs, in the image's own Python, every test that needs no engine, from a private clone too."""
    for path in project.folder.rglob("*"):
        path.chmod(path.stat().st_mode & 0o700)
    done = project.compose("run", "--build", "--rm", "--no-TTY", "test")
    assert " passed" in done.stdout
    assert " failed" not in done.stdout


@pytest.mark.parametrize(("clients", "size"), [(700, 500_000), (1900, 32_000)])
def test_many_unfinished_uploads(project: Project, clients: int, size: int) -> None:
    """Clients that stop in the middle of their uploads, many or large, neither get it killed nor keep others out."""
    project.compose("up", "--build", "--wait")
    [network] = container_of(project)["NetworkSettings"]["Networks"].values()
    half = f"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {size}\r\n\r\n".encode() + bytes(size - 1)
    with many_files(), ExitStack() as stack:
        for _ in range(clients):
            client = stack.enter_context(socket.create_connection((network["IPAddress"], 5000), 20))
            with suppress(OSError):  # some are refused, for lack of room
                client.sendall(half)
        assert get(project.url() + "/health")[0] == 200
    facts = container_of(project)
    assert (facts["State"]["OOMKilled"], facts["RestartCount"]) == (False, 0)
