"""A loss that jumps is a spike; one that falls, ripples, or has a small K is none."""

from __future__ import annotations

import numpy as np
import pytest

from megassm.train.spikes import LEVEL, MIN_RECORDS, WINDOW, Spikes

BUDGETS = (1, 2, 3, 4, 6, 8, 16, 32)


def curve(updates: int, seed: int, noise: float = 0.02) -> list[tuple[list[int], float]]:
    """(K of both micro-steps, loss) of a run whose loss falls, and is higher by up to 1.2 nats at a small K."""
    rng = np.random.default_rng(seed)
    rows = []
    for update in range(updates):
        drawn = [int(k) for k in rng.choice(BUDGETS, 2)]
        loss = 2.5 + 3 / (1 + update / 30) + np.mean([1.2 / k for k in drawn]) + rng.normal(0, noise)
        rows.append((drawn, float(loss)))
    return rows


def run(spikes: Spikes, rows: list[tuple[list[int], float]]) -> list[int]:
    """Updates that are taken for spikes."""
    found = []
    for update, (drawn, loss) in enumerate(rows):
        spike = loss > spikes.limit(drawn)
        spikes.add(drawn, loss, spike)
        if spike:
            found.append(update)
    return found


@pytest.mark.parametrize("seed", range(5))
def test_small_budgets_and_a_falling_curve_are_no_spikes(seed: int) -> None:
    assert run(Spikes(8.0), curve(400, seed)) == []


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rise", [0.6, 3.0])
def test_a_spike_is_found_alone(seed: int, rise: float) -> None:
    rows = curve(200, seed)
    rows[150] = (rows[150][0], rows[150][1] + rise)
    assert run(Spikes(8.0), rows) == [150]


def test_the_rare_budget_of_a_warm_up_is_no_spike() -> None:
    rows = [([32, 32], loss) for _, loss in curve(60, 0)]
    rows = [([32, 32], 3.0 - 0.001 * update + 0.01 * (-1) ** update) for update in range(60)]
    spikes = Spikes(8.0)
    assert run(spikes, rows) == []
    assert spikes.limit([32, 32]) < 3.2
    rows = [*curve(WINDOW, 1), ([1, 1], 2.5 + 3 / (1 + WINDOW / 30) + 1.2)]
    assert run(Spikes(8.0), rows) == []


def test_a_flat_curve_makes_no_spike_of_a_ripple() -> None:
    rows = [([4], 2.0)] * 100 + [([4], 2.07), ([4], 2.0), ([4], 2.2)]
    assert run(Spikes(8.0), rows) == [102]


def test_a_new_level_is_accepted() -> None:
    rows = [([4], 2.0 + 0.01 * (-1) ** update) for update in range(100)]
    rows += [([4], 3.0 + 0.01 * (-1) ** update) for update in range(100)]
    assert run(Spikes(8.0), rows) == list(range(100, 100 + LEVEL))


def test_too_little_is_known_at_the_start_and_what_is_not_finite_is_passed_over() -> None:
    spikes = Spikes(8.0)
    for _ in range(MIN_RECORDS - 1):
        spikes.add([2], 1.0, spike=False)
    spikes.add([2], None, spike=False)
    assert spikes.limit([2]) == float("inf")
    spikes.add([2], 1.0, spike=False)
    assert 1.0 < spikes.limit([2]) < 1.1
