"""The memory of blocks: bounded, each block loaded once where it fits, errors where the block is used."""

from __future__ import annotations

import threading
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megassm.data.blocks import DamagedBlockError, StoredIds
from megassm.data.prefetch import BlockKey, BlockMemory, FetchThreads

BLOCK_BYTES = 200


def key(block: int) -> BlockKey:
    return BlockKey(0, block)


class Loads:
    """Blocks of 100 ids, each its own number, and how often they were loaded."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.counts: Counter[int] = Counter()
        self.at_once = self.most_at_once = 0
        self._seconds, self._lock = seconds, threading.Lock()

    def __call__(self, wanted: BlockKey) -> StoredIds:
        with self._lock:
            self.counts[wanted.block] += 1
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        time.sleep(self._seconds)
        with self._lock:
            self.at_once -= 1
        if wanted.block == 13:
            raise DamagedBlockError("block 13")
        return np.full(100, wanted.block, dtype=np.uint16)


def memory(loads: Loads, blocks: int) -> BlockMemory:
    return BlockMemory(loads, lambda _: BLOCK_BYTES, blocks * BLOCK_BYTES)


def test_the_bound_holds_and_the_least_recently_used_go() -> None:
    loads = Loads()
    kept = memory(loads, 3)
    for block in (0, 1, 2, 0, 3, 0, 1, 0):
        assert kept.get(key(block))[0] == block
    assert loads.counts == {0: 1, 1: 2, 2: 1, 3: 1}
    assert kept.largest_bytes == 3 * BLOCK_BYTES


def test_a_block_larger_than_the_bound_is_kept_alone() -> None:
    kept = BlockMemory(Loads(), lambda _: BLOCK_BYTES, 10)
    assert [int(kept.get(key(block))[0]) for block in (0, 0, 1)] == [0, 0, 1]
    assert (kept.resident_bytes, kept.fetches) == (BLOCK_BYTES, 2)


def test_several_threads_load_at_once_and_each_block_once() -> None:
    loads, closed = Loads(0.02), threading.Event()
    kept = memory(loads, 12)
    threads = FetchThreads(kept, closed, count=4)
    for block in range(12):
        assert threads.plan([key(block)])
    assert not threads.plan([key(99)]), "more than fits is not planned"
    for block in range(12):
        assert kept.get(key(block))[0] == block
        kept.done([key(block)])
    assert set(loads.counts.values()) == {1}
    assert loads.most_at_once in (4, 5)  # the asker may load one too
    assert threads.plan([key(99)])
    assert kept.get(key(99))[0] == 99
    closed.set()


def test_what_is_planned_is_not_dropped_for_what_is_not() -> None:
    loads = Loads()
    kept = memory(loads, 3)
    kept.plan([key(0), key(1)])
    for block in (0, 1, 5, 6, 7, 0, 1):
        kept.get(key(block))
    assert loads.counts[0] == loads.counts[1] == 1
    kept.done([key(0), key(1)])
    for block in (5, 6, 7, 0):
        kept.get(key(block))
    assert loads.counts[0] == 2


def test_damage_is_raised_where_the_block_is_used_and_looked_for_once() -> None:
    loads, closed = Loads(), threading.Event()
    kept = memory(loads, 4)
    threads = FetchThreads(kept, closed)
    threads.plan([key(12), key(13), key(14)])
    assert kept.get(key(12))[0] == 12
    for _ in range(2):
        with pytest.raises(DamagedBlockError, match="block 13"):
            kept.get(key(13))
    assert kept.get(key(14))[0] == 14
    assert loads.counts[13] == 1
    closed.set()


@settings(deadline=None, max_examples=30)
@given(blocks=st.lists(st.integers(0, 12), max_size=60), room=st.integers(1, 6), ahead=st.integers(1, 8))
def test_any_order_of_use_gives_the_blocks_within_the_bound(blocks: list[int], room: int, ahead: int) -> None:
    loads, closed = Loads(), threading.Event()
    kept = memory(loads, room)
    threads = FetchThreads(kept, closed, count=2)
    planned: list[int] = []
    for place, block in enumerate(blocks):
        while len(planned) <= place + ahead and len(planned) < len(blocks):
            if not threads.plan([key(blocks[len(planned)])]):
                break
            planned.append(blocks[len(planned)])
        assert kept.get(key(block))[0] == block
        assert len(planned) > place
        kept.done([key(block)])
        assert kept.largest_bytes <= room * BLOCK_BYTES
    closed.set()
