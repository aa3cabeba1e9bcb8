"""One commit, one image: how it is built, compared, published, listed; on a real registry."""

import json
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from tests.support import ROOT, Project, get, run, wait_until
from tests.test_image import inspect, until_health

if not (ROOT / "tools").is_dir():
    pytest.skip("the image has no tools", allow_module_level=True)

VERSION = re.search(r'image.version="(.*)"', (ROOT / "Dockerfile").read_text())[1]
REPRODUCE = (sys.executable, "tools/reproduce.py")
# A registry has no SBOM scanner here, which BuildKit takes from one.
PUBLISH = ("make", "image", "PUSH=1", "ATTESTATIONS=--provenance mode=max")


@pytest.fixture
def repository(project: Project) -> Project:
    """A copy of the project that is a repository with one commit, tagged as its version."""
    if "containerd" not in run("docker", "info", "--format", "{{.DriverStatus}}").stdout:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("the engine has no containerd image store")
    (project.folder / ".gitignore").write_text("override.yaml\n*.oci.tar\n.venv/\n.sbom.*\nsbom.*.json\n")
    git = ("git", "-c", "user.name=tests", "-c", "user.email=tests@example.org", "-c", "init.defaultBranch=main")
    project.run(*git, "init", "--quiet")
    commit(project)
    return project


def commit(repository: Project) -> None:
    """Commit all that is there."""
    repository.run("git", "add", "--all")
    identity = ("-c", "user.name=tests", "-c", "user.email=tests@example.org", "-c", "commit.gpgSign=false")
    repository.run("git", *identity, "commit", "--quiet", "--message", "test")


@pytest.fixture
def registry(tmp_path: pathlib.Path) -> Iterator[str]:
    """The address of a registry."""
    program = shutil.which("docker-registry") or shutil.which("registry")
    if not program:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("docker-registry is not installed")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    config = tmp_path / "registry.yml"
    data = tmp_path / "registry"
    settings = {"storage": {"filesystem": {"rootdirectory": str(data)}}, "http": {"addr": f"127.0.0.1:{port}"}}
    config.write_text(json.dumps({"version": 0.1} | settings))
    with subprocess.Popen([program, "serve", config], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: answers(f"http://127.0.0.1:{port}/v2/"), 20, "the registry")
            yield f"localhost:{port}"
        finally:
            process.terminate()
    shutil.rmtree(data, ignore_errors=True)


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
    repository: Project, published_base: str, container: Callable, tmp_path: pathlib.Path
) -> None:
    """Labels say which commit it is, and on which base; its files are of its time, its bytecode is in date."""
    repository.environ["PYTHON_IMAGE"] = published_base
    repository.run("make", "archive", "TARGET=runtime", f"ARCHIVE={tmp_path / 'image.tar'}")
    image = run("docker", "load", "--quiet", "--input", tmp_path / "image.tar").stdout.split()[-1]
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
        "source": "https://example.org/flask-helloworld",
        "base.name": name,
        "base.digest": digest,
        "revision": commit_id,
        "created": created,
    }
    code = "import os, flask, app; print(*(int(os.stat(f).st_mtime) for f in (flask.__file__, app.__file__)))"
    times = run("docker", "run", "--rm", image, "python", "-c", code).stdout.split()
    assert times == [time, time]
    # As root, who could write bytecode.
    started = container("--user", "0", image)
    until_health(started, "healthy")
    assert run("docker", "diff", started).stdout == ""
    run("docker", "rm", "--force", started)
    run("docker", "image", "rm", "--force", image)


def test_a_change_since_the_commit_is_on_the_label(repository: Project) -> None:
    """An image of what is not committed does not pass for the commit's."""
    with (repository.folder / "app.py").open("a") as file:
        file.write("# a change\n")
    revision = repository.run("git", "rev-parse", "HEAD").stdout.strip() + "-dirty"
    assert f"image.revision={revision} " in repository.run("make", "--dry-run", "image").stdout


def test_what_differs_is_named(repository: Project, published_base: str) -> None:
    """A build that depends on when it is made is found out, with the file and what of it; so is another image."""
    text = "FROM ${PYTHON_IMAGE} AS runtime\nRUN date +%s%N >/when && chmod 0640 /when\n"
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
    """What `make image PUSH=1` puts into a registry, building its commit again gives; that of another commit is not."""
    (repository.folder / "CHANGELOG.md").write_text(f"## [{VERSION}] - 2026-01-01\n")
    commit(repository)
    name = f"{registry}/me/hello"
    refused = f"PUSH takes a commit with the tag v{VERSION}, nothing uncommitted, and [{VERSION}] in CHANGELOG.md"
    assert refused in repository.run(*PUBLISH, f"IMAGE={name}", check=False).stderr
    repository.run("git", "tag", f"v{VERSION}")
    repository.run(*PUBLISH, f"IMAGE={name}")
    done = repository.run(*REPRODUCE, "--published", f"{name}:{VERSION}", "runtime")
    assert done.stdout.splitlines()[-1].endswith(": the same")
    raw = run("docker", "buildx", "imagetools", "inspect", "--raw", f"{name}:{VERSION}").stdout
    kinds = [m.get("annotations", {}).get("vnd.docker.reference.type") for m in json.loads(raw)["manifests"]]
    assert kinds == [None, "attestation-manifest"]
    (repository.folder / "app.py").write_text("app = None\n")
    assert refused in repository.run(*PUBLISH, f"IMAGE={name}", check=False).stderr
    run("docker", "image", "rm", "--force", f"{name}:{VERSION}")


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
    assert run(*REPRODUCE[:1], "tools/lock.py", "check", cwd=repository.folder).stderr == ""
    assert repository.run("make", "newest-base").stdout == f"The base is its tag's newest: {published_base}\n"
    replace(published_base, f"registry.invalid/python:1@{digest}")
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
