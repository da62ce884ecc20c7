"""Curves in characters: braille dots for a plot, blocks for a line of it and for bars."""

from __future__ import annotations

import math
from collections.abc import Sequence

BLOCKS = " ▁▂▃▄▅▆▇█"
EIGHTHS = " ▏▎▍▌▋▊▉█"
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
"""Of a braille character, by column and row."""


def curve(points: Sequence[tuple[float, float]], width: int, height: int) -> list[str]:
    """(x, y) as `height` lines of `width` braille characters, joined up and down, from the top; x need not be even."""
    cells = [[0] * width for _ in range(height)]
    finite = [(x, y) for x, y in points if math.isfinite(y)]
    if not finite:
        return [" " * width] * height
    (left, low), (right, high) = (tuple(end(values) for values in zip(*finite, strict=True)) for end in (min, max))
    columns: dict[int, list[float]] = {}
    for x, y in finite:
        columns.setdefault(_place(x, left, right, 2 * width), []).append(y)
    before = None
    for column in sorted(columns):
        rows = [_place(y, low, high, 4 * height) for y in columns[column]]
        rows += [] if before is None else [before]
        before = _place(columns[column][-1], low, high, 4 * height)
        for row in range(min(rows), max(rows) + 1):
            cells[height - 1 - row // 4][column // 2] |= DOTS[column % 2][3 - row % 4]
    return ["".join(chr(0x2800 + cell) if cell else " " for cell in line) for line in cells]


def sparkline(values: Sequence[float], width: int) -> str:
    """The newest `width` values as blocks, from the smallest to the largest of them."""
    shown = [value for value in values if math.isfinite(value)][-width:]
    if not shown:
        return ""
    low, high = min(shown), max(shown)
    return "".join(BLOCKS[1 + _place(value, low, high, len(BLOCKS) - 1)] for value in shown)


def bar(share: float, width: int) -> str:
    """A bar over `share` of the width."""
    eighths = round(8 * width * min(1.0, max(0.0, share)))
    whole, rest = divmod(eighths, 8)
    return ("█" * whole + (EIGHTHS[rest] if rest else "")).ljust(width)


def _place(value: float, low: float, high: float, places: int) -> int:
    """Which of `places` equal parts of low..high a value lies in; the middle where they are one."""
    if high <= low:
        return places // 2
    return min(places - 1, int((value - low) / (high - low) * places))
