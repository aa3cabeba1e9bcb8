"""The documentation: every command in a `console` block succeeds and prints what the page shows.

In the output, `[...]` stands for anything. A command may fail if `echo $?` follows. A comment above a block,
`<!-- not run: REASON -->`, leaves it out.
"""

import json
import pathlib
import re
import statistics
from collections.abc import Iterator

import pytest

from tests.conftest import needs_docker
from tests.support import ROOT, Project, edit, free_port, run

SLOW = {"building.md", "walkthrough.md"}
END = "==== exit status "  # printed after each command


def blocks(page: pathlib.Path) -> Iterator[list[tuple[str, str]]]:
    """Yield the console blocks of a page: each command with the output shown for it."""
    text = page.read_text()
    found = re.findall(r"(<!-- not run: .+? -->\n)?^```console\n(\$ .*?)^```$", text, re.M | re.S)
    assert len(found) == text.count("```console"), f"{page}: a console block is not at the margin, or not of commands"
    for skipped, block in found:
        if not skipped:
            yield re.findall(r"^\$ ((?:.*\\\n)*.*)\n((?:(?!\$ ).*\n)*)", block, re.M)


PAGES = [
    page
    for name in ("README.md", "docs/*.md", "deploy/*.md", "examples/*/README.md")
    for page in sorted(ROOT.glob(name))
]
PAGES = [page for page in PAGES if any(blocks(page))]


def pattern(shown: str) -> str:
    """Return a regular expression for the output that a page shows. Any white space counts as one space."""
    words = re.escape(" ".join(shown.split()))
    return words.replace(r"\[\.\.\.\]\ ", "(.* )?").replace(r"\ \[\.\.\.\]", "( .*)?").replace(r"\[\.\.\.\]", ".*")


@pytest.fixture
def names(page: pathlib.Path, project: Project, base: str) -> Iterator[dict[str, str]]:
    """The names on a page, with unique ones to use instead: its commands must not touch anything else here."""
    port = free_port("127.0.0.1")
    for variable in ("BIND", "PYTHON_IMAGE", "TARGET"):
        project.environ.pop(variable)
    # Without attestations, building the same again gives the same image, not one more.
    project.environ |= {"PORT": str(port), "CURL_HOME": str(project.folder), "BUILDX_NO_DEFAULT_ATTESTATIONS": "1"}
    project.write({".curlrc": "no-progress-meter\n"})  # as on a terminal
    for dockerfile in project.folder.rglob("*Dockerfile"):
        edit(dockerfile, r"^FROM \S+", f"FROM {base}")  # the first one names the base image
    if page.name in SLOW:
        # A build cache of its own: `make reproduce` builds without cache, which replaces what others find there.
        edit(project.folder / "Dockerfile", "^ARG PYTHONDONTWRITEBYTECODE=1", rf"\g<0> CACHE={project.name}")
    # An old commit: `make reproduce` gives its time to each newer file, and some are in the cache already.
    commit = "git -c user.name=tests -c user.email=tests@example.org commit --quiet --message test"
    project.run("git", "init", "--quiet")
    project.run("git", "add", "--all")
    project.run(*commit.split(), environ={"GIT_COMMITTER_DATE": "2026-01-01T00:00:00Z"})
    image = re.search("^    image: (.+)$", (ROOT / "compose.yaml").read_text(), re.M)[1]
    published = "5001" if "degrees" in page.parts else "5000"
    hosts = {f"{host}:{published}": f"{host}:{port}" for host in ("localhost", "127.0.0.1")}
    yield {image: project.name, "python:3.14-slim": base} | hosts
    # Each page removes what it starts; this is for a page that fails.
    project.compose("--file", "examples/degrees/compose.yaml", "down", "--volumes", check=False)
    for kind, command in (("container", "ps --all --filter=name="), ("image", "image ls --filter=reference=")):
        for left in project.run("docker", *f"{command}{project.name}*".split(), "--quiet").stdout.split():
            project.run("docker", kind, "rm", "--force", left, check=False)


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow if page.name in SLOW else (), id=page.stem) for page in PAGES]
)
def test_commands(page: pathlib.Path, project: Project, names: dict[str, str]) -> None:
    """Each command prints what the page shows. It succeeds, or the page shows its exit status."""
    if page.name == "building.md" and "containerd" not in run("docker", "info", "--format", "{{.DriverStatus}}").stdout:
        needs_docker("the engine has no containerd image store")

    def here(text: str) -> str:
        return re.sub("|".join(map(re.escape, names)), lambda name: names[name[0]], text)

    for block in blocks(page):
        script = "".join(f"{here(command)}\ns=$?; echo '{END}'$s; (exit $s)\n" for command, _ in block)
        printed = re.split(rf"{END}(\d+)\n", project.run("bash", "-c", f"exec 2>&1\n{script}", check=False).stdout)
        assert len(printed) == 2 * len(block) + 1, printed
        for number, (command, shown) in enumerate(block):
            output, status = printed[2 * number : 2 * number + 2]
            matches = not shown or re.fullmatch(pattern(here(shown)), " ".join(output.split()))
            may_fail = block[number + 1 : number + 2] == [("echo $?", f"{status}\n")]
            good = matches and (status == "0" or may_fail)
            assert good, f"$ {command}\n{output}\nexit status {status}; the page shows:\n{shown}"


RESULTS = ROOT / "bench/results.json"


@pytest.mark.skipif(not RESULTS.exists(), reason="there is no bench/")
def test_figures() -> None:
    """README.md, docs/minimal.md and docs/comparison.md have the figures of bench/results.json."""
    from bench.report import page

    results = json.loads(RESULTS.read_text())
    figures = {title: values for measure in results.values() for title, values in measure["figures"].items()}

    def of(title: str, contestant: str) -> str:
        return f"{statistics.median(figures[title][contestant]):.2g}"

    def others(title: str, unit: str, *names: str) -> str:
        return ", ".join(f"{name}: {of(title, name)}{unit}" for name in names)

    size, added = "compressed, MB", "compressed, added to the base image, MB"
    start, seconds = "`docker run` to the first response, s", " s"
    cut, slow = (
        "of 48 clients, cut off by a stop",
        "of 20 requests, answered within 1 s beside 3,000 clients with slow headers",
    )
    phrases = [
        f"{of(added, 'runtime')} MB over the base image, compressed; "
        f"the usual two stages: {of(added, 'waitress')} MB |",
        f"{of(start, 'runtime')} s from `docker run` to the first response. "
        f"{others(start, seconds, 'waitress', 'gunicorn', 'granian')} |",
        f"of 48 clients under load, {of(cut, 'runtime')} cut off. {others(cut, '', 'gunicorn', 'uWSGI', 'granian')} |",
        f"{of(slow, 'runtime')} of 20 requests answered within 1 s. "
        f"{others(slow, '', 'gunicorn', 'uWSGI', 'granian')} |",
        f"{of(size, 'minimal')} MB in all",
    ]
    texts = " ".join((ROOT / "README.md").read_text().split() + (ROOT / "docs/minimal.md").read_text().split())
    assert [phrase for phrase in phrases if phrase not in texts] == []
    assert (ROOT / "docs/comparison.md").read_text() == page(results)
