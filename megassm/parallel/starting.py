"""What a start is at, said now and then until its first update is done: no minutes without a word."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from megassm.cli.arguments import is_rank_zero, print_line
from megassm.parallel.watchdog import RankProgress

FIRST_S = 15.0
"""After the start; then each time twice as long after it."""
LOOK_S = 0.5


@contextmanager
def told_until_first_update(progress: RankProgress) -> Iterator[None]:
    """The first rank prints where its main thread is, from a thread beside it."""
    over = threading.Event()
    if is_rank_zero():
        threading.Thread(target=_tell, args=(progress, over), name="start", daemon=True).start()
    try:
        yield
    finally:
        over.set()


def _tell(progress: RankProgress, over: threading.Event) -> None:
    began, due = time.monotonic(), FIRST_S
    while not over.wait(LOOK_S) and progress.steps_begun <= 1:
        now = time.monotonic()
        if now - began >= due:
            due *= 2
            mark = progress.mark
            place = f"step {mark.step}, {mark.place}" if mark.step else mark.place
            print_line(f"{now - began:.0f} s since the start, no update yet: in {place} for {now - mark.at:.0f} s")
