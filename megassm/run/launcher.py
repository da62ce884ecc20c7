"""Whether the launcher that started this rank still lives.

`deepspeed` starts a second launcher that starts the ranks; told to end, it leaves at once and the rest trains
on, unseen, in the run directory that the next job will want. A rank that notices ends as if it had been told itself.
"""

from __future__ import annotations

import os
from pathlib import Path


def launcher_pids() -> list[int]:
    """This rank's parent and, under `deepspeed`, the parent's; empty without a launcher or without /proc."""
    if "RANK" not in os.environ or not Path("/proc/self/stat").exists():
        return []
    parent = os.getppid()
    pids = [parent]
    if b"deepspeed.launcher.launch" in _read(parent, "cmdline"):
        pids.append(_parent_of(parent))
    return pids


def launcher_is_gone(pids: list[int]) -> bool:
    """Whether one of the `launcher_pids()` of the job's start has ended since: its children have other parents."""
    if not pids:
        return False
    if os.getppid() != pids[0]:
        return True
    return len(pids) > 1 and _parent_of(pids[0]) != pids[1]


def _parent_of(pid: int) -> int:
    fields = _read(pid, "stat").rpartition(b")")[2].split()  # the name before ")" may hold anything
    return int(fields[1]) if len(fields) > 1 else 0


def _read(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""
