"""Which start of a run may write: the newest, and no other ever again.

    RUN_DIR/incarnations/0003    host, process, SLURM job and restart, time of the run's third start

Every start takes the next number by an exclusive create, which is atomic on NFS too. Whoever is about to publish
something looks first whether a higher number has been taken. So ranks that a cluster has given up, because the link to
their node was cut, cannot write beside those that were started in their place: a lock cannot say that, for the old
ranks may hold it as long as they live.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megassm.errors import UserError
from megassm.guarded import LINE_BYTES, Described, read_json
from megassm.run.directory import INCARNATIONS

NUMBER = re.compile("[0-9]{4,9}")


class SupersededError(UserError):
    """A newer start of the run has taken over: this one must write nothing more."""


@dataclass(frozen=True)
class Fence:
    """The right of one start of a run to write."""

    run_dir: Path
    number: int

    def check(self) -> None:
        """Call it before anything is published.

        Raises:
            SupersededError: this start is no longer the newest.
        """
        newest = newest_number(self.run_dir)
        if newest == self.number:
            return
        if newest < self.number:
            raise SupersededError(
                f"{self.run_dir / INCARNATIONS}: the file of this start, {self.number:04d}, is gone; nothing more is "
                "written. Restore the run directory, and start again: the same command continues from the last "
                "checkpoint"
            )
        facts = facts_of(self.run_dir, newest)
        job = f", SLURM job {facts['job_id']} restart {facts['restart']}" if facts.get("job_id") else ""
        raise SupersededError(
            f"{self.run_dir}: start {newest} of this run (host {facts.get('host', '?')}{job}) has taken over from "
            f"start {self.number}, which is this one. It stops here, and writes nothing more; there is nothing to do"
        )

    def holds(self) -> bool:
        try:
            self.check()
        except (SupersededError, OSError):
            return False
        return True


def take(run_dir: Path) -> Fence:
    """Takes the next number: from here on older starts are fenced off."""
    folder = run_dir / INCARNATIONS
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        number = newest_number(run_dir) + 1
        with contextlib.suppress(FileExistsError), (folder / f"{number:04d}").open("x", encoding="utf-8") as file:
            file.write(json.dumps(_own_facts()) + "\n")
            file.flush()
            os.fsync(file.fileno())
            return Fence(run_dir, number)


def newest_number(run_dir: Path) -> int:
    """The highest number taken, 0 before the first start."""
    folder = run_dir / INCARNATIONS
    # NFS answers a listing from a cache that may be a minute old; a name created here makes it ask the server
    probe = folder / f".probe-{socket.gethostname()}-{os.getpid()}"
    with contextlib.suppress(OSError):
        probe.open("x").close()
        probe.unlink()
    return max((int(path.name) for path in folder.glob("*") if NUMBER.fullmatch(path.name)), default=0)


def facts_of(run_dir: Path, number: int) -> Mapping[str, Any]:
    """What a start wrote of itself; empty where it was killed before."""
    try:
        path = run_dir / INCARNATIONS / f"{number:04d}"
        return read_json(path, StartFacts, limit=LINE_BYTES).model_dump()
    except (OSError, UserError):
        return {}


class StartFacts(Described):
    """What a start writes of itself."""

    host: str = "?"
    pid: int = 0
    job_id: str | None = None
    restart: int = 0
    time: str = ""


def restarts_the_newest(run_dir: Path) -> bool:
    """Whether SLURM has started this process in place of the run's newest start: the same job, once more."""
    own, newest = _own_facts(), facts_of(run_dir, newest_number(run_dir))
    return bool(own["job_id"]) and own["job_id"] == newest.get("job_id") and own["restart"] > newest.get("restart", 0)


def _own_facts() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "job_id": os.environ.get("SLURM_JOB_ID"),
        "restart": int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }
