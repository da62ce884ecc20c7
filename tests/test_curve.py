"""What a curve over budgets says: area, cliffs, rises, and what chance may not be blamed for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megassm.eval.curve import RESAMPLES, describe, interval, resample, shape

SMOOTH = {1: 2.05, 2: 2.03, 4: 2.01, 8: 2.0}
COLLAPSED = {2: 4.0, 4: 2.1, 8: 2.05, 16: 2.0}


def test_area_counts_every_doubling_alike() -> None:
    assert shape({1: 3.0, 2: 2.0, 8: 1.0}).area == pytest.approx((2.5 * 1 + 1.5 * 2) / 3)
    assert shape({1: 3.0, 2: 2.0, 8: 1.0}).area_gap_percent == pytest.approx(100 * (5.5 / 3 - 1))
    assert shape({4: 1.5}).area == 1.5


@given(st.dictionaries(st.integers(1, 64), st.floats(0.5, 8), min_size=1))
def test_area_lies_between_the_best_and_the_worst_budget(curve: dict[int, float]) -> None:
    found = shape(curve)
    assert min(curve.values()) - 1e-9 <= found.area <= max(curve.values()) + 1e-9
    assert found.near_full_k in curve
    assert not {step.k for step in found.cliffs} & {step.k for step in found.rises}


def test_a_cliff_is_most_of_a_large_gap() -> None:
    (cliff,) = shape(COLLAPSED).cliffs
    assert (cliff.k, cliff.next_k) == (2, 4)
    assert cliff.loss == pytest.approx(1.9)
    assert cliff.share_of_gap == pytest.approx(0.95)
    assert cliff.per_doubling == pytest.approx(1.9)
    assert describe(cliff) == "K=2: 1.900 bits per byte above K=4"
    assert shape(SMOOTH).cliffs == [], "a small gap has none, though one step is most of it"
    even = {1: 5.0, 2: 4.0, 4: 3.0, 8: 2.0}
    assert shape(even).cliffs == [], "nor has an even slope"


def test_near_full_looks_at_all_larger_budgets() -> None:
    assert shape(SMOOTH).near_full_k == 4
    assert shape({1: 2.0, 2: 2.5, 4: 2.0}).near_full_k == 4, "K=1 is as good as full, but K=2 is not"
    assert shape({1: 2.0, 2: 2.0}).near_full_k == 1


def test_a_rise_must_be_large_enough_and_certain() -> None:
    curve = {2: 2.0, 4: 1.9, 8: 1.95, 16: 1.92}
    (rise,) = shape(curve).rises
    assert (rise.k, rise.next_k, round(rise.loss, 3)) == (4, 8, -0.05)
    assert shape(curve).rises
    assert not shape(SMOOTH).rises
    assert not shape(SMOOTH | {8: 2.011}).rises, "too small to matter"
    assert describe(rise) == "K=4: 0.050 bits per byte below K=8"
    noise = np.random.default_rng(0).normal(0, 1, RESAMPLES)
    at = {k: np.full(RESAMPLES, bits) for k, bits in curve.items()}
    assert not shape(curve, at | {8: 1.95 + noise}).rises, "chance"
    together = {k: bits + noise for k, bits in at.items()}
    assert shape(curve, together).rises, "the difference is certain, however uncertain both are"


def test_many_small_steps_make_a_rise() -> None:
    curve = {k: 2.0 + 0.001 * abs(k - 3) for k in range(1, 33)}
    (rise,) = shape(curve).rises
    assert (rise.k, rise.next_k) == (3, 32)


def test_intervals_come_from_whole_sequences_and_repeat() -> None:
    generator = np.random.default_rng(1)
    scores = np.stack((generator.gamma(4, 25, 400), np.full(400, 50.0), np.full(400, 100.0)), axis=1)
    sums = resample(scores)
    assert sums.shape == (RESAMPLES, 3)
    assert np.array_equal(sums, resample(scores))
    assert not np.array_equal(sums, resample(scores, seed=1))
    assert (sums[:, 1] == 400 * 50).all()
    low, high = interval(sums[:, 0] / sums[:, 1])
    error = scores[:, 0].std() / 50 / np.sqrt(400)
    mean = scores[:, 0].mean() / 50
    assert low == pytest.approx(mean - 1.96 * error, rel=0.02)
    assert high == pytest.approx(mean + 1.96 * error, rel=0.02)
