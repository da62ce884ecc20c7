"""The servers of `tools.bench.servers` for tests, which skip where one is not installed."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from megassm.errors import UserError
from tools.bench import servers
from tools.bench.servers import Server


@contextmanager
def nginx(folder: Path, work: Path, options: str = "") -> Iterator[Server]:
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(servers.nginx(folder, work, options))
        except UserError as error:
            pytest.skip(str(error))
        yield server


def kill_a_worker(server: Server) -> None:
    """As the kernel does where memory runs out; nginx's master starts another."""
    with contextlib.suppress(psutil.NoSuchProcess, IndexError):
        psutil.Process(server.process.pid).children()[0].send_signal(signal.SIGKILL)


@contextmanager
def juicefs_s3(work: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """S3, and in this process's environment all that boto3 needs for it."""
    pytest.importorskip("boto3", reason="needs boto3: pip install -e '.[s3]'")
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(servers.juicefs_s3(work))
        except UserError as error:
            pytest.skip(str(error))
        for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


def s3_client() -> Any:
    """With what the environment says now."""
    import boto3

    return boto3.session.Session().client("s3")


def upload(folder: Path, prefix: str) -> str:
    """See `servers.upload`."""
    return servers.upload(s3_client(), folder, prefix)
