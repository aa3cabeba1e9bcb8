"""Behind a real nginx: the client's address, the scheme, the host, the prefix, and nothing that a client can forge."""

import json
import pathlib
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.support import Server, listens, program, wait_until

APPLICATION = """
import json

from flask import Flask, request, url_for

app = Flask(__name__)


@app.get("/where")
def where():
    return json.dumps({
        "address": request.remote_addr,
        "url": request.url,
        "link": url_for("where", _external=True),
        "forwarded": request.headers.get("X-Forwarded-For"),
        "id": request.headers["X-Request-ID"],
    })
"""

# In the foreground, as any user, with all its files in one folder.
NGINX = """
daemon off;
master_process off;
pid {folder}/nginx.pid;
error_log stderr;
events {{}}
http {{
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    access_log off;
    upstream service {{
        server {upstream};
        keepalive 4;
    }}
    server {{
        listen 127.0.0.1:{port};
        location / {{
            proxy_pass http://service;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_set_header Host $host;
            proxy_set_header X-Forwarded-For $remote_addr;
            proxy_set_header X-Forwarded-Proto https;
            proxy_set_header X-Forwarded-Host shop.example;
            proxy_set_header X-Request-ID $request_id;
            # The address from which nginx connects, another than the client's.
            proxy_bind 127.0.0.2;
        }}
    }}
}}
"""

TRUST = {
    "WAITRESS_TRUSTED_PROXY": "127.0.0.2",
    "WAITRESS_TRUSTED_PROXY_HEADERS": "x-forwarded-for x-forwarded-proto x-forwarded-host",
    "WAITRESS_URL_PREFIX": "/shop",
}
FORGED = (
    b"X-Forwarded-For: 6.6.6.6\r\nForwarded: for=6.6.6.6\r\n"
    b"X-Forwarded-Proto: https\r\nX-Forwarded-Host: evil.example\r\n"
)


@pytest.fixture
def service(tmp_path: pathlib.Path) -> Iterator[Server]:
    """A server that trusts nginx, with an application that tells what it believes of its client."""
    (tmp_path / "app.py").write_text(APPLICATION)
    with Server(tmp_path, **TRUST) as running:
        running.listening()
        yield running


@contextmanager
def nginx(folder: pathlib.Path, upstream: str) -> Iterator[tuple[str, int]]:
    """Run nginx before the server at `upstream`; give its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, upstream=upstream, port=address[1]))
    command = [program("nginx"), "-p", folder, "-e", "stderr", "-c", config]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: listens(address), 10, "nginx")
            yield address
        finally:
            process.terminate()


def ask(address: tuple[str, int], path: bytes = b"/shop/where", headers: bytes = b"") -> dict:
    """Return what the application believes."""
    with socket.create_connection(address, 10) as connection:
        connection.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: a\r\nConnection: close\r\n" + headers + b"\r\n")
        answered = b"".join(iter(lambda: connection.recv(4096), b""))
    assert answered.startswith(b"HTTP/1.1 200 "), answered
    return json.loads(answered.partition(b"\r\n\r\n")[2])


def place(running: Server) -> tuple[str, int]:
    """Return the server's own address."""
    host, port = running.listening()[0].removeprefix("http://").split(":")
    return host, int(port)


@pytest.mark.parametrize("headers", [b"", FORGED], ids=["", "forged"])
def test_behind_nginx(service: Server, tmp_path: pathlib.Path, headers: bytes) -> None:
    """Application and access log have the client's own address, scheme and host, whatever the client says of itself."""
    with nginx(tmp_path, "{}:{}".format(*place(service))) as address:
        for _ in range(3):  # on nginx's keep-alive connection
            told = ask(address, headers=headers)
        entry = service.requests(3)[-1]
    assert (told["address"], told["forwarded"]) == ("127.0.0.1", "127.0.0.1")
    assert told["url"] == told["link"] == "https://shop.example/shop/where"
    assert len(told["id"]) == 32
    assert (entry["remote_addr"], entry["request_id"], entry["path"]) == ("127.0.0.1", told["id"], "/shop/where")


def test_past_the_proxy(service: Server) -> None:
    """A client that is not the proxy is believed nothing: it comes from where it comes from, and its headers go."""
    told = ask(place(service), headers=FORGED)
    assert (told["address"], told["forwarded"]) == ("127.0.0.1", None)
    assert told["url"] == "http://a/shop/where"
    assert service.requests(1)[0]["remote_addr"] == "127.0.0.1"


def test_several_hops(tmp_path: pathlib.Path) -> None:
    """Of a chain of addresses only those count that trusted proxies have added, as many as there are of them."""
    (tmp_path / "app.py").write_text(APPLICATION)
    trust = TRUST | {"WAITRESS_TRUSTED_PROXY": "*", "WAITRESS_TRUSTED_PROXY_COUNT": "2"}
    with Server(tmp_path, **trust) as running:
        told = ask(place(running), headers=b"X-Forwarded-For: 6.6.6.6, 192.0.2.1, 192.0.2.2\r\n")
        assert told["address"] == running.requests(1)[0]["remote_addr"] == "192.0.2.1"


def test_the_probe_needs_no_prefix(service: Server) -> None:
    """What asks the server itself, as the container's probe does, asks without the prefix."""
    assert ask(place(service), b"/where")["address"] == "127.0.0.1"


@pytest.mark.parametrize(
    ("given", "recorded"), [(b"192.0.2.1", "192.0.2.1"), (b":1.2", None)], ids=["address", "garbage"]
)
def test_refused_behind_the_proxy(tmp_path: pathlib.Path, given: bytes, recorded: str | None) -> None:
    """What is refused before the application sees it is on record with the client's own address, if that is one."""
    (tmp_path / "app.py").write_text(APPLICATION)
    with Server(tmp_path, **TRUST | {"WAITRESS_TRUSTED_PROXY": "127.0.0.1"}) as running:
        request = b"POST / HTTP/1.1\r\nHost: a\r\nX-Forwarded-For: %b\r\nContent-Length: 9999999\r\n\r\n"
        assert running.exchange(request % given).startswith(b"HTTP/1.1 413 ")
        [entry] = running.requests(1)
        assert entry["status"] == 413
        assert recorded in (None, entry["remote_addr"])
