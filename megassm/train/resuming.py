"""The checkpoint that a run goes on from: found, checked by all ranks together, read by each in parts."""

from __future__ import annotations

import json
from pathlib import Path

from megassm.checkpoint.format import (
    Checkpoint,
    check_sum,
    checkpoint_of_run,
    read_manifest,
)
from megassm.checkpoint.identity import check_identity, run_identity
from megassm.checkpoint.tensors import CheckedTensor, tensors_of
from megassm.config.schema import Config
from megassm.errors import UserError
from megassm.parallel.background import in_background
from megassm.parallel.engine import Engine
from megassm.parallel.state import AVERAGE, Kind
from megassm.parallel.waiting import wait_for_all
from megassm.parallel.world import World, gather_texts
from megassm.run.directory import CHECKPOINTS, checkpoint_folders
from megassm.run.events import Events


def checkpoint_to_continue(config: Config, data_fingerprint: str, events: Events, world: World) -> Checkpoint | None:
    """The newest complete checkpoint of the run, whatever mesh wrote it; None for a new run. All ranks call it.

    Raises:
        UserError: it is another run's, or there are checkpoints and none can be continued.
    """
    checkpoint, skipped = _newest_whole(config, world)
    for reason in skipped:
        events.add("passed over", checkpoint.manifest.step if checkpoint else 0, f"passed over a checkpoint: {reason}")
    if checkpoint is None and skipped:
        raise UserError(
            f"{config.run.dir}: has checkpoints, but none that can be continued; move them away to start from the "
            "beginning, or choose another run.dir"
        )
    if checkpoint is not None:
        check_identity(checkpoint, run_identity(config, data_fingerprint))
    return checkpoint


def _newest_whole(config: Config, world: World) -> tuple[Checkpoint | None, list[str]]:
    """(the newest checkpoint that is undamaged, why newer ones were passed over), alike on all ranks.

    Rank 0 looks what there is; each rank reads the manifest, and the files that are its share for their checksums.
    """
    folder, skipped = Path(config.run.dir) / CHECKPOINTS, list[str]()
    found = [path.name for path in reversed(checkpoint_folders(folder))] if world.is_main else []
    for name in json.loads(gather_texts(json.dumps(found))[0]):
        why = ""
        try:
            at = folder / name
            checkpoint = checkpoint_of_run(at, to_continue=True) if world.is_main else read_manifest(at)
        except UserError as error:
            why = str(error)
        why = _first(why) or _first(_damage(checkpoint, config, world))
        if not why:
            return checkpoint, skipped
        skipped.append(why)
    return None, skipped


def _first(why: str) -> str:
    """Of all ranks' reasons; empty where none has one."""
    return next(filter(None, gather_texts(why)), "")


def _damage(checkpoint: Checkpoint, config: Config, world: World) -> str:
    """What is wrong with the files that are this rank's share."""
    read, limit = 0, config.parallel.timeout_s

    def headway(count: int) -> None:
        nonlocal read
        read += count

    def check() -> str:
        try:
            for name in sorted(checkpoint.manifest.files)[world.rank :: world.size]:
                check_sum(checkpoint, name, headway)
        except UserError as error:
            return str(error)
        return ""

    work = in_background(check)
    if stuck := wait_for_all(world, work, "checking the checkpoint", lambda: read, limit):
        raise UserError(
            f"{checkpoint.folder}: the disk has given nothing to rank {', '.join(map(str, stuck[:8]))} for "
            f"parallel.timeout_s = {limit} seconds; see to the disk, and start again"
        )
    return work.result()


def restore(engine: Engine, checkpoint: Checkpoint, events: Events) -> int:
    """Loads a checkpoint; returns how many updates are done. All ranks call it."""
    manifest, find = checkpoint.manifest, tensors_of(checkpoint)
    begins = AVERAGE in engine.kinds and not checkpoint.has_average

    def source(name: str, kind: Kind) -> CheckedTensor:
        engine.world.progress.note("reading the checkpoint")
        return find(name, "weight" if begins and kind == AVERAGE else kind)

    engine.write_state(source, manifest.updates)
    other = "" if engine.shape == manifest.mesh else f", written by {manifest.mesh} and continued by {engine.shape}"
    if begins:
        other += "; the running average of the weights begins here"
    events.add("resume", manifest.step, f"continuing after step {manifest.step} from {checkpoint.folder}{other}")
    return manifest.step
