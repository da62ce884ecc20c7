"""Bytes from a store, whole or not at all: reconnects at the byte reached, backs off, and gives up in time.

A store's failures are tried again with exponential backoff and full jitter (Brooker, "Exponential backoff and
jitter", AWS Architecture Blog, 2015), until the deadline of the whole fetch. A file that is replaced under a run
is refused: blocks of two versions must not be mixed.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from megassm.data.request import (
    WHOLE_BYTES,
    BrokenFetchError,
    ByteRange,
    NoSuchFileError,
    ReplacedFileError,
    Reply,
    Store,
)
from megassm.errors import UserError

START_DEADLINE_S = 30.0  # for an index: a wrong address is told soon


@dataclass(frozen=True)
class Patience:
    """How long a fetch goes on, in seconds."""

    deadline_s: float = START_DEADLINE_S
    """All attempts and waits of one fetch together."""
    first_wait_s: float = 0.2
    longest_wait_s: float = 10.0

    def wait_s(self, failures: int) -> float:
        """Seconds before the next attempt, after this many in a row that brought nothing."""
        return random.uniform(0, min(self.longest_wait_s, self.first_wait_s * 2.0**failures))


@dataclass
class DataCounters:
    """What reading cost since it was last asked; the names are the journal's."""

    data_wait_s: float = 0.0
    """Seconds the trainer waited for a batch."""
    data_reconnects: int = 0
    data_refetches: int = 0
    """Blocks that came whole, but not as the index says, and were fetched again."""
    data_fetched_bytes: int = 0
    data_cache_hits: int = 0
    """Blocks found in data.cache_dir."""
    data_masked_samples: int = 0
    """Sequences that train nothing, because a block of theirs is damaged (data.on_bad_block: mask)."""


class Meter:
    """Counts from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counted = DataCounters()

    def add(self, name: str, amount: float = 1) -> None:
        with self._lock:
            setattr(self._counted, name, getattr(self._counted, name) + amount)

    def take(self) -> DataCounters:
        """What was counted since the last call."""
        with self._lock:
            taken, self._counted = self._counted, DataCounters()
            return taken


def total_counters(ranks: Sequence[Sequence[float]]) -> DataCounters:
    """Of all ranks, each as a tuple: sums, and the longest wait."""
    longest_wait, *_ = (max(column) for column in zip(*ranks, strict=True))
    _, *sums = (int(sum(column)) for column in zip(*ranks, strict=True))
    return DataCounters(longest_wait, *sums)


class Transport:
    """Fetches from one store; several threads may."""

    def __init__(
        self,
        store: Store,
        patience: Patience,
        meter: Meter,
        known: bool = False,
        etags: dict[str, str] | None = None,
    ) -> None:
        """Of `known` files it is known that they were there: one that is missing may be back in a moment, as where a
        server or a mounted folder goes away. `etags` of each file, as first seen, by this or an earlier one."""
        self._store, self._patience, self._meter, self._known = store, patience, meter, known
        self._etags: dict[str, str] = {} if etags is None else etags

    def fetch(self, name: str, offset: int, size: int | None = None) -> bytes:
        """The `size` bytes at `offset`, fewer where the file ends; without a size all, at most `WHOLE_BYTES`.

        Raises:
            FileNotFoundError: there is no such file, and none was known.
            UserError: access is denied, the file was replaced or is too long, or the deadline has passed.
        """
        started = time.monotonic()
        got: list[bytes] = []
        reached = failures = 0
        while True:
            rest = ByteRange(offset + reached, None if size is None else size - reached)
            try:
                self._read(name, rest, got, started + self._patience.deadline_s)
                return b"".join(got)
            except BrokenFetchError as trouble:
                before, reached = reached, sum(map(len, got))
                failures = 0 if reached > before else failures + 1
                self._meter.add("data_reconnects")
                wait = max(self._patience.wait_s(failures), trouble.wait_s)
                if time.monotonic() + wait > started + self._patience.deadline_s:
                    raise self._given_up(name, offset, reached, trouble) from None
                time.sleep(wait)
            except NoSuchFileError:
                raise FileNotFoundError(name) from None
            except ReplacedFileError:
                raise self._replaced(name, offset) from None

    def _read(self, name: str, span: ByteRange, into: list[bytes], deadline: float) -> None:
        try:
            reply = self._store.request(name, span, self._etags.get(name))
        except NoSuchFileError:
            if self._known:
                raise BrokenFetchError("no such file") from None
            raise
        room = WHOLE_BYTES - span.offset if span.size is None else span.size
        try:
            self._check_etag(name, reply)
            came = 0
            for chunk in reply.chunks:
                came += len(chunk)
                if came > room:  # whatever the server has said of the length
                    raise self._too_long(name, span)
                into.append(chunk)
                self._meter.add("data_fetched_bytes", len(chunk))
                if time.monotonic() > deadline:
                    raise BrokenFetchError(f"only {came} bytes came in time")
            if 0 <= reply.length != came:
                raise BrokenFetchError(f"{came} of {reply.length} bytes came")
        finally:
            reply.close()

    def _too_long(self, name: str, span: ByteRange) -> Exception:
        if span.size is not None:
            return BrokenFetchError(f"asked for {span.header}, more came")
        rule = f"longer than the {WHOLE_BYTES:,} bytes of a file that is read whole"
        return UserError(f"{self._store.place}/{name}: {rule}; look at what the server sends")

    def _check_etag(self, name: str, reply: Reply) -> None:
        if reply.etag is not None and self._etags.setdefault(name, reply.etag) != reply.etag:
            raise ReplacedFileError

    def _replaced(self, name: str, offset: int) -> UserError:
        place, etag = f"{self._store.place}/{name}, at offset {offset}", self._etags.get(name)
        return UserError(
            f"{place}: the file was replaced while this run reads it (its ETag was {etag}); put the old one back, or "
            "start a new run on the new data"
        )

    def _given_up(self, name: str, offset: int, reached: int, trouble: BrokenFetchError) -> UserError:
        place, seconds = f"{self._store.place}/{name}, at offset {offset}", self._patience.deadline_s
        return UserError(
            f"{place}: {reached} bytes came within {seconds:g} s, then given up ({trouble}); look at the server "
            "or the disk, at what is mounted, and the network. The same command goes on from the last checkpoint"
        )


def read_file(store: Store, name: str, patience: Patience | None = None) -> bytes:
    """A whole small file.

    Raises:
        FileNotFoundError, UserError: see `Transport.fetch`.
    """
    return Transport(store, patience or Patience(), Meter()).fetch(name, 0)
