"""Samples by their place: the pieces of blocks they consist of, fetched and put together."""

from __future__ import annotations

import sys
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megassm.cli.arguments import print_line
from megassm.data.blocks import BlockReader, DamagedBlockError, Fetch, StoredIds
from megassm.data.cache import DiskCache
from megassm.data.index import ShardSet
from megassm.data.mixture import Mixture, OrderShape, ReadOptions
from megassm.data.order import SamplePlace, block_order
from megassm.data.prefetch import BlockKey, BlockMemory
from megassm.data.transport import Meter, Transport


class Piece(NamedTuple):
    """Ids [start, stop) of a block."""

    key: BlockKey
    start: int
    stop: int


@dataclass(frozen=True)
class _Layout:
    """An epoch's virtual stream: blocks in order, and where each starts in it (one more: the end)."""

    keys: list[BlockKey]
    starts: list[int]


class SampleReader:
    """Reads samples of a mixture."""

    def __init__(
        self,
        mixture: Mixture,
        seq_len: int,
        seed: int | None,
        meter: Meter,
        memory_bytes: int,
        fetch: Fetch | None = None,
    ) -> None:
        """`seed` orders the blocks of each epoch; None leaves them as stored."""
        self._sources, self._reading = mixture.sources, mixture.reading
        self.seq_len, self.eod, self.answers = seq_len, mixture.eod, mixture.answers
        self._seed, self._meter = seed, meter
        self._readers = [_block_reader(s.shards, mixture.reading, meter, fetch) for s in mixture.sources]
        self._block_bytes = [_block_bytes(source.shards) for source in mixture.sources]
        self._layout = lru_cache(maxsize=3 * len(mixture.sources))(self._make_layout)  # lanes span two epochs
        self.memory = BlockMemory(self._load, self._bytes_of, memory_bytes)
        self._announced: set[str] = set()

    def pieces(self, place: SamplePlace) -> list[Piece]:
        """What a sample consists of: seq_len + 1 ids, fewer where the epoch ends."""
        layout = self._layout(place.source, place.epoch)
        keys, starts = layout.keys, layout.starts
        start = place.number * self.seq_len
        stop = min(start + self.seq_len + 1, starts[-1])
        at = bisect_right(starts, start) - 1
        found = []
        while start < stop:
            first, last = starts[at], starts[at + 1]
            found.append(Piece(keys[at], start - first, min(stop, last) - first))
            start, at = last, at + 1
        return found

    def read(self, pieces: Sequence[Piece], into: npt.NDArray[np.int64]) -> int:
        """Writes a sample's ids; returns how many, 0 where a block of it is damaged and `on_bad_block` is mask.

        Raises:
            UserError: a block is damaged, or cannot be had.
        """
        written = 0
        try:
            for key, start, stop in pieces:
                into[written : written + stop - start] = self.memory.get(key)[start:stop]
                written += stop - start
        except DamagedBlockError as damage:
            if self._reading.on_bad_block == "raise":
                raise
            self._meter.add("data_masked_samples")
            self._announce(str(damage))
            return 0
        return written

    def _announce(self, damage: str) -> None:
        if damage not in self._announced:
            self._announced.add(damage)
            print_line(f"warning: its samples train nothing: {damage}", sys.stderr)

    def _make_layout(self, source: int, epoch: int) -> _Layout:
        stored = self._sources[source].shards.blocks["tokens"].astype(np.int64)
        count = len(stored)
        blocks = np.arange(count) if self._seed is None else block_order(count, self._seed, epoch)
        keys = [BlockKey(source, block) for block in blocks.tolist()]
        return _Layout(keys, [0, *np.cumsum(stored[blocks]).tolist()])

    def _load(self, key: BlockKey) -> StoredIds:
        return self._readers[key.source].read(key.block)

    def _bytes_of(self, key: BlockKey) -> int:
        return self._block_bytes[key.source][key.block]


def _block_reader(shards: ShardSet, reading: ReadOptions, meter: Meter, fetch: Fetch | None) -> BlockReader:
    disk = DiskCache(reading.cache_dir, reading.cache_bytes) if reading.cache_dir else None
    return BlockReader(shards, fetch or Transport(shards.store, reading.patience, meter, known=True).fetch, disk, meter)


def _block_bytes(shards: ShardSet) -> list[int]:
    sizes: list[int] = (shards.blocks["tokens"] * shards.numpy_dtype.itemsize).tolist()
    return sizes


def lane_bytes(shards: ShardSet, shape: OrderShape) -> int:
    """What one lane needs in memory to fetch each block once: the ids of the window it is in and of the next, which is
    read ahead, and a block's rest on either side."""
    largest = int(shards.blocks["tokens"].max(initial=0))
    return shards.numpy_dtype.itemsize * (2 * shape.window * shape.seq_len + 2 * largest)
