"""Budget dropout: a pure function with the promised distributions."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest

from megassm.budget import budget_at, drawn_budgets
from megassm.config.schema import Config

Make = Callable[..., Config]
DRAWS = 20_000


def draw(config: Config, count: int = DRAWS) -> Counter[int]:
    return Counter(budget_at(config, step, 0) for step in range(count))


def test_pure_and_pinned(small_config: Make) -> None:
    config = small_config("model.num_channels=32", "budget.strategy=uniform")
    first = [budget_at(config, step, micro) for step in range(4) for micro in range(2)]
    assert first == [budget_at(config, step, micro) for step in range(4) for micro in range(2)]
    assert first == [18, 30, 5, 18, 2, 6, 29, 30], "the draws of existing runs have changed"
    other = small_config("model.num_channels=32", "budget.strategy=uniform", "run.seed=1")
    assert first != [budget_at(other, step, micro) for step in range(4) for micro in range(2)]


def test_fixed(small_config: Make) -> None:
    assert set(draw(small_config("budget.strategy=fixed"), 50)) == {8}
    assert set(draw(small_config("budget.strategy=fixed", "budget.k=3"), 50)) == {3}


@pytest.mark.parametrize(
    "overrides",
    [("fixed",), ("fixed", "budget.k=3"), ("uniform", "budget.min_k=3"), ("log_uniform",),
     ("sandwich", "budget.min_k=2"), ("paper",), ("paper", "budget.budgets=[2,5]", "budget.sampler=authors"),
     ("paper", "budget.min_k_steps=40"), ("stratified",), ("stratified", "budget.budgets=[2,5]")],
)  # fmt: skip
def test_what_may_be_drawn_is_known(small_config: Make, overrides: tuple[str, ...]) -> None:
    config = small_config(f"budget.strategy={overrides[0]}", *overrides[1:], "train.steps=400")
    assert set(draw(config, 400)) | {8} == drawn_budgets(config)


def test_uniform(small_config: Make) -> None:
    counts = draw(small_config("budget.strategy=uniform", "budget.min_k=3"))
    assert set(counts) == set(range(3, 9))
    for k in counts:
        assert counts[k] / DRAWS == pytest.approx(1 / 6, abs=0.015)


def test_log_uniform(small_config: Make) -> None:
    counts = draw(small_config("budget.strategy=log_uniform"))
    assert set(counts) == set(range(1, 9))
    for k in counts:
        assert counts[k] / DRAWS == pytest.approx(math.log((k + 1) / k) / math.log(9), abs=0.015)


def test_paper_recipe(small_config: Make) -> None:
    config = small_config("budget.full_every=4", "budget.bias=1.0", "optim.warmup_steps=6")
    drawn = [budget_at(config, step, 0) for step in range(DRAWS)]
    assert set(drawn[:6]) == {8}, "full budget during warm-up"
    assert set(drawn[3::4]) == {8}, "full budget at every fourth update"
    assert all(budget_at(config, 7, micro) == 8 for micro in range(9)), "in all its micro-steps"
    rest = Counter(k for step, k in enumerate(drawn) if step >= 6 and (step + 1) % 4)
    assert set(rest) == {1, 2, 4, 8}
    for k in rest:  # weight K^bias
        assert rest[k] / rest.total() == pytest.approx(k / 15, abs=0.015)


def test_paper_without_full_updates(small_config: Make) -> None:
    config = small_config("budget.full_every=null", "budget.full_steps=0", "budget.budgets=[1,2]")
    assert set(draw(config, 200)) == {1, 2}


def test_sandwich_takes_largest_smallest_and_random_in_turn(small_config: Make) -> None:
    config = small_config("budget.strategy=sandwich", "budget.min_k=2", "budget.draws=2")
    drawn = [budget_at(config, step, micro) for step in range(600) for micro in range(2)]
    assert set(drawn[::3]) == {8}
    assert set(drawn[1::3]) == {2}
    assert set(drawn[2::3]) == set(range(2, 9))


def test_stratified_takes_every_budget_once_a_round(small_config: Make) -> None:
    """Whatever an update's draws are: rounds go on from one to the next, and are the same in every life of a run."""
    settings = ("budget.strategy=stratified", "budget.full_steps=3", "budget.budgets=[1,2,5,8]")
    for draws in (1, 3, 4, 6):
        rows = (f"train.batch_sequences={draws}", "train.micro_batch_sequences=1")
        config = small_config(*settings, *rows, f"budget.draws={draws}")
        drawn = [budget_at(config, step, draw) for step in range(200) for draw in range(draws)]
        assert set(drawn[: 3 * draws]) == {8}, "the first updates at K_max"
        begins = -(-3 * draws // 4) * 4
        rounds = [tuple(drawn[at : at + 4]) for at in range(begins, len(drawn) - 3, 4)]
        assert {frozenset(each) for each in rounds} == {frozenset({1, 2, 5, 8})}
        assert draws < 3 or len(set(rounds)) == 24, "in every order"
    first = [budget_at(config, step, draw) for step in range(3, 5) for draw in range(6)]
    assert first == [2, 1, 1, 2, 8, 5, 8, 5, 2, 1, 1, 8], "the draws of existing runs have changed"
    own = small_config(*settings, *rows)
    assert [budget_at(own, step, draw) for step in range(3, 5) for draw in range(6)] == first, "a draw a micro-step"


def test_the_smallest_budget_falls_over_the_first_updates(small_config: Make) -> None:
    config = small_config("budget.strategy=log_uniform", "budget.min_k_steps=80")
    assert budget_at(config, 0, 0) == 8
    for step in range(80):
        assert min(budget_at(config, step, micro) for micro in range(50)) == math.ceil(8 * (1 - step / 80))
    assert {budget_at(config, 80, micro) for micro in range(200)} == set(range(1, 9))
