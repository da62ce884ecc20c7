"""Drawn tasks: what they ask is in what they show."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megassm.data.task import Example, Task
from megassm.data.tasks.synthetic import FILLERS, Frequent, HighFrequency, Recall, Tracking, drawn
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


def split_up(task: Task, keys: int, example: Example) -> tuple[list[tuple[int, int]], list[int]]:
    """Pairs in their order, and the places of what means nothing."""
    filler = task.first_symbol + keys
    places = [place for place, value in enumerate(example.seen) if value >= filler]
    rest = np.delete(example.seen, places)
    assert bool((example.seen < filler + FILLERS).all())
    return [(int(key), int(value)) for key, value in rest.reshape(-1, 2)], places


def test_a_needle_is_anywhere_in_its_haystack_and_a_gap_is_behind_it() -> None:
    made = Recall((1, 3), queries=1, keys=5, values=4, gap=(2, 4), haystack=(0, 6))
    task = made.task(None)
    assert task.length == 2 * 3 + 4 + 6 + 2 + 2
    depths, sizes = set(), set()
    for example in drawn(made.draw(task), 4000, seed=1, split=0):
        pairs, places = split_up(task, 5, example)
        assert dict(pairs)[int(example.asked[0])] == example.asked[1]
        gap = len(example.seen) - max(set(range(len(example.seen))) - set(places)) - 1
        assert 2 <= gap <= 10, "at least the gap, and what of the haystack is last"
        sizes.add((len(pairs), len(places)))
        if len(pairs) == 1 and len(places) == 8:
            depths.add(len(example.seen) - gap - 2)
        task.ids(example)  # refuses what is too long
    assert sizes == {(pairs, count) for pairs in (1, 2, 3) for count in range(2, 11)}
    assert depths == set(range(7)), "as likely at the end as at the beginning"
    (whole,) = drawn(Recall(2, queries=2, keys=5, values=4, gap=3).draw(task), 1, 0, 0)
    assert split_up(task, 5, whole)[1] == [4, 5, 6]


def test_recall_of_one_size_is_what_it_was() -> None:
    """The data sets of earlier versions, bit for bit."""
    made = Recall()
    (example,) = drawn(made.draw(made.task(None)), 1, 0, 0)
    random = np.random.default_rng((0, 0, 0))
    keys, values, asked = random.permutation(64)[:8] + 19, random.integers(0, 16, 8), random.permutation(8)[:4]
    assert example.seen.tolist() == np.stack((keys, values), 1).ravel().tolist()
    assert example.asked.tolist() == np.stack((keys[asked], values[asked]), 1).ravel().tolist()
    assert len(made.task(None).symbols) == 64, "no haystack, no symbols of it"


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 4), st.integers(0, 3), st.integers(0, 9), st.integers(0, 2**31))
def test_chains_lead_from_what_is_asked_to_its_value(chains: int, hops: int, haystack: int, seed: int) -> None:
    made = Tracking(chains, hops, queries=chains, keys=16, values=5, haystack=haystack)
    task = made.task(None)
    (example,) = drawn(made.draw(task), 1, seed, split=0)
    pairs, places = split_up(task, 16, example)
    assert (len(pairs), len(places)) == (chains * (hops + 1), haystack)
    value_of: dict[int, int] = {}
    steps: dict[int, int] = {}
    for variable, source in pairs:  # a source is always known before it is used
        assert variable not in value_of
        value_of[variable] = source if source < 5 else value_of[source]
        steps[variable] = 0 if source < 5 else steps[source] + 1
    asked = dict(example.asked.reshape(-1, 2).tolist())
    assert len(asked) == chains
    assert all(value_of[variable] == value and steps[variable] == hops for variable, value in asked.items())
    assert task.ids(example).size == task.length - 1


def test_the_most_frequent_word_is_the_answer() -> None:
    made = Frequent(words=5, shown=(2, 30))
    task = made.task(None)
    counts, answers = set(), set()
    for example in drawn(made.draw(task), 300, seed=1, split=0):
        often = np.bincount(example.seen, minlength=5)
        assert often.argmax() == example.asked[0]
        assert np.sort(often)[-1] > np.sort(often)[-2]
        counts.add(len(example.seen))
        answers.add(int(example.asked[0]))
        task.ids(example)
    assert counts == set(range(2, 31))
    assert answers == set(range(5))


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
    with pytest.raises(UserError, match="--queries 4 --pairs 2-6"):
        Recall(pairs=(2, 6))
    with pytest.raises(UserError, match="--gap 5-2: give a number, or the least and the most"):
        Recall(gap=(5, 2))
    with pytest.raises(UserError, match="--queries 4 --chains 4 --hops 0-16 --keys 64"):
        Tracking(hops=(0, 16))
    with pytest.raises(UserError, match="--words 1 --shown 16: at least 2 words"):
        Frequent(words=1, shown=16)
