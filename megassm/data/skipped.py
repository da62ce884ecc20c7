"""Batches that a run passes over: where its loss jumped, it went back to a checkpoint and on with what came after.

    RUN_DIR/left_out.json    [{"step": 400, "batches": 37}]: from the update after step 400 on, 37 batches further

What is left out follows from the step alone, like all of the order: a resumed run reads what it would have read, at any
number of ranks.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megassm.errors import UserError
from megassm.files import write_atomically

LEFT_OUT = "left_out.json"


class LeftOut(NamedTuple):
    """One time that a run went back."""

    step: int
    """Updates done where it went on."""
    batches: int
    """Global batches that are passed over there."""


def read_left_out(run_dir: Path) -> tuple[LeftOut, ...]:
    """What a run passes over, in the order of steps.

    Raises:
        UserError: the file is damaged.
    """
    path = run_dir / LEFT_OUT
    try:
        found = [LeftOut(int(entry["step"]), int(entry["batches"])) for entry in json.loads(path.read_text("utf-8"))]
    except FileNotFoundError:
        return ()
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path}: damaged ({error!r}); it says which batches the run passes over, see events.jsonl for 'rewind', "
            'and write them again: [{"step": 400, "batches": 37}]'
        ) from None
    return tuple(sorted(found))


def leave_out(run_dir: Path, more: LeftOut) -> None:
    """Adds to what a run passes over."""
    entries = [entry._asdict() for entry in (*read_left_out(run_dir), more)]
    write_atomically(run_dir / LEFT_OUT, (json.dumps(entries) + "\n").encode())


def batch_of(left_out: Sequence[LeftOut], step: int) -> int:
    """The batch, by its place in the order from 0, of update `step` (from 0)."""
    return step + sum(entry.batches for entry in left_out if entry.step <= step)


def step_of(left_out: Sequence[LeftOut], batch: int) -> int | None:
    """The update (from 0) that reads a batch; None for one that is passed over."""
    shift = 0
    for entry in sorted(left_out):
        if batch < entry.step + shift:
            break
        if batch < entry.step + shift + entry.batches:
            return None
        shift += entry.batches
    return batch - shift
