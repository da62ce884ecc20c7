"""What a model is scored on: its own validation set, other prepared sets, plain text tokenized on the fly."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megassm.config.schema import Config
from megassm.data.dataset import VALID, Dataset, open_dataset, run_tokenizer
from megassm.data.order import epoch_samples
from megassm.data.prepare.documents import ReadCounts, read_documents
from megassm.data.prepare.inputs import find_inputs
from megassm.data.prepare.source import TextSource
from megassm.data.stream import NO_SAMPLE, MicroBatch, StreamPlan, validation_batches
from megassm.data.tokenizer.base import Tokenizer, load_tokenizer
from megassm.errors import UserError, without_secrets


@dataclass(frozen=True)
class EvalText:
    """A text to score."""

    name: str
    read: Callable[[StreamPlan, int], Iterator[MicroBatch]]
    """(plan, N) -> one rank's share of the first N sequences, fewer where the text holds fewer; every rank gets
    equally many micro-batches."""


def open_texts(
    config: Config, sources: Sequence[str], glob: str | None = None, kept: Path | None = None
) -> tuple[list[EvalText], Tokenizer]:
    """The texts to score a run on, in its tokenizer's ids.

    Args:
        config: the run's.
        sources: prepared data sets (their validation part), files and folders of text; none: the run's own set.
        glob: which files of a folder are text.
        kept: a folder with the run's tokenizer, for where its data is gone.

    Raises:
        UserError: a source is missing, empty, or was prepared with another tokenizer.
    """
    if not sources:
        own = open_dataset(config)
        return [_prepared(config.data.path or ", ".join(config.data.sources), own)], own.tokenizer
    sets = {path: _open_set(config, path) for path in sources if not is_plain_text(path)}
    tokenizer = _tokenizer(config, list(sets.values()), kept)
    texts = []
    for path in sources:
        if path not in sets:
            texts.append(EvalText(path, _plain_text(Path(path), glob, tokenizer)))
            continue
        if sets[path].tokenizer.sha256 != tokenizer.sha256:
            raise UserError(
                f"--data {without_secrets(path)}: was prepared with tokenizer {sets[path].tokenizer.name}, another one "
                f"than the run's {tokenizer.name}; prepare it with the run's, or give the text itself"
            )
        texts.append(_prepared(without_secrets(path), sets[path]))
    return texts, tokenizer


def is_plain_text(path: str) -> bool:
    """Whether --data names text, and not a prepared data set."""
    return "://" not in path and not (Path(path) / VALID).is_dir()


def token_batches(ids_N: npt.NDArray[np.int64], eod: int, plan: StreamPlan, sequences: int) -> Iterator[MicroBatch]:
    """One rank's share of the first `sequences` samples of N ids: each of seq_len + 1 ids, at stride seq_len.

    The same samples, masks and division over ranks as `validation_batches` makes of a prepared set.
    """
    stop = min(sequences, epoch_samples(len(ids_N), plan.seq_len))
    together = plan.micro_batch_sequences * plan.world_size
    for first in range(0, stop, together):
        samples = np.arange(first + plan.rank, first + together, plan.world_size)
        batch = MicroBatch(
            np.full((len(samples), plan.seq_len + 1), eod, dtype=np.int64),
            np.zeros((len(samples), plan.seq_len), dtype=np.bool_),
            np.where(samples < stop, samples, NO_SAMPLE),
        )
        for row, sample in enumerate(samples[samples < stop].tolist()):
            part = ids_N[sample * plan.seq_len : (sample + 1) * plan.seq_len + 1]
            batch.ids_BT[row, : len(part)] = part
            batch.mask_BL[row, : len(part) - 1] = True
        yield batch


def _prepared(name: str, data: Dataset) -> EvalText:
    return EvalText(name, lambda plan, sequences: validation_batches(data.valid, plan, sequences))


def _open_set(config: Config, path: str) -> Dataset:
    one_set: dict[str, Any] = {"path": path, "sources": {}, "phases": (), "tokenizer": None}
    data = config.data.model_copy(update=one_set)
    return open_dataset(config.model_copy(update={"data": data}))


def _tokenizer(config: Config, sets: Sequence[Dataset], kept: Path | None) -> Tokenizer:
    """The run's own; where its data is not here, that of the first prepared set."""
    if kept is not None and kept.is_dir():
        return run_tokenizer(config, kept)
    if config.data.tokenizer is not None:
        return load_tokenizer(config.data.tokenizer)
    try:
        return open_dataset(config).tokenizer
    except UserError as error:
        if sets:
            return sets[0].tokenizer
        raise UserError(
            f"the run's tokenizer lies with its data, which cannot be opened ({error}); bring that back, or give a "
            "set prepared with the same tokenizer as another --data"
        ) from None


def _plain_text(path: Path, glob: str | None, tokenizer: Tokenizer) -> Callable[..., Iterator[MicroBatch]]:
    if path.is_dir() and (path / "index.json").exists():
        raise UserError(f"--data {path}: is one part of a prepared set; give the folder that holds {VALID}/")
    source = TextSource((path,), glob)
    ids = []
    for document in read_documents(source, find_inputs(source).files, ReadCounts()):
        ids += [*tokenizer.encode([document]), np.array([tokenizer.eod])]
    ids_N = np.concatenate(ids) if ids else np.empty(0, dtype=np.int64)
    if len(ids_N) < 2:
        raise UserError(f"--data {path}: holds no text; give text files, .jsonl, or a prepared data set")
    return lambda plan, sequences: token_batches(ids_N, tokenizer.eod, plan, sequences)
