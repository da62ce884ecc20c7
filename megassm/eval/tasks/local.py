"""Reads a task's examples from the folder that the environment variable MEGASSM_EVAL_DATA names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import datasets

from megassm.data.prepare.records import lines_of
from megassm.data.prepare.unpack import open_unpacked
from megassm.errors import UserError
from megassm.eval.task_fields import as_asked
from megassm.files import open_given
from megassm.guarded import parse_json

EXAMPLE_BYTES = 16 << 20


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
    with open_given(path) as raw, open_unpacked(path, "gzip" if packed.is_file() else None, raw) as stream:
        for number, line in lines_of(path, stream, EXAMPLE_BYTES):
            place = f"{path}:{number}"
            if line.strip():
                rows.append(as_asked(task, parse_json(line, place, "a file has an example a line"), place))
    if not rows:
        raise UserError(f"{path}: holds no example; fetch the file again")
    return {"test": datasets.Dataset.from_list(rows)}
