"""The batches that a run passes over, as a file (`megassm.data.skipped`).

RUN_DIR/left_out.json    [{"step": 400, "batches": 37}]: from the update after step 400 on, 37 batches further
"""

from __future__ import annotations

import json
from pathlib import Path

from megassm.data.skipped import LeftOut
from megassm.errors import UserError
from megassm.files import write_atomically
from megassm.run.directory import LEFT_OUT


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
