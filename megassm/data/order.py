"""Which tokens are sample G: a pure function of (seed, G), never a state.

An epoch is one virtual stream: the data set's blocks in an order hashed from (seed, epoch), end to end.
Its T tokens are cut into N = ceil((T - 1) / seq_len) samples of seq_len + 1 ids at stride seq_len, so that
every token but the first is predicted exactly once an epoch; the last sample may be short. Samples are
dealt to fixed lanes of contiguous samples, and within a lane permuted in windows: neighbours in a batch
come from far apart, while each lane is still read nearly sequentially.

    G -> epoch = G // N, g = G % N -> lane = g % lanes, place = g // lanes -> place permuted in its window

A mixture is dealt in the same lanes: row r of lane l is global sample r * lanes + l. A pattern as even as
its weights allow (period PATTERN) says which source has a slot, and a lane reads each source's own lane of the
same number in sequence. So a sample's place is counted, not remembered: every sample of a source comes once
before any comes again (at an epoch's seam lanes differ by a row or two), and a mixture of one source is that source.

The hash is our own splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014): numpy does not promise that its generators keep their streams, and a run must resume the
same after an upgrade.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]

BLOCK_STREAM = 1  # separates the hashes of two questions asked of one seed
WINDOW_STREAM = 2
PATTERN = 10_000  # slots; weights are kept to one part in so many


def splitmix64(values: U64) -> U64:
    """The finaliser of splitmix64, elementwise: a bijection of 64-bit words that scatters them."""
    z = values + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    result: U64 = z ^ (z >> np.uint64(31))
    return result


def hash_order(count: int, *key: int) -> npt.NDArray[np.int64]:
    """A permutation of range(count): sorted by the hash of (key, item), ties by item."""
    state = np.zeros(1, dtype=np.uint64)
    for part in key:
        state = splitmix64(state ^ np.uint64(part % 2**64))
    hashes = splitmix64(state ^ splitmix64(np.arange(count, dtype=np.uint64)))
    return np.argsort(hashes, kind="stable").astype(np.int64)


def block_order(blocks: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """The order in which an epoch's virtual stream goes through the blocks."""
    return hash_order(blocks, seed, BLOCK_STREAM, epoch)


