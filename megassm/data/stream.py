"""Batches of token ids: step and micro-step in, ids out, the same whatever the number of ranks.

Step t covers the global samples [t * batch, (t + 1) * batch). Its micro-batch m is the slots
[m * micro * world, (m + 1) * micro * world) of them, and rank r takes the slots s with s % world == r. So one
process with micro-batches of 8 and two ranks with 4 see the same global micro-batches, and the stream
is the same for any number of ranks. The position is one integer, the step: no state lives in workers
or buffers. `order` says which tokens a sample is, `samples` gets them.
"""

from __future__ import annotations

import math
import queue
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megassm.data.blocks import Fetch
from megassm.data.index import ShardSet
from megassm.data.mixture import Mixture, OrderShape, one_source
from megassm.data.order import SamplePlace, epoch_samples
from megassm.data.prefetch import BlockKey, FetchThreads
from megassm.data.samples import Piece, SampleReader, lane_bytes
from megassm.data.skipped import LeftOut, batch_of
from megassm.data.task import answer_mask
from megassm.data.transport import Meter
from megassm.errors import UserError

PREFETCHED_MICRO_BATCHES = 4
PLANNED_MICRO_BATCHES = 64  # whose blocks are fetched ahead, where there is room
JOIN_SECONDS = 1.0
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
    left_out: tuple[LeftOut, ...] = ()

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

    @property
    def lanes_of_a_rank(self) -> int:
        """Lanes its samples lie in."""
        return self.lanes // math.gcd(self.lanes, self.world_size)


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


Ready = queue.SimpleQueue[MicroBatch | BaseException | None]
"""What a thread has made, in order: batches, then an error or None for the end."""


class _Row(NamedTuple):
    """A sample of a micro-batch, and the pieces of blocks it consists of; none for a row that only fills it."""

    sample: int
    pieces: Sequence[Piece]


class TokenStream:
    """The training batches of one rank."""

    def __init__(
        self,
        data: ShardSet | Mixture,
        plan: StreamPlan,
        fetch: Fetch | None = None,
        memory_bytes: int | None = None,
    ) -> None:
        """`fetch` replaces each source's own transport, `memory_bytes` what this rank's lanes need."""
        self.plan = plan
        self.mixture = data if isinstance(data, Mixture) else one_source(data)
        self.meter = Meter()
        shape = OrderShape(plan.seq_len, plan.batch_sequences, plan.seed, plan.lanes, plan.window)
        self.order = self.mixture.order(shape)
        if memory_bytes is None:
            memory_bytes = plan.lanes_of_a_rank * sum(lane_bytes(s.shards, shape) for s in self.mixture.sources)
        self.reader = SampleReader(self.mixture, plan.seq_len, plan.seed, self.meter, memory_bytes, fetch)
        self.micro_steps = plan.batch_sequences // (plan.micro_batch_sequences * plan.world_size)

    def samples(self, step: int, micro_step: int) -> list[int]:
        """This rank's global sample numbers: a pure function of its arguments."""
        plan = self.plan
        first = (
            batch_of(plan.left_out, step) * plan.batch_sequences
            + micro_step * plan.micro_batch_sequences * plan.world_size
        )
        return [first + row * plan.world_size + plan.rank for row in range(plan.micro_batch_sequences)]

    def micro_batch(self, step: int, micro_step: int) -> MicroBatch:
        """This rank's sequences: a pure function of its arguments. UserError where the data is damaged."""
        return _micro_batch(self.reader, self._rows(step, micro_step))

    def _rows(self, step: int, micro_step: int) -> list[_Row]:
        locate, pieces = self.order.locate, self.reader.pieces
        return [_Row(sample, pieces(locate(sample))) for sample in self.samples(step, micro_step)]

    def epochs(self, steps: int) -> dict[str, float]:
        """How often each source has been read after `steps` steps."""
        batches = batch_of(self.plan.left_out, steps - 1) + 1
        read = self.order.epochs(batches * self.plan.batch_sequences)
        return {source.name: count for source, count in zip(self.mixture.sources, read, strict=True)}

    def batches(self, start_step: int, stop_step: int) -> Iterator[MicroBatch]:
        """The micro-batches of steps [start_step, stop_step) in order, read ahead by threads.

        The threads begin at the first `next`; they end with the iterator (exhausted, closed or dropped).
        What they raise is raised here, after the batches before it.
        """
        turns = (
            self._rows(step, micro_step)
            for step in range(start_step, stop_step)
            for micro_step in range(self.micro_steps)
        )
        return _prefetched(self._planned(turns), self.meter, self.mixture.reading.batch_wait_s)

    def _planned(self, turns: Iterator[list[_Row]]) -> Iterator[MicroBatch]:
        """Makes each micro-batch, while threads fetch the blocks of the next ones."""
        closed = threading.Event()
        threads = FetchThreads(self.reader.memory, closed)
        planned: deque[tuple[list[_Row], list[BlockKey]]] = deque()
        turn = next(turns, None)
        try:
            while True:
                while turn is not None and len(planned) < PLANNED_MICRO_BATCHES and threads.plan(keys := _keys(turn)):
                    planned.append((turn, keys))
                    turn = next(turns, None)
                if planned:
                    yield _micro_batch(self.reader, planned[0][0])
                    self.reader.memory.done(planned.popleft()[1])
                elif turn is not None:  # another iterator's plan fills the memory
                    yield _micro_batch(self.reader, turn)
                    turn = next(turns, None)
                else:
                    return
        finally:
            closed.set()
            for _, keys in planned:
                self.reader.memory.done(keys)


