"""Where PyPI is not reachable as it is: a private index with a password and a CA of one's own, a proxy, no network.

The index is made by dumb-pypi and served by nginx, with TLS and a password; the proxy is tinyproxy.
"""

import hashlib
import io
import json
import os
import pathlib
import re
import secrets
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest

from tests.support import NGINX_COMMON, ROOT, Project, edit, free_port, get, listens, program, run, wait_until
from tests.test_lock import wheel

if not (ROOT / "tools").is_dir():
    pytest.skip("the image has no tools", allow_module_level=True)
if sys.platform != "linux":
    pytest.skip("a build reaches this machine by the bridge's address on Linux", allow_module_level=True)

USER = "me"
# Layers of the cache may be packed in ways that this Python cannot read.
UNPACKED = "compression=uncompressed,force-compression=true"
ACME = "acme-1.0-py3-none-any.whl"
NGINX = """
{common}
    access_log {folder}/access.log;
    server {{
        listen {host}:{port} ssl;
        ssl_certificate {folder}/server.pem;
        ssl_certificate_key {folder}/server.key;
        auth_basic index;
        auth_basic_user_file {folder}/passwords;
        root {folder}/index;
        types {{
            text/html html;
        }}
        # So that pip keeps what it gets, in its cache.
        add_header Cache-Control max-age=600;
        location /simple/ {{
            try_files $uri/index.html @pypi;
        }}
        location @pypi {{
            return 302 https://pypi.org$uri;
        }}
    }}
}}
"""
TINYPROXY = """
Listen {host}
Port {port}
BasicAuth {user} {password}
LogFile "{folder}/tinyproxy.log"
LogLevel Connect
"""
CERTIFICATES = """
cd /certificates
for ca in ca other; do
    openssl req -x509 -newkey rsa:2048 -nodes -subj /CN=$ca -keyout $ca.key -out $ca.pem -addext keyUsage=keyCertSign
done
openssl req -newkey rsa:2048 -nodes -subj /CN=index -keyout server.key -out server.csr
echo subjectAltName=IP:{host} >extensions
openssl x509 -req -in server.csr -CA ca.pem -CAkey ca.key -extfile extensions -out server.pem
cat ca.pem /etc/ssl/certs/ca-certificates.crt >bundle.pem
chmod -R a+rX .
"""
APP = """
import acme
from flask import Flask

app = Flask(__name__)


@app.get("/")
def hello():
    return acme.GREETING


@app.get("/health")
def health():
    return "ok"
"""


class Index(NamedTuple):
    """A private index: a folder with what it is made of and has logged, where it is, and its password."""

    folder: pathlib.Path
    address: str
    password: str

    def conf(
        self, name: str = "pip.conf", password: str | None = None, more: str = "", at: str | None = None
    ) -> pathlib.Path:
        """Write a configuration for pip that names it; one retry, which is what pip says the reason of."""
        user = f"{USER}:{self.password if password is None else password}@"
        (self.folder / name).write_text(
            f"[global]\nindex-url = https://{user}{at or self.address}/simple/\nretries = 1\n{more}"
        )
        return self.folder / name

    def given(self) -> str:
        """Return what it has logged."""
        return (self.folder / "access.log").read_text()


@contextmanager
def running(port: int, host: str, *command: object, **options: object) -> Iterator[None]:
    """Run a server, until the end of the block; give it back once it listens."""
    with subprocess.Popen([str(part) for part in command], stderr=subprocess.DEVNULL, **options) as process:
        try:
            wait_until(lambda: listens((host, port)) or process.poll() is not None, 20, command[0])
            assert process.poll() is None, f"{command[0]} has ended"
            yield
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def host(engine: None) -> str:
    """The address at which a build finds this machine."""
    return run(
        "docker", "network", "inspect", "bridge", "--format", "{{(index .IPAM.Config 0).Gateway}}"
    ).stdout.strip()


