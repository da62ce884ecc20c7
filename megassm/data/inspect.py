"""What a run has read, or will read, as text: any sample, from the configuration alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megassm.config.schema import Config
from megassm.data.dataset import open_dataset
from megassm.data.skipped import LeftOut, batch_of, step_of
from megassm.data.stream import StreamPlan, TokenStream
from megassm.data.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class SampleText:
    """One sequence of a global batch."""

    sample: int
    """Global sample number; batch b of the order, from 0, has those from b * batch on."""
    update: int | None
    """Which update reads it, from 1; None where the run passes it over."""
    source: str
    epoch: int
    number: int
    """Its place in the epoch's virtual stream."""
    blocks: list[str]
    """Where its tokens lie: file and offset of each block."""
    tokens: int
    """Ids, of which all but the first are predicted; 0 where a damaged block masks it."""
    documents: list[str]
    """The text, cut where documents end. A character that is cut by the sequence's end shows as U+FFFD."""
    ends_document: bool
    """Whether the last of `documents` ends here."""


def samples_of_update(config: Config, update: int, left_out: Sequence[LeftOut] = ()) -> range:
    """The global batch of an update, as metrics.jsonl counts them: the first is 1."""
    size, batch = config.train.batch_sequences, batch_of(left_out, update - 1)
    return range(batch * size, (batch + 1) * size)


def read_samples(config: Config, samples: Sequence[int], left_out: Sequence[LeftOut] = ()) -> Iterator[SampleText]:
    """Each sample as a run of this configuration reads it on any number of ranks, `left_out` being passed over.

    Raises:
        UserError: the data is missing or damaged.
    """
    data = open_dataset(config)
    size = config.train.batch_sequences
    stream = TokenStream(data.train, StreamPlan(config.model.seq_len, size, size, config.run.seed))
    for sample in samples:
        place = stream.order.locate(sample)
        source = stream.mixture.sources[place.source]
        pieces = stream.reader.pieces(place)
        row = np.empty(config.model.seq_len + 1, dtype=np.int64)
        ids = row[: stream.reader.read(pieces, row)]
        entries = [source.shards.blocks[piece.key.block] for piece in pieces]
        names = [source.shards.shards[int(entry["shard"])].name for entry in entries]
        yield SampleText(
            sample=sample,
            update=None if (step := step_of(left_out, sample // size)) is None else step + 1,
            source=source.name,
            epoch=place.epoch,
            number=place.number,
            blocks=[f"{name} at {int(entry['offset'])}" for name, entry in zip(names, entries, strict=True)],
            tokens=len(ids),
            documents=_documents(ids, data.tokenizer),
            ends_document=bool(len(ids)) and int(ids[-1]) == data.train.eod,
        )


def _documents(ids: npt.NDArray[np.int64], tokenizer: Tokenizer) -> list[str]:
    ends = np.flatnonzero(ids == tokenizer.eod)
    parts = np.split(ids, ends + 1)
    return [tokenizer.decode([i for i in part.tolist() if i != tokenizer.eod]) for part in parts if part.size]
