"""The batches that a run passes over, as a file (`megassm.data.skipped`).

RUN_DIR/left_out.json    [{"step": 400, "batches": 37}]: from the update after step 400 on, 37 batches further
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from pydantic import Field

from megassm.data.skipped import LeftOut
from megassm.files import write_atomically
from megassm.guarded import LINE_BYTES, Described, read_json
from megassm.run.directory import LEFT_OUT


class _Entry(Described):
    step: Annotated[int, Field(ge=0, le=2**53)]
    batches: Annotated[int, Field(ge=1, le=2**53)]


def read_left_out(run_dir: Path) -> tuple[LeftOut, ...]:
    """What a run passes over, in the order of steps.

    Raises:
        UserError: the file is damaged.
    """
    path = run_dir / LEFT_OUT
    way_out = (
        "it says which batches the run passes over: see events.jsonl for 'rewind', and write them again: "
        '[{"step": 400, "batches": 37}]'
    )
    try:
        found = read_json(path, list[_Entry], way_out, LINE_BYTES)
    except FileNotFoundError:
        return ()
    return tuple(sorted(LeftOut(entry.step, entry.batches) for entry in found))


def leave_out(run_dir: Path, more: LeftOut) -> None:
    """Adds to what a run passes over."""
    entries = [entry._asdict() for entry in (*read_left_out(run_dir), more)]
    write_atomically(run_dir / LEFT_OUT, (json.dumps(entries) + "\n").encode())
