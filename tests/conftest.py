"""Fixtures: running servers; the Docker Engine, if there is one, with images and containers; copies of the project."""

import os
import pathlib
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache

import pytest

from tests.support import ROOT, Project, Server, run, until_health


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test as `docker` if one of its fixtures needs the engine."""
    for item in items:
        if "engine" in item.fixturenames:
            item.add_marker("docker")


@pytest.fixture
def start(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Callable[..., Server]:
    """A function that starts a server in `tmp_path`, by default with the test module's APPLICATION."""
    return lambda application=None, **options: Server(tmp_path, application or request.module.APPLICATION, **options)


@pytest.fixture(scope="module")
def running(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the module's APPLICATION and VARIABLES, shared by the tests that do not change its state."""
    variables = getattr(request.module, "VARIABLES", {})
    with Server(tmp_path_factory.mktemp("running"), request.module.APPLICATION, **variables) as running:
        yield running


def needs_docker(problem: str) -> None:
    """Skip the test because of `problem`; with REQUIRE_DOCKER=1 fail it instead."""
    if os.environ.get("REQUIRE_DOCKER") == "1":
        pytest.fail(f"REQUIRE_DOCKER=1, but {problem}")
    pytest.skip(problem)


@pytest.fixture(scope="session")
def engine() -> None:
    """A running Docker Engine, and compose."""
    for command in (["docker", "info"], ["docker", "compose", "version"]):
        try:
            done = run(*command, check=False)
        except FileNotFoundError:
            needs_docker("docker is not installed")
        if done.returncode:
            needs_docker(f"`{' '.join(command)}` fails: no Docker Engine answers")


@pytest.fixture(scope="session")
def base(engine: None) -> str:
    """The base image, pulled if it is missing."""
    default = re.search(r"^FROM (\S+) AS pinned$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[1]
    name = os.environ.get("PYTHON_IMAGE") or default
    if (
        run("docker", "image", "inspect", name, check=False).returncode
        and run("docker", "pull", name, check=False).returncode
    ):
        needs_docker(f"the base image {name} is missing and cannot be pulled")
    return name


@pytest.fixture(scope="session", params=["runtime", "minimal"])
def target(request: pytest.FixtureRequest) -> str:
    """A target of the Dockerfile that runs the service; a test that uses it runs once for each."""
    return request.param


@pytest.fixture(scope="session")
def images(base: str) -> Iterator[Callable[[str], str]]:
    """A function that builds a target of the Dockerfile and returns the image's name.

    Each pytest process builds a target once; all but the first find it in the build cache.
    """
    with ExitStack() as stack:

        @cache
        def build(target: str) -> str:
            name = f"flask-helloworld-test:{uuid.uuid4().hex[:12]}"
            run("docker", "build", "--build-arg", f"PYTHON_IMAGE={base}", "--target", target, "--tag", name, ROOT)
            stack.callback(run, "docker", "image", "rm", "--force", name)
            return name

        yield build


@pytest.fixture
def image(images: Callable[[str], str], target: str) -> str:
    """The image of a target."""
    return images(target)


@pytest.fixture(scope="session")
def services(images: Callable[[str], str]) -> Iterator[Callable[[str], str]]:
    """A function that returns a healthy container of a target, without network.

    Each is started once and shared by the tests that do not change its state.
    """
    with ExitStack() as stack:

        @cache
        def start(target: str) -> str:
            name = run("docker", "run", "--detach", "--network", "none", images(target)).stdout.strip()
            stack.callback(run, "docker", "rm", "--force", name)
            until_health(name)
            return name

        yield start


@pytest.fixture
def service(services: Callable[[str], str], target: str) -> str:
    """The shared container of a target."""
    return services(target)


@pytest.fixture
def container(engine: None) -> Iterator[Callable[..., str]]:
    """A function that starts a container (options, image, command), removed after the test, and returns its id."""
    with ExitStack() as stack:

        def start(*arguments: object) -> str:
            name = run("docker", "run", "--detach", *arguments).stdout.strip()
            stack.callback(run, "docker", "rm", "--force", name)
            return name

        yield start


@pytest.fixture
def copy(tmp_path: pathlib.Path) -> Project:
    """A copy of the project, for tests that build and start nothing in Docker."""
    return Project(tmp_path / "project")


@pytest.fixture
def project(base: str, copy: Project) -> Iterator[Project]:
    """A copy of the project; its containers, networks and images are removed after the test."""
    copy.environ["PYTHON_IMAGE"] = base
    with copy:
        yield copy
