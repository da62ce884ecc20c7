"""Checkpoints as they lie on disk: what one holds, how it is found, checked and read.

    RUN_DIR/checkpoints/step-00000100/
        manifest.json                         what it is: step, config, data fingerprint, size, checksum of every file
        weights-00001-of-00002.safetensors    float32: all that evaluation, sampling and export need
        moments-00001-of-00002.safetensors    AdamW's: NAME.exp_avg, NAME.exp_avg_sq
        average-00001-of-00002.safetensors    where optim.ema is set, the weights' running average: NAME.ema

A milestone (`checkpoint.keep_weights_every`) that rotation has come to lacks the moments, in its manifest too: it can
be evaluated and exported, not continued.

Every tensor is whole, whatever mesh and ZeRO stage it was trained on (`megassm.parallel.state`); the ranks divide the
parameters among themselves and each writes its own files. So a run continues on any number of ranks, and a tool
needs one process. Everything else of a run is a pure function of the step.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from torch import Tensor

from megassm import __version__
from megassm.checkpoint.tensor_file import leading
from megassm.config.model import ModelConfig
from megassm.config.schema import Config
from megassm.cost import parameters
from megassm.errors import UserError
from megassm.files import open_given
from megassm.guarded import as_tensors, check_inside, open_tensors, parse_json, read_bytes, validated
from megassm.model import LanguageModel, assembled, parameter_shapes
from megassm.parallel.state import Kind
from megassm.run.directory import CHECKPOINTS, TOKENIZER, checkpoint_folders, step_name

FORMAT = 3
MANIFEST = "manifest.json"
MANIFEST_BYTES = 2**24
AGAIN = "use another checkpoint or model"
WEIGHTS, MOMENTS, AVERAGES = "weights", "moments", "average"
"""How files begin, by what they hold."""
TENSORS = re.compile(rf"({WEIGHTS}|{MOMENTS}|{AVERAGES})-\d{{5,9}}-of-\d{{5,9}}\.safetensors")

NOTHING_HELD: Mapping[str, Tensor] = MappingProxyType({})


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint is; `identity` must be equal for a run to continue from it (`megassm.checkpoint.identity`)."""

    format: int
    step: int
    """Updates done."""
    tokens: int
    """Training tokens seen."""
    updates: int
    """Updates that changed the weights: steps but for those skipped."""
    mesh: dict[str, int]
    """Ranks along each axis, and the ZeRO stage, that it was written by; it can be continued by others."""
    identity: dict[str, Any]
    config: dict[str, Any]
    files: dict[str, tuple[int, int]]
    """Size in bytes and CRC-32 of every file, by its path below the checkpoint."""
    version: str = ""
    """Of megassm, that wrote it; older ones do not say."""
    checksum: int = 0
    """CRC-32 of all the above."""

    def own_checksum(self) -> int:
        return checksum_of(asdict(self))


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    manifest: Manifest
    averaged: bool = False
    """Its `weights` are their running average."""

    @property
    def title(self) -> str:
        return f"step {self.manifest.step}{', running average' if self.averaged else ''}"

    @property
    def has_moments(self) -> bool:
        """Whether a run can be continued from it; a milestone may have its weights alone."""
        return self._has(MOMENTS)

    @property
    def has_average(self) -> bool:
        return self._has(AVERAGES)

    def _has(self, kind: str) -> bool:
        return any(name.startswith(kind) for name in self.manifest.files)

    @property
    def kept_tokenizer(self) -> Path:
        """A folder of the run directory; older runs have none."""
        return self.folder.parent.parent / TOKENIZER

    @property
    def config(self) -> Config:
        """The configuration it was trained with."""
        return stored_config(self.manifest, self.folder / MANIFEST)

    def model_config(self) -> ModelConfig:
        size = sum(size for name, (size, _) in self.manifest.files.items() if name.startswith("weights"))
        check_room(self.folder / MANIFEST, self.config.model, size, bytes_each=4)
        return self.config.model

    def weights(self, k: int | None = None, held: Mapping[str, Tensor] = NOTHING_HELD) -> Iterator[tuple[str, Tensor]]:
        """See `StoredModel`."""
        config, stored = self.model_config(), self.stored()
        whole = parameter_shapes(config)
        for name, shape in parameter_shapes(config if k is None else config.cut(k)).items():
            if name in held and held[name].shape == shape:
                continue
            key = tensor_key(name, "ema" if self.averaged else "weight")
            with as_tensors(self.folder, AGAIN):
                part = leading(stored(key), key, whole[name], shape)
            self.check_values(part, key)
            yield name, part

    def stored(self) -> Callable[[str], Any]:
        """The open file that a tensor is in, by the tensor's key."""
        files: list[Any] = [open_tensors(self.folder / name, AGAIN) for name in self.manifest.files]
        place = {key: file for file in files for key in file.keys()}  # noqa: SIM118

        def file_of(key: str) -> Any:
            if key not in place:
                raise UserError(f"{self.folder}: has no {key}; {AGAIN}")
            return place[key]

        return file_of

    def check_values(self, tensor: Tensor, key: str) -> None:
        """UserError where a part of a tensor is not float32, or not finite."""
        if tensor.dtype != torch.float32 or not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{self.folder}: {key} is {tensor.dtype}, or not finite; {AGAIN}")


