"""A run's journal in bounded memory, however long it is: means over spans of records, the newest, all validations.

A span covers one record at first; whenever there are `2 * SPANS` of them, neighbours are merged and later spans cover
twice as many records.
"""

from __future__ import annotations

import bisect
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from megassm.run.lines import Record

SPANS = 500
RECENT = 50
"""Records that "now" is the median of."""
OTHER_SHARE = 0.01
VALIDATIONS = 400
"""Kept at most; every second of the older ones goes first."""
DRAWN = 40
"""Budgets at most whose training loss is kept apart."""
MOST_PHASES = 50
FIGURES = (
    "loss", "bits_per_byte", "grad_norm", "lr", "tokens_per_s", "mfu", "step_s", "data_wait_s", "peak_memory_bytes",
    "k",
)  # fmt: skip


@dataclass
class Span:
    """Neighbouring records."""

    step: int
    """Of the last record, as are the tokens."""
    tokens: int
    records: int = 0
    seconds: float = 0.0
    """Inside updates, from the run's first to this last record."""
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
        self.step, self.tokens, self.records = later.step, later.tokens, self.records + later.records
        self.seconds = later.seconds
        self.low, self.high = min(self.low, later.low), max(self.high, later.high)
        for name, value in later.sums.items():
            self.add(name, value, later.counts[name])

    def mean(self, name: str) -> float | None:
        return self.sums[name] / self.counts[name] if name in self.sums else None


BITS, ANSWERS = "bits per byte", "nats an answer"
"""What is validated: a text, or a task. Of both, less is better."""


class History:
    """What was added, record by record in order."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.recent: deque[Record] = deque(maxlen=RECENT)
        self.validations: list[tuple[int, int, dict[int, float]]] = []
        """(step, tokens, what is `validated` by K)."""
        self.errors: dict[int, float] = {}
        """Standard errors of the newest validation by K, over its sequences; older journals have none."""
        self.validated = BITS
        self.records = self.skipped = 0
        self.seconds = 0.0
        self.phases: list[str] = []
        """Names, in the journal's order, where updates were timed by phase."""
        self.drawn: list[int] = []
        """Every K, increasing, at which all micro-steps of some update were."""
        self._records_per_span = 1

    def extend(self, records: Iterable[Record]) -> History:
        for record in records:
            self.add(record)
        return self

    def add(self, record: Record) -> None:
        """Takes a record of any version of the journal; what it lacks is missing."""
        self.records += 1
        self.skipped += bool(record.get("skipped"))
        self.seconds += record.get("step_s") or 0.0
        self.recent.append(record)
        self._add_to_span(record)
        if record.get("valid_loss"):
            self.validated = ANSWERS
        by_k = record.get("valid") or record.get("valid_loss") or {}
        if valid := {int(k): value for k, value in by_k.items() if value is not None}:
            errors = record.get("valid_error") or {}
            self.errors = {int(k): value for k, value in errors.items() if value is not None}
            self.validations.append((record["step"], record.get("tokens", 0), valid))
            if len(self.validations) > VALIDATIONS:
                self.validations = self.validations[:-1:2] + self.validations[-1:]

    def seconds_at(self, step: int) -> float:
        """Inside updates, until the end of the span that an update belongs to."""
        place = bisect.bisect_left(self.spans, step, key=lambda span: span.step)
        return self.spans[min(place, len(self.spans) - 1)].seconds

    @property
    def newest(self) -> Record | None:
        return self.recent[-1] if self.recent else None

    def now(self, name: str) -> float | None:
        """The median of the newest records."""
        values = [value for record in self.recent if (value := record.get(name)) is not None]
        return statistics.median(values) if values else None

    def spread(self, name: str) -> tuple[float, float]:
        """The middle 90% of the newest records; call it where `now` has a value."""
        values = sorted(value for record in self.recent if (value := record.get(name)) is not None)
        edge = len(values) // 20
        return values[edge], values[-1 - edge]

    def phase_shares(self, records: Iterable[Record]) -> dict[str, float]:
        """Of the records' time, by phase, and "other" where that is worth a word. Empty where phases were not timed."""
        timed = [record for record in records if record.get("phases_s") and record.get("step_s")]
        total = sum(record["step_s"] for record in timed)
        if not total:
            return {}
        shares = {name: sum(record["phases_s"].get(name, 0.0) for record in timed) / total for name in self.phases}
        other = 1 - sum(shares.values())
        return shares | ({"other": other} if other > OTHER_SHARE else {})

    def series(self, name: str) -> list[tuple[Span, float]]:
        """(span, mean of the figure there), where it has one."""
        return [(span, mean) for span in self.spans if (mean := span.mean(name)) is not None]

    def _add_to_span(self, record: Record) -> None:
        if not self.spans or self.spans[-1].records >= self._records_per_span:
            self.spans.append(Span(0, 0))
        span = self.spans[-1]
        span.step, span.tokens, span.records = record["step"], record.get("tokens", 0), span.records + 1
        span.seconds = self.seconds
        for name, value in _figures(record, self.phases):
            span.add(name, value)
        bits, k = record.get("bits_per_byte"), _only_budget(record)
        if bits is not None and k is not None and (k in self.drawn or len(self.drawn) < DRAWN):
            span.add(f"bits_per_byte/{k}", bits)
            if k not in self.drawn:
                bisect.insort(self.drawn, k)
        loss = record.get("loss")
        if loss is not None:
            span.low, span.high = min(span.low, loss), max(span.high, loss)
        if len(self.spans) == 2 * SPANS and span.records == self._records_per_span:
            for first, second in zip(self.spans[::2], self.spans[1::2], strict=True):
                first.take(second)
            self.spans = self.spans[::2]
            self._records_per_span *= 2


def _only_budget(record: Mapping[str, Any]) -> int | None:
    """The K of all micro-steps, where it is one."""
    drawn = record.get("k_micro")
    if not isinstance(drawn, list) or not drawn or drawn.count(drawn[0]) < len(drawn) or type(drawn[0]) is not int:
        return None
    return drawn[0]


def _figures(record: Mapping[str, Any], phases: list[str]) -> Iterable[tuple[str, float]]:
    for name in FIGURES:
        if (value := record.get(name)) is not None:
            yield name, value
    for name, seconds in (record.get("phases_s") or {}).items():
        if name not in phases and len(phases) < MOST_PHASES:
            phases.append(name)
        if name in phases:
            yield f"phases_s/{name}", seconds