def _keys(rows: list[_Row]) -> list[BlockKey]:
    """The blocks of a micro-batch, each once, in the order of their use."""
    return list(dict.fromkeys(piece.key for row in rows for piece in row.pieces))


def validation_batches(data: ShardSet | Mixture, plan: StreamPlan, sequences: int) -> Iterator[MicroBatch]:
    """The first `sequences` samples of a data set as stored (documents were shuffled when prepared), each
    once over all ranks; of several sources equally many of each; fewer where the sets hold fewer.

    Rank r takes every world-th. All ranks get equally many micro-batches: rows without a sample are fully
    masked and have sample number -1. `plan.batch_sequences`, `seed`, `lanes` and `window` play no part.
    """
    if sequences < 1:
        raise UserError(f"validation: {sequences} sequences, it must be at least 1")
    mixture = data if isinstance(data, Mixture) else one_source(data)
    shape = OrderShape(plan.seq_len, plan.batch_sequences, plan.seed, lanes=1, window=1)
    memory_bytes = sum(lane_bytes(source.shards, shape) for source in mixture.sources)
    meter = Meter()
    reader = SampleReader(mixture, plan.seq_len, None, meter, memory_bytes)
    places = validation_places(mixture, plan.seq_len, sequences)

    def micro_batch(first: int) -> MicroBatch:
        rows = []
        for row in range(plan.micro_batch_sequences):
            sample = first + row * plan.world_size + plan.rank
            known = sample < len(places)
            rows.append(_Row(sample, reader.pieces(places[sample])) if known else _Row(NO_SAMPLE, ()))
        return _micro_batch(reader, rows)

    together = plan.micro_batch_sequences * plan.world_size
    batches = (micro_batch(first) for first in range(0, len(places), together))
    return _prefetched(batches, meter, mixture.reading.batch_wait_s)


def validation_places(mixture: Mixture, seq_len: int, sequences: int) -> list[SamplePlace]:
    """The first samples of each source as stored, equally many of each as far as it goes."""
    places = []
    for number, (_, shards) in enumerate(mixture.sources):
        share = len(range(number, sequences, len(mixture.sources)))
        held = epoch_samples(shards.tokens, seq_len)
        places += [SamplePlace(number, 0, index) for index in range(min(share, held))]
    return places


def _micro_batch(reader: SampleReader, rows: list[_Row]) -> MicroBatch:
    """Reads the rows, and fills what a short one leaves with EOD; the mask says how far each goes."""
    ids_BT = np.empty((len(rows), reader.seq_len + 1), dtype=np.int64)
    mask_BL = np.zeros((len(rows), reader.seq_len), dtype=np.bool_)
    for (_, pieces), ids_T, mask_L in zip(rows, ids_BT, mask_BL, strict=True):
        read = reader.read(pieces, ids_T)
        ids_T[read:] = reader.eod
        mask_L[: max(read - 1, 0)] = True
    if reader.answers is not None:
        mask_BL &= answer_mask(ids_BT, reader.answers)
    return MicroBatch(ids_BT, mask_BL, np.array([sample for sample, _ in rows], dtype=np.int64))


def _prefetched(batches: Iterator[MicroBatch], meter: Meter, wait_s: float | None) -> Iterator[MicroBatch]:
    """Runs a generator in a thread that stays a bounded number of batches ahead.

    UserError where a batch takes longer than `wait_s`: the other ranks must hear of it before they give up waiting.
    """
    ready: Ready = queue.SimpleQueue()
    room: queue.SimpleQueue[None] = queue.SimpleQueue()  # an item for each batch that may be made ahead
    for _ in range(PREFETCHED_MICRO_BATCHES):
        room.put(None)
    closed = threading.Event()

    def produce() -> None:
        try:
            with closing(batches):  # type: ignore[type-var]
                for batch in batches:
                    room.get()
                    if closed.is_set():
                        return
                    ready.put(batch)
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    thread = threading.Thread(target=produce, name="data-prefetch", daemon=True)
    thread.start()
    try:
        while (item := _wait_for(ready, meter, wait_s)) is not None:
            if isinstance(item, BaseException):
                raise item
            room.put(None)
            yield item
    finally:
        closed.set()
        room.put(None)
        thread.join(JOIN_SECONDS)  # not for ever: it may be waiting for a server


def _wait_for(ready: Ready, meter: Meter, wait_s: float | None) -> MicroBatch | BaseException | None:
    started = time.perf_counter()
    try:
        return ready.get(timeout=wait_s)
    except queue.Empty:
        raise UserError(
            f"no batch of data within {wait_s:g} s (part of parallel.timeout_s); look at the data's server and the "
            "network. The same command goes on from the last checkpoint"
        ) from None
    finally:
        meter.add("data_wait_s", time.perf_counter() - started)
