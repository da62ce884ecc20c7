"""Are two dots joined by a path? Pathfinder (Linsley and others, arXiv 1805.08315), drawn at any size.

A square image holds two long paths of dashes and some short ones, all smooth, none near another, and two bright dots:
at both ends of one long path, or at an end of either. Long Range Arena has it at 32 x 32 with paths of 6, 9 or 14
dashes. Paths of one image are further apart than dashes of a path, so that the label can be seen.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from megassm.data.task import Example, Task, fitting
from megassm.errors import UserError

DASH, GAP = 2, 1
"""Pixels that a path is seen at, and not seen at, by turns; it begins and ends with a dash."""
TURN = 0.5
"""Radians by which a path turns from pixel to pixel at most."""
REACH = GAP + 1
"""No pixel of a path is so near to another path, rows and columns counted each."""
LEVELS = ("ground", "dash", "dot")
MOST_PATHS, MOST_IMAGES = 200, 200
"""Tries for a path, and for an image."""

Pixel = tuple[int, int]


@dataclass(frozen=True)
class Paths:
    """Which images: pixels of a side, dashes of a long path, short paths of a third of that."""

    size: int = 16
    dashes: int = 5
    distractors: int = 2

    def __post_init__(self) -> None:
        if self.size < 8 or self.dashes < 2 or self.distractors < 0:
            raise UserError(
                f"--size {self.size} --dashes {self.dashes} --distractors {self.distractors}: at least 8 pixels a "
                "side, 2 dashes and 0 distractors"
            )

    def task(self, length: int | None) -> Task:
        return Task("paths", length or fitting(self.size**2), ("apart", "joined"), LEVELS)

    def draw(self, task: Task) -> Callable[[np.random.Generator], Example]:
        def draw(generator: np.random.Generator) -> Example:
            chance = random.Random(int(generator.integers(2**63)))
            first, second, *others = self.paths(chance)
            joined = chance.random() < 0.5
            image = np.zeros((self.size, self.size), dtype=np.int64)
            for path in (first, second, *others):
                for number, pixel in enumerate(path):
                    image[pixel] = int(number % (DASH + GAP) < DASH)
            for pixel in (first[0], first[-1] if joined else second[chance.choice((0, -1))]):
                image[pixel] = 2
            return Example(image.ravel() + task.first_symbol, np.array([int(joined)]))

        return draw

    def paths(self, chance: random.Random) -> list[list[Pixel]]:
        """The two long ones, then the short ones; the pixels of each in order, those not seen too.

        Raises:
            UserError: they hardly ever fit.
        """
        short = max(1, self.dashes // 3)
        for _ in range(MOST_IMAGES):
            found: list[list[Pixel]] = []
            taken: set[Pixel] = set()
            for dashes in (self.dashes, self.dashes, *[short] * self.distractors):
                path = self._path(chance, dashes * (DASH + GAP) - GAP, taken)
                if path is None:
                    break
                found.append(path)
                around = range(-REACH, REACH + 1)
                taken |= {(row + down, column + right) for row, column in path for down in around for right in around}
            else:
                return found
        raise UserError(
            f"--size {self.size} --dashes {self.dashes} --distractors {self.distractors}: none of {MOST_IMAGES} images "
            "has room for these paths; give a larger size, or fewer or shorter ones"
        )

    def _path(self, chance: random.Random, pixels: int, taken: set[Pixel]) -> list[Pixel] | None:
        """So many pixels, each beside the one before it, none in `taken` nor twice; None if no try ends."""
        for _ in range(MOST_PATHS):
            row, column = chance.uniform(0, self.size), chance.uniform(0, self.size)
            angle = chance.uniform(0, 2 * math.pi)
            path: list[Pixel] = []
            while len(path) < pixels:
                pixel = math.floor(row), math.floor(column)
                if not (path and pixel == path[-1]):
                    if min(pixel) < 0 or max(pixel) >= self.size or pixel in taken or pixel in path:
                        break
                    path.append(pixel)
                    angle += chance.uniform(-TURN, TURN)
                row, column = row + math.sin(angle), column + math.cos(angle)
            else:
                return path
        return None
