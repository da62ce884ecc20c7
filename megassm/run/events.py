"""RUN_DIR/events.jsonl: what happened to a run that a person may want to know, oldest first. Needs no torch.

One object a line: `time` (seconds since 1970), `step` (updates done), `kind`, `text`, `figures`. Only the main rank
writes. Nothing is ever removed: an update that is made again after a resume leaves two traces.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from megassm.cli.arguments import print_line
from megassm.files import open_own
from megassm.guarded import parse_object
from megassm.run.directory import EVENTS
from megassm.run.fence import Fence
from megassm.run.records import Record, lines_of

Kind = Literal[
    "resume", "checkpoint", "passed over", "disk", "stop", "end", "straggler", "loss spike", "non-finite",
    "cliff collapse", "oscillating loss", "repeated failure", "rewind",
]  # fmt: skip
WARNINGS: tuple[Kind, ...] = ("disk", "straggler", "loss spike", "non-finite", "cliff collapse", "oscillating loss")


def append_event(run_dir: Path, kind: Kind, step: int, text: str, figures: Mapping[str, Any]) -> None:
    """Adds a line. A disk that is full ends no run for it."""
    event = {"time": time.time(), "step": step, "kind": kind, "text": text, "figures": dict(figures)}
    try:
        with open_own(run_dir / EVENTS, "a+b") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - 1))
            mends = size and file.read(1) != b"\n"  # a full disk has cut the line before
            file.write(b"\n" * bool(mends) + json.dumps(event).encode() + b"\n")
    except OSError as error:
        print_line(f"warning: {run_dir / EVENTS}: cannot be written ({error.strerror})")


def read_events(run_dir: Path) -> Iterator[Record]:
    """A run's events, oldest first, one at a time; without lines that a kill cut in half."""
    with contextlib.suppress(FileNotFoundError), (run_dir / EVENTS).open("rb") as file:
        yield from (
            event
            for event in map(parse_object, lines_of(file))
            if event is not None and "kind" in event and is_event(event)
        )


def is_event(event: Record) -> bool:
    """Whether an object is an event that can be shown."""
    moment, step = event.get("time"), event.get("step")
    dated = moment is None or isinstance(moment, str) or (isinstance(moment, int | float) and 0 <= moment < 1e11)
    return dated and (not isinstance(step, int) or abs(step) < 2**53)


class Events:
    """Writes and prints a run's events on the main rank; does nothing on others, and writes nothing once fenced off."""

    def __init__(self, run_dir: Path, writes: bool, fence: Fence) -> None:
        self._run_dir, self._writes, self._fence = run_dir, writes, fence

    def add(self, kind: Kind, step: int, text: str, **figures: Any) -> None:
        if self._writes:
            print_line(f"warning: {text}" if kind in WARNINGS else text)
            if self._fence.holds():
                append_event(self._run_dir, kind, step, text, figures)
