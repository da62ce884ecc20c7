"""Others who are told of a run's updates, each from a thread of its own: training never waits for them.

Whatever goes wrong with one ends its part with one warning. metrics.jsonl is the truth.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from megassm.run.directory import METRICS
from megassm.run.lines import Record

CLOSE_TIMEOUT_S = 100
"""What is still to be sent when training is done may take so long."""
WAITING_RECORDS = 10_000
"""Records that wait at most: for the thread, or for the next checkpoint."""


class Sink(Protocol):
    """Who is told. All is called from one thread, and may raise anything."""

    name: str

    def open(self) -> bool:
        """Returns whether records are to come only once a checkpoint holds their updates: what cannot be taken back."""

    def log(self, record: Record) -> None: ...

    def close(self) -> None: ...

    def abandon(self) -> None:
        """It is given up; nothing it does may be heard of later."""


class Tracker:
    """Hands a run's records to a sink."""

    def __init__(self, sink: Sink, warn: Callable[[str], None]) -> None:
        self._sink = sink
        self._warn = warn
        self._queue: queue.Queue[Record | int | None] = queue.Queue(WAITING_RECORDS)
        self._given_up = False
        self._thread = threading.Thread(target=self._work, name=sink.name, daemon=True)
        self._thread.start()

    def tell(self, record: Record) -> None:
        """Hands over a record; never waits."""
        self._put(record)

    def saved(self, step: int) -> None:
        """A checkpoint holds the updates up to `step`: none of them will be made again."""
        self._put(step)

    def close(self) -> None:
        """Waits for what is still to be sent, within limits."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=CLOSE_TIMEOUT_S)
        self._thread.join(CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            self._give_up("it does not come to an end")

    def _put(self, item: Record | int) -> None:
        if self._given_up:
            return
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self._give_up(f"it is {WAITING_RECORDS:,} records behind")

    def _work(self) -> None:
        try:
            held: deque[Record] | None = deque() if self._sink.open() else None
            while not self._given_up and (item := self._queue.get()) is not None:
                for record in _due(item, held):
                    self._sink.log(record)
            self._sink.close()
        except Exception as error:
            self._give_up(first_line(error))
            with contextlib.suppress(Exception):
                self._sink.abandon()

    def _give_up(self, reason: str) -> None:
        if not self._given_up:
            self._given_up = True
            self._warn(f"{self._sink.name} is given up ({reason}); {METRICS} has everything")


def _due(item: Record | int, held: deque[Record] | None) -> Iterator[Record]:
    """The records that are to be sent now: those of a checkpoint, or at once where none are `held`."""
    if held is None:
        yield from [] if isinstance(item, int) else [item]
    elif not isinstance(item, int):
        held.append(item)
        if len(held) > WAITING_RECORDS:
            yield held.popleft()
    else:
        while held and held[0]["step"] <= item:
            yield held.popleft()


def first_line(error: Exception) -> str:
    return (str(error).splitlines() or [repr(error)])[0]


def flat(record: Record) -> Record:
    """A record as curves: one a K, one a source, one a phase; without lists."""
    plain = {name: value for name, value in record.items() if not isinstance(value, (dict, list))}
    for group in ("epochs", "phases_s"):
        plain |= {f"{group}/{name}": value for name, value in record.get(group, {}).items()}
    for name, layers in record.get("channels", {}).items():  # means over layers: one curve a channel
        means: list[Any] = np.atleast_2d(layers).mean(axis=0).tolist()
        plain |= {f"channels/{name}_k{k:02d}": value for k, value in enumerate(means, start=1)}
    for name in ("valid_loss", "valid_accuracy"):
        plain |= {f"valid/{name.removeprefix('valid_')}_k{k}": value for k, value in record.get(name, {}).items()}
    plain |= {f"valid/error_k{k}": value for k, value in record.get("valid_error", {}).items()}
    return plain | {f"valid/bits_per_byte_k{k}": value for k, value in record.get("valid", {}).items()}
