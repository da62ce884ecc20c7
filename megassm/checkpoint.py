"""Checkpoints: save, publish, find the newest complete one, rotate, load.

    RUN_DIR/checkpoints/step-00000100/
        manifest.json           what it is: step, config, data fingerprint, shape of the job, size of every file
        weights.safetensors     the whole model in float32: all that evaluation, sampling and export need
        state/                  DeepSpeed's shards: weights and optimizer moments, one part a rank

DeepSpeed moves its own `latest` file before all ranks have written, so that file is neither written nor read here.
A checkpoint is written under a hidden name, gets its manifest when every rank is done, and is then renamed:
it is complete or it does not exist. Everything else of a run is a pure function of the step.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from megassm.config import Config
from megassm.durable import sync, write_atomically
from megassm.errors import UserError
from megassm.model import LanguageModel
from megassm.parallel.engine import Engine
from megassm.parallel.world import barrier
from megassm.rundir import CHECKPOINTS

FORMAT = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights.safetensors"


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is; `identity` must be equal for a run to continue from it."""

    format: int
    step: int
    """Updates done."""
    tokens: int
    """Training tokens seen."""
    identity: dict[str, Any]
    config: dict[str, Any]
    files: dict[str, list[int]]
    """Size in bytes and CRC-32 of every file, by its path below the checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    manifest: Manifest

    @property
    def config(self) -> Config:
        """The configuration it was trained with."""
        try:
            return Config.model_validate_json(json.dumps(self.manifest.config))
        except ValidationError as error:
            knobs = ", ".join(".".join(map(str, problem["loc"])) for problem in error.errors())
            raise UserError(
                f"{self.folder / MANIFEST}: its configuration is not one of this version of megassm ({knobs}); use the "
                "version that wrote it"
            ) from None

    def load_model(self) -> LanguageModel:
        """The whole model, float32, on the CPU, in evaluation mode."""
        model = LanguageModel(self.config.model)
        path = self.folder / WEIGHTS
        try:
            model.load_state_dict(load_file(path))
        except Exception as error:  # safetensors raises its own type, torch a RuntimeError
            raise UserError(f"{path}: damaged weights ({error}); use another checkpoint of this run") from None
        model.reset_filters()
        return model.eval()


def checkpoints_folder(run_dir: Path) -> Path:
    return run_dir / CHECKPOINTS


def save_checkpoint(engine: Engine, config: Config, step: int, data_fingerprint: str) -> None:
    """Writes, publishes and rotates; every rank must call it. `step` updates are done."""
    folder = checkpoints_folder(Path(config.run.dir))
    partial = folder / f".partial-step-{step:08d}"
    if engine.world.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    barrier()
    engine.save_shards(partial)
    weights = engine.whole_weights()
    if engine.world.is_main:
        save_file(weights, partial / WEIGHTS)
        (partial / WEIGHTS).chmod(0o644)
        for script in partial.glob("zero_to_*.py"):
            script.unlink()  # DeepSpeed's converters: the weights are whole already
    barrier()  # every rank's shard is on disk
    if engine.world.is_main:
        identity = run_identity(config, engine.world.size, data_fingerprint)
        _publish(partial, folder / f"step-{step:08d}", _manifest(partial, config, step, identity))
        _rotate(folder, config.checkpoint.keep, newest=step)
    barrier()


def run_identity(config: Config, world_size: int, data_fingerprint: str) -> dict[str, Any]:
    """What must not change between a checkpoint and the run that continues it, by knob."""
    model = {f"model.{name}": value for name, value in config.model.model_dump(mode="json").items()}
    return model | {
        "run.seed": config.run.seed,
        "train.batch_sequences": config.train.batch_sequences,
        "data.isolate_documents": config.data.isolate_documents,
        "train.precision": config.train.precision,
        "parallel.zero_stage": config.parallel.zero_stage,
        "the number of ranks": world_size,
        "the data's fingerprint": data_fingerprint,
    }


def newest_checkpoint(run_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest complete checkpoint of a run, and why newer ones were passed over."""
    skipped: list[str] = []
    for folder in sorted(checkpoints_folder(run_dir).glob("step-*"), reverse=True):
        try:
            return read_checkpoint(folder, check_content=True), skipped
        except UserError as error:
            skipped.append(str(error))
    return None, skipped


