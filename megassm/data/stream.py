"""Batches of token ids: step and micro-step in, ids out, the same whatever the number of ranks.

Step t covers the global samples [t * batch, (t + 1) * batch). Its micro-batch m is the slots
[m * micro * world, (m + 1) * micro * world) of them, and rank r takes the slots s with s % world == r. So one
process with micro-batches of 8 and two ranks with 4 see the same global micro-batches, and the stream
is the same for any number of ranks. The position is one integer, the step: no state lives in workers
or buffers. `order` says which tokens a sample is, `blocks` fetches and checks them.
"""

from __future__ import annotations

import queue
import threading
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from megassm.data.blocks import DEFAULT_CACHE_BYTES, BlockCache, Fetch, StoredIds, local_fetch
from megassm.data.order import SampleOrder, block_order, epoch_samples
from megassm.data.shards import ShardSet
from megassm.errors import UserError

PREFETCHED_MICRO_BATCHES = 4
POLL_SECONDS = 0.1
NO_SAMPLE = -1


@dataclass(frozen=True)
class StreamPlan:
    """What decides the batches. `lanes` and `window` are part of the order (see `order`).

    48 lanes divide among 2, 3, 4, 6, 8, 12, 16, 24 or 48 ranks, so that each rank reads only its own;
    with any other number a rank reads more lanes, which costs memory and changes no batch.
    """

    seq_len: int  # predicted tokens a sample
    batch_sequences: int  # global, a step
    micro_batch_sequences: int  # of one rank
    seed: int
    rank: int = 0
    world_size: int = 1
    lanes: int = 48
    window: int = 64

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch_sequences", "micro_batch_sequences", "world_size", "lanes", "window"):
            if getattr(self, name) < 1:
                raise UserError(f"data stream: {name} is {getattr(self, name)}, it must be at least 1")
        if not 0 <= self.rank < self.world_size:
            raise UserError(f"data stream: rank {self.rank} is not in [0, world_size = {self.world_size})")
        together = self.micro_batch_sequences * self.world_size
        if self.batch_sequences % together:
            product = f"{self.micro_batch_sequences} (micro-batch) x {self.world_size} (ranks) = {together}"
            raise UserError(
                f"data stream: a batch of {self.batch_sequences} sequences is not a multiple of {product}; "
                "change one of the three"
            )


@dataclass(frozen=True)
class MicroBatch:
    """B sequences of one rank. Inputs are `ids_BT[:, :-1]`, labels `ids_BT[:, 1:]`; T = seq_len + 1."""

    ids_BT: npt.NDArray[np.int64]
    mask_BL: npt.NDArray[np.bool_]  # which labels count; L = seq_len
    sample_ids_B: npt.NDArray[np.int64]  # global sample numbers; -1 for a row that only fills the batch

    def span(self, part: int, parts: int) -> MicroBatch:
        """Part `part` of the positions, divided evenly; each with the label after its last position."""
        length = self.mask_BL.shape[1] // parts
        first = part * length
        return MicroBatch(
            self.ids_BT[:, first : first + length + 1], self.mask_BL[:, first : first + length], self.sample_ids_B
        )


class SampleReader:
    """Samples by their place in an epoch's virtual stream of blocks."""

    def __init__(self, shards: ShardSet, seq_len: int, fetch: Fetch | None, cache_bytes: int) -> None:
        if shards.tokens < 2:
            raise UserError(f"{shards.directory}: 1 token leaves nothing to predict; give more text")
        self.shards, self.seq_len = shards, seq_len
        self.epoch_samples = epoch_samples(shards.tokens, seq_len)
        self.cache = BlockCache(shards, fetch or local_fetch(shards.directory), cache_bytes)

    def read(self, layout: _Layout, index: int) -> StoredIds:
        """Sample `index` of an epoch: seq_len + 1 ids, fewer where the epoch ends."""
        start = index * self.seq_len
        stop = min(start + self.seq_len + 1, self.shards.tokens)
        place = bisect_right(layout.starts, start) - 1
        parts = []
        while start < stop:
            block_start, block_stop = layout.starts[place], layout.starts[place + 1]
            ids = self.cache.get(layout.blocks[place])
            parts.append(ids[start - block_start : stop - block_start])
            start, place = block_stop, place + 1
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def layout(self, blocks: npt.NDArray[np.int64]) -> _Layout:
        """The virtual stream that goes through the blocks in this order."""
        tokens = self.shards.blocks["tokens"][blocks].astype(np.int64)
        return _Layout(blocks.tolist(), [0, *np.cumsum(tokens).tolist()])

    def micro_batch(self, rows: list[tuple[int, StoredIds]]) -> MicroBatch:
        """Pads (sample number, ids) rows with EOD to seq_len + 1; the mask says how far each goes."""
        ids_BT = np.full((len(rows), self.seq_len + 1), self.shards.eod, dtype=np.int64)
        mask_BL = np.zeros((len(rows), self.seq_len), dtype=np.bool_)
        for row, (_, ids) in enumerate(rows):
            ids_BT[row, : len(ids)] = ids
            mask_BL[row, : max(len(ids) - 1, 0)] = True
        return MicroBatch(ids_BT, mask_BL, np.array([number for number, _ in rows], dtype=np.int64))


