"""Saves checkpoints: written by all ranks, published whole, the oldest removed.

A checkpoint is written under a hidden name, gets its manifest when every rank's files are on disk, and is then
renamed: it is complete or it does not exist. The hidden name is the start's own (see `megassm.run.fence`), and the next
start removes it: what older ranks may still write can then not be published.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

from safetensors.torch import save_file

from megassm import __version__
from megassm.checkpoint.format import (
    FORMAT,
    MANIFEST,
    Manifest,
    _crc32,
    _key,
    read_checkpoint,
    run_identity,
)
from megassm.checkpoint.space import pinned, shortage
from megassm.cli.arguments import error_text
from megassm.config.schema import Config
from megassm.errors import UserError
from megassm.files import open_as_its_folder, sync, write_atomically
from megassm.model import parameter_shapes
from megassm.parallel.engine import Engine
from megassm.parallel.state import KINDS, MOMENTS
from megassm.parallel.world import gather_texts
from megassm.run.directory import CHECKPOINTS, checkpoint_folders, step_name
from megassm.run.fence import Fence
from megassm.run.opening import clear_partial


def save_checkpoint(engine: Engine, config: Config, step: int, data_fingerprint: str, fence: Fence) -> str | None:
    """Writes, publishes and rotates; every rank must call it. `step` updates are done.

    Returns:
        None, or why there is no new checkpoint (a full disk); what was there is untouched.

    Raises:
        SupersededError: on rank 0, where a newer start of the run has taken over.
    """
    folder = Path(config.run.dir) / CHECKPOINTS
    partial = folder / f".partial-{step_name(step)}-{fence.number:04d}"
    world = engine.world
    world.progress.note("checkpoint, beginning")
    if world.is_main:
        fence.check()
        clear_partial(Path(config.run.dir))
    if failure := gather_texts(_make(partial, config) if world.is_main else "")[0]:
        shutil.rmtree(partial, ignore_errors=True)
        return failure
    shares = [json.loads(text) for text in gather_texts(json.dumps(_write_share(engine, partial)))]
    world.progress.note("checkpoint, publication")
    failure = next((f"rank {rank}: {share}" for rank, share in enumerate(shares) if isinstance(share, str)), "")
    if world.is_main and not failure:
        files = {name: (facts[0], facts[1]) for share in shares for name, facts in share.items()}
        fence.check()
        try:
            _publish(partial, folder / step_name(step), _manifest(engine, config, step, data_fingerprint, files))
            _rotate(folder, config.checkpoint.keep, newest=step)
        except OSError as error:
            failure = error_text(error)
    if world.is_main and failure:
        shutil.rmtree(partial, ignore_errors=True)
    return gather_texts(failure)[0] or None


def _make(partial: Path, config: Config) -> str:
    """Makes the folder to write to; returns why no checkpoint can be written there, if none can."""
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
            return f"{partial.parent} is read-only ({error.strerror})"
        return error_text(error)
    return shortage(partial.parent, config)


def _write_share(engine: Engine, partial: Path) -> dict[str, list[int]] | str:
    """Writes this rank's parameters; returns size and checksum of its files, or what went wrong."""
    world = engine.world
    mine = _owned(engine, world.rank)

    def reading(name: str) -> bool:
        world.progress.note("checkpoint, reading state")
        return name in mine

    state = engine.read_state(KINDS, reading)
    world.progress.note("checkpoint, writing files")
    number = f"{world.rank + 1:05d}-of-{world.size:05d}"
    files = {}
    try:
        for title, kinds in (("weights", KINDS[:1]), ("moments", MOMENTS)):
            tensors = {_key(name, kind): state[name][kind].contiguous() for name in mine for kind in kinds}
            path = partial / f"{title}-{number}.safetensors"
            save_file(tensors, path)
            open_as_its_folder(path)
            sync(path)
            files[path.name] = [path.stat().st_size, _crc32(path)]
    except Exception as error:  # a full disk has several types: safetensors', RuntimeError, OSError
        return str(error) or type(error).__name__
    return files


def _owned(engine: Engine, rank: int) -> set[str]:
    """The parameters that `rank` writes: the largest first, each to the rank with the least so far."""
    loads = [0] * engine.world.size
    owned = set()
    sizes = {name: shape.numel() for name, shape in parameter_shapes(engine.config.model).items()}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        least = loads.index(min(loads))
        loads[least] += sizes[name]
        if least == rank:
            owned.add(name)
    return owned


def _manifest(
    engine: Engine, config: Config, step: int, data_fingerprint: str, files: dict[str, tuple[int, int]]
) -> Manifest:
    manifest = Manifest(
        format=FORMAT,
        step=step,
        tokens=step * config.tokens_per_step(),
        updates=engine.applied_updates,
        mesh=engine.shape,
        identity=run_identity(config, data_fingerprint),
        config=config.model_dump(mode="json"),
        files=files,
        version=__version__,
    )
    return replace(manifest, checksum=manifest.own_checksum())


def _publish(partial: Path, final: Path, manifest: Manifest) -> None:
    write_atomically(partial / MANIFEST, (json.dumps(asdict(manifest), indent=1) + "\n").encode())
    if final.exists():  # an incomplete folder of that name that resume passed over
        shutil.rmtree(final)
    partial.rename(final)
    sync(final.parent)


def _rotate(folder: Path, keep: int, newest: int) -> None:
    """Removes the oldest complete checkpoints up to step `newest`; what is damaged, pinned or beyond it stays."""
    complete, kept = [], pinned(folder)
    for path in checkpoint_folders(folder):
        with contextlib.suppress(UserError):
            if path not in kept and read_checkpoint(path).manifest.step <= newest:
                complete.append(path)
    for old in complete[:-keep]:
        (old / MANIFEST).unlink()  # first: a folder half removed must not pass for complete
        shutil.rmtree(old)
