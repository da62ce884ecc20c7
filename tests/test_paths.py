"""Paths: whether the dots are joined can be seen in the image, and in nothing else than where they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megassm.data.task import Example, Ids, Task
from megassm.data.tasks.paths import Paths
from megassm.data.tasks.synthetic import drawn
from megassm.errors import UserError


def image_of(made: Paths, task: Task, example: Example) -> Ids:
    return (example.seen - task.first_symbol).reshape(made.size, made.size)


def pieces(image: Ids) -> list[set[tuple[int, int]]]:
    """What is lit, in parts between which two rows or two columns are dark: grown pixel by pixel."""
    left = {(int(row), int(column)) for row, column in np.argwhere(image > 0)}
    found = []
    while left:
        part, edge = set(), [left.pop()]
        while edge:
            row, column = edge.pop()
            part.add((row, column))
            near = {other for other in left if max(abs(other[0] - row), abs(other[1] - column)) <= 2}
            left -= near
            edge += near
        found.append(part)
    return found


@settings(max_examples=40, deadline=None)
@given(st.integers(12, 34), st.integers(2, 5), st.integers(0, 2), st.integers(0, 2**31))
def test_the_label_is_that_of_the_image(size: int, dashes: int, distractors: int, seed: int) -> None:
    made = Paths(size, dashes, distractors)
    task = made.task(None)
    try:
        (example,) = drawn(made.draw(task), 1, seed, split=0)
    except UserError as refusal:
        assert size < 5 * dashes
        assert "has room for" in str(refusal)  # noqa: PT017
        return
    image = image_of(made, task, example)
    found = pieces(image)
    short = max(1, dashes // 3)
    lit = sorted([2 * dashes] * 2 + [2 * short] * distractors)
    assert sorted(map(len, found)) == lit, "as many paths as asked for, each of its dashes"
    dots = [(int(row), int(column)) for row, column in np.argwhere(image == 2)]
    assert len(dots) == 2
    joined = any(set(dots) <= part for part in found)
    assert task.answers[int(example.asked[0])] == ("joined" if joined else "apart")
    assert all(any(dot in part and len(part) == 2 * dashes for part in found) for dot in dots), "on long paths"
    assert task.ids(example).size == task.length - 1


def test_half_are_joined_and_the_images_do_not_say() -> None:
    """Without the dots' places nothing tells the classes apart: as many pixels of each kind in every image."""
    made = Paths()
    task = made.task(None)
    assert task.length == 320
    examples = list(drawn(made.draw(task), 400, seed=0, split=0))
    joined = np.mean([example.asked[0] for example in examples])
    assert abs(joined - 0.5) < 0.1
    counts = {tuple(np.bincount(image_of(made, task, example).ravel(), minlength=3)) for example in examples}
    assert counts == {(256 - 24, 22, 2)}
    again = list(drawn(made.draw(task), 3, seed=0, split=0))
    assert all((a.seen == b.seen).all() for a, b in zip(again, examples, strict=False))
    assert len({example.seen.tobytes() for example in examples}) == 400


def test_the_arenas_size_has_room() -> None:
    made = Paths(size=32, dashes=9, distractors=4)
    task = made.task(None)
    assert task.length == 1088
    for example in drawn(made.draw(task), 5, seed=3, split=1):
        assert len(pieces(image_of(made, task, example))) == 6


def test_what_has_no_room_is_refused() -> None:
    with pytest.raises(UserError, match="--size 7 --dashes 5 --distractors 2: at least 8 pixels"):
        Paths(size=7)
    made = Paths(size=8, dashes=9)
    with pytest.raises(UserError, match="none of 200 images has room for these paths"):
        next(drawn(made.draw(made.task(None)), 1, seed=0, split=0))
