"""A run directory is made and locked before anything is started; needs no torch."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from megassm.cli.arguments import error_text, is_rank_zero, print_line
from megassm.config.load import dump_config, load_config_or_exit
from megassm.config.schema import Config
from megassm.errors import UserError
from megassm.files import open_own, write_atomically
from megassm.guarded import YAML_BYTES, read_bytes
from megassm.run.directory import CHECKPOINTS, CONFIG, CONFIG_HISTORY, FAILURE, INCARNATIONS, LOCK, METRICS, step_name
from megassm.run.failures import check_failures
from megassm.run.fence import restarts_the_newest
from megassm.run.lives import note_last_end, note_start


def load_run_config(path: Path, overrides: Sequence[str], world_size: int | None = None) -> Config:
    """`load_config_or_exit`; the config.yaml of a run directory means the run that lies there, wherever it was when
    the file was written."""
    run_dir = path.parent
    is_runs = path.name == CONFIG and any((run_dir / name).exists() for name in (CHECKPOINTS, INCARNATIONS, METRICS))
    is_told = any(override.startswith("run.dir=") for override in overrides)
    written = load_config_or_exit(path, overrides, world_size)
    if not is_runs or is_told or Path(written.run.dir).absolute() == run_dir.absolute():
        return written
    if is_rank_zero():
        print_line(
            f"{path}: this run was in {written.run.dir}, and has been copied or moved; it goes on where it lies, in "
            f"{run_dir}. To train in another place give run.dir=DIR",
            sys.stderr,
        )
    return written.model_copy(update={"run": written.run.model_copy(update={"dir": str(run_dir)})})


def open_run_directory(config: Config) -> IO[str] | None:
    """Makes the run directory, tries that it can be written, locks it against a second job, and notes the start.

    Every rank tries it, before anything is started: so all refuse together where one would. Nothing a finished run
    left there is changed yet.

    Returns:
        On rank 0 the lock; it is held as long as this file is open.

    Raises:
        UserError: it cannot be written, another job is training there, or jobs keep failing at the same step.
    """
    folder = Path(config.run.dir)
    try:
        (folder / CHECKPOINTS).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder / CHECKPOINTS):
            pass
        if not is_rank_zero():
            return None
        lock = _lock(folder / LOCK)
        note_last_end(folder)
        check_failures(folder, folder / METRICS, folder / FAILURE, config.health.max_failures)
        (folder / FAILURE).unlink(missing_ok=True)
        note_start(config)
        return lock
    except UserError:
        raise
    except (OSError, ValueError) as error:
        why = error_text(error) if isinstance(error, OSError) else str(error)
        raise UserError(
            f"run.dir = {config.run.dir!r}: cannot be written ({why}); choose another directory with run.dir=DIR"
        ) from None


def _lock(path: Path) -> IO[str]:
    file = open_own(path, "a+")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if restarts_the_newest(path.parent):  # SLURM has given the holder up; the fence keeps it from writing
            path.unlink()
            return _lock(path)
        file.seek(0)
        raise UserError(
            f"run.dir = {str(path.parent)!r}: another job is training there (process {file.read().strip() or '?'}); "
            "wait for it, end it, or choose another directory with run.dir=DIR"
        ) from None
    except OSError:
        return file  # a file system without locks
    file.truncate(0)
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file


def write_config(config: Config) -> None:
    """Writes the resolved configuration of the run that is about to train, atomically."""
    write_atomically(Path(config.run.dir) / CONFIG, dump_config(config).encode())


def replace_config(config: Config, start: int, step: int) -> None:
    """`write_config`; where another was there it is kept in `CONFIG_HISTORY`, under the start that replaced it and the
    updates that were done then."""
    folder = Path(config.run.dir)
    with contextlib.suppress(FileNotFoundError):
        before = read_bytes(folder / CONFIG, YAML_BYTES)
        if before == dump_config(config).encode():
            return
        (folder / CONFIG_HISTORY).mkdir(exist_ok=True)
        write_atomically(folder / CONFIG_HISTORY / f"before-start-{start:04d}-{step_name(step)}.yaml", before)
    write_config(config)


def clear_partial(run_dir: Path) -> list[str]:
    """Removes what saves that did not end have left; returns the names. Renamed first: another's rename to its final
    name then fails."""
    folder = run_dir / CHECKPOINTS
    found = sorted(path.name for path in folder.glob(".partial-*"))
    for remains in folder.glob(".partial-*"):
        with contextlib.suppress(OSError):
            remains.rename(remains.with_name(remains.name.replace(".partial", ".removed")))
    for removed in folder.glob(".removed-*"):
        shutil.rmtree(removed, ignore_errors=True)
    return found
