"""deploy/: its files agree with compose.yaml and the image; on a swarm, no update loses a request."""

import http.client
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import yaml

from serve.settings import Settings, read_settings
from tests.conftest import needs_docker
from tests.support import ROOT, Project, edit, free_port, get, inspect, python, run, wait_until

if not (ROOT / "deploy").exists():
    pytest.skip("the image has no folder deploy", allow_module_level=True)

# ---- The files agree -------------------------------------------------------------------------------------------------

WEB = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["web"]
SWARM = yaml.safe_load((ROOT / "deploy/compose.swarm.yaml").read_text())["services"]["web"]
HAPROXY = yaml.safe_load((ROOT / "deploy/compose.haproxy.yaml").read_text())["services"]["haproxy"]
HAPROXY_CFG = (ROOT / "deploy/haproxy.cfg").read_text()
KUBERNETES = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / "deploy/kubernetes").glob("*.yaml")}
POD = KUBERNETES["deployment"]["spec"]["template"]["spec"]
[CONTAINER] = POD["containers"]


def settings(*variables: str) -> Settings:
    """Return the server's settings for a list of variables as in a compose file."""
    return read_settings(dict(variable.split("=", 1) for variable in variables if "=" in variable))


ON_SWARM = settings(*WEB["environment"], *SWARM["environment"])
IN_POD = settings(*(f"{variable['name']}={variable.get('value')}" for variable in CONTAINER["env"]))


