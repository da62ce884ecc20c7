"""How far a long tool is: a bar with rate and time left on a terminal, a plain line now and then elsewhere.

Always on stderr: stdout belongs to results.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Protocol, TypeVar

from megassm.errors import visible

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

LINE_EVERY_S = 15.0
BYTES = "bytes"

T = TypeVar("T")


class Progress(Protocol):
    """Takes reports of how far long work has come."""

    def start(self, phase: str, total: float, unit: str = BYTES) -> None:
        """A phase of `total` units begins; the unit is a plural noun."""

    def update(self, done: float) -> None:
        """`done` units of the phase are complete."""

    def busy(self, phase: str) -> AbstractContextManager[None]:
        """A phase of unknown length."""

    def note(self, message: str) -> None:
        """Something the user should know."""


class Silent:
    """Prints nothing: for callers that show no progress, and for ranks other than 0."""

    def start(self, phase: str, total: float, unit: str = BYTES) -> None: ...

    def update(self, done: float) -> None: ...

    def busy(self, phase: str) -> AbstractContextManager[None]:
        return nullcontext()

    def note(self, message: str) -> None: ...


@contextmanager
def shown_progress(shown: bool = True) -> Iterator[Progress]:
    """Progress as the terminal, or the log file, in place of stderr allows; none where it is not to be `shown`."""
    if not shown:
        yield Silent()
        return
    if not sys.stderr.isatty():
        yield LineProgress()
        return
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description:8}"),
        progress.BarColumn(),
        progress.TextColumn("{task.fields[done]}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("{task.fields[left]}"),
    )
    with progress.Progress(*columns, console=Console(stderr=True)) as bar:
        yield _Bar(bar)


SILENT = Silent()


def tracked(items: Iterable[T], progress: Progress, phase: str, total: int, unit: str) -> Iterator[T]:
    """The items, each counted when the next is asked for."""
    progress.start(phase, total, unit)
    for done, item in enumerate(items, start=1):
        yield item
        progress.update(done)


class _Rate:
    """A phase's size, speed and time left, in words."""

    def __init__(self, total: float, unit: str) -> None:
        self._total, self._unit, self._began = total, unit, time.monotonic()

    def words(self, done: float) -> tuple[str, str]:
        """("2.0 of 8.0 MB, 0.20 MB/s", "30 s left")."""
        rate = done / max(time.monotonic() - self._began, 1e-9)
        left = f"{max(0.0, self._total - done) / rate:,.0f} s left" if rate else "time left unknown"
        if self._unit == BYTES:
            return f"{done / 1e6:,.1f} of {self._total / 1e6:,.1f} MB, {rate / 1e6:,.2f} MB/s", left
        return f"{done:,.0f} of {self._total:,.0f} {self._unit}, {rate:,.2g} {self._unit}/s", left


class LineProgress:
    """A line every so often; nothing for work that is done before the first is due."""

    def __init__(self, every_s: float = LINE_EVERY_S) -> None:
        self._every_s = every_s
        self.start("", 0)

    def start(self, phase: str, total: float, unit: str = BYTES) -> None:
        self._phase, self._rate = phase, _Rate(total, unit)
        self._last_line = time.monotonic()

    def update(self, done: float) -> None:
        now = time.monotonic()
        if now - self._last_line < self._every_s:
            return
        self._last_line = now
        self.note(f"{self._phase}: {', '.join(self._rate.words(done))}")

    @contextmanager
    def busy(self, phase: str) -> Iterator[None]:
        over, began = threading.Event(), time.monotonic()

        def tell() -> None:
            while not over.wait(self._every_s):
                self.note(f"{phase}: {time.monotonic() - began:,.0f} s so far")

        teller = threading.Thread(target=tell, daemon=True)
        teller.start()
        try:
            yield
        finally:
            over.set()
            teller.join()

    def note(self, message: str) -> None:
        print(visible(message), file=sys.stderr, flush=True)


class _Bar:
    """Phases of work as rich's bars."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._task: TaskID | None = None

    def start(self, phase: str, total: float, unit: str = BYTES) -> None:
        self._rate = _Rate(total, unit)
        self._task = self._bar.add_task(phase, total=total, done="", left="")

    def update(self, done: float) -> None:
        assert self._task is not None, "start comes first"
        words, left = self._rate.words(done)
        self._bar.update(self._task, completed=done, done=words, left=left)

    @contextmanager
    def busy(self, phase: str) -> Iterator[None]:
        task = self._bar.add_task(phase, total=None, done="", left="")
        yield
        self._bar.update(task, total=1, completed=1)

    def note(self, message: str) -> None:
        self._bar.console.print(visible(message), markup=False, highlight=False)