@pytest.fixture(scope="module")
def index(base: str, host: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Index]:
    """An index with one package of its own, acme; for others it sends pip to PyPI."""
    folder = tmp_path_factory.mktemp("index")
    folder.chmod(0o755)
    run(
        "docker", "run", "--rm", f"--volume={folder}:/certificates:z", base, "sh", "-ec", CERTIFICATES.format(host=host)
    )
    (folder / "packages").write_text(f"{ACME}\n")
    pages = [
        "--package-list",
        folder / "packages",
        "--packages-url",
        "../../packages",
        "--output-dir",
        folder / "index",
    ]
    run(sys.executable, "-m", "dumb_pypi.main", *pages)
    (folder / "index" / "packages").mkdir()
    (folder / "index" / "packages" / ACME).write_bytes(wheel("acme", "1.0", "GREETING = 'from the private index'\n"))
    password = secrets.token_hex(16)
    (folder / "passwords").write_text(f"{USER}:{{PLAIN}}{password}\n")
    port = free_port(host)
    common = NGINX_COMMON.format(folder=folder)
    (folder / "nginx.conf").write_text(NGINX.format(common=common, folder=folder, host=host, port=port))
    with running(port, host, program("nginx"), "-p", folder, "-e", "stderr", "-c", folder / "nginx.conf"):
        yield Index(folder, f"{host}:{port}", password)


@pytest.fixture
def acme(project: Project) -> Project:
    """A copy of the project whose application needs the private package, which no lock has yet."""
    (project.folder / "app.py").write_text(APP)
    with (project.folder / "requirements.in").open("a") as requirements:
        requirements.write("acme\n")
    return project


def locked(project: Project, index: Index) -> None:
    """Have the private package alone in the lock."""
    digest = hashlib.sha256((index.folder / "index" / "packages" / ACME).read_bytes()).hexdigest()
    (project.folder / "requirements.txt").write_text(f"acme==1.0 --hash=sha256:{digest}\n")


def leaks(archive: pathlib.Path, *found: bytes) -> list[str]:
    """Return the files of a saved image, packed or not, in which one of some texts stands."""
    places = []
    with tarfile.open(archive) as image:
        for blob in image:
            if not blob.isfile():
                continue
            content = image.extractfile(blob).read()
            assert not content.startswith(b"\x28\xb5\x2f\xfd"), "packed with zstd, into which this does not look"
            try:
                with tarfile.open(fileobj=io.BytesIO(content)) as layer:
                    parts = [(file.name, layer.extractfile(file).read() if file.isfile() else b"") for file in layer]
            except tarfile.TarError:
                parts = [("", content)]
            places += [
                f"{blob.name} {name}" for name, data in parts if any(t in data or t in name.encode() for t in found)
            ]
    return places


def test_a_private_index(acme: Project, index: Index, tmp_path: pathlib.Path) -> None:
    """With pip's configuration and a CA as secrets of the build, a private index is locked from and installed from.

    Nothing of the secrets is in an image, in a stage that is no image, in history or labels, or in pip's cache after.
    """
    conf = index.conf()
    environ = {"PIP_CONF": str(conf), "CA_BUNDLE": str(index.folder / "bundle.pem")}
    acme.run("make", "lock", environ=environ)
    lock = (acme.folder / "requirements.txt").read_text()
    assert "acme==1.0 \\\n" in lock
    for secret in (index.password, index.address, "index-url"):
        assert secret not in lock
    acme.run("make", "up", environ=environ)
    assert get(acme.url() + "/") == (200, "from the private index")
    assert re.search(rf'{USER} .*"GET /packages/acme-1.0-py3-none-any.whl HTTP/1.1" 200', index.given())
    options = [
        f"--secret=id={name},src={path}" for name, path in (("pip_conf", conf), ("ca_bundle", environ["CA_BUNDLE"]))
    ]
    authority = (index.folder / "ca.pem").read_bytes().splitlines()[5]
    texts = (index.password.encode(), index.address.encode(), authority)
    for target in ("download", "wheelhouse", "builder", "dev", "pins", "minimal", "runtime"):
        if target in ("minimal", "runtime"):
            name = f"{acme.environ['COMPOSE_PROJECT_NAME']}:{target}"
            output = f"--output=type=image,name={name},{UNPACKED}"
            how = ["--build-arg=PYTHON_IMAGE", *options, "--provenance=mode=max", f"--target={target}", output]
            acme.run("docker", "build", *how, ".")
            run("docker", "save", "--output", tmp_path / "image.tar", name)
            said = run("docker", "history", "--no-trunc", name).stdout + run("docker", "image", "inspect", name).stdout
            assert not any(text.decode() in said for text in texts)
            run("docker", "image", "rm", name)
        else:
            acme.build(*options, f"--target={target}", f"--output=type=docker,dest={tmp_path / 'image.tar'},{UNPACKED}")
        assert leaks(tmp_path / "image.tar", *texts) == []
    assert leaks_in_cache(acme, index) == ""