def find_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint by its own folder, or a run's newest.

    Raises:
        UserError: there is none.
    """
    if (path / MANIFEST).exists():
        return read_checkpoint(path)
    checkpoint, skipped = newest_checkpoint(path)
    if checkpoint is None:
        why = f" ({'; '.join(skipped)})" if skipped else ""
        raise UserError(
            f"{path}: no complete checkpoint{why}; give a run directory (run.dir of its config) or one of its "
            "checkpoints/step-* folders"
        )
    return checkpoint


def read_checkpoint(folder: Path, check_content: bool = False) -> Checkpoint:
    """Reads the manifest and checks that every file is there in its size and, if asked, with its checksum.

    Raises:
        UserError: naming what is missing or damaged.
    """
    path = folder / MANIFEST
    try:
        manifest = Manifest(**json.loads(path.read_text(encoding="utf-8")))
        files = [(name, int(size), int(crc)) for name, (size, crc) in manifest.files.items()]
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not a checkpoint's manifest ({error})") from None
    if manifest.format != FORMAT:
        raise UserError(f"{path}: checkpoint format {manifest.format}, this version reads {FORMAT}")
    for name, size, crc in files:
        file = folder / name
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise UserError(f"{folder}: incomplete: {name} {state}; the manifest says {size}")
        if check_content and _crc32(file) != crc:
            raise UserError(f"{folder}: damaged: the checksum of {name} is not the manifest's")
    return Checkpoint(folder, manifest)


def check_identity(checkpoint: Checkpoint, identity: dict[str, Any]) -> None:
    """Refuses to continue a run from a checkpoint of another one.

    Raises:
        UserError: with every difference.
    """
    theirs = checkpoint.manifest.identity
    differences = [
        f"{name} is {_short(identity.get(name))}, the checkpoint has {_short(theirs.get(name))}"
        for name in sorted(theirs.keys() | identity.keys())
        if theirs.get(name) != identity.get(name)
    ]
    if differences:
        raise UserError(
            f"{checkpoint.folder}: cannot be continued by this run: {'; '.join(differences)}. "
            "Restore these, or start a new run with another run.dir"
        )


def _manifest(partial: Path, config: Config, step: int, identity: dict[str, Any]) -> Manifest:
    files = {
        str(file.relative_to(partial)): [file.stat().st_size, _crc32(file)]
        for file in sorted(partial.rglob("*"))
        if file.is_file()
    }
    tokens = step * config.tokens_per_step()
    return Manifest(FORMAT, step, tokens, identity, config.model_dump(mode="json"), files)


def _publish(partial: Path, final: Path, manifest: Manifest) -> None:
    for name in manifest.files:
        sync(partial / name)
    write_atomically(partial / MANIFEST, (json.dumps(asdict(manifest), indent=1) + "\n").encode())
    if final.exists():  # an incomplete folder of that name that resume passed over
        shutil.rmtree(final)
    partial.rename(final)
    sync(final.parent)


def _crc32(path: Path) -> int:
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 24):
            value = zlib.crc32(block, value)
    return value


def _rotate(folder: Path, keep: int, newest: int) -> None:
    """Removes the oldest complete checkpoints up to step `newest`; what is damaged or beyond it is left alone."""
    complete = []
    for path in sorted(folder.glob("step-*")):
        with contextlib.suppress(UserError):
            if read_checkpoint(path).manifest.step <= newest:
                complete.append(path)
    for old in complete[:-keep]:
        (old / MANIFEST).unlink()  # first: a folder half removed must not pass for complete
        shutil.rmtree(old)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 24 else f"{text[:16]}..."
