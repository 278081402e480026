"""Requests to servers of models: every form of address, and what comes back when there is no reply."""

from __future__ import annotations

import os
import socket
import ssl
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from r1engine.config.addresses import FORMS, address_problem
from r1engine.rewards.servers.endpoint import ModelServers, ModelServersError
from r1engine.rollout.sglang.client import Client, ServerError
from r1engine.web import NoReply, request

CALL = "import sys; from r1engine.web import request; print(request('POST', sys.argv[1], {}, seconds=20))"


class Echo(BaseHTTPRequestHandler):
    """Says which path and key it was asked with; /elsewhere sends to another server."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = f'{{"path": "{self.path}", "key": "{self.headers.get("Authorization")}"}}'.encode()
        self.send_response(307 if self.path == "/elsewhere" else 200)
        self.send_header("Location", "http://elsewhere.invalid/")
        self.send_header("Content-Length", str(len(found)))
        self.end_headers()
        self.wfile.write(found)

    do_GET = do_POST

    def log_message(self, *_: object) -> None:
        """Nothing on stderr."""


class IPv6Server(ThreadingHTTPServer):
    address_family = socket.AF_INET6


@pytest.fixture
def listen():
    """Starts a server on a host, perhaps behind a certificate; gives its port."""
    servers = []

    def start(host: str = "127.0.0.1", certificate: ssl.SSLContext | None = None) -> int:
        server = (IPv6Server if ":" in host else ThreadingHTTPServer)((host, 0), Echo)
        if certificate is not None:
            server.socket = certificate.wrap_socket(server.socket, server_side=True)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return server.server_port

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


ADDRESSES = (
    "http://a:1 http://a:1/ https://a http://a/v1 https://10.0.0.7:443/x/v1 http://[::1]:30000 http://[fe80::1]/v1"
)
NO_ADDRESSES = (
    "a:1 10.0.0.7:30000 http:// http://:1 http://a:x http://a:70000 http://a:0 http://::1:30000 http://[::1 ftp://a"
)


@pytest.mark.parametrize("url", ADDRESSES.split())
def test_what_is_an_address(url):
    assert address_problem(url) == ""


@pytest.mark.parametrize("url", [*NO_ADDRESSES.split(), "http://a b:1", "http://a:1\n"])
def test_what_is_none(url):
    assert address_problem(url) == FORMS


def test_an_address_holds_no_key_and_no_query():
    assert "key_variable" in address_problem("http://me:secret@a:1")
    assert address_problem("http://a:1/v1?x=1") == "an address without ? and #"


def test_servers_behind_ipv6_and_a_path_are_reached_by_every_client(listen):
    try:
        port = listen("::1")
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    url = f"http://[::1]:{port}/behind/v1"
    assert ModelServers(url).post("/x", {})["path"] == "/behind/v1/x"
    assert Client(url + "/", stall_seconds=20, key="k").get("/x") == {"path": "/behind/v1/x", "key": "Bearer k"}


def test_a_certificate_is_checked(listen, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    name = ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1"]
    subprocess.run([*made, "-keyout", key, "-out", certificate, *name], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    url = f"https://127.0.0.1:{listen(certificate=context)}/v1"
    with pytest.raises(ModelServersError, match=r"https://.*certificate verify failed: self.signed certificate"):
        ModelServers(url, tries=1).post("/x", {})
    trusted = os.environ | {"SSL_CERT_FILE": str(certificate)}
    done = subprocess.run([sys.executable, "-c", CALL, url + "/x"], env=trusted, capture_output=True, text=True)
    assert "/v1/x" in done.stdout, done.stderr


def test_a_redirection_takes_no_key_elsewhere(listen):
    url = f"http://127.0.0.1:{listen()}"
    with pytest.raises(ServerError, match=r"HTTP 307 it sends to http://elsewhere\.invalid/"):
        Client(url, stall_seconds=20, key="k").post("/elsewhere")
    with pytest.raises(NoReply) as caught:
        request("POST", url + "/elsewhere", {}, key="k", seconds=20)
    assert caught.value.is_refusal


@pytest.mark.parametrize(
    ("host", "reason"), [("127.0.0.1:9", "Connection refused"), ("no-such-host.invalid:9", "known")]
)
def test_nobody_there_is_told_in_words(host, reason):
    with pytest.raises(ModelServersError, match=rf"http://{host}/x: .*{reason}"):
        ModelServers(f"http://{host}", tries=1).post("/x", {})


def test_a_forked_process_asks_too(listen):
    url = f"http://127.0.0.1:{listen()}/x"
    assert request("POST", url, {}, seconds=20)
    if (child := os.fork()) == 0:
        os._exit(0 if request("POST", url, {}, seconds=20) else 1)
    assert os.waitpid(child, 0)[1] == 0
