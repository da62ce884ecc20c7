"""A bounded memory of blocks, filled ahead of need by a few threads.

Blocks are planned in the order of their use, as many as fit. The threads load them, and drop only blocks that
are not planned. A block that was not planned is loaded by the caller that asks for it. So memory is bounded,
batches come in the order in which they are asked for, and an error appears where the block is used, after all
batches before it.
"""

from __future__ import annotations

import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from typing import NamedTuple

from megassm.data.blocks import DamagedBlockError, StoredIds

FETCH_THREADS = 4
POLL_SECONDS = 0.1


class BlockKey(NamedTuple):
    """A block of one of the sources."""

    source: int
    block: int


class BlockMemory:
    """Blocks as ids: at most `max_bytes` of them, or one larger block."""

    def __init__(
        self, load: Callable[[BlockKey], StoredIds], bytes_of: Callable[[BlockKey], int], max_bytes: int
    ) -> None:
        """`load` reads a block; `bytes_of` says beforehand how large its ids are."""
        self._load, self._bytes_of, self._max_bytes = load, bytes_of, max_bytes
        self._blocks: OrderedDict[BlockKey, StoredIds] = OrderedDict()
        self._damaged: dict[BlockKey, DamagedBlockError] = {}
        self._loading: set[BlockKey] = set()
        self._planned: dict[BlockKey, int] = {}
        self._planned_bytes = 0  # of each block once
        self._changed = threading.Condition(threading.Lock())
        self.resident_bytes = 0
        self.largest_bytes = 0  # ever resident and being loaded together
        self.fetches = 0

    def get(self, key: BlockKey) -> StoredIds:
        """The ids of a block; see `read_block`."""
        with self._changed:
            while key in self._loading:
                self._changed.wait()
            if key in self._blocks:
                self._blocks.move_to_end(key)
                return self._blocks[key]
            if key in self._damaged:
                raise self._damaged[key]
            self._begin(key)
        return self._finish(key)

    def plan(self, keys: Sequence[BlockKey]) -> bool:
        """Plans blocks, all different, each of which will be asked for once: once loaded they stay until `done`.

        Returns False, and plans nothing, if all planned blocks together would not fit: call `done` first.
        """
        with self._changed:
            new_bytes = sum(self._bytes_of(key) for key in keys if key not in self._planned)
            if self._planned and self._planned_bytes + new_bytes > self._max_bytes:
                return False
            self._planned_bytes += new_bytes
            for key in keys:
                self._planned[key] = self._planned.get(key, 0) + 1
            return True

    def done(self, keys: Sequence[BlockKey]) -> None:
        """These planned blocks have been asked for, or will not be."""
        with self._changed:
            for key in keys:
                self._planned[key] -= 1
                if not self._planned[key]:
                    del self._planned[key]
                    self._planned_bytes -= self._bytes_of(key)

    def load_ahead(self, key: BlockKey) -> None:
        """Loads a planned block if there is room. An error is left to the caller that asks for the block."""
        with self._changed:
            known = key in self._blocks or key in self._loading or key in self._damaged
            if known or key not in self._planned or not self._make_room(key, planned_too=False):
                return
            self._begin(key)
        try:
            self._finish(key)
        except Exception:
            return

    def _begin(self, key: BlockKey) -> None:
        self._make_room(key, planned_too=True)
        self._loading.add(key)
        self.fetches += 1
        busy = sum(map(self._bytes_of, self._loading))
        self.largest_bytes = max(self.largest_bytes, self.resident_bytes + busy)

    def _finish(self, key: BlockKey) -> StoredIds:
        ids: StoredIds | None = None
        damage: DamagedBlockError | None = None
        try:
            ids = self._load(key)
            return ids
        except DamagedBlockError as error:
            damage = error
            raise
        finally:
            with self._changed:
                self._loading.remove(key)
                if ids is not None:
                    self._blocks[key] = ids
                    self.resident_bytes += ids.nbytes
                if damage is not None:
                    self._damaged[key] = damage
                self._changed.notify_all()

    def _make_room(self, key: BlockKey, planned_too: bool) -> bool:
        """Drops the least recently used blocks, planned ones last or not at all, until `key` fits."""
        room = self._max_bytes - self._bytes_of(key) - sum(map(self._bytes_of, self._loading))
        for planned in (False, True) if planned_too else (False,):
            for other in [other for other in self._blocks if (other in self._planned) is planned]:
                if self.resident_bytes <= room:
                    break
                self.resident_bytes -= self._blocks.pop(other).nbytes
        return self.resident_bytes <= room


class FetchThreads:
    """Threads that load what is planned, in the order planned. A context manager."""

    def __init__(self, memory: BlockMemory, closed: threading.Event, count: int = FETCH_THREADS) -> None:
        self._memory, self._closed = memory, closed
        self._keys: deque[BlockKey] = deque()
        self._more = threading.Semaphore(0)
        for number in range(count):
            threading.Thread(target=self._work, name=f"data-fetch-{number}", daemon=True).start()

    def plan(self, keys: Sequence[BlockKey]) -> bool:
        """See `BlockMemory.plan`."""
        if not self._memory.plan(keys):
            return False
        for key in keys:
            self._keys.append(key)
            self._more.release()
        return True

    def _work(self) -> None:
        while not self._closed.is_set():
            if self._more.acquire(timeout=POLL_SECONDS):
                self._memory.load_ahead(self._keys.popleft())
