"""What a live run is at: followed from its files, at any moment ready to be drawn."""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path
from typing import Any, Literal

from megassm.report.follow import FollowedFile
from megassm.report.history import History
from megassm.report.run_files import age_s, failure, planned_steps, read_environment, read_knobs
from megassm.run.directory import CONFIG, EVENTS, METRICS
from megassm.run.events import is_event
from megassm.run.lines import Record, Unread
from megassm.run.records import is_record

EVENTS_KEPT = 200
STALL_MIN_S = 60.0
"""A run without a new record for this long, and for `STALL_UPDATES` updates, is called stalled."""
STALL_UPDATES = 5

State = Literal["not started", "starting", "running", "stalled", "finished", "failed"]


class LiveRun:
    """A run directory, followed by `look`."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.history = History()
        self.events: deque[Record] = deque(maxlen=EVENTS_KEPT)
        self.knobs: dict[str, Any] = {}
        self.environment: dict[str, Any] = {}
        self._records = FollowedFile(run_dir / METRICS, is_record)
        self._happened = FollowedFile(run_dir / EVENTS, is_event)
        self._looked = 0.0

    def look(self) -> LiveRun:
        """Takes what is new, at most `tail.READ_BYTES` of it; `read_share` says how much of the journal is read."""
        restarted, records = self._records.read()
        if restarted:
            self.history = History()
        self.history.extend(records)
        restarted, events = self._happened.read()
        if restarted:
            self.events.clear()
        self.events.extend(events)
        self.knobs, self.environment = read_knobs(self.run_dir), read_environment(self.run_dir)
        self._looked = time.time()
        return self

    @property
    def read_share(self) -> float:
        return self._records.share

    @property
    def unread(self) -> list[Unread]:
        """Of the journal and the events, where a line of them is not whole."""
        return [file.unread for file in (self._records, self._happened) if file.unread.numbers]

    @property
    def steps(self) -> int | None:
        """Planned updates."""
        return planned_steps(self.knobs)

    @property
    def age_s(self) -> float | None:
        """Seconds since the last record, before the first one since the run's start; None if neither is known."""
        return age_s(self.run_dir / (METRICS if self.history.records else CONFIG), self._looked)

    @property
    def failure(self) -> str:
        return failure(self.run_dir)

    @property
    def state(self) -> State:
        """Judged by the files alone: the run may be on another machine."""
        newest, age = self.history.newest, self.age_s
        if self.failure:
            return "failed"
        if newest is None:
            return "not started" if age is None else "starting"
        if self.steps is not None and newest["step"] >= self.steps:
            return "finished"
        limit = max(STALL_MIN_S, STALL_UPDATES * (self.history.now("step_s") or 0.0))
        return "stalled" if age is not None and age > limit else "running"

    @property
    def left_s(self) -> float | None:
        """Seconds to the last update at the newest updates' pace."""
        newest, pace = self.history.newest, self.history.now("step_s")
        return None if newest is None or pace is None or self.steps is None else (self.steps - newest["step"]) * pace
