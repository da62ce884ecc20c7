"""What lies in a run directory beside the journal, as plain values; all of it may be missing."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from pathlib import Path
from typing import Any

from ruamel.yaml.error import YAMLError

from megassm.errors import UserError, visible
from megassm.guarded import LINE_BYTES, TOKENIZER_BYTES, YAML_BYTES, parse_object, parse_yaml, read_bytes
from megassm.run.directory import CHECKPOINTS, CONFIG, ENVIRONMENT, FAILURE, METRICS, TOKENIZER
from megassm.run.lines import Record

TOKENIZER_FILES = 10
"""Looked at, of a run's tokenizer."""


def check_run_directory(path: Path) -> Path:
    """`path`, if a run is or was there.

    Raises:
        UserError: it is not a run directory.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such run directory; give run.dir of a run, such as runs/demo")
    if not any((path / name).exists() for name in (CONFIG, METRICS, CHECKPOINTS)):
        raise UserError(
            f"{path}: is not a run directory (it has neither config.yaml nor {METRICS}); give run.dir of a run"
        )
    return path


def read_knobs(run_dir: Path) -> dict[str, Any]:
    """The resolved configuration as section.key -> value."""
    try:
        tree = parse_yaml(read_bytes(run_dir / CONFIG, YAML_BYTES).decode())
    except (OSError, YAMLError, ValueError):
        return {}
    if not isinstance(tree, dict):
        return {}
    return {
        f"{section}.{key}": value
        for section, knobs in tree.items()
        for key, value in (knobs.items() if isinstance(knobs, dict) else ())
    }


def read_environment(run_dir: Path) -> dict[str, Any]:
    try:
        return parse_object(read_bytes(run_dir / ENVIRONMENT, LINE_BYTES)) or {}
    except (OSError, UserError):
        return {}


def tokenizer_mark(run_dir: Path, knobs: dict[str, Any]) -> str:
    """Equal for runs of one tokenizer: a digest of its files in the run directory; of older runs the data's path."""
    folder = run_dir / TOKENIZER
    if not folder.is_dir():
        return str(knobs.get("data.path") or knobs.get("data.sources"))
    digest = hashlib.sha256()
    for path in sorted(folder.iterdir())[:TOKENIZER_FILES]:
        with contextlib.suppress(OSError, UserError):
            digest.update(path.name.encode(errors="surrogateescape") + read_bytes(path, TOKENIZER_BYTES))
    return digest.hexdigest()


def failure(run_dir: Path) -> str:
    """The first line of why the last job ended, where something was wrong."""
    try:
        text = read_bytes(run_dir / FAILURE, LINE_BYTES).decode(errors="replace")
        return visible(text.strip().partition("\n")[0])
    except (OSError, UserError):
        return ""


def planned_steps(knobs: dict[str, Any]) -> int | None:
    steps = knobs.get("train.steps")
    return steps if type(steps) is int and 0 < steps <= 2**53 else None


def age_s(path: Path, now: float | None = None) -> float | None:
    """Seconds since a file was written; None where it is not there."""
    try:
        return max(0.0, (time.time() if now is None else now) - path.stat().st_mtime)
    except OSError:
        return None


def event_text(event: Record) -> str:
    """What an event says; one without a text shows what it has."""
    text = event.get("text")
    rest = {name: value for name, value in event.items() if name not in ("time", "step", "kind")}
    return visible(str(text) if text else json.dumps(rest))


def event_time(event: Record) -> str:
    """The event's `time`: seconds since 1970, or a text as it is."""
    moment = event.get("time")
    if isinstance(moment, int | float):
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(moment))
    return "" if moment is None else visible(str(moment))
