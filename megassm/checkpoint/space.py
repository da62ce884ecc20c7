"""Room for checkpoints: how much one takes, whether the disk has it, and which ones rotation must leave."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

from megassm.config.schema import Config
from megassm.model import parameter_shapes
from megassm.parallel.state import KINDS
from megassm.run.directory import checkpoint_folders

PIN = "pinned.txt"
"""In a checkpoint that rotation leaves alone; it says why."""
PINS = 2
"""The newest pinned ones are left alone; a run that is never well must not fill the disk."""


def checkpoint_bytes(config: Config) -> int:
    """Of weights, both moments and the running average in float32, and a margin for headers, manifest and journal."""
    numbers = sum(shape.numel() for shape in parameter_shapes(config.model).values())
    kinds = len(KINDS) + (config.optim.ema is not None)
    return numbers * 4 * kinds * 102 // 100 + 65536


def shortage(folder: Path, config: Config) -> str:
    """Why a checkpoint cannot fit below `folder`; empty where it may."""
    needed = checkpoint_bytes(config)
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        return ""  # writing will say what is wrong
    return "" if free >= needed else f"{folder} has {free:,} bytes free, and a checkpoint needs {needed:,}"


def pin(checkpoint: Path, why: str) -> None:
    with contextlib.suppress(OSError):
        (checkpoint / PIN).write_text(f"{why}\n", encoding="utf-8")


def pinned(folder: Path) -> list[Path]:
    """The checkpoints in `folder` that rotation must neither remove nor count."""
    return [path for path in checkpoint_folders(folder) if (path / PIN).exists()][-PINS:]
