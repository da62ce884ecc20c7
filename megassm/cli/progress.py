"""How far a long tool is: a bar with rate and time left on a terminal, a plain line now and then elsewhere.

Always on stderr: stdout belongs to results.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

LINE_EVERY_S = 15.0


class Progress(Protocol):
    """Where long work says how far it is."""

    def start(self, phase: str, total_bytes: int) -> None:
        """A phase begins."""

    def update(self, done_bytes: int) -> None:
        """So much of the phase is done."""

    def note(self, message: str) -> None:
        """Something the user should know."""


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """Progress as the terminal, or the log file, in place of stderr allows."""
    if not sys.stderr.isatty():
        yield Lines()
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description:8}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        yield _Bar(bar)


class Lines:
    """A line every so often; nothing for work that is done before the first is due."""

    def __init__(self, every_s: float = LINE_EVERY_S) -> None:
        self._every_s = every_s
        self.start("", 0)

    def start(self, phase: str, total_bytes: int) -> None:
        self._phase, self._total_bytes = phase, total_bytes
        self._started = self._last_line = time.monotonic()

    def update(self, done_bytes: int) -> None:
        now = time.monotonic()
        if now - self._last_line < self._every_s:
            return
        self._last_line = now
        rate = done_bytes / (now - self._started)
        left = f"{(self._total_bytes - done_bytes) / rate:,.0f} s left" if rate else "time left unknown"
        done = f"{done_bytes / 1e6:,.1f} of {self._total_bytes / 1e6:,.1f} MB"
        self.note(f"{self._phase}: {done}, {rate / 1e6:,.2f} MB/s, {left}")

    def note(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)


class _Bar:
    """Phases of work as rich's bars."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._task = bar.add_task("", visible=False)

    def start(self, phase: str, total_bytes: int) -> None:
        self._task = self._bar.add_task(phase, total=total_bytes)

    def update(self, done_bytes: int) -> None:
        self._bar.update(self._task, completed=done_bytes)

    def note(self, message: str) -> None:
        self._bar.console.print(message, markup=False, highlight=False)