class StoredModel(Protocol):
    """A trained model on disk: a checkpoint, or an exported folder."""

    def model_config(self) -> ModelConfig:
        """The whole model's.

        Raises:
            UserError: it is not one of this version.
        """

    def weights(self, k: int | None = None, held: Mapping[str, Tensor] = NOTHING_HELD) -> Iterator[tuple[str, Tensor]]:
        """(name, float32 values) of every parameter, as `initial_weights` yields them; with `k` cut to that budget, of
        which alone is read. Of `held`, leading parts that were read before, those that are whole are left out.

        Raises:
            UserError: damaged files, or of another model.
        """


def load_model(stored: StoredModel, k: int | None = None) -> LanguageModel:
    """The model, float32, on the CPU, in evaluation mode: whole, or cut to `k`.

    Raises:
        UserError: a budget out of range, damaged files, or of another model.
    """
    config = stored.model_config()
    return assembled(config if k is None else config.cut(k), stored.weights(k)).eval()


def check_room(place: object, config: ModelConfig, size: int, bytes_each: float) -> None:
    """UserError if files of `size` bytes are too small for a model, before one of its size is made."""
    least = int(bytes_each * parameters(config, config.num_channels))
    if size < least:
        raise UserError(f"{place}: says a model of {least:,} bytes at least, its weights have {size:,}; {AGAIN}")


def tensor_key(name: str, kind: Kind) -> str:
    return name if kind == "weight" else f"{name}.{kind}"


def newest_checkpoint(
    run_dir: Path, check: str | None = "", to_continue: bool = False
) -> tuple[Checkpoint | None, list[str]]:
    """The newest complete checkpoint of a run, and why newer ones were passed over; `check` as in `read_checkpoint`.

    With `to_continue` it is one that a run can go on from.
    """
    skipped: list[str] = []
    for folder in reversed(checkpoint_folders(run_dir / CHECKPOINTS)):
        try:
            return checkpoint_of_run(folder, check, to_continue), skipped
        except UserError as error:
            skipped.append(str(error))
    return None, skipped


def checkpoint_of_run(folder: Path, check: str | None = None, to_continue: bool = False) -> Checkpoint:
    """As `read_checkpoint`; it must be of the step that its folder is named by, and whole if a run shall go on from it.

    Raises:
        UserError: it is not.
    """
    found = read_checkpoint(folder, check)
    if folder.name != step_name(found.manifest.step):
        raise UserError(f"{folder}: holds step {found.manifest.step}: not this run's, or renamed by hand")
    if to_continue and not found.has_moments:
        raise UserError(f"{folder}: a milestone: it has the weights alone, and cannot be continued")
    return found


def find_checkpoint(path: Path, averaged: bool = False) -> Checkpoint:
    """A checkpoint by its own folder, or a run's newest, for its weights; `averaged`: for their running average.

    Raises:
        UserError: there is not a complete checkpoint, or it has no average.
    """
    return with_average(_find(path, AVERAGES)) if averaged else _find(path, WEIGHTS)


