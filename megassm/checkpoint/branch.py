"""A new run that begins where another one was: its weights, moments and position, and its journal up to there."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from megassm.checkpoint.format import MANIFEST, Checkpoint, read_checkpoint
from megassm.config.load import dump_config
from megassm.config.schema import Config
from megassm.errors import UserError
from megassm.files import sync, write_atomically
from megassm.run.directory import (
    CHECKPOINTS,
    CONFIG,
    LEFT_OUT,
    METRICS,
    TOKENIZER,
    checkpoint_folders,
    step_name,
    step_of,
)
from megassm.run.events import write_event
from megassm.run.records import cut_after


def branch(run_dir: Path, step: int, new: Path) -> Config:
    """Makes the run directory `new` from what `run_dir` was after `step` updates; returns its configuration.

    A checkpoint's files are never written to, so those of the new run are hard links where the file system has them;
    elsewhere they are copied.

    Raises:
        UserError: no complete checkpoint of that step, or `new` is there already.
    """
    source = _checkpoint_at(run_dir, step)
    if new.exists() and (not new.is_dir() or any(new.iterdir())):
        raise UserError(f"{new}: is there already; a branch is a new run, give a folder that does not exist")
    config = source.config
    config = config.model_copy(update={"run": config.run.model_copy(update={"dir": str(new)})})
    new.parent.mkdir(parents=True, exist_ok=True)
    partial = new.with_name(f".{new.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        _fill(partial, source, run_dir, config)
        with contextlib.suppress(FileNotFoundError):
            new.rmdir()
        partial.rename(new)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    sync(new.parent)
    return config


def _fill(folder: Path, source: Checkpoint, run_dir: Path, config: Config) -> None:
    step = source.manifest.step
    place = folder / CHECKPOINTS / step_name(step)
    place.mkdir(parents=True)
    for name in (*source.manifest.files, MANIFEST):
        _link(source.folder / name, place / name)
    if source.kept_tokenizer.is_dir():
        shutil.copytree(source.kept_tokenizer, folder / TOKENIZER)
    if (run_dir / METRICS).exists():
        shutil.copyfile(run_dir / METRICS, folder / METRICS)
        cut_after(folder / METRICS, step)
    if (run_dir / LEFT_OUT).exists():
        shutil.copyfile(run_dir / LEFT_OUT, folder / LEFT_OUT)
    write_atomically(folder / CONFIG, dump_config(config).encode())
    origin = {"run": str(run_dir.absolute()), "step": step}
    write_event(folder, "branch", step, f"branched from {run_dir} after step {step}", origin)
    sync(place)


def _link(file: Path, place: Path) -> None:
    """A second name of a file, or, where the file system has none, a copy."""
    try:
        os.link(file.resolve(), place)
    except OSError:
        shutil.copyfile(file, place)
        sync(place)


def _checkpoint_at(run_dir: Path, step: int) -> Checkpoint:
    folders = [folder for folder in checkpoint_folders(run_dir / CHECKPOINTS) if (folder / MANIFEST).exists()]
    found = {number: folder for folder in folders if (number := step_of(folder)) is not None}
    if step not in found:
        there = f"it has those of {', '.join(map(str, found))}" if found else "it has none"
        raise UserError(
            f"{run_dir}: no checkpoint after step {step}; {there}. checkpoint.every_steps and checkpoint.keep say when "
            "a run saves, and how many stay"
        )
    checkpoint = read_checkpoint(found[step])
    if not checkpoint.has_moments:
        raise UserError(
            f"{checkpoint.folder}: a milestone: it has the weights alone, and no run can go on from it; export it "
            "(tools/export.py) and begin a new run with run.init_from, or branch from another step"
        )
    return checkpoint