def leaks_in_cache(project: Project, index: Index) -> str:
    """Return the files of pip's cache between builds that have the index's password."""
    caches = "--mount=type=cache,target=/root/.cache/pip --mount=type=cache,target=/root/.cache/pip-tools"
    look = f"RUN {caches} ls /root/.cache/pip/* /root/.cache/pip-tools/* && ! grep -rla '{{}}' /root/.cache"
    (project.folder / "look.Dockerfile").write_text(
        f"ARG PYTHON_IMAGE\nFROM ${{PYTHON_IMAGE}}\n{look.format(index.password)}\n"
    )
    return project.build("--file=look.Dockerfile", "--quiet").stderr


def test_leaks_are_found(index: Index, base: str, tmp_path: pathlib.Path) -> None:
    """What looks for secrets in images finds one in a file of a layer, in a name, and in the history."""
    for step in ("RUN echo {} >/file", "RUN mkdir /{}", "ENV SECRET={}"):
        (tmp_path / "Dockerfile").write_text(f"FROM {base}\n{step.format(index.password)}\n")
        name = f"flask-helloworld-test-leak:{os.getpid()}"
        run("docker", "build", "--tag", name, tmp_path)
        run("docker", "save", "--output", tmp_path / "image.tar", name)
        run("docker", "image", "rm", "--force", name)
        assert leaks(tmp_path / "image.tar", index.password.encode())


@pytest.mark.parametrize(
    ("conf", "bundle", "message"),
    [
        ({"password": "wrong"}, "ca.pem", "401 Error, Credentials not correct"),
        ({"password": ""}, "ca.pem", "401"),
        ({}, None, "CERTIFICATE_VERIFY_FAILED"),
        ({}, "other.pem", "CERTIFICATE_VERIFY_FAILED"),
        ({}, f"index/packages/{ACME}", "no certificate or crl found"),
        ({"at": "127.0.0.1:9"}, "ca.pem", "Connection refused"),
        ({"at": "index.invalid"}, "ca.pem", "Name or service not known|Temporary failure in name resolution"),
        ({"more": "no setting\n"}, "ca.pem", "Configuration file could not be loaded"),
        ({"more": "proxy = http://127.0.0.1:9\n"}, "ca.pem", "port=9.*Connection refused"),
    ],
    ids=["password", "no password", "no CA", "other CA", "no PEM", "port", "host", "conf", "proxy"],
)
def test_what_is_wrong_is_said(
    acme: Project, index: Index, conf: dict[str, str], bundle: str | None, message: str
) -> None:
    """Where pip cannot get a package, the build ends, waits for nobody, and has pip's own message, no password."""
    locked(acme, index)
    options = [f"--secret=id=pip_conf,src={index.conf('wrong.conf', **conf)}", "--no-cache-filter=download"]
    if bundle:
        options.append(f"--secret=id=ca_bundle,src={index.folder / bundle}")
    done = acme.build(*options, "--target=wheelhouse", check=False)
    assert done.returncode != 0
    assert re.search(message, done.stderr)
    assert index.password not in done.stderr


@pytest.mark.parametrize("variable", ["PIP_CONF", "CA_BUNDLE"])
def test_a_secret_that_is_not_there(project: Project, variable: str) -> None:
    """A variable that names no file ends `make up`, and the file is named."""
    done = project.run("make", "up", check=False, environ={variable: "/nonexistent/secret"})
    assert done.returncode != 0
    assert "/nonexistent/secret: no such file or directory" in done.stderr


