"""Trained models in a store that the data plane knows (https, s3, ...): of a budget only what it needs is fetched.

What is fetched in part has no checksum to hold it against; it must be finite, of the shapes that the configuration
says, and of a file that was not replaced in the meantime.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from torch import Tensor

from megassm.checkpoint.exported import CONFIG, INDEX, INDEX_BYTES, SECTION, SUMS, WEIGHTS, name_in_file
from megassm.checkpoint.format import (
    AVERAGES,
    MANIFEST,
    MANIFEST_BYTES,
    NOTHING_HELD,
    Manifest,
    check_room,
    manifest_of,
    stored_config,
    tensor_key,
)
from megassm.checkpoint.format import WEIGHTS as CHECKPOINT_WEIGHTS
from megassm.checkpoint.ranges import Part, TensorFiles
from megassm.config.model import ModelConfig
from megassm.data.cache import local_copies
from megassm.data.dataset import TOKENIZER_NAMES, own_tokenizer
from megassm.data.tokenizer.base import Tokenizer, load_tokenizer
from megassm.errors import UserError
from megassm.guarded import LINE_BYTES, TOKENIZER_BYTES, parse_json, parse_object
from megassm.model import parameter_shapes
from megassm.run.directory import CHECKPOINTS, EVENTS, TOKENIZER, step_name

EVENTS_BYTES = 2**28
NO_AVERAGE = "has no running average beside its weights; leave out --ema"


class RemoteModel(Protocol):
    """A model in a store; `weights` as of `megassm.checkpoint.format.StoredModel`."""

    def model_config(self) -> ModelConfig: ...

    def weights(
        self, k: int | None = None, held: Mapping[str, Tensor] = NOTHING_HELD
    ) -> Iterator[tuple[str, Tensor]]: ...

    def tokenizer(self) -> Tokenizer: ...


@dataclass(frozen=True)
class RemoteFolder:
    """An exported model (`megassm.checkpoint.exported`)."""

    files: TensorFiles
    config: ModelConfig

    def model_config(self) -> ModelConfig:
        names = {WEIGHTS} if self._index is None else set(self._index.values())
        try:
            size = sum(self.files.tensor_bytes(name) for name in names)
        except FileNotFoundError as missing:
            raise UserError(f"{self.files.place}: {missing} is missing; export the model again") from None
        check_room(f"{self.files.place}/{CONFIG}", self.config, size, bytes_each=2)  # bfloat16
        return self.config

    def weights(self, k: int | None = None, held: Mapping[str, Tensor] = NOTHING_HELD) -> Iterator[tuple[str, Tensor]]:
        """See `StoredModel`."""
        yield from _weights(self.files, self._file_of, self._key, self.config, k, held)

    def _key(self, name: str) -> str:
        return name_in_file(name, self.config)

    @cached_property
    def _index(self) -> Mapping[str, str] | None:
        """The file by tensor; None where there is one for all."""
        try:
            self.files.keys(WEIGHTS)
            return None
        except FileNotFoundError:
            place = f"{self.files.place}/{INDEX}"
            try:
                files = parse_json(self.files.read(INDEX, INDEX_BYTES), place)["weight_map"]
                return {key: _plain(name) for key, name in files.items()}
            except (FileNotFoundError, AttributeError, KeyError, TypeError, ValueError):
                raise UserError(f"{self.files.place}: has no {WEIGHTS}, nor an {INDEX} of its parameters") from None

    @property
    def _file_of(self) -> Mapping[str, str]:
        """The file by parameter."""
        names, index = parameter_shapes(self.config), self._index
        if index is None:
            return dict.fromkeys(names, WEIGHTS)
        return {name: index[self._key(name)] for name in names if self._key(name) in index}

    def tokenizer(self) -> Tokenizer:
        return _tokenizer(self.files.path, _listed(self.files))


@dataclass(frozen=True)
class RemoteCheckpoint:
    """A checkpoint (`megassm.checkpoint.format`)."""

    files: TensorFiles
    manifest: Manifest
    run: str
    """The path or URL of its run."""
    averaged: bool = False
    """Its weights are their running average."""

    def model_config(self) -> ModelConfig:
        place = f"{self.files.place}/{MANIFEST}"
        config = stored_config(self.manifest, place).model
        size = sum(size for name, (size, _) in self.manifest.files.items() if name.startswith(CHECKPOINT_WEIGHTS))
        check_room(place, config, size, bytes_each=4)
        return config

    def weights(self, k: int | None = None, held: Mapping[str, Tensor] = NOTHING_HELD) -> Iterator[tuple[str, Tensor]]:
        """See `StoredModel`."""
        kind = AVERAGES if self.averaged else CHECKPOINT_WEIGHTS
        names = [name for name in self.manifest.files if name.startswith(kind)]
        try:
            place = {key: name for name in names for key in self.files.keys(name)}
        except FileNotFoundError as missing:
            raise UserError(f"{self.files.place}: incomplete: {missing} is missing; use another checkpoint") from None
        config = self.model_config()
        file_of = {name: place[self._key(name)] for name in parameter_shapes(config) if self._key(name) in place}
        yield from _weights(self.files, file_of, self._key, config, k, held)

    def _key(self, name: str) -> str:
        return tensor_key(name, "ema" if self.averaged else "weight")

    def tokenizer(self) -> Tokenizer:
        return _tokenizer(f"{self.run}/{TOKENIZER}", None)


def open_remote(path: str, averaged: bool = False) -> RemoteModel:
    """What a URL leads to: an exported model, a checkpoint, or a run, of which the newest checkpoint counts.

    With `averaged` its weights are their running average.

    Raises:
        UserError: none of these, or it has no average.
    """
    files = TensorFiles(path)
    for name, limit in ((CONFIG, LINE_BYTES), (MANIFEST, MANIFEST_BYTES), (EVENTS, EVENTS_BYTES)):
        try:
            raw = files.read(name, limit)
        except FileNotFoundError:
            continue
        if name == CONFIG:
            if averaged:
                raise UserError(f"{files.place}: {NO_AVERAGE}")
            return RemoteFolder(files, _exported_config(raw, f"{files.place}/{name}"))
        if name == MANIFEST:
            run = _child(path, "..", "..")
            return _with_average(RemoteCheckpoint(files, manifest_of(raw, f"{files.place}/{name}"), run), averaged)
        return _with_average(_newest_checkpoint(path, raw), averaged)
    raise UserError(
        f"{files.place}: no trained model there: neither {CONFIG} (an exported model), {MANIFEST} (a checkpoint) nor "
        f"{EVENTS} (a run); correct the address"
    )


def _with_average(checkpoint: RemoteCheckpoint, averaged: bool) -> RemoteCheckpoint:
    if averaged and not any(name.startswith(AVERAGES) for name in checkpoint.manifest.files):
        raise UserError(f"{checkpoint.files.place}: {NO_AVERAGE}")
    return replace(checkpoint, averaged=averaged)


def _newest_checkpoint(path: str, events: bytes) -> RemoteCheckpoint:
    """A run's, by what its events say it has saved: a server need not list its folders."""
    told = (parse_object(line) for line in events.splitlines())
    steps = {event.get("step") for event in told if event is not None and event.get("kind") == "checkpoint"}
    for step in sorted((step for step in steps if isinstance(step, int) and step >= 0), reverse=True):
        files = TensorFiles(_child(path, CHECKPOINTS, step_name(step)))
        try:
            raw = files.read(MANIFEST, MANIFEST_BYTES)
        except FileNotFoundError:  # removed since
            continue
        return RemoteCheckpoint(files, manifest_of(raw, f"{files.place}/{MANIFEST}"), path)
    raise UserError(f"{TensorFiles(path).place}: its {EVENTS} tells of no checkpoint that is there; give a checkpoint")


