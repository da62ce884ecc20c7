"""Tasks that are drawn: recall, chains of it, the most frequent word, periods under noise. (More: `listops`, `paths`.)

Example i of a split is a function of (seed, split, i): more examples never change the first ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from megassm.data.task import Example, Ids, Task
from megassm.errors import UserError

Draw = Callable[[np.random.Generator], Example]
Size = int | tuple[int, int]
"""A number, or the least and the most of it: drawn for each example then, all as likely."""

FILLERS = 16
"""Symbols that a haystack is made of."""
LEVEL_RANGE = 3.0
"""Signals are cut to [-3, 3] of their standard deviations, and rounded to levels."""


def drawn(draw: Draw, count: int, seed: int, split: int) -> Iterator[Example]:
    """Examples 0 .. count - 1 of a split."""
    return (draw(np.random.default_rng((seed, split, number))) for number in range(count))


def bounds(size: Size) -> tuple[int, int]:
    """The least and the most."""
    return (size, size) if isinstance(size, int) else size


def drawn_size(random: np.random.Generator, size: Size) -> int:
    """Nothing is drawn where there is nothing to choose."""
    least, most = bounds(size)
    return least if least == most else int(random.integers(least, most + 1))


def shown_size(size: Size) -> str:
    """As the command line has it."""
    return f"{size}" if isinstance(size, int) else f"{size[0]}-{size[1]}"


def hidden(random: np.random.Generator, pairs_P2: Ids, haystack: Size, first: int) -> Ids:
    """The pairs in their order, each whole; anywhere among them ids from `first` on, which mean nothing."""
    pairs, count = len(pairs_P2), drawn_size(random, haystack)
    places_P = np.sort(random.permutation(count + pairs)[:pairs]) if count else np.arange(pairs)
    filler = random.integers(0, FILLERS, count) + first
    return np.insert(filler, np.repeat(places_P - np.arange(pairs), 2), pairs_P2.ravel())


def _fillers(*sizes: Size) -> tuple[str, ...]:
    """Names of the symbols of a haystack, where there is any."""
    return tuple(f"n{filler}" for filler in range(FILLERS)) if any(bounds(size)[1] for size in sizes) else ()


def _check_sizes(sizes: Mapping[str, Size]) -> None:
    for flag, size in sizes.items():
        if not 0 <= bounds(size)[0] <= bounds(size)[1]:
            raise UserError(f"{flag} {shown_size(size)}: give a number, or the least and the most, such as 4-16")


@dataclass(frozen=True)
class Recall:
    """Pairs of a key and a value, then keys of them in any order: what is asked are their values.

    Multi-query associative recall (Zoology, arXiv 2312.04927), the queries next to each other and none twice; with one
    pair or few in a haystack the needles of RULER (arXiv 2404.06654).
    """

    pairs: Size = 8
    queries: int = 4
    keys: int = 64
    values: int = 16
    gap: Size = 0
    """Ids that mean nothing, between what is shown and what is asked."""
    haystack: Size = 0
    """... among the pairs, before and after them, at random."""

    def __post_init__(self) -> None:
        _check_sizes({"--pairs": self.pairs, "--gap": self.gap, "--haystack": self.haystack})
        least, most = bounds(self.pairs)
        if not 1 <= self.queries <= least <= most <= self.keys:
            raise UserError(
                f"--queries {self.queries} --pairs {shown_size(self.pairs)} --keys {self.keys}: must not fall in this "
                "order, for no key comes twice and none is asked twice"
            )

    def task(self, length: int | None) -> Task:
        shown = 2 * bounds(self.pairs)[1] + bounds(self.gap)[1] + bounds(self.haystack)[1]
        answers = tuple(f"v{value}" for value in range(self.values))
        symbols = tuple(f"k{key}" for key in range(self.keys)) + _fillers(self.gap, self.haystack)
        return Task("recall", length or shown + 2 * self.queries + 2, answers, symbols, self.queries)

    def draw(self, task: Task) -> Draw:
        filler = task.first_symbol + self.keys

        def draw(random: np.random.Generator) -> Example:
            pairs = drawn_size(random, self.pairs)
            keys = random.permutation(self.keys)[:pairs] + task.first_symbol
            values = random.integers(0, self.values, pairs)
            asked = random.permutation(pairs)[: self.queries]
            shown = hidden(random, np.stack((keys, values), 1), self.haystack, filler)
            gap = random.integers(0, FILLERS, drawn_size(random, self.gap)) + filler
            return Example(np.concatenate((shown, gap)), np.stack((keys[asked], values[asked]), 1).ravel())

        return draw


@dataclass(frozen=True)
class Tracking:
    """Variables that are given values, and others that are given those variables: which values do the last ones have?

    A chain is `x v`, `y x`, `z y`, ..: `hops` pairs after its first, in this order, among those of the other chains
    and of a haystack. Variable tracking of RULER (arXiv 2404.06654), asked from the variable's end.
    """

    chains: Size = 4
    hops: Size = (0, 3)
    queries: int = 4
    keys: int = 64
    values: int = 16
    haystack: Size = 0

    def __post_init__(self) -> None:
        _check_sizes({"--chains": self.chains, "--hops": self.hops, "--haystack": self.haystack})
        least, most = bounds(self.chains)
        if not 1 <= self.queries <= least or most * (1 + bounds(self.hops)[1]) > self.keys:
            raise UserError(
                f"--queries {self.queries} --chains {shown_size(self.chains)} --hops {shown_size(self.hops)} --keys "
                f"{self.keys}: no more queries than chains, and a key for each variable: chains times hops + 1"
            )

    def task(self, length: int | None) -> Task:
        shown = 2 * bounds(self.chains)[1] * (1 + bounds(self.hops)[1]) + bounds(self.haystack)[1]
        answers = tuple(f"v{value}" for value in range(self.values))
        symbols = tuple(f"k{key}" for key in range(self.keys)) + _fillers(self.haystack)
        return Task("tracking", length or shown + 2 * self.queries + 2, answers, symbols, self.queries)

    def draw(self, task: Task) -> Draw:
        filler = task.first_symbol + self.keys

        def draw(random: np.random.Generator) -> Example:
            chains, steps = drawn_size(random, self.chains), drawn_size(random, self.hops) + 1
            names_CN = random.permutation(self.keys)[: chains * steps].reshape(chains, steps) + task.first_symbol
            values = random.integers(0, self.values, chains)
            sources_CN = np.concatenate((values[:, None], names_CN[:, :-1]), 1)
            order = random.permutation(np.repeat(np.arange(chains), steps))  # whose next pair it is
            step_of = np.empty_like(order)
            for chain in range(chains):
                step_of[order == chain] = np.arange(steps)
            pairs = np.stack((names_CN[order, step_of], sources_CN[order, step_of]), 1)
            asked = random.permutation(chains)[: self.queries]
            answers = np.stack((names_CN[asked, -1], values[asked]), 1).ravel()
            return Example(hidden(random, pairs, self.haystack, filler), answers)

        return draw


@dataclass(frozen=True)
class Frequent:
    """Words, of which one comes more often than any other: which?

    Their frequencies fall as 1 / rank, over ranks drawn for each example. Frequent words of RULER (arXiv 2404.06654),
    which asks for three.
    """

    words: int = 16
    shown: Size = 64

    def __post_init__(self) -> None:
        _check_sizes({"--shown": self.shown})
        if self.words < 2 or bounds(self.shown)[0] < 1:
            raise UserError(f"--words {self.words} --shown {shown_size(self.shown)}: at least 2 words, and 1 shown")

    def task(self, length: int | None) -> Task:
        answers = tuple(f"w{word}" for word in range(self.words))
        return Task("frequent", length or bounds(self.shown)[1] + 3, answers, ())

    def draw(self, task: Task) -> Draw:
        share = 1 / np.arange(1, self.words + 1)
        share /= share.sum()

        def draw(random: np.random.Generator) -> Example:
            count, names = drawn_size(random, self.shown), random.permutation(self.words)
            while True:
                seen = names[random.choice(self.words, count, p=share)]
                often = np.bincount(seen, minlength=self.words)
                if np.count_nonzero(often == often.max()) == 1:
                    return Example(seen, np.array([often.argmax()]))

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
