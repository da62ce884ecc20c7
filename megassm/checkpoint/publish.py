"""A checkpoint's folder while it is made, when it is published, and when newer ones take its place."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from megassm.checkpoint.format import MANIFEST, MOMENTS, Checkpoint, Manifest, read_checkpoint
from megassm.checkpoint.space import pinned, shortage
from megassm.cli.arguments import error_text
from megassm.config.schema import Config
from megassm.errors import UserError
from megassm.files import commit, open_temporary, sync, write_atomically
from megassm.run.directory import checkpoint_folders


def make(partial: Path, config: Config) -> str:
    """Makes the folder to write to; returns why no checkpoint can be written there, if none can."""
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return f"{partial.parent} is read-only ({error.strerror})"
        return error_text(error)
    return shortage(partial.parent, config)


def _as_json(manifest: Manifest) -> bytes:
    return (json.dumps(asdict(manifest), indent=1) + "\n").encode()


def publish(partial: Path, final: Path, manifest: Manifest) -> None:
    write_atomically(partial / MANIFEST, _as_json(manifest))
    if final.exists():  # an incomplete folder of that name that resume passed over
        shutil.rmtree(final)
    partial.rename(final)
    sync(final.parent)


def rotate(folder: Path, config: Config, newest: int) -> None:
    """Removes the oldest complete checkpoints up to step `newest`, of milestones the moments; what is damaged, pinned
    or beyond it stays."""
    complete, kept = [], pinned(folder)
    for path in checkpoint_folders(folder):
        with contextlib.suppress(UserError):
            found = read_checkpoint(path)
            if not found.has_moments:
                _remove_moments(path)  # of a milestone; a kill may have left some
            elif path not in kept and found.manifest.step <= newest:
                complete.append(found)
    for old in complete[: -config.checkpoint.keep]:
        if config.is_milestone(old.manifest.step):
            _keep_weights(old)
            continue
        (old.folder / MANIFEST).unlink()  # first: a folder half removed must not pass for complete
        shutil.rmtree(old.folder)


def _keep_weights(checkpoint: Checkpoint) -> None:
    """Leaves a milestone without its moments; it is complete at every moment, first with them, then without."""
    path, before = checkpoint.folder / MANIFEST, checkpoint.manifest
    files = {name: facts for name, facts in before.files.items() if not name.startswith(MOMENTS)}
    after = replace(before, files=files)
    written = path.stat()
    with open_temporary(path) as file:
        file.write(_as_json(replace(after, checksum=after.own_checksum())))
        file.flush()
        os.utime(file.name, ns=(written.st_atime_ns, written.st_mtime_ns))  # what was measured of it stays measured
        commit(file, path)
    _remove_moments(checkpoint.folder)


def _remove_moments(folder: Path) -> None:
    for path in folder.glob(f"{MOMENTS}-*"):
        path.unlink()