def _weights(
    files: TensorFiles,
    file_of: Mapping[str, str],
    key_of: Callable[[str], str],
    config: ModelConfig,
    k: int | None,
    held: Mapping[str, Tensor],
) -> Iterator[tuple[str, Tensor]]:
    whole, wanted = parameter_shapes(config), parameter_shapes(config if k is None else config.cut(k))
    by_file: dict[str, dict[str, Part]] = defaultdict(dict)
    for name, shape in wanted.items():
        if name in held and held[name].shape == shape:
            continue
        if name not in file_of:
            raise UserError(f"{files.place}: has no {name}; export the model again")
        part = Part(key_of(name), tuple(whole[name]), tuple(shape), _rows(held.get(name), shape))
        by_file[file_of[name]][name] = part
    for file, parts in by_file.items():
        try:
            fetched = files.fetch(file, list(parts.values()))
        except FileNotFoundError:
            raise UserError(f"{files.place}: {file} is missing; export the model again") from None
        for name, part in parts.items():
            values = fetched.pop(part.key)
            if not bool(torch.isfinite(values).all()):
                raise UserError(f"{files.place}/{file}: {name} is not finite; export it again")
            yield name, torch.cat((held[name], values.to(held[name]))) if part.first else values.float()


def _rows(held: Tensor | None, shape: torch.Size) -> int:
    """Leading rows of a parameter that need not be fetched."""
    return len(held) if held is not None and held.shape[1:] == shape[1:] else 0


def _exported_config(raw: bytes, place: str) -> ModelConfig:
    try:
        return ModelConfig.model_validate_json(json.dumps(parse_json(raw, place)[SECTION]["model"]))
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise UserError(f"{place}: not an exported model ({type(error).__name__}: {error})") from None


def _tokenizer(path: str, names: list[str] | None) -> Tokenizer:
    """From a folder that holds it: `names` are the files there are, None where that is not known."""
    files, kept = TensorFiles(path), {}
    for name in TOKENIZER_NAMES if names is None else names:
        try:
            kept[name] = files.read(name, TOKENIZER_BYTES)
        except FileNotFoundError:
            continue
    return load_tokenizer(own_tokenizer(local_copies(kept)))


def _listed(files: TensorFiles) -> list[str] | None:
    """Those of the tokenizer's files that an exported model's checksums name: some servers deny what is not there."""
    try:
        lines = files.read(SUMS, LINE_BYTES).decode(errors="replace").splitlines()
    except FileNotFoundError:
        return None
    return [name for name in TOKENIZER_NAMES if any(line.endswith(f"  {name}") for line in lines)]


def _plain(name: Any) -> str:
    """ValueError if it is not the name of a file of the same folder."""
    if not isinstance(name, str) or not name or "/" in name or name.startswith("."):
        raise ValueError(name)
    return name


def _child(path: str, *names: str) -> str:
    """A folder below a URL, or above it for "..", whose query and fragment stay."""
    from urllib.parse import urlsplit, urlunsplit

    parts = urlsplit(path)
    folders = parts.path.rstrip("/").split("/")
    for name in names:
        folders = folders[:-1] if name == ".." else [*folders, name]
    return urlunsplit(parts._replace(path="/".join(folders)))
