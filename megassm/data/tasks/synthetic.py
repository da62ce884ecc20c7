"""Tasks that are drawn: associative recall, and periods of a few steps under noise. (ListOps: `listops`.)

Example i of a split is a function of (seed, split, i): more examples never change the first ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from megassm.data.task import Example, Task
from megassm.errors import UserError

Draw = Callable[[np.random.Generator], Example]

LEVEL_RANGE = 3.0
"""Signals are cut to [-3, 3] of their standard deviations, and rounded to levels."""


def drawn(draw: Draw, count: int, seed: int, split: int) -> Iterator[Example]:
    """Examples 0 .. count - 1 of a split."""
    return (draw(np.random.default_rng((seed, split, number))) for number in range(count))


@dataclass(frozen=True)
class Recall:
    """Pairs of a key and a value, then keys of them in any order: what is asked are their values.

    Multi-query associative recall (Zoology, arXiv 2312.04927), the queries next to each other and none twice.
    """

    pairs: int = 8
    queries: int = 4
    keys: int = 64
    values: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.queries <= self.pairs <= self.keys:
            raise UserError(
                f"--queries {self.queries} --pairs {self.pairs} --keys {self.keys}: must not fall in this order, for "
                "no key comes twice and none is asked twice"
            )

    def task(self, length: int | None) -> Task:
        least = 2 * self.pairs + 2 * self.queries + 2
        answers = tuple(f"v{value}" for value in range(self.values))
        symbols = tuple(f"k{key}" for key in range(self.keys))
        return Task("recall", length or least, answers, symbols, self.queries)

    def draw(self, task: Task) -> Draw:
        def draw(random: np.random.Generator) -> Example:
            keys = random.permutation(self.keys)[: self.pairs] + task.first_symbol
            values = random.integers(0, self.values, self.pairs)
            asked = random.permutation(self.pairs)[: self.queries]
            return Example(np.stack((keys, values), 1).ravel(), np.stack((keys[asked], values[asked]), 1).ravel())

        return draw


@dataclass(frozen=True)
class HighFrequency:
    """Cosines of periods 2 .. 8 steps at random phases, each of unit power, under white noise: which periods?

    Their power is at 1/8 cycle a step and above, where the leading spectral filters, which are smooth, respond least.
    """

    signals: int = 1
    noise: float = 1.0
    """Standard deviation; 1 is the signal's own."""
    levels: int = 16
    first: int = 2
    last: int = 8

    def __post_init__(self) -> None:
        if not 2 <= self.first <= self.last or not 1 <= self.signals <= self.last - self.first + 1:
            raise UserError(
                f"--periods {self.first}-{self.last} --signals {self.signals}: periods are at least 2 steps, and a "
                "signal has each once at most"
            )

    @property
    def classes(self) -> list[tuple[int, ...]]:
        return list(combinations(range(self.first, self.last + 1), self.signals))

    def task(self, length: int | None) -> Task:
        answers = tuple("+".join(f"p{period}" for period in periods) for periods in self.classes)
        return Task("high_frequency", length or 128, answers, tuple(str(level) for level in range(self.levels)))

    def draw(self, task: Task) -> Draw:
        classes, steps = self.classes, np.arange(task.length - 3)

        def draw(random: np.random.Generator) -> Example:
            label = int(random.integers(len(classes)))
            signal = self.noise * random.standard_normal(steps.size)
            for period in classes[label]:
                wave = np.cos(2 * np.pi * steps / period + random.uniform(0, 2 * np.pi))
                signal += wave / np.sqrt(np.mean(wave**2))
            signal /= np.sqrt(self.signals + self.noise**2)
            levels = np.floor((np.clip(signal / LEVEL_RANGE, -1, 1) + 1) / 2 * (self.levels - 1) + 0.5).astype(np.int64)
            return Example(levels + task.first_symbol, np.array([label]))

        return draw
