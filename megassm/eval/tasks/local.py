"""Reads a task's examples from the folder that the environment variable MEGASSM_EVAL_DATA names."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import datasets

from megassm.errors import UserError


def load(file: str, **_: object) -> dict[str, Any]:
    """{"test": the examples of a .jsonl.gz, or of the .jsonl beside it}.

    Raises:
        UserError: there is neither.
    """
    folder = os.environ.get("MEGASSM_EVAL_DATA", "")
    packed = Path(folder) / file
    plain = packed.with_suffix("")
    if not folder or not (packed.is_file() or plain.is_file()):
        raise UserError(f"{packed}: no such file; name the folder of the tasks' files with --data or MEGASSM_EVAL_DATA")
    if packed.is_file():
        with gzip.open(packed, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
    else:
        rows = [json.loads(line) for line in plain.read_text(encoding="utf-8").splitlines()]
    return {"test": datasets.Dataset.from_list(rows)}
