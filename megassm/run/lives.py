"""Every start of a run and how it ended, in events.jsonl, whatever ended it. Needs no torch.

A start writes an event, and an orderly end another. Where there was no time for that, the next start adds it: with the
cause, if a rank has left one in failure.txt, or that the job ended without a word.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megassm.config.schema import Config
from megassm.errors import UserError
from megassm.guarded import LINE_BYTES, read_bytes
from megassm.run.directory import FAILURE, METRICS
from megassm.run.events import ENDS, LIFE, read_events, write_event
from megassm.run.lines import Record
from megassm.run.records import newest_record


def note_last_end(run_dir: Path) -> None:
    """Adds how the start before this one has ended, where it could not do so itself; call it under the run's lock.

    Raises:
        OSError: the event cannot be written.
    """
    start = _open_start(read_events(run_dir))
    if start is not None:
        event = _end_of(run_dir, start)
        write_event(run_dir, "failure", event["step"], event["text"], event["figures"])


def note_start(config: Config) -> None:
    """Adds this start and its shape; raises as `note_last_end`."""
    parallel, ranks = config.parallel, int(os.environ.get("WORLD_SIZE", "1"))
    host, job = socket.gethostname(), os.environ.get("SLURM_JOB_ID")
    figures = {
        "host": host, "pid": os.getpid(), "job_id": job, "ranks": ranks, "tensor": parallel.tensor,
        "sequence": parallel.sequence, "zero_stage": parallel.zero_stage,
    }  # fmt: skip
    split = f", tensor {parallel.tensor}" * (parallel.tensor > 1) + f", sequence {parallel.sequence}" * (
        parallel.sequence > 1
    )
    where = f"on {host}" + (f", SLURM job {job}" if job else "")
    text = f"started {where}: {ranks} {'rank' if ranks == 1 else 'ranks'}{split}, ZeRO {parallel.zero_stage}"
    run_dir = Path(config.run.dir)
    write_event(run_dir, "start", _last_step(run_dir), text, figures)


def life_of(run_dir: Path) -> list[Record]:
    """The events that say when a run was started, how it went on and how it ended, oldest first; also how it has just
    ended, where nobody has written that yet."""
    events = list(read_events(run_dir))
    life = [event for event in events if event["kind"] in LIFE]
    start = _open_start(iter(events))
    return [*life, _end_of(run_dir, start)] if start is not None and failure_reason(run_dir) else life


def failure_reason(run_dir: Path) -> str:
    """The first line of failure.txt; empty where there is none."""
    try:
        return read_bytes(run_dir / FAILURE, LINE_BYTES).decode(errors="replace").strip().partition("\n")[0]
    except (OSError, UserError):
        return ""


def _open_start(events: Iterator[Record]) -> Record | None:
    """The last start, if nothing says how it ended."""
    start = None
    for event in events:
        if event["kind"] == "start":
            start = event
        elif event["kind"] in ENDS:
            start = None
    return start


def _end_of(run_dir: Path, start: Record) -> Record:
    """The event that a start could not write itself."""
    step, reason = _last_step(run_dir), failure_reason(run_dir)
    given = start.get("figures")
    figures: dict[str, Any] = given if isinstance(given, dict) else {}
    moment = start.get("time")
    began = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment)) if isinstance(moment, int | float) else "?"
    after = f"after step {step}" if step else "before its first step was done"
    how = f"ended {after}: {reason}" if reason else f"ended without a word {after}"
    text = f"the job before, started {began} on {figures.get('host', '?')}, {how}"
    cause = {"started": moment, "host": figures.get("host"), "cause": reason or None}
    return {"time": None, "step": step, "kind": "failure", "text": text, "figures": cause}


def _last_step(run_dir: Path) -> int:
    row = newest_record(run_dir / METRICS)
    return 0 if row is None else int(row["step"])
