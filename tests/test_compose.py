"""docker compose with a copy of the project: up, what it may do, down; the tests inside of the image."""

import json
import socket
from contextlib import ExitStack, suppress

import pytest

from tests.support import Project, get, many_files, run

TESTS = ["python", "-m", "pytest"]


@pytest.fixture
def project(project: Project, target: str) -> Project:
    """A copy of the project that runs either target, as TARGET names it."""
    project.environ["TARGET"] = target
    return project


def test_up_serves_and_down_removes(project: Project) -> None:
    """`up --wait` waits until it is healthy, on 127.0.0.1 alone; `stop` kills nothing, `down` leaves nothing."""
    project.compose("up", "--build", "--wait")
    url = project.url()
    assert url.startswith("http://127.0.0.1:")
    assert get(url + "/health")[0] == 200
    project.compose("stop")
    container = project.compose("ps", "--all", "--quiet").stdout.strip()
    assert run("docker", "inspect", "--format", "{{.State.ExitCode}}", container).stdout.strip() == "0"
    project.compose("down")
    assert project.compose("ps", "--all", "--quiet").stdout == ""


def test_what_the_container_may_not_do(project: Project) -> None:
    """It is read-only but for /tmp, has no capabilities and cannot get any; memory, CPU and processes are bounded."""
    project.compose("up", "--build", "--wait")
    container = project.compose("ps", "--quiet").stdout.strip()
    [facts] = json.loads(run("docker", "inspect", container).stdout)
    host = facts["HostConfig"]
    assert facts["Config"]["User"] == "65532:65532"
    assert host["ReadonlyRootfs"] is True
    assert host["Tmpfs"] == {"/tmp": "size=64m"}
    assert host["CapDrop"] == ["ALL"]
    assert host["SecurityOpt"] == ["no-new-privileges:true"]
    assert host["Memory"] == 256 * 1024 * 1024
    assert host["NanoCpus"] == 1_000_000_000
    assert host["PidsLimit"] == 100
    assert host["RestartPolicy"]["Name"] == "unless-stopped"
    assert facts["Config"]["StopTimeout"] > 10
    [image] = json.loads(run("docker", "image", "inspect", facts["Image"]).stdout)
    assert facts["Config"]["Healthcheck"] == image["Config"]["Healthcheck"]
    assert image["Config"]["Healthcheck"]["Test"] == ["CMD", "python", "-IS", "/app/healthcheck.py"]
    assert image["Config"]["StopSignal"] == "SIGTERM"
    shell = project.compose("exec", "web", "sh", "-c", "true", check=False).returncode == 0
    assert shell == (project.environ["TARGET"] == "runtime")
    process = project.compose("exec", "web", "python", "-c", "print(open('/proc/1/status').read())").stdout
    assert "CapEff:\t0000000000000000" in process
    assert "NoNewPrivs:\t1" in process


def test_published_where_asked(project: Project) -> None:
    """BIND and PORT, from the environment or from .env, say where it is published."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    del project.environ["BIND"], project.environ["PORT"]
    (project.folder / ".env").write_text(f"BIND=127.0.0.2\nPORT={port}\n")
    project.compose("up", "--build", "--wait")
    assert project.url() == f"http://127.0.0.2:{port}"
    assert get(f"http://127.0.0.2:{port}/health")[0] == 200


def test_defaults(copy: Project, engine: None) -> None:
    """With nothing set, it is 127.0.0.1:5000 and the Dockerfile's own base image."""
    for variable in ("BIND", "PORT", "PYTHON_IMAGE", "COMPOSE_FILE", "TARGET"):
        copy.environ.pop(variable, None)
    web = json.loads(copy.compose("config", "--format", "json").stdout)["services"]["web"]
    assert web["image"] == "flask-helloworld"
    assert (web["ports"][0]["host_ip"], web["ports"][0]["published"]) == ("127.0.0.1", "5000")
    assert not web["build"].get("args")
    assert web["build"]["target"] == "runtime"


