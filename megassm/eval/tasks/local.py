"""Reads a task's examples from the folder that the environment variable MEGASSM_EVAL_DATA names."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets

from megassm.errors import UserError
from megassm.eval.task_fields import as_asked


def load(file: str, task: str, **_: object) -> dict[str, Any]:
    """{"test": the examples of a .jsonl.gz, or of the .jsonl beside it}, as the task's templates ask them.

    Raises:
        UserError: there is neither, or an example has other fields than `megassm.eval.task_fields` knows of the task.
    """
    folder = os.environ.get("MEGASSM_EVAL_DATA", "")
    packed = Path(folder) / file
    plain = packed.with_suffix("")
    if not folder or not (packed.is_file() or plain.is_file()):
        raise UserError(f"{packed}: no such file; name the folder of the tasks' files with --data or MEGASSM_EVAL_DATA")
    path = packed if packed.is_file() else plain
    rows = []
    with gzip.open(path, "rt", encoding="utf-8") if packed.is_file() else path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                rows.append(as_asked(task, _parsed(line, f"{path}:{number}"), f"{path}:{number}"))
    return {"test": datasets.Dataset.from_list(rows)}


def _parsed(line: str, place: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise UserError(f"{place}: is no JSON ({error}); a file has an example a line") from None
