"""A run that fails at the same step again and again stops and says so. Needs no torch.

RUN_DIR/failures.jsonl has a line {"began": time} while a job trains; a job that ends in order removes the file. A job
that finds such a line puts {"failed": step, "reason": text, "killed": no rank gave a reason} in its place: the step
after the last one in the journal. So a job that ends while it sets up is not counted, and progress forgets.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from megassm.errors import UserError
from megassm.files import write_atomically
from megassm.guarded import LINE_BYTES, parse_object, read_bytes
from megassm.run.directory import FAILURES
from megassm.run.events import append_event
from megassm.run.lines import Record
from megassm.run.records import newest_record

KILLED = 0.5
"""A job that was killed counts so much: machines are taken away, and most often nothing is wrong with the step."""
LOST_RANK = "no longer answer"
"""In the watchdog's message about a rank that was killed or cut off."""


def job_begins(run_dir: Path) -> None:
    """To be called when training begins; the line stays unless `job_ends` is called."""
    _write(run_dir, [*_read(run_dir), {"began": time.time()}])


def job_ends(run_dir: Path) -> None:
    (run_dir / FAILURES).unlink(missing_ok=True)


def check_failures(run_dir: Path, journal: Path, failure: Path, limit: int | None) -> None:
    """To be called at the start of a job: notes how the one before has ended.

    Raises:
        UserError: `limit` jobs in a row have failed at the same step.
    """
    lines = _read(run_dir)
    if lines and "began" in lines[-1]:
        newest = newest_record(journal)
        lines[-1] = _failed(newest["step"] + 1 if newest else 1, failure)
        lines = [line for line in lines if line.get("failed") == lines[-1]["failed"]]
        _write(run_dir, lines)
    count = sum(KILLED if line["killed"] else 1.0 for line in lines)
    if limit is None or not lines or count < limit:
        return
    step, last = lines[-1]["failed"], lines[-1]["reason"]
    text = f"{len(lines)} jobs in a row have ended at step {step}, the last because: {last}"
    append_event(run_dir, "repeated failure", step - 1, text, {"failed_step": step, "jobs": len(lines)})
    raise UserError(
        f"{run_dir}: {text}. Look at that step's batch (python tools/inspect_data.py {run_dir} --step {step}), mend "
        f"the cause, then remove {run_dir / FAILURES} and start again; or raise health.max_failures = {limit}"
    )


def _failed(step: int, failure: Path) -> Record:
    reason = read_bytes(failure, LINE_BYTES).decode(errors="replace").strip() if failure.exists() else ""
    killed = not reason or LOST_RANK in reason
    return {"failed": step, "reason": reason or "killed, without a word", "killed": killed, "time": time.time()}


def _read(run_dir: Path) -> list[Record]:
    path = run_dir / FAILURES
    lines = read_bytes(path, LINE_BYTES).splitlines() if path.exists() else []
    return [line for line in map(parse_object, lines) if line is not None and _is_known(line)]


def _is_known(line: Record) -> bool:
    """Whether a line is one of those that this module writes; another is passed over."""
    if "began" in line:
        return isinstance(line["began"], int | float)
    types = {"failed": int, "reason": str, "killed": bool}
    return all(type(line.get(name)) is kind for name, kind in types.items())


def _write(run_dir: Path, lines: list[Record]) -> None:
    write_atomically(run_dir / FAILURES, "".join(f"{json.dumps(line)}\n" for line in lines).encode())
