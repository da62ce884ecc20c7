"""Starts a training job as a user would, waits for a moment of it, and does something to one of its ranks."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal

import psutil

from megassm.run.journal import read_records
from tests.conftest import ROOT

PATIENCE_S = 300.0

Launcher = Literal["torchrun", "deepspeed"]


class Job:
    """A launcher with `ranks` ranks of `script`; killed with all its ranks where the `with` is left."""

    def __init__(self, run_dir: Path, ranks: int, overrides: Sequence[str], script: str = "launch/pretrain.py",
                 launcher: Launcher = "torchrun", **environment: str) -> None:  # fmt: skip
        self.run_dir = run_dir
        self._known: set[psutil.Process] = set()
        run_dir.mkdir(parents=True, exist_ok=True)
        self._log = run_dir.with_name(f"{run_dir.name}.log")
        starts = {
            "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)],
            "deepspeed": [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", str(ranks), "--master_port",
                          str(free_port())],
        }[launcher]  # fmt: skip
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [*starts, script, "--config", "configs/tiny.yaml", *overrides, f"run.dir={run_dir}"],
                cwd=ROOT,
                env=os.environ | environment,
                stdout=log,
                stderr=log,
            )

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        for member in self._family():
            with contextlib.suppress(psutil.NoSuchProcess):  # also of those that a killed launcher has left
                member.kill()
        self.process.wait()

    @property
    def said(self) -> str:
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def rows(self) -> int:
        return len(read_records(self.run_dir)) if (self.run_dir / "metrics.jsonl").exists() else 0

    def wait_until(self, condition: Callable[[], bool], poll_s: float = 0.02) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            assert self.process.poll() is None, f"the job ended too early:\n{self.said}"
            assert time.monotonic() < deadline, f"the moment never came:\n{self.said}"
            time.sleep(poll_s)

    def end(self, number: signal.Signals, whole: bool) -> None:
        """Sends a signal to the launcher, or to everything at once."""
        for member in self._family() if whole else [psutil.Process(self.process.pid)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.send_signal(number)

    @property
    def ranks(self) -> list[psutil.Process]:
        return [member for member in self._family() if _rank_of(member) is not None]

    def send(self, rank: int, number: signal.Signals) -> None:
        self._rank(rank).send_signal(number)

    def wait_for_ranks(self, but: int | None, within_s: float) -> int:
        """Waits until all ranks have ended, except for `but`, which is then killed; returns the launcher's code."""
        stopped = None if but is None else self._rank(but)
        ranks = [member for member in self.ranks if member != stopped]
        deadline = time.monotonic() + within_s
        while alive := [member.pid for member in ranks if _lives(member)]:
            assert time.monotonic() < deadline, f"ranks live on after {within_s} s ({alive}):\n{self.said}"
            time.sleep(0.1)
        if stopped is not None:
            stopped.kill()
        return self.process.wait(timeout=PATIENCE_S)

    def finish(self) -> str:
        """What a job that must succeed has said."""
        assert self.process.wait(timeout=PATIENCE_S) == 0, self.said
        return self.said

    def _family(self) -> list[psutil.Process]:
        """All that was ever seen of the job, and still is there."""
        with contextlib.suppress(psutil.NoSuchProcess):
            own = psutil.Process(self.process.pid)
            self._known |= {*own.children(recursive=True), own}
        return [member for member in self._known if _lives(member)]

    def _rank(self, rank: int) -> psutil.Process:
        return next(member for member in self._family() if _rank_of(member) == rank)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _lives(process: psutil.Process) -> bool:
    """A rank that has ended stays a zombie while the launcher waits, up to 30 s, for one that is stopped."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _rank_of(process: psutil.Process) -> int | None:
    try:
        text = process.environ().get("RANK")
    except psutil.Error:
        return None
    return None if text is None else int(text)
