"""What passes of a model take on this machine at this moment: timed, and kept up to date while they are made."""

from __future__ import annotations

import math
import statistics
from collections import deque
from typing import Literal

Kind = Literal["step", "read", "verify"]
"""One token of each of so many texts; so many tokens of a prompt; so many tokens of each text, from its state."""

REMEMBERED = 15
"""Newest timings of a kind that count."""


class Costs:
    """Seconds of passes by kind, K and size: the median of the newest timings, which passes over a hiccup."""

    def __init__(self) -> None:
        self._timings: dict[tuple[Kind, int, int], deque[float]] = {}
        self._medians: dict[tuple[Kind, int, int], float] = {}

    def add(self, kind: Kind, k: int, size: int, seconds: float) -> None:
        """A pass at K was timed; `size` as its kind says."""
        timings = self._timings.setdefault((kind, k, size), deque(maxlen=REMEMBERED))
        timings.append(seconds)
        self._medians[kind, k, size] = statistics.median(timings)

    def count(self, kind: Kind, k: int, size: int) -> int:
        """How many timings of such a pass are remembered."""
        return len(self._timings.get((kind, k, size), ()))

    def seconds(self, kind: Kind, k: int, size: int) -> float:
        """Of one pass; of the nearest size, as a ratio, where this one was never timed.

        Raises:
            KeyError: nothing of this kind was timed at K.
        """
        if (kind, k, size) not in self._medians:
            known = [other for name, at, other in self._timings if (name, at) == (kind, k)]
            if not known:
                raise KeyError(f"no {kind} at K = {k} was timed")
            size = min(known, key=lambda other: abs(math.log(other / size)))
        return self._medians[kind, k, size]


def power_of_two(size: int) -> int:
    """The smallest at or above `size`: sizes that may be taken for one another."""
    return 1 << max(0, size - 1).bit_length()
