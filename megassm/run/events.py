"""RUN_DIR/events.jsonl: what happened to a run that a person may want to know, oldest first. Needs no torch.

One object a line: `time` (seconds since 1970), `step` (updates done), `kind`, `text`, `figures`. Only the main rank
writes. Nothing is ever removed: an update that is made again after a resume leaves two traces.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from megassm.cli.arguments import print_line
from megassm.files import open_own
from megassm.run.directory import EVENTS
from megassm.run.fence import Fence
from megassm.run.lines import Record, Unread, read_lines
from megassm.run.records import RecordFile, ends_amid_a_line

Kind = Literal[
    "start", "resume", "checkpoint", "passed over", "left over", "disk", "stop", "end", "failure", "straggler",
    "loss spike", "non-finite", "cliff collapse", "oscillating loss", "repeated failure", "rewind",
    "branch", "change", "rising rate",
]  # fmt: skip
ENDS: tuple[Kind, ...] = ("stop", "end", "failure")
"""How a start ended."""
LIFE: tuple[Kind, ...] = (
    "branch", "start", "resume", "change", "rising rate", "passed over", "left over", "disk", "rewind",
    "repeated failure", *ENDS,
)  # fmt: skip
"""What a person reads first of a run that did not go as it should."""
WARNINGS: tuple[Kind, ...] = (
    "disk", "straggler", "loss spike", "non-finite", "cliff collapse", "oscillating loss", "rising rate",
)  # fmt: skip


def append_event(run_dir: Path, kind: Kind, step: int, text: str, figures: Mapping[str, Any]) -> None:
    """Adds a line. A disk that is full ends no run for it."""
    try:
        write_event(run_dir, kind, step, text, figures)
    except OSError as error:
        print_line(f"warning: {run_dir / EVENTS}: cannot be written ({error.strerror})")


def write_event(run_dir: Path, kind: Kind, step: int, text: str, figures: Mapping[str, Any]) -> None:
    """Adds a line; an `OSError` where it cannot."""
    line = json.dumps(_event(kind, step, text, figures)).encode() + b"\n"
    with open_own(run_dir / EVENTS, "a+b") as file:
        line = b"\n" * ends_amid_a_line(file) + line
        if file.write(line) != len(line):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run_dir / EVENTS))


def _event(kind: Kind, step: int, text: str, figures: Mapping[str, Any]) -> Record:
    return {"time": time.time(), "step": step, "kind": kind, "text": text, "figures": dict(figures)}


def read_events(run_dir: Path, unread: Unread | None = None) -> Iterator[Record]:
    """A run's events, oldest first, one at a time; `unread` as in `megassm.run.lines.read_lines`."""
    try:
        yield from read_lines(run_dir / EVENTS, _is_known, unread)
    except FileNotFoundError:
        return


def _is_known(event: Record) -> bool:
    return isinstance(event.get("kind"), str) and is_event(event)


def is_event(event: Record) -> bool:
    """Whether an object is an event that can be shown."""
    moment, step = event.get("time"), event.get("step")
    dated = moment is None or isinstance(moment, str) or (isinstance(moment, int | float) and 0 <= moment < 1e11)
    return dated and (not isinstance(step, int) or abs(step) < 2**53)


class Events:
    """Writes and prints a run's events on the main rank; does nothing on others, and writes nothing once fenced off.

    What a full disk does not take waits in memory, as the journal's rows do.
    """

    def __init__(self, run_dir: Path, writes: bool, fence: Fence) -> None:
        self._writes, self._fence = writes, fence
        self._file: RecordFile | None = None
        if writes:
            try:
                self._file = RecordFile(run_dir / EVENTS, lambda text: print_line(f"warning: {text}"))
            except OSError as error:
                print_line(f"warning: {run_dir / EVENTS}: cannot be written ({error.strerror})")

    def add(self, kind: Kind, step: int, text: str, **figures: Any) -> None:
        if self._writes:
            print_line(f"warning: {text}" if kind in WARNINGS else text)
            if self._file is not None and self._fence.holds():
                self._file.write(_event(kind, step, text, figures))

    def retry(self) -> None:
        """Writes what waits, if there is room again."""
        if self._file is not None and self._file.waits and self._fence.holds():
            self._file.retry()

    def close(self) -> None:
        if self._file is not None and self._fence.holds():
            self._file.close()