@dataclass(frozen=True)
class _Layout:
    """An epoch's virtual stream: blocks in order, and where each starts in it (one more: the end)."""

    blocks: list[int]
    starts: list[int]


class TokenStream:
    """The training batches of one rank."""

    def __init__(
        self,
        shards: ShardSet,
        plan: StreamPlan,
        fetch: Fetch | None = None,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
    ) -> None:
        self.plan = plan
        self._reader = SampleReader(shards, plan.seq_len, fetch, cache_bytes)
        self.epoch_samples = self._reader.epoch_samples
        self.micro_steps = plan.batch_sequences // (plan.micro_batch_sequences * plan.world_size)
        self._order = SampleOrder(self.epoch_samples, plan.seed, plan.lanes, plan.window)
        self._epoch_layout = lru_cache(maxsize=2)(self._layout)  # a batch may span two epochs

    def _layout(self, epoch: int) -> _Layout:
        return self._reader.layout(block_order(len(self._reader.shards.blocks), self.plan.seed, epoch))

    def micro_batch(self, step: int, micro_step: int) -> MicroBatch:
        """This rank's sequences: a pure function of its arguments. UserError where the data is damaged."""
        plan = self.plan
        first = step * plan.batch_sequences + micro_step * plan.micro_batch_sequences * plan.world_size
        rows = []
        for row in range(plan.micro_batch_sequences):
            sample = first + row * plan.world_size + plan.rank
            epoch, index = self._order.locate(sample)
            rows.append((sample, self._reader.read(self._epoch_layout(epoch), index)))
        return self._reader.micro_batch(rows)

    def batches(self, start_step: int, stop_step: int) -> Iterator[MicroBatch]:
        """The micro-batches of steps [start_step, stop_step) in order, read ahead by a thread.

        The thread begins at the first `next`; it ends with the iterator (exhausted, closed or dropped).
        What it raises is raised here, after the batches before it.
        """
        return _prefetched(
            self.micro_batch(step, micro_step)
            for step in range(start_step, stop_step)
            for micro_step in range(self.micro_steps)
        )


def validation_batches(shards: ShardSet, plan: StreamPlan, sequences: int) -> Iterator[MicroBatch]:
    """The first `sequences` samples of a data set as stored (documents were shuffled when prepared), each
    once over all ranks; fewer where the set holds fewer.

    Rank r takes every world-th. All ranks get equally many micro-batches: rows without a sample are fully
    masked and have sample number -1. `plan.batch_sequences`, `seed`, `lanes` and `window` play no part.
    """
    if sequences < 1:
        raise UserError(f"validation: {sequences} sequences, it must be at least 1")
    reader = SampleReader(shards, plan.seq_len, None, DEFAULT_CACHE_BYTES)
    layout = reader.layout(np.arange(len(shards.blocks)))
    stop = min(sequences, reader.epoch_samples)
    nothing = np.empty(0, dtype=shards.numpy_dtype)

    def micro_batch(first: int) -> MicroBatch:
        rows = []
        for row in range(plan.micro_batch_sequences):
            sample = first + row * plan.world_size + plan.rank
            rows.append((sample, reader.read(layout, sample)) if sample < stop else (NO_SAMPLE, nothing))
        return reader.micro_batch(rows)

    together = plan.micro_batch_sequences * plan.world_size
    return _prefetched(micro_batch(first) for first in range(0, stop, together))


def _prefetched(batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
    """Runs an iterator in a thread that stays a bounded number of batches ahead."""
    ready: queue.Queue[MicroBatch | BaseException | None] = queue.Queue(PREFETCHED_MICRO_BATCHES)
    closed = threading.Event()

    def hand_over(item: MicroBatch | BaseException | None) -> None:
        while not closed.is_set():
            try:
                return ready.put(item, timeout=POLL_SECONDS)
            except queue.Full:
                continue

    def produce() -> None:
        try:
            for batch in batches:
                hand_over(batch)
                if closed.is_set():
                    return
            hand_over(None)
        except BaseException as error:
            hand_over(error)

    thread = threading.Thread(target=produce, name="data-prefetch", daemon=True)
    thread.start()
    try:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        closed.set()
        thread.join()