def dockerfile(instruction: str) -> set[str]:
    """Return the different arguments that an instruction has in the Dockerfile."""
    return set(re.findall(rf"^{instruction} (.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))


def test_user() -> None:
    """Everywhere, the user is that of the image: a number, which Kubernetes can see is not root."""
    [user] = dockerfile("USER")
    assert re.fullmatch("[1-9][0-9]*:[1-9][0-9]*", user)
    assert "user" not in WEB | SWARM
    assert POD["securityContext"]["runAsNonRoot"] is True
    assert {"runAsUser", "runAsGroup"}.isdisjoint(POD["securityContext"] | CONTAINER["securityContext"])


def test_port() -> None:
    """All name the port that the image exposes."""
    [port] = dockerfile("EXPOSE")
    assert {published.rpartition(":")[2] for published in WEB.get("ports", [])} <= {port}
    assert re.findall(r"tasks\.web:(\d+)", HAPROXY_CFG) == [port]
    [published] = HAPROXY["ports"]
    assert re.findall(r"bind :(\d+)", HAPROXY_CFG) == [str(published["target"])]
    assert CONTAINER["ports"] == [{"name": "http", "containerPort": int(port)}]
    assert KUBERNETES["service"]["spec"]["ports"][0]["targetPort"] == "http"
    assert KUBERNETES["networkpolicy"]["spec"]["ingress"][0]["ports"][0]["port"] == "http"


def test_grace_period() -> None:
    """It is the same everywhere, and longer than the server needs to stop."""
    grace = POD["terminationGracePeriodSeconds"]
    assert WEB["stop_grace_period"] == f"{grace}s"
    assert "stop_grace_period" not in SWARM
    assert ON_SWARM.shutdown_delay == IN_POD.shutdown_delay > 0
    for environment in (settings(*WEB["environment"]), ON_SWARM, IN_POD):
        assert environment.shutdown_delay + environment.shutdown_timeout + 1 < grace


def test_resources() -> None:
    """Limits, and what a machine must have free for a replica, are the same."""
    limits, free = WEB["deploy"]["resources"]["limits"], SWARM["deploy"]["resources"]["reservations"]
    assert "limits" not in SWARM["deploy"]["resources"]
    for of_swarm, of_pod in ((limits, "limits"), (free, "requests")):
        resources = {"cpu": of_swarm["cpus"], "memory": of_swarm["memory"].replace("m", "Mi")}
        assert CONTAINER["resources"][of_pod] == resources
    [size] = [volume["tmpfs"]["size"] // 1024**2 for volume in SWARM["volumes"] if volume["target"] == "/tmp"]
    assert WEB["tmpfs"] == [f"/tmp:size={size}m"]
    assert {"name": "tmp", "emptyDir": {"medium": "Memory", "sizeLimit": f"{size}Mi"}} in POD["volumes"]


def test_probes() -> None:
    """All ask the path that the image's health check asks, but liveness none. A draining replica is unready in time."""
    [path] = re.findall("GET (/[a-z]*) HTTP/1.0", (ROOT / "healthcheck.py").read_text())
    assert re.findall("option httpchk GET (.*)", HAPROXY_CFG) == [path]
    [timeout] = re.findall(r"timeout check (\d+)s", HAPROXY_CFG)
    [(interval, failures)] = re.findall(r"inter (\d+)s fall (\d+)", HAPROXY_CFG)
    assert int(interval) * int(failures) < ON_SWARM.shutdown_delay
    [options] = dockerfile("HEALTHCHECK")
    check = {name: float(seconds) for name, seconds in re.findall(r"--([a-z-]+)=([0-9.]+)s", options)}
    assert check["timeout"] >= int(timeout)
    startup, readiness, liveness = (CONTAINER[f"{name}Probe"] for name in ("startup", "readiness", "liveness"))
    assert startup["httpGet"] == readiness["httpGet"] == {"path": path, "port": "http"}
    # As long as the image's check takes to find that a container is unhealthy: three failures after the start period.
    starts = startup["periodSeconds"] * startup["failureThreshold"]
    assert starts == check["start-period"] + 3 * check["interval"]
    assert startup["timeoutSeconds"] == readiness["timeoutSeconds"] == int(timeout)
    assert readiness["periodSeconds"] * readiness["failureThreshold"] < IN_POD.shutdown_delay
    assert liveness == {"tcpSocket": {"port": "http"}}


# ---- On a swarm ------------------------------------------------------------------------------------------------------

APPLICATION = """
import socket
import time
from flask import Flask, request

app = Flask(__name__)
ANSWER = "version %s on " + socket.gethostname()


@app.get("/")
def version():
    return ANSWER


@app.get("/slow")
def slow():
    app.logger.warning("a slow request has begun")
    time.sleep(5)
    return ANSWER


@app.get("/health")
def health():
    return "", 503 if request.environ["serve.draining"] or "broken" in ANSWER else 200
"""

# Debian's haproxy on the base image, started as the official image `haproxy` starts it.
HAPROXY_DOCKERFILE = """
FROM {base}
RUN apt-get update && apt-get install --yes --no-install-recommends haproxy
USER haproxy
CMD ["haproxy", "-f", "/usr/local/etc/haproxy/haproxy.cfg"]
"""


class Load:
    """Clients that send requests until the `with` block ends, and until 10,000 have been answered.

    Four clients keep their connection and send without a pause (closed loop). In addition, a request is sent every
    10 ms, on a connection of its own, however long the responses take (open loop).
    """

    def __init__(self, port: int) -> None:
        """`port`: where haproxy listens, on 127.0.0.1."""
        self.port, self.ends = port, threading.Event()
        self.answers: list[str] = []
        self.failures: list[tuple[float, str]] = []  # when the request was sent, and what went wrong

    def connection(self) -> http.client.HTTPConnection:
        """Return a connection, which opens with the first request."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)

    def send(self, connection: http.client.HTTPConnection) -> None:
        """Send a request and keep its answer or its failure."""
        sent = time.monotonic()
        try:
            connection.request("GET", "/")
            response = connection.getresponse()
            answer = response.read().decode()
            if response.status != 200:
                raise http.client.HTTPException(f"{response.status}: {answer}")
            self.answers.append(answer)
        except (OSError, http.client.HTTPException) as failure:
            connection.close()
            self.failures.append((sent, repr(failure)))

    def closed_loop(self) -> None:
        """See the class."""
        connection = self.connection()
        while not self.ends.is_set():
            self.send(connection)
        connection.close()

    def open_loop(self) -> None:
        """See the class."""

        def send_one() -> None:
            connection = self.connection()
            self.send(connection)
            connection.close()

        with ThreadPoolExecutor(100) as pool:
            while not self.ends.wait(0.01):
                pool.submit(send_one)

    def __enter__(self) -> "Load":
        self.threads = [threading.Thread(target=loop) for loop in [self.closed_loop] * 4 + [self.open_loop]]
        for thread in self.threads:
            thread.start()
        wait_until(lambda: len(self.answers) >= 100, 30, "the load to start")
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        try:
            wait_until(lambda: failed or len(self.answers) >= 10_000, 60, "10,000 answers")
        finally:
            self.ends.set()
            for thread in self.threads:
                thread.join()


class Stack:
    """The service on the swarm, and its images: `1`, `2`, and `broken`, which is never healthy."""

    def __init__(self, project: Project) -> None:
        """Build the images and deploy the first."""
        self.project, self.service, self.port = project, f"{project.name}_web", free_port("127.0.0.1")
        edit(project.folder / "deploy/compose.haproxy.yaml", "published: 80,", f"published: {self.port},")
        project.write({"haproxy/Dockerfile": HAPROXY_DOCKERFILE.format(base=project.environ["PYTHON_IMAGE"])})
        project.environ["HAPROXY_IMAGE"] = f"{project.name}:haproxy"
        project.run("docker", "build", "--tag", f"{project.name}:haproxy", "haproxy")
        for version in ("1", "2", "broken"):
            project.write({"app.py": APPLICATION % version})
            project.build("--tag", f"{project.name}:{version}")
        self.deploy("1")
        wait_until(lambda: get(f"http://127.0.0.1:{self.port}/")[0] == 200, 60, "haproxy to find the replicas")

    def deploy(self, version: str) -> None:
        """Deploy an image; return when the swarm has finished."""
        files = ["compose.yaml", "deploy/compose.swarm.yaml", "deploy/compose.haproxy.yaml"]
        options = ["--detach=false", *(f"--compose-file={file}" for file in files)]
        environ = {"IMAGE": f"{self.project.name}:{version}"}
        self.project.run("docker", "stack", "deploy", *options, self.project.name, environ=environ)

    def scale(self, replicas: int) -> None:
        """Change the number of replicas; return when the swarm has finished."""
        run("docker", "service", "scale", f"{self.service}={replicas}")

    def replicas(self) -> list[str]:
        """Return the ids of the running replicas' containers."""
        return run("docker", "ps", "--quiet", "--no-trunc", "--filter", f"name={self.service}").stdout.split()

    def slow_replica(self) -> str | None:
        """Return the id of a replica that has got a request for /slow."""
        logs = ((replica, run("docker", "logs", replica).stderr) for replica in self.replicas())
        return next((replica for replica, log in logs if "a slow request has begun" in log), None)

    def until_replicas(self, count: int) -> None:
        """Wait until this many run: the old ones have drained, the new ones have started."""
        wait_until(lambda: len(self.replicas()) == count, 60, f"{count} replicas")


@pytest.fixture
def stack(project: Project) -> Iterator[Stack]:
    """The service on a swarm that the engine forms alone, reachable from this machine only."""
    if run("docker", "info", "--format", "{{.Swarm.LocalNodeState}}").stdout != "inactive\n":
        needs_docker("this engine is part of a swarm")
    networks = run("docker", "network", "ls", "--format", "{{.Name}}").stdout.split()
    run("docker", "swarm", "init", "--advertise-addr", "127.0.0.1", "--listen-addr", "127.0.0.1")
    try:
        run("docker", "network", "create", "--driver", "overlay", "--attachable", project.name)
        run_there = ["docker", "run", "--rm", "--network", project.name, project.environ["PYTHON_IMAGE"], "true"]
        if run(*run_there, check=False).returncode:
            needs_docker("this machine has no overlay networks")
        yield Stack(project)
    finally:
        run("docker", "swarm", "leave", "--force")
        if "docker_gwbridge" not in networks:
            run("docker", "network", "rm", "docker_gwbridge")
        for image in run("docker", "image", "ls", "--quiet", project.name).stdout.split():
            run("docker", "image", "rm", "--force", image, check=False)


@pytest.mark.slow
def test_no_request_is_lost(stack: Stack, subtests: pytest.Subtests) -> None:
    """Only a replica that is killed loses requests: those that it was answering."""
    with subtests.test("limits and protections"):
        replica = stack.replicas()[0]
        host = inspect(replica, ".HostConfig")
        assert (host["Memory"], host["NanoCpus"], host["PidsLimit"]) == (256 * 1024 * 1024, 1_000_000_000, 100)
        assert host["CapDrop"] == ["ALL"]
        code = "import os; print([path for path in ('/', '/app', '/tmp') if os.access(path, os.W_OK)])"
        assert python(replica, code) == "['/tmp']"

    with subtests.test("update"):
        with Load(stack.port) as load:
            stack.deploy("2")
            stack.until_replicas(3)
        assert load.failures == []
        assert load.answers[0].startswith("version 1")
        assert load.answers[-1].startswith("version 2")

    with subtests.test("rollback"):
        with Load(stack.port) as load:
            run("docker", "service", "rollback", stack.service)
            stack.until_replicas(3)
        assert load.failures == []
        assert load.answers[-1].startswith("version 1")

    with subtests.test("an update that is never healthy: the swarm goes back by itself"):
        with Load(stack.port) as load:
            stack.deploy("broken")
            stack.until_replicas(3)
        assert load.failures == []
        assert all(answer.startswith("version 1") for answer in load.answers)
        update = "{{.UpdateStatus.State}}"
        assert run("docker", "service", "inspect", "--format", update, stack.service).stdout == "rollback_completed\n"

    with subtests.test("from three replicas to one, four and two"):
        with Load(stack.port) as load:
            for replicas in (1, 4, 2):
                stack.scale(replicas)
                stack.until_replicas(replicas)
        assert load.failures == []
        assert len(set(load.answers)) == 6  # the first three; scaling from one to four adds three

    stack.scale(3)
    with subtests.test("a replica is stopped while it answers requests that take 5 s"):
        with Load(stack.port) as load, ThreadPoolExecutor() as pool:
            slow = [pool.submit(get, f"http://127.0.0.1:{stack.port}/slow") for _ in range(6)]
            # haproxy may not know the newest replica yet, so any that has such a request.
            stopped = wait_until(stack.slow_replica, 10, "a replica with a slow request")
            run("docker", "stop", "--timeout", "15", stopped)  # the grace period is the swarm's; by hand, it is 10 s
            stack.until_replicas(3)
            answers = [future.result() for future in slow]
        assert load.failures == []
        assert {status for status, _ in answers} == {200}
        assert any(answer.endswith(stopped[:12]) for _, answer in answers)
        assert inspect(stopped, ".State.ExitCode") == 0

    with subtests.test("a replica is killed: only the requests that it was answering are lost"):
        with Load(stack.port) as load:
            replica = stack.replicas()[0]
            run("docker", "kill", replica)
            killed = time.monotonic()
            run("docker", "wait", replica)  # before the others are counted
            stack.until_replicas(3)
        print(f"lost when a replica was killed: {len(load.failures)} of {len(load.answers) + len(load.failures)}")
        assert all(sent < killed for sent, _ in load.failures)
