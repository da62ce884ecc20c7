"""ListOps: nested lists of digits under MAX, MIN, MED and SM (sum modulo 10), and their value.

    [MAX 4 [SM 7 5 ] 0 ]  =>  4

Grammar: Nangia and Bowman, arXiv 1804.06028. Sizes: Long Range Arena, arXiv 2011.04006: 500 to 2000 tokens, at most 10
arguments and 10 levels of nesting, of which the last holds digits only; an argument is a list with probability 1/4.
MED of an even number of arguments is the mean of the middle two, rounded down.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from megassm.data.task import Example, Task, fitting
from megassm.errors import UserError

OPERATORS: dict[str, Callable[[Sequence[int]], int]] = {
    "[MAX": max,
    "[MIN": min,
    "[MED": lambda values: (sorted(values)[(len(values) - 1) // 2] + sorted(values)[len(values) // 2]) // 2,
    "[SM": lambda values: sum(values) % 10,
}
END = "]"
DIGITS = tuple("0123456789")
SYMBOLS = (*OPERATORS, END, *DIGITS)
NUMBERS = {symbol: number for number, symbol in enumerate(SYMBOLS)}
LIST_PROBABILITY = 0.25
MOST_DRAWS = 20_000


class _TooLongError(Exception):
    pass


@dataclass(frozen=True)
class ListOps:
    """Which expressions: lengths in tokens, arguments of a list, levels of nesting."""

    min_length: int = 500
    max_length: int = 2000
    max_args: int = 10
    max_depth: int = 10

    def __post_init__(self) -> None:
        if self.max_args < 2 or self.max_depth < 2 or not 4 <= self.min_length <= self.max_length:
            raise UserError(
                f"--min-length {self.min_length} --max-length {self.max_length} --max-args {self.max_args} --max-depth "
                f"{self.max_depth}: lengths of at least 4, in this order; at least 2 arguments and 2 levels"
            )

    def task(self, length: int | None) -> Task:
        return Task("listops", length or fitting(self.max_length), DIGITS, SYMBOLS)

    def draw(self, task: Task) -> Callable[[np.random.Generator], Example]:
        def draw(generator: np.random.Generator) -> Example:
            chance = random.Random(int(generator.integers(2**63)))
            tokens, value = self.expression(chance)
            ids = np.array([NUMBERS[token] for token in tokens]) + task.first_symbol
            return Example(ids, np.array([value]))

        return draw

    def expression(self, chance: random.Random) -> tuple[list[str], int]:
        """(the tokens of an expression of the wanted length, its value): drawn until one has it.

        Raises:
            UserError: hardly any, or none, has.
        """
        for _ in range(MOST_DRAWS):
            tokens: list[str] = []
            try:
                value = self._list(chance, 1, tokens)
            except _TooLongError:
                continue
            if len(tokens) >= self.min_length:
                return tokens, value
        raise UserError(
            f"--min-length {self.min_length} --max-length {self.max_length}: none of {MOST_DRAWS:,} expressions of up "
            f"to {self.max_args} arguments and {self.max_depth} levels is so long; widen it, or raise one of these"
        )

    def _list(self, chance: random.Random, depth: int, tokens: list[str]) -> int:
        """Appends a list that stands `depth` levels deep; returns its value."""
        operator = chance.choice(tuple(OPERATORS))
        tokens.append(operator)
        values = []
        for _ in range(chance.randint(2, self.max_args)):
            if depth + 1 < self.max_depth and chance.random() < LIST_PROBABILITY:
                values.append(self._list(chance, depth + 1, tokens))
            else:
                values.append(int(chance.random() * 10))
                tokens.append(DIGITS[values[-1]])
        tokens.append(END)
        if len(tokens) > self.max_length:
            raise _TooLongError
        return OPERATORS[operator](values)
