"""What a plot shows, as plain values: drawn by a page's script (`megassm.report.html`) and by matplotlib alike."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

LIGHT = ("#0072b2", "#d55e00", "#2ca05a", "#882255", "#8c8c8c", "#111111")
DARK = ("#56b4e9", "#e69f00", "#009e73", "#c04fb0", "#b0a060", "#f5f5f5")
"""Of lines that have no order, on light and on dark paper: told apart with every kind of colour blindness, and with a
contrast of at least 3 to the paper (docs/LOG.md has the figures; a test holds them)."""
LIGHT_RAMP, DARK_RAMP = ("#3b0f70", "#0072b2", "#2a9d74", "#a87400"), ("#ffe38a", "#5fd3a4", "#3fa7e8", "#a779e6")
"""Of lines in an order, such as budgets: the ends of three equal parts."""

SMOOTHED_FROM = 100
"""Points of a line from which on its running mean is drawn ..."""
SMOOTHED_SHARE = 80
"""... over this part of them to either side."""
DESCRIBED_LINES = 8
"""At most, in the words that stand for a plot."""

Values = Sequence[float | None]


class Line(NamedTuple):
    """One line of a plot; its sequences are equally long."""

    label: str
    x: Mapping[str, Sequence[float]]
    """Increasing values by the axis: one that is fixed, or several that a reader chooses from."""
    y: Values
    low: Values = ()
    high: Values = ()
    """The ends of a band around it."""
    raw: Values = ()
    """What `y` is a running mean of: drawn faintly."""
    place: float | None = None
    """From 0 to 1 where lines have an order, such as budgets."""


class Chart(NamedTuple):
    """One plot."""

    title: str
    y_label: str
    lines: Sequence[Line]
    band: str = ""
    """What the bands enclose."""
    kind: Literal["lines", "stack"] = "lines"
    from_zero: bool = False
    log_y: bool = False
    """To begin with; a reader may change it."""
    ticks: Sequence[int] = ()
    """Of an x axis in doublings."""
    mark: tuple[float, str] | None = None
    """An x that is worth a vertical line, and why."""

    @property
    def axes(self) -> list[str]:
        """What the x axis may show."""
        return list(self.lines[0].x)


def smoothed(values: Values, share: int = SMOOTHED_SHARE) -> tuple[Values, Values]:
    """(the running mean, the values themselves) where they are many; else (the values, nothing)."""
    if len(values) < min(SMOOTHED_FROM, 2 * share):
        return values, ()
    reach = len(values) // share
    sums = [0.0, *accumulate(0.0 if value is None else value for value in values)]
    counts = [0, *accumulate(int(value is not None) for value in values)]
    means: list[float | None] = []
    for place, value in enumerate(values):
        first, last = max(0, place - reach), min(len(values), place + reach + 1)
        known = value is not None and counts[last] > counts[first]
        means.append((sums[last] - sums[first]) / (counts[last] - counts[first]) if known else None)
    return means, values


def places(count: int) -> list[float]:
    """So many places from 0 to 1, in equal distances."""
    return [place / max(1, count - 1) for place in range(count)]


def ramp(colours: Sequence[str], place: float) -> str:
    """The colour at a place of 0..1 between equally far ones."""
    at = place * (len(colours) - 1)
    first = min(int(at), len(colours) - 2)
    ends = [[int(colour[i : i + 2], 16) for i in (1, 3, 5)] for colour in colours[first : first + 2]]
    return "#" + "".join(f"{round(a + (at - first) * (b - a)):02x}" for a, b in zip(*ends, strict=True))


def budget_ticks(values: Sequence[int]) -> list[int]:
    """Ticks at increasing values, but for those too near to the next."""
    ticks = [values[-1]]
    for value in reversed(values):
        if value <= ticks[-1] / 1.3:
            ticks.append(value)
    return ticks[::-1]


def in_words(chart: Chart) -> str:
    """What a reader who does not see the plot is told: each line's ends and extremes."""
    said = [f"{chart.title}: {chart.y_label} over {' or '.join(chart.axes)}."]
    for line in chart.lines[:DESCRIBED_LINES]:
        axis = next(iter(line.x))
        known = [(x, y) for x, y in zip(line.x[axis], line.y, strict=True) if y is not None and math.isfinite(y)]
        if known:
            (first, start), (last, end) = known[0], known[-1]
            low, high = (edge(y for _, y in known) for edge in (min, max))
            ends = f"{start:.4g} at {axis} {first:,.6g}, {end:.4g} at {last:,.6g}"
            said.append(f"{line.label}: {ends}; lowest {low:.4g}, highest {high:.4g}.")
    if len(chart.lines) > DESCRIBED_LINES:
        said.append(f"And {len(chart.lines) - DESCRIBED_LINES} more.")
    return " ".join(said)