@pytest.mark.parametrize("profile", ["", "dev", "degrees", "test", "*"])
def test_every_profile_is_valid(copy: Project, engine: None, profile: str) -> None:
    """The file is valid with each profile; what is published is on this machine alone, and nothing is privileged."""
    for variable in ("BIND", "PORT", "DEGREES_PORT", "COMPOSE_FILE"):
        copy.environ.pop(variable)
    options = ["--profile", profile] if profile else []
    services = json.loads(copy.compose(*options, "config", "--format", "json").stdout)["services"]
    assert services.keys() == {"web"} | ({"dev", "degrees", "test"} if profile == "*" else {profile} - {""})
    ports = {"web": "5000", "dev": "5000", "degrees": "5001"}
    for name, service in services.items():
        published = [(port["host_ip"], port["published"]) for port in service.get("ports", [])]
        assert published == ([("127.0.0.1", ports[name])] if name in ports else [])
        assert (service["read_only"], service["cap_drop"]) == (True, ["ALL"])


def test_dev_is_published_here_alone(copy: Project, engine: None) -> None:
    """What runs a debugger stays on this machine, even where BIND opens the service to others."""
    config = copy.compose("--profile", "dev", "config", "--format", "json", environ={"BIND": "0.0.0.0"}).stdout
    published = {name: service["ports"][0]["host_ip"] for name, service in json.loads(config)["services"].items()}
    assert published == {"web": "0.0.0.0", "dev": "127.0.0.1"}


@pytest.mark.parametrize("user", ["12345:0", "1000:1000"])
def test_any_user(project: Project, user: str) -> None:
    """It serves as whatever user a platform gives it (OpenShift: a random number, of the group root)."""
    override = json.loads((project.folder / "override.yaml").read_text())
    override["services"]["web"]["user"] = user
    (project.folder / "override.yaml").write_text(json.dumps(override))
    project.compose("up", "--build", "--wait")
    assert get(project.url() + "/health")[0] == 200
    who = "import os; print(os.getuid(), os.getgid(), sep=':')"
    assert project.compose("exec", "--no-TTY", "web", "python", "-c", who).stdout == f"{user}\n"


def test_run(project: Project) -> None:
    """`docker compose run` runs another command in the same image."""
    project.compose("build")
    assert project.compose("run", "--rm", "--no-TTY", "web", "python", "-c", "print('here')").stdout == "here\n"


def test_the_tests_pass_inside_of_the_image(project: Project, target: str) -> None:
    """The profile `test` runs, in the image's own Python, every test that needs no engine; so does `minimal`."""
    if target == "minimal":
        project.compose("build", "web", "test")
        web, test = (project.environ["COMPOSE_PROJECT_NAME"] + suffix for suffix in ("", "-tests"))
        copies = "".join(f"COPY --from={test} {folder} {folder}\n" for folder in ("/opt/venv", "/app"))
        (project.folder / "both.Dockerfile").write_text(f"FROM {web}\n{copies}CMD {json.dumps(TESTS)}\n")
        project.run("docker", "build", "--file", "both.Dockerfile", "--tag", test, ".")
    done = project.compose("run", *([] if target == "minimal" else ["--build"]), "--rm", "--no-TTY", "test")
    assert " passed" in done.stdout
    assert " failed" not in done.stdout


@pytest.mark.parametrize(("clients", "size"), [(700, 500_000), (1900, 32_000)])
def test_many_unfinished_uploads(project: Project, clients: int, size: int) -> None:
    """Clients that stop in the middle of their uploads, many or large, neither get it killed nor keep others out."""
    project.compose("up", "--build", "--wait")
    url = project.url()
    container = project.compose("ps", "--quiet").stdout.strip()
    [facts] = json.loads(run("docker", "inspect", container).stdout)
    [network] = facts["NetworkSettings"]["Networks"].values()
    half = f"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: {size}\r\n\r\n".encode() + bytes(size - 1)
    with many_files(), ExitStack() as stack:
        for _ in range(clients):
            client = stack.enter_context(socket.create_connection((network["IPAddress"], 5000), 20))
            with suppress(OSError):  # some are refused, for lack of room
                client.sendall(half)
        assert get(url + "/health")[0] == 200
    [facts] = json.loads(run("docker", "inspect", container).stdout)
    assert (facts["State"]["OOMKilled"], facts["RestartCount"]) == (False, 0)
