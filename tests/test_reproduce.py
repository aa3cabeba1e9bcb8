"""One commit, one image: how it is built, compared, published, listed; on a real registry."""

import json
import pathlib
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.conftest import needs_docker
from tests.support import ROOT, Project, edit, get, run, wait_until
from tests.test_image import inspect, python, until_health

if not (ROOT / "tools").is_dir():
    pytest.skip("the image has no tools", allow_module_level=True)

VERSION = re.search(r"^ARG VERSION=(.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[1]
REPRODUCE = (sys.executable, "tools/reproduce.py")
# The list of what is in the image is left out: its generator comes from a registry that need not be in reach.
IMAGE = ("make", "image", "ATTESTATIONS=--provenance mode=max")


@pytest.fixture
def repository(project: Project) -> Project:
    """A copy of the project that is a repository with one commit, whatever git is set to for the user."""
    if "containerd" not in run("docker", "info", "--format", "{{.DriverStatus}}").stdout:
        needs_docker("the engine has no containerd image store")
    project.environ |= {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    for role in ("AUTHOR", "COMMITTER"):
        project.environ |= {f"GIT_{role}_NAME": "tests", f"GIT_{role}_EMAIL": "tests@example.org"}
    shutil.copy(ROOT / ".gitignore", project.folder)
    with (project.folder / ".gitignore").open("a") as file:
        file.write("override.yaml\n")
    edit(project.folder / "Dockerfile", "^ARG SOURCE=.*", "ARG SOURCE=https://example.com/mine")
    project.run("git", "-c", "init.defaultBranch=main", "init", "--quiet")
    commit(project)
    return project


def commit(repository: Project) -> None:
    """Commit all that is there."""
    repository.run("git", "add", "--all")
    repository.run("git", "commit", "--quiet", "--message", "test")


@pytest.fixture
def load(engine: None) -> Iterator[Callable[[pathlib.Path], str]]:
    """A function that loads an image from an archive and returns its name; it goes when the test ends."""
    loaded = []

    def load(archive: pathlib.Path) -> str:
        loaded.append(run("docker", "load", "--quiet", "--input", archive).stdout.split()[-1])
        return loaded[-1]

    yield load
    for name in loaded:
        run("docker", "image", "rm", "--force", name)


@pytest.fixture
def registry(engine: None, tmp_path: pathlib.Path) -> Iterator[str]:
    """The address of a registry."""
    program = shutil.which("docker-registry")
    if not program or sys.platform != "linux":
        needs_docker("docker-registry is not installed, or the engine not on this machine")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    settings = {"storage": {"filesystem": {"rootdirectory": str(tmp_path / "registry")}}}
    config = tmp_path / "registry.yml"
    config.write_text(json.dumps({"version": 0.1, "http": {"addr": f"127.0.0.1:{port}"}} | settings))
    with (
        (tmp_path / "registry.log").open("w") as log,
        subprocess.Popen([program, "serve", config], stderr=log) as process,
    ):
        try:
            wait_until(lambda: answers(f"http://127.0.0.1:{port}/v2/"), 20, f"the registry: {log.name}")
            yield f"localhost:{port}"
        finally:
            process.terminate()
    shutil.rmtree(tmp_path / "registry", ignore_errors=True)


def answers(url: str) -> bool:
    """Tell whether something answers there."""
    try:
        get(url)
    except OSError:
        return False
    return True


@pytest.fixture
def published_base(base: str, registry: str) -> Iterator[str]:
    """The base image in the registry, by name, tag and digest."""
    name = f"{registry}/library/python:test"
    run("docker", "tag", base, name)
    run("docker", "push", "--quiet", name)
    digest = run("docker", "buildx", "imagetools", "inspect", "--format", "{{json .Manifest.Digest}}", name).stdout
    yield f"{name}@{digest.strip().strip(chr(34))}"
    run("docker", "image", "rm", "--force", name)


def test_the_image_of_a_commit(
    repository: Project, target: str, published_base: str, load: Callable, container: Callable
) -> None:
    """Labels name commit and base; the files are the commit's alone and of its time, the bytecode is in date."""
    repository.environ["PYTHON_IMAGE"] = published_base
    archive = repository.folder.parent / "image.tar"
    (repository.folder / "serve" / "untracked.py").write_text("")
    done = repository.run("make", "archive", f"TARGET={target}", f"ARCHIVE={archive}")
    assert "What is built is the commit; it does not have your changes." in done.stderr
    assert (b"tar+zstd" in archive.read_bytes()) == (target == "minimal")
    image = load(archive)
    assert "untracked" not in python(image, "import os; print(os.listdir('serve'))")
    labels = {key.rpartition("image.")[2]: value for key, value in inspect(image, ".Config.Labels").items()}
    commit_id, created, time = repository.run(
        *("git", "log", "-1", "--date=format-local:%Y-%m-%dT%H:%M:%SZ", "--format=%H %cd %ct"), environ={"TZ": "UTC0"}
    ).stdout.split()
    name, _, digest = published_base.partition("@")
    assert labels == {
        "title": "flask-helloworld",
        "description": "A greeting service in Flask, served by waitress",
        "version": VERSION,
        "licenses": "MIT",
        "source": "https://example.com/mine",
        "base.name": name,
        "base.digest": digest,
        "revision": commit_id,
        "created": created,
    }
    code = "import os, flask, app; print(*(int(os.stat(f).st_mtime) for f in (flask.__file__, app.__file__)))"
    of_the_environment, of_the_code = python(image, code).split()
    assert of_the_code == time
    assert of_the_environment == time or target == "minimal"  # where it is the interpreter's, in every commit's image
    # As root, who could write bytecode.
    started = container("--user", "0", image)
    until_health(started, "healthy")
    assert run("docker", "diff", started).stdout == ""


def test_what_differs_is_named(repository: Project, published_base: str) -> None:
    """A build that depends on when it is made is found out, with the file and what of it; so is another image."""
    text = "FROM ${PYTHON_IMAGE} AS runtime\nRUN date +%s%N >/when\n"
    (repository.folder / "Dockerfile").write_text(f"ARG PYTHON_IMAGE=x\n{text}")
    commit(repository)
    done = repository.run(*REPRODUCE, "--published", published_base, "runtime", check=False)
    assert done.returncode == 1
    assert re.search(r"^runtime  sha256:\w{64} is not sha256:\w{64}:$", done.stdout, re.MULTILINE)
    assert re.search(r"^    when: content \w+ or \w+$", done.stdout, re.MULTILINE)
    assert done.stdout.splitlines()[-1] == f"{published_base} {published_base.partition('@')[2]}: ANOTHER IMAGE"


def test_a_build_that_fails_is_said(repository: Project) -> None:
    """If a target cannot be built, that is said with what the build says."""
    done = repository.run(*REPRODUCE, "nonexistent", check=False)
    assert done.returncode == 1
    assert done.stderr.endswith("reproduce: nonexistent cannot be built\n")
    assert 'target stage "nonexistent" could not be found' in done.stderr


def test_publish_and_verify(repository: Project, registry: str) -> None:
    """What `make publish` puts into a registry, building its commit again gives; nothing but a release is pushed."""
    image = f"IMAGE={registry}/me/hello"
    name = f"{registry}/me/hello:{VERSION}"
    repository.run("git", "tag", f"v{VERSION}")
    released = f"This takes a commit with the tag v{VERSION}, and a section [{VERSION}] in CHANGELOG.md.\n"
    assert released in repository.run("make", "publish", image, check=False).stderr
    (repository.folder / "CHANGELOG.md").write_text(f"## [{VERSION}] - 2026-01-01\n")
    commit(repository)
    assert released in repository.run("make", "publish", image, check=False).stderr
    repository.run("git", "tag", "--force", f"v{VERSION}")
    repository.run(*IMAGE, image)
    try:
        repository.run("make", "publish", image)
        done = repository.run(*REPRODUCE, "--published", name, "runtime")
        assert done.stdout.splitlines()[-1].endswith(": the same")
        raw = run("docker", "buildx", "imagetools", "inspect", "--raw", name).stdout
        kinds = [m.get("annotations", {}).get("vnd.docker.reference.type") for m in json.loads(raw)["manifests"]]
        assert kinds == [None, "attestation-manifest"]
        (repository.folder / "app.py").write_text("app = None\n")
        commit(repository)
        repository.run("git", "tag", "--force", f"v{VERSION}")
        done = repository.run("make", "publish", image, check=False)
        assert re.search(r"flask-helloworld.oci.tar is of commit \w+, not \w+; run: make image\n", done.stderr)
    finally:
        run("docker", "image", "rm", "--force", name)


@pytest.mark.parametrize("unfit", ["source", "clock", "git"])
def test_what_is_no_release_is_said(repository: Project, unfit: str) -> None:
    """The template's own address is not published; a time to come and a folder without git are not built."""
    (repository.folder / "CHANGELOG.md").write_text(f"## [{VERSION}] - 2026-01-01\n")
    command, message = {
        "source": ("publish", "Dockerfile: SOURCE is an example; put the address of your repository."),
        "clock": ("reproduce", "The commit's time is still to come: the clock is wrong, or was when it was made."),
        "git": ("reproduce", "This takes a commit of a git repository."),
    }[unfit]
    if unfit == "source":
        edit(repository.folder / "Dockerfile", "example.com", "example.org")
    elif unfit == "clock":
        repository.environ["GIT_COMMITTER_DATE"] = "2099-01-01T00:00:00Z"
    commit(repository)
    repository.run("git", "tag", f"v{VERSION}")
    if unfit == "git":
        repository.environ["GIT_DIR"] = "nonexistent"
    done = repository.run("make", command, check=False)
    assert done.returncode != 0
    assert message in done.stderr.splitlines()


def test_every_target_is_compared() -> None:
    """`make reproduce` builds each stage that somebody uses; the others are what these are made of."""
    stages = set(re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    compared = set(
        re.search(r"tools/reproduce.py .*\$\(filter-out .*,([a-z ]*)\)", (ROOT / "Makefile").read_text())[1].split()
    )
    assert stages - compared == {
        *(
            "pip",
            "download",
            "wheelhouse",
            "code",
            "bytecode",
            "environment",
            "application",
            "service",
            "dev",
            "pins",
            "lock",
            "compact",
            "root",
        )
    }


def test_the_newest_base(repository: Project, base: str, published_base: str) -> None:
    """`make upgrade` moves the base to its tag's newest digest wherever it is named; without a registry it says so."""
    del repository.environ["PYTHON_IMAGE"]
    default = re.search(r"^ARG PYTHON_IMAGE=(.*)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[1]
    named = ("Dockerfile", "README.md", ".github/base/Dockerfile")
    name, _, digest = published_base.partition("@")

    def names(reference: str) -> list[str]:
        return [file for file in named if reference in (repository.folder / file).read_text()]

    def replace(old: str, new: str) -> None:
        for file in named:
            path = repository.folder / file
            path.write_text(path.read_text().replace(old, new))

    old = f"{name}@sha256:{64 * '0'}"
    replace(default, old)
    assert repository.run("make", "newest-base").stdout == f"The base is now {published_base}\n"
    assert names(published_base) == list(named)
    assert repository.run(sys.executable, "tools/lock.py", "check").stderr == ""
    assert repository.run("make", "newest-base").stdout == f"The base is its tag's newest: {published_base}\n"
    run("docker", "tag", published_base.partition("@")[0], f"{name}-next")
    run("docker", "push", "--quiet", f"{name}-next")
    run("docker", "image", "rm", f"{name}-next")
    edit(repository.folder / named[-1], "^FROM .*", f"FROM {name}-next@sha256:{64 * '1'}")  # as Dependabot does
    assert repository.run("make", "newest-base").stdout == f"The base is now {name}-next@{digest}\n"
    assert names(f"{name}-next@{digest}") == list(named)
    replace(f"{name}-next@{digest}", f"registry.invalid/python:1@{digest}")
    done = repository.run("make", "upgrade", environ={"PYTHON_IMAGE": base})
    assert "No registry answers for registry.invalid/python:1, so the base stays: " in done.stdout
    assert names(f"registry.invalid/python:1@{digest}") == list(named)


def test_sbom(repository: Project) -> None:
    """`make sbom` lists the Python packages in their locked versions, and the base's own, in both formats."""
    repository.run("make", "sbom")
    locked = set(re.findall(r"^(\S+)==(\S+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    spdx = json.loads((repository.folder / "sbom.spdx.json").read_text())
    cyclonedx = json.loads((repository.folder / "sbom.cdx.json").read_text())
    assert spdx["spdxVersion"].startswith("SPDX-")
    assert cyclonedx["bomFormat"] == "CycloneDX"
    found = {(package["name"].lower(), package.get("versionInfo")) for package in spdx["packages"]}
    assert locked <= found
    assert locked <= {(part["name"].lower(), part.get("version")) for part in cyclonedx["components"]}
    assert any(part.get("purl", "").startswith("pkg:deb/") for part in cyclonedx["components"])


def test_a_base_without_a_digest_is_said(project: Project, published_base: str) -> None:
    """A base by name alone is built on with a warning, by docker and by make; one by digest without."""
    for base in (published_base.partition("@")[0], published_base):
        project.environ["PYTHON_IMAGE"] = base
        built = project.build("--no-cache", "--progress=plain", "--target=builder")
        # A step is printed too, before what it says.
        said = [re.sub(r"^#\d+ [\d.]+ ", "", line) for line in (built.stderr + up_says(project)).splitlines()]
        warnings = [line for line in said if line.startswith(f"warning: PYTHON_IMAGE={base} has no digest")]
        assert len(warnings) == (2 if base != published_base else 0)


def up_says(project: Project) -> str:
    """Return what `make up` says on standard error."""
    said = project.run("make", "up").stderr
    project.run("make", "down")
    return said
