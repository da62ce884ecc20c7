"""ListOps: the value is that of the printed expression, which keeps to the grammar."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megassm.data.task import TaskTokenizer
from megassm.data.tasks.listops import ListOps
from megassm.data.tasks.synthetic import drawn
from megassm.errors import UserError


def read(tokens: list[str], depth: int = 1) -> tuple[int, int, int]:
    """(value, deepest list, most arguments) of the expression at the head of `tokens`, which it takes away."""
    operator, values, deepest, most = tokens.pop(0), [], depth, 0
    while tokens[0] != "]":
        if tokens[0].startswith("["):
            value, lower, wide = read(tokens, depth + 1)
            deepest, most = max(deepest, lower), max(most, wide)
        else:
            value = int(tokens.pop(0))
        values.append(value)
    tokens.pop(0)
    assert len(values) >= 2
    by_name = {"[MAX": max, "[MIN": min, "[SM": lambda v: math.fsum(v) % 10,
               "[MED": lambda v: math.floor(statistics.median(v))}  # fmt: skip
    return int(by_name[operator](values)), deepest, max(most, len(values))


@settings(max_examples=60, deadline=None)
@given(st.integers(4, 60), st.integers(10, 200), st.integers(2, 10), st.integers(3, 10), st.integers(0, 2**31))
def test_values_and_grammar(least: int, more: int, args: int, depth: int, seed: int) -> None:
    made = ListOps(least, least + more, args, depth)
    task = made.task(None)
    try:
        (example,) = drawn(made.draw(task), 1, seed, split=0)
    except UserError as refusal:
        assert least > 2 * args
        assert "is so long" in str(refusal)  # noqa: PT017
        return
    tokens = TaskTokenizer(task).decode(example.seen.tolist()).split()
    assert least <= len(tokens) <= least + more
    value, deepest, most = read(tokens)
    assert not tokens, "one expression, closed"
    assert value == int(example.asked[0])
    assert deepest < depth
    assert most <= args


def test_the_arena_s_sizes() -> None:
    made = ListOps()
    task = made.task(None)
    assert task.length == 2048
    found = list(drawn(made.draw(task), 12, seed=0, split=0))
    assert all(500 <= example.seen.size <= 2000 for example in found)
    assert len({int(example.asked[0]) for example in found}) > 3
    used = np.unique(np.concatenate([example.seen for example in found])) - task.first_symbol
    assert used.tolist() == list(range(15)), "every operator, the bracket, every digit"


def test_impossible_lengths_are_refused() -> None:
    with pytest.raises(UserError, match="in this order"):
        ListOps(min_length=20, max_length=10)
    made = ListOps(min_length=40, max_length=50, max_args=2, max_depth=3)
    with pytest.raises(UserError, match=r"none of 20,000 expressions of up to 2 arguments and 3 levels"):
        next(drawn(made.draw(made.task(None)), 1, seed=0, split=0))
