"""A run directory read once, for a page: its journal in bounded memory, its newest events, what stands beside them."""

from __future__ import annotations

from collections import Counter, deque
from pathlib import Path
from typing import Any, NamedTuple

from megassm.report.history import History
from megassm.report.run_files import (
    check_run_directory,
    failure,
    planned_steps,
    read_environment,
    read_knobs,
    tokenizer_mark,
)
from megassm.run.console import duration
from megassm.run.directory import EVENTS, METRICS
from megassm.run.events import LIFE, WARNINGS, read_events
from megassm.run.lines import Record, Unread
from megassm.run.records import iterate_records

EVENTS_SHOWN = 200
"""Of each run, the newest."""


class LoadedRun(NamedTuple):
    """A run directory, read."""

    name: str
    history: History
    knobs: dict[str, Any]
    environment: dict[str, Any]
    events: list[Record]
    event_count: int
    event_kinds: Counter[str]
    """How many of each kind that is known."""
    failure: str
    tokenizer: str
    """Equal where nats a token are comparable."""
    unread: list[str]
    """What the journal and the events hold that could not be read, in words."""

    @property
    def state(self) -> str:
        """How far it is, in words."""
        newest, steps = self.history.newest, planned_steps(self.knobs)
        if self.failure:
            return f"failed: {self.failure}"
        if newest is None:
            return "no update yet"
        if steps is None or newest["step"] >= steps:
            return f"{newest['step']:,} updates done"
        left = (steps - newest["step"]) * (self.history.now("step_s") or 0.0)
        return f"{newest['step'] / steps:.0%} done, {duration(left)} of updates left"


def load_run(run_dir: Path, name: str) -> LoadedRun:
    """Reads a run in bounded memory.

    Raises:
        UserError: it is not a run directory.
    """
    check_run_directory(run_dir)
    journal = run_dir / METRICS
    rows, happened = Unread(journal), Unread(run_dir / EVENTS)
    history = History().extend(iterate_records(journal, rows) if journal.exists() else ())
    newest: deque[Record] = deque(maxlen=EVENTS_SHOWN)
    kinds: Counter[str] = Counter()
    count = 0
    for count, event in enumerate(read_events(run_dir, happened), start=1):  # noqa: B007
        newest.append(event)
        if (kind := event.get("kind")) in (*LIFE, *WARNINGS):
            kinds[str(kind)] += 1
    knobs, environment = read_knobs(run_dir), read_environment(run_dir)
    mark = tokenizer_mark(run_dir, knobs)
    unread = [lost.told for lost in (rows, happened) if lost.told]
    return LoadedRun(name, history, knobs, environment, list(newest), count, kinds, failure(run_dir), mark, unread)
