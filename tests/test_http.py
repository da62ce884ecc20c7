"""What stands between a run and its server: proxies with passwords, certificates, servers that compress."""

from __future__ import annotations

import base64
import gzip
import shutil
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from megassm.data.request import AUTHORITIES
from megassm.data.stores import open_store
from megassm.data.transport import Patience, read_file
from megassm.errors import UserError
from tests.fault_server import FaultServer, serving

LONG = Patience(60.0, 1.0, 5.0)  # a refusal must not wait for it
PASSWORD = "p@ss:word"


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*AUTHORITIES, "http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FaultServer]:
    (tmp_path / "index.json").write_bytes(b"content")
    with serving(tmp_path) as running:
        yield running


class _Proxy(BaseHTTPRequestHandler):
    def log_message(self, format: str, *arguments: Any) -> None:
        """Quiet."""

    def _allowed(self) -> bool:
        given = self.headers.get("Proxy-Authorization", "")
        if given == "Basic " + base64.b64encode(f"me:{PASSWORD}".encode()).decode():
            return True
        self.send_response(407)
        self.send_header("Content-Length", "0")
        self.end_headers()
        return False

    def do_GET(self) -> None:
        if self._allowed():
            host, _, path = self.path.removeprefix("http://").partition("/")
            with socket.create_connection(tuple(host.split(":"))) as out:  # type: ignore[arg-type]
                lines = [
                    f"GET /{path} HTTP/1.1",
                    f"Host: {host}",
                    f"Range: {self.headers['Range']}",
                    "Connection: close",
                ]
                out.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
                while data := out.recv(1 << 16):
                    self.wfile.write(data)
            self.close_connection = True

    def do_CONNECT(self) -> None:
        if self._allowed():
            self.send_error(502)


@pytest.fixture
def proxy() -> Iterator[str]:
    running = ThreadingHTTPServer(("127.0.0.1", 0), _Proxy)
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    yield f"127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def test_a_proxys_password_is_sent(server: FaultServer, proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://me:p%40ss%3Aword@{proxy}")
    assert read_file(open_store(server.url), "index.json", LONG) == b"content"


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_proxy_without_its_password_is_told(proxy: str, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"{scheme}_proxy", f"http://me:wr0ng@{proxy}")
    started = time.monotonic()
    with pytest.raises(UserError, match=r"the proxy wants a user and password \(HTTP 407\)") as told:
        read_file(open_store(f"{scheme}://data.invalid/set"), "index.json", LONG)
    assert "wr0ng" not in str(told.value)
    assert time.monotonic() - started < 30


def test_a_server_that_compresses_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Compressing(BaseHTTPRequestHandler):
        def log_message(self, format: str, *arguments: Any) -> None:
            """Quiet."""

        def do_GET(self) -> None:
            body = gzip.compress(b"content", mtime=0)
            self.send_response(200)
            self.send_header("Content-Encoding", "gzip")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    running = ThreadingHTTPServer(("127.0.0.1", 0), Compressing)
    threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
    with pytest.raises(UserError, match=r"the server compresses .*\(Content-Encoding: gzip\).*turn that off"):
        read_file(open_store(f"http://127.0.0.1:{running.server_port}/set"), "index.json", LONG)
    running.shutdown()
    running.server_close()


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    if shutil.which("openssl") is None:
        pytest.skip("openssl, which makes the certificate, is not installed")
    place = tmp_path / "own.pem"
    subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
                    "-days", "2", "-subj", "/CN=own", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout",
                    place.with_suffix(".key"), "-out", place], check=True, capture_output=True)  # fmt: skip
    return place


def test_an_own_authority(server: FaultServer, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_suffix(".key"))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    url = server.url.replace("http://", "https://")
    started = time.monotonic()
    with pytest.raises(UserError, match=r"certificate is not accepted \(self.signed certificate\); name the file"):
        read_file(open_store(url), "index.json", LONG)
    assert time.monotonic() - started < 20
    for variable in AUTHORITIES[:3]:
        with monkeypatch.context() as patch:
            patch.setenv(variable, str(certificate))
            assert read_file(open_store(url), "index.json", LONG) == b"content"
    monkeypatch.setenv("CURL_CA_BUNDLE", "/nowhere.pem")
    with pytest.raises(UserError, match=r"CURL_CA_BUNDLE = '/nowhere\.pem': no such file"):
        open_store(url)


def test_an_own_authority_of_an_s3(server: FaultServer, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same words in the same time, though it is another library."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, certificate.with_suffix(".key"))
    server.socket = context.wrap_socket(server.socket, server_side=True)
    (server.folder / "set").mkdir()
    shutil.copy(server.folder / "index.json", server.folder / "set")
    host = server.url.removeprefix("http://").partition("/")[0]
    for name, value in {"ENDPOINT_URL": f"https://{host}", "ACCESS_KEY_ID": "a", "SECRET_ACCESS_KEY": "b",
                        "DEFAULT_REGION": "us-east-1", "EC2_METADATA_DISABLED": "true"}.items():  # fmt: skip
        monkeypatch.setenv(f"AWS_{name}", value)
    for name in (*AUTHORITIES, "AWS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    started = time.monotonic()
    with pytest.raises(UserError, match=r"s3://set/index\.json: the server's certificate is not accepted"):
        read_file(open_store("s3://set"), "index.json", LONG)
    assert time.monotonic() - started < 20
    for variable in (*AUTHORITIES[:3], "AWS_CA_BUNDLE"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, str(certificate))
            assert read_file(open_store("s3://set"), "index.json", LONG) == b"content"
