"""Which tokens are sample G: a pure function of (seed, G), never a state.

An epoch is one virtual stream: the data set's blocks in an order hashed from (seed, epoch), end to end.
Its T tokens are cut into N = ceil((T - 1) / seq_len) samples of seq_len + 1 ids at stride seq_len, so that
every token but the first is predicted exactly once an epoch; the last sample may be short. Samples are
dealt to fixed lanes of contiguous samples, and within a lane permuted in windows: neighbours in a batch
come from far apart, while each lane is still read nearly sequentially.

    G -> epoch = G // N, g = G % N -> lane = g % lanes, place = g // lanes -> place permuted in its window

The hash is our own splitmix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
OOPSLA 2014): numpy does not promise that its generators keep their streams, and a run must resume the
same after an upgrade.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

U64 = npt.NDArray[np.uint64]

BLOCK_STREAM = 1  # separates the hashes of two questions asked of one seed
WINDOW_STREAM = 2


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