def test_through_a_proxy(acme: Project, index: Index, host: str) -> None:
    """A proxy that asks for a password is named in pip's configuration too; all goes through it."""
    locked(acme, index)
    port, password = free_port(host), secrets.token_hex(8)
    config = index.folder / "tinyproxy.conf"
    config.write_text(TINYPROXY.format(folder=index.folder, host=host, port=port, user=USER, password=password))
    conf = index.conf("proxy.conf", more=f"proxy = http://{USER}:{password}@{host}:{port}\n")
    secret = [f"--secret=id=pip_conf,src={conf}", f"--secret=id=ca_bundle,src={index.folder / 'ca.pem'}"]
    with running(port, host, program("tinyproxy"), "-d", "-c", config, stdout=subprocess.DEVNULL):
        acme.build(*secret, "--no-cache-filter=download", "--target=wheelhouse")
    assert f"CONNECT {index.address}" in (index.folder / "tinyproxy.log").read_text()


# ---- Without any network --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheelhouse(base: str, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The locked wheels, as `make wheelhouse` collects them."""
    copy = Project(tmp_path_factory.mktemp("offline") / "project")
    copy.environ["PYTHON_IMAGE"] = base
    copy.run("make", "wheelhouse")
    return copy.folder / "wheelhouse"


OFFLINE = ["--network=none", "--build-context=wheelhouse=wheelhouse", "--no-cache"]


@pytest.fixture
def offline(project: Project, wheelhouse: pathlib.Path) -> Project:
    """A copy of the project with these wheels in its folder."""
    shutil.copytree(wheelhouse, project.folder / "wheelhouse")
    return project


def test_the_wheelhouse(wheelhouse: pathlib.Path) -> None:
    """It has one wheel for each package of the lock, and each is there by its hash."""
    lock = (ROOT / "requirements.txt").read_text()
    wheels = list(wheelhouse.iterdir())
    assert len(wheels) == len(re.findall(r"^\S+==", lock, re.MULTILINE))
    assert all(f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}" in lock for path in wheels)


def test_a_build_without_network(offline: Project, target: str) -> None:
    """With the wheels no step of the build has a network, none from the cache either; what it builds serves."""
    offline.build(*OFFLINE, f"--target={target}")
    offline.compose("up", "--wait")
    assert get(offline.url() + "/health")[0] == 200


def test_up_without_network(offline: Project, target: str) -> None:
    """`make up` does the same where WHEELHOUSE names the folder, for web alone, whatever that depends on."""
    (offline.folder / ".env").write_text("WHEELHOUSE=wheelhouse\n")
    offline.environ["TARGET"] = target
    name = offline.environ["COMPOSE_PROJECT_NAME"]
    more = {"services": {"web": {"image": name, "depends_on": ["other"]}, "other": {"image": name}}}
    (offline.folder / "override.yaml").write_text(json.dumps(more))
    offline.run("make", "up")
    assert get(offline.url() + "/health")[0] == 200
    network = (
        "RUN --mount=type=bind,from=wheelhouse,target=/w python -c 'import urllib.request as u; u.urlopen(\"{}\")'"
    )
    edit(offline.folder / "Dockerfile", "^FROM scratch AS bytecode", network.format("https://pypi.org") + r"\n\g<0>")
    done = offline.run("make", "up", check=False)
    assert done.returncode != 0
    assert "Temporary failure in name resolution" in done.stderr


def missing(wheel: pathlib.Path) -> None:
    """Take a wheel away."""
    wheel.unlink()


def tampered(wheel: pathlib.Path) -> None:
    """Change a wheel's last byte."""
    content = wheel.read_bytes()
    wheel.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (missing, r"No matching distribution found for flask=="),
        (tampered, r"/wheels/flask-\S+.whl is not in requirements.txt; make wheelhouse collects what is"),
    ],
)
def test_a_wrong_wheelhouse(offline: Project, change: Callable, message: str) -> None:
    """A wheel that is missing, or another than is locked, ends the build, which names it."""
    change(next((offline.folder / "wheelhouse").glob("flask-*")))
    done = offline.build(*OFFLINE, "--target=builder", check=False)
    assert done.returncode != 0
    assert re.search(message, done.stderr)


def test_no_wheelhouse(project: Project) -> None:
    """A WHEELHOUSE that is no folder is named."""
    done = project.run("make", "up", check=False, environ={"WHEELHOUSE": "nowhere"})
    assert done.returncode != 0
    assert "nowhere" in done.stderr
