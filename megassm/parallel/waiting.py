"""All ranks waiting together for their work in the background: each sees that the others live."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

from megassm.parallel.world import World, gather_rows

T = TypeVar("T")
POLL_S = 2.0
"""Between two looks of all ranks at each other."""


def wait_for_all(world: World, work: Future[T], place: str, headway: Callable[[], int], limit_s: float) -> list[int]:
    """Waits until every rank's `work` is done; `place` is noted as progress meanwhile, for it may take long.

    `headway` is a number that grows as long as this rank's work does not hang.

    Returns:
        The ranks whose headway has not grown for `limit_s`, on all ranks alike; empty if all are done.
    """
    moved, before = time.monotonic(), -1
    while True:
        world.progress.note(place)
        wait([work], timeout=POLL_S)
        if (now := headway()) != before:
            moved, before = time.monotonic(), now
        ranks = gather_rows([work.done(), time.monotonic() - moved])
        if all(done for done, _ in ranks):
            return []
        if stuck := [rank for rank, (done, still_s) in enumerate(ranks) if not done and still_s > limit_s]:
            return stuck
