"""Drawn tasks: what they ask is in what they show."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megassm.data.tasks.synthetic import HighFrequency, Recall, drawn
from megassm.errors import UserError


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 12), st.data(), st.integers(1, 9), st.integers(0, 2**31))
def test_recall_asks_keys_that_were_shown(pairs: int, data: st.DataObject, values: int, seed: int) -> None:
    queries, keys = data.draw(st.integers(1, pairs)), data.draw(st.integers(pairs, 20))
    made = Recall(pairs, queries, keys, values)
    task = made.task(None)
    (example,) = drawn(made.draw(task), 1, seed, split=0)
    shown = dict(example.seen.reshape(-1, 2).tolist())
    asked = dict(example.asked.reshape(-1, 2).tolist())
    assert (len(shown), len(asked)) == (pairs, queries), "no key twice"
    assert asked.items() <= shown.items()
    assert all(task.first_symbol <= key < task.first_symbol + keys for key in shown)
    assert all(0 <= value < values for value in shown.values())
    assert task.ids(example).size == task.length - 1, "no longer than it needs to be"


def test_the_classes_of_signals_are_their_strongest_periods() -> None:
    made = HighFrequency(signals=2, noise=0.5)
    task = made.task(509)
    assert len(task.answers) == 21
    labels = set()
    for example in drawn(made.draw(task), 60, seed=1, split=0):
        signal = example.seen - example.seen.mean()
        assert task.first_symbol <= example.seen.min() <= example.seen.max() < task.first_symbol + 16
        steps = np.arange(signal.size)
        power = {p: abs(signal @ np.exp(2j * np.pi * steps / p)) for p in range(2, 9)}
        strongest = sorted(sorted(power, key=lambda p: -power[p])[:2])
        assert task.answers[int(example.asked[0])] == "+".join(f"p{p}" for p in strongest)
        labels.add(int(example.asked[0]))
    assert len(labels) > 12


def test_examples_depend_on_seed_split_and_number_only() -> None:
    made = HighFrequency()
    draw = made.draw(made.task(None))
    few, many = list(drawn(draw, 2, 7, 0)), list(drawn(draw, 5, 7, 0))
    assert all((a.seen == b.seen).all() for a, b in zip(few, many, strict=False))
    for other in (list(drawn(draw, 2, 8, 0)), list(drawn(draw, 2, 7, 1))):
        assert (few[0].seen != other[0].seen).any()


def test_noise_hides_the_signal() -> None:
    """The share of a period's power in the signal falls as 1 / (1 + noise^2)."""
    for noise in (0.0, 2.0):
        made = HighFrequency(noise=noise, first=4, last=4)
        shares = []
        for example in drawn(made.draw(made.task(1003)), 8, seed=1, split=0):
            signal = example.seen - example.seen.mean()
            wave = np.exp(2j * np.pi * np.arange(1000) / 4)
            shares.append(2 * abs(signal @ wave) ** 2 / 1000 / (signal @ signal))
        assert np.mean(shares) == pytest.approx(1 / (1 + noise**2), abs=0.06)


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(UserError, match="--queries 3 --pairs 2 --keys 64"):
        Recall(pairs=2, queries=3)
    with pytest.raises(UserError, match="--periods 1-8"):
        HighFrequency(first=1)
    with pytest.raises(UserError, match="--signals 3"):
        HighFrequency(first=4, last=5, signals=3)