def epoch_samples(tokens: int, seq_len: int) -> int:
    """N: samples that predict each of `tokens` tokens but the first once."""
    return -(-(tokens - 1) // seq_len)


@lru_cache(maxsize=1024)
def _window_order(size: int, seed: int, epoch: int, lane: int, window: int) -> tuple[int, ...]:
    return tuple(hash_order(size, seed, WINDOW_STREAM, epoch, lane, window).tolist())


@dataclass(frozen=True)
class SampleOrder:
    """The map from global sample numbers to places in an epoch's virtual stream.

    `samples` is N, an epoch's samples; `lanes` and `window` are part of the order: change them and a
    resumed run sees other batches.
    """

    samples: int
    seed: int
    lanes: int
    window: int

    def locate(self, global_sample: int) -> tuple[int, int]:
        """(epoch, index): sample G is the index-th of N in the virtual stream of that epoch."""
        epoch, g = divmod(global_sample, self.samples)
        lane, place = g % self.lanes, g // self.lanes
        short, extra = divmod(self.samples, self.lanes)  # the first `extra` lanes hold one sample more
        lane_start = lane * short + min(lane, extra)
        lane_size = short + (lane < extra)
        window, offset = divmod(place, self.window)
        window_start = window * self.window
        window_size = min(self.window, lane_size - window_start)
        order = _window_order(window_size, self.seed, epoch, lane, window)
        return epoch, lane_start + window_start + order[offset]


class OrderPhase(NamedTuple):
    """From a global sample on, what share of the samples each source has; 0: none."""

    first_sample: int
    weights: tuple[float, ...]


class SamplePlace(NamedTuple):
    """Where a sample lies: which source, and where in the virtual stream of one of its epochs."""

    source: int
    epoch: int
    number: int


@lru_cache(maxsize=64)
def _pattern(weights: tuple[float, ...]) -> tuple[tuple[int, ...], npt.NDArray[np.int64]]:
    """(PATTERN,) the source of each slot, and (sources, PATTERN + 1) how many slots before each a source has.

    Each slot goes to the source that is furthest behind its share (smooth weighted round robin).
    """
    shares = np.array(weights, dtype=np.float64) / sum(weights) * PATTERN
    slots = np.floor(shares).astype(np.int64)
    slots[(slots == 0) & (shares > 0)] = 1
    for source in np.argsort(slots - shares, kind="stable")[: max(0, PATTERN - int(slots.sum()))]:
        slots[source] += 1
    slots[np.argmax(slots)] += PATTERN - slots.sum()
    pattern = np.empty(PATTERN, dtype=np.int64)
    behind = np.zeros_like(slots)
    for slot in range(PATTERN):
        behind += slots
        pattern[slot] = chosen = int(np.argmax(behind))
        behind[chosen] -= PATTERN
    taken = np.eye(len(slots), dtype=np.int64)[:, pattern].cumsum(axis=1)
    return tuple(pattern.tolist()), np.pad(taken, ((0, 0), (1, 0)))


class MixtureOrder:
    """The map from global sample numbers to places in several sources, whose shares change by phases."""

    def __init__(self, orders: Sequence[SampleOrder], phases: Sequence[OrderPhase]) -> None:
        """`orders` have equal lanes; the first phase begins at sample 0, and they are in order."""
        self._orders, self._phases = tuple(orders), tuple(phases)
        self._lanes = self._orders[0].lanes
        self._lane_numbers = np.arange(self._lanes, dtype=np.int64)
        self._starts = [phase.first_sample for phase in self._phases]
        self._first_rows = [self._rows(start) for start in self._starts]
        self._read_before = [np.zeros((len(self._orders), self._lanes), dtype=np.int64)]
        for phase in range(1, len(self._phases)):
            self._read_before.append(self._read(phase - 1, self._first_rows[phase]))

    def locate(self, global_sample: int) -> SamplePlace:
        """Where the sample is."""
        if len(self._orders) == 1:  # what is counted below would be the number itself
            return SamplePlace(0, *self._orders[0].locate(global_sample))
        phase = bisect_right(self._starts, global_sample) - 1
        row, lane = divmod(global_sample, self._lanes)
        pattern, taken = _pattern(self._phases[phase].weights)
        slot = lane + row - int(self._first_rows[phase][lane])
        source = pattern[slot % PATTERN]
        since = _taken(taken[source], slot) - _taken(taken[source], lane)
        turn = int(self._read_before[phase][source, lane] + since)
        return SamplePlace(source, *self._orders[source].locate(turn * self._lanes + lane))

    def epochs(self, global_samples: int) -> list[float]:
        """How often each source has been read by the samples before this one."""
        phase = bisect_right(self._starts, max(global_samples - 1, 0)) - 1
        read = self._read(phase, self._rows(global_samples)).sum(axis=1).tolist()
        return [count / order.samples for count, order in zip(read, self._orders, strict=True)]

    def _rows(self, global_samples: int) -> npt.NDArray[np.int64]:
        """(lanes,) rows of each lane among the first samples."""
        rows: npt.NDArray[np.int64] = (global_samples - self._lane_numbers + self._lanes - 1) // self._lanes
        return rows

    def _read(self, phase: int, rows: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """(sources, lanes) samples read when each lane has done so many rows, all within or before the phase."""
        _, taken = _pattern(self._phases[phase].weights)
        first = self._lane_numbers
        last = first + rows - self._first_rows[phase]
        since = [_taken(counts, last) - _taken(counts, first) for counts in taken]
        read: npt.NDArray[np.int64] = self._read_before[phase] + np.stack(since)
        return read


def _taken(counts: npt.NDArray[np.int64], slot: Any) -> Any:
    """Slots of a source before `slot` (one, or an array of them)."""
    return slot // PATTERN * counts[-1] + counts[slot % PATTERN]