def with_average(checkpoint: Checkpoint) -> Checkpoint:
    """The same, with the running average of the weights for the weights.

    Raises:
        UserError: it has none.
    """
    if not checkpoint.has_average:
        raise UserError(
            f"{checkpoint.folder}: has no running average of the weights; leave out --ema, or train with optim.ema"
        )
    return replace(checkpoint, averaged=True)


def _find(path: Path, check: str) -> Checkpoint:
    if (path / MANIFEST).exists():
        return read_checkpoint(path, check)
    checkpoint, skipped = newest_checkpoint(path, check)
    if checkpoint is None:
        why = f" ({'; '.join(skipped)})" if skipped else ""
        raise UserError(
            f"{path}: no complete checkpoint{why}; give a run directory (run.dir of its config) or one of its "
            "checkpoints/step-* folders"
        )
    return checkpoint


def read_checkpoint(folder: Path, check: str | None = None) -> Checkpoint:
    """Reads the manifest and checks that every file is there in its size, and the checksums of those named `check`*.

    Raises:
        UserError: naming what is missing or damaged.
    """
    checkpoint = read_manifest(folder)
    for name, (size, _) in checkpoint.manifest.files.items():
        file = folder / name
        check_inside(file, folder)
        found = file.stat().st_size if file.is_file() else None
        if found != size:
            state = "is missing" if found is None else f"has {found} bytes"
            raise UserError(f"{folder}: incomplete: {name} {state}; the manifest says {size}")
        if check is not None and name.startswith(check):
            check_sum(checkpoint, name)
    return checkpoint


def check_sum(checkpoint: Checkpoint, name: str, read: Callable[[int], None] = lambda count: None) -> None:
    """Reads a file, and tells `read` how many bytes, as they are.

    Raises:
        UserError: its checksum is not the manifest's.
    """
    if _crc32(checkpoint.folder / name, read) != checkpoint.manifest.files[name][1]:
        raise UserError(f"{checkpoint.folder}: damaged: the checksum of {name} is not the manifest's")


def read_manifest(folder: Path) -> Checkpoint:
    """A checkpoint whose manifest is whole; its files are not looked at.

    Raises:
        UserError: there is none, it is damaged, or names what no checkpoint has.
    """
    path = folder / MANIFEST
    try:
        manifest = manifest_of(read_bytes(path, MANIFEST_BYTES, AGAIN), path)
    except FileNotFoundError:
        raise UserError(f"{path}: not there: {folder} is not a complete checkpoint") from None
    return Checkpoint(folder, manifest)


def manifest_of(raw: bytes, path: object) -> Manifest:
    """What a manifest of these bytes says.

    Raises:
        UserError: it is damaged, of another version, or names files that are no checkpoint's.
    """
    facts = parse_json(raw, path, AGAIN)
    manifest = validated(Manifest, facts, path, AGAIN)
    if manifest.format != FORMAT:
        raise UserError(f"{path}: checkpoint format {manifest.format}, this version reads {FORMAT}")
    if manifest.checksum != checksum_of(facts):  # of what is written there, facts of other versions included
        raise UserError(f"{path}: damaged: its checksum is not that of what it says")
    for name in manifest.files:
        if not TENSORS.fullmatch(name):
            raise UserError(f"{path}: names the file {name[:200]!r}, which is not a checkpoint's; it is not opened")
    return manifest


def stored_config(manifest: Manifest, path: object) -> Config:
    """The configuration that a checkpoint was trained with; UserError if this version does not know it."""
    try:
        return Config.model_validate_json(json.dumps(manifest.config))
    except ValidationError as error:
        knobs = ", ".join(".".join(map(str, problem["loc"])) for problem in error.errors())
        wrote = f"megassm {manifest.version}" if manifest.version else "the version that wrote it"
        raise UserError(
            f"{path}: its configuration is not one of this version of megassm, {__version__} ({knobs}); use {wrote}"
        ) from None


def _crc32(path: Path, read: Callable[[int], None] = lambda count: None) -> int:
    value = 0
    try:
        with open_given(path) as file:
            while block := file.read(1 << 24):
                value = zlib.crc32(block, value)
                read(len(block))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    return value


def checksum_of(facts: dict[str, Any]) -> int:
    """CRC-32 of what a manifest says, its own checksum apart."""
    return zlib.crc32(json.dumps(facts | {"checksum": None}, sort_keys=True).encode())
