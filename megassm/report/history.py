"""A run's journal in bounded memory, however long it is: means over spans of rows, the newest rows, all validations.

A span covers one row at first; whenever there are `2 * SPANS` of them, neighbours are merged and later spans cover
twice as many rows.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megassm.run.records import Row

SPANS = 500
RECENT = 50
"""Rows that "now" is the median of."""
OTHER_SHARE = 0.01
VALIDATIONS = 400
"""Kept at most; every second of the older ones goes first."""
FIGURES = (
    "loss", "bits_per_byte", "grad_norm", "lr", "tokens_per_s", "mfu", "step_s", "data_wait_s", "peak_memory_bytes",
    "k",
)  # fmt: skip


@dataclass
class Span:
    """Neighbouring rows."""

    step: int
    """Of the last row, as are the tokens."""
    tokens: int
    rows: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    low: float = float("inf")
    """Of the loss."""
    high: float = float("-inf")

    def add(self, name: str, value: float, count: int = 1) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + value
        self.counts[name] = self.counts.get(name, 0) + count

    def take(self, later: Span) -> None:
        """Merges the span that follows into this one."""
        self.step, self.tokens, self.rows = later.step, later.tokens, self.rows + later.rows
        self.low, self.high = min(self.low, later.low), max(self.high, later.high)
        for name, value in later.sums.items():
            self.add(name, value, later.counts[name])

    def mean(self, name: str) -> float | None:
        return self.sums[name] / self.counts[name] if name in self.sums else None


BITS, ANSWERS = "bits per byte", "nats an answer"
"""What is validated: a text, or a task. Of both, less is better."""


class History:
    """What was added, row by row in order."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.recent: deque[Row] = deque(maxlen=RECENT)
        self.validations: list[tuple[int, int, dict[int, float]]] = []
        """(step, tokens, what is `validated` by K)."""
        self.validated = BITS
        self.rows = self.skipped = 0
        self.seconds = 0.0
        self.phases: list[str] = []
        """Names, in the journal's order, where updates were timed by phase."""
        self._rows_per_span = 1

    def extend(self, rows: Iterable[Row]) -> History:
        for row in rows:
            self.add(row)
        return self

    def add(self, row: Row) -> None:
        """Takes a row of any version of the journal; what it lacks is missing."""
        self.rows += 1
        self.skipped += bool(row.get("skipped"))
        self.seconds += row.get("step_s") or 0.0
        self.recent.append(row)
        self._add_to_span(row)
        if row.get("valid_loss"):
            self.validated = ANSWERS
        by_k = row.get("valid") or row.get("valid_loss") or {}
        if valid := {int(k): value for k, value in by_k.items() if value is not None}:
            self.validations.append((row["step"], row.get("tokens", 0), valid))
            if len(self.validations) > VALIDATIONS:
                self.validations = self.validations[:-1:2] + self.validations[-1:]

    @property
    def newest(self) -> Row | None:
        return self.recent[-1] if self.recent else None

    def now(self, name: str) -> float | None:
        """The median of the newest rows."""
        values = [value for row in self.recent if (value := row.get(name)) is not None]
        return statistics.median(values) if values else None

    def phase_shares(self, rows: Iterable[Row]) -> dict[str, float]:
        """Of the rows' time, by phase, and "other" where that is worth a word. Empty where phases were not timed."""
        timed = [row for row in rows if row.get("phases_s")]
        total = sum(row["step_s"] for row in timed)
        if not total:
            return {}
        shares = {name: sum(row["phases_s"].get(name, 0.0) for row in timed) / total for name in self.phases}
        other = 1 - sum(shares.values())
        return shares | ({"other": other} if other > OTHER_SHARE else {})

    def series(self, name: str) -> list[tuple[Span, float]]:
        """(span, mean of the figure there), where it has one."""
        return [(span, mean) for span in self.spans if (mean := span.mean(name)) is not None]

    def _add_to_span(self, row: Row) -> None:
        if not self.spans or self.spans[-1].rows >= self._rows_per_span:
            self.spans.append(Span(0, 0))
        span = self.spans[-1]
        span.step, span.tokens, span.rows = row["step"], row.get("tokens", 0), span.rows + 1
        for name, value in _figures(row, self.phases):
            span.add(name, value)
        loss = row.get("loss")
        if loss is not None:
            span.low, span.high = min(span.low, loss), max(span.high, loss)
        if len(self.spans) == 2 * SPANS and span.rows == self._rows_per_span:
            for first, second in zip(self.spans[::2], self.spans[1::2], strict=True):
                first.take(second)
            self.spans = self.spans[::2]
            self._rows_per_span *= 2


def _figures(row: Mapping[str, Any], phases: list[str]) -> Iterable[tuple[str, float]]:
    for name in FIGURES:
        if (value := row.get(name)) is not None:
            yield name, value
    for name, seconds in (row.get("phases_s") or {}).items():
        if name not in phases:
            phases.append(name)
        yield f"phases_s/{name}", seconds
