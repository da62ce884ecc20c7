"""Budget dropout: which K a micro-batch runs at. A pure function of (seed, step, micro-step).

Every rank evaluates it for itself, so all agree without a message, and a resumed run draws what it would have drawn.
The paper's recipe (ES-SSM, arXiv 2601.22488): K_max during warm-up and at every 8th update, otherwise one of the
listed budgets, with a bias towards large ones, as `budget.sampler` says. The sandwich (arXiv 1903.05134) takes the
largest, the smallest and a random one in turn; stratified draws take every listed one in turn, in an order of their own
each round.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import math
from collections.abc import Sequence
from typing import assert_never

from megassm.config.schema import BudgetConfig, Config


def budget_at(config: Config, step: int, micro_step: int) -> int:
    """K, 1 <= K <= K_max, of one micro-step.

    Args:
        config: its `budget` section, K_max, the seed and the length of the warm-up are used.
        step: update, from 0.
        micro_step: micro-step within the update, from 0; the same on every rank.
    """
    return max(_strategy(config, step, micro_step), _floor(config, step))


def drawn_budgets(config: Config) -> set[int]:
    """Every K that `budget_at` may give, and K_max, at which a student is taught."""
    budget, k_max = config.budget, config.model.num_channels
    if budget.min_k_steps is not None:  # on its way down the smallest K is any
        return set(range(1, k_max + 1))
    match budget.strategy:
        case "fixed":
            return {budget.k or k_max, k_max}
        case "uniform" | "log_uniform" | "sandwich":
            return set(range(budget.min_k, k_max + 1))
        case "paper" | "stratified":
            return {*config.listed_budgets(), k_max}
    assert_never(budget.strategy)


def _strategy(config: Config, step: int, micro_step: int) -> int:
    budget, k_max = config.budget, config.model.num_channels
    draw = _uniform(config.run.seed, step, micro_step)
    match budget.strategy:
        case "fixed":
            return k_max if budget.k is None else budget.k
        case "uniform":
            return budget.min_k + int(draw * (k_max + 1 - budget.min_k))
        case "log_uniform":
            return _log_uniform(budget.min_k, k_max, draw)
        case "sandwich":
            turn = step * (budget.draws or 1) + micro_step
            return (k_max, budget.min_k, _log_uniform(budget.min_k, k_max, draw))[turn % 3]
        case "paper":
            if step < config.full_budget_steps() or _is_full_update(budget, step):
                return k_max
            listed, bias = config.listed_budgets(), budget.bias
            return _listed(listed, bias, draw) if budget.sampler == "weighted" else _nearest(listed, bias, draw)
        case "stratified":
            if step < config.full_budget_steps():
                return k_max
            return _in_turn(config.run.seed, config.listed_budgets(), step * _draws(config) + micro_step)
    assert_never(budget.strategy)


def _draws(config: Config) -> int:
    """Of an update: what a run has fixed at its start, else one a micro-step of one rank."""
    return config.budget.draws or config.micro_steps(1)


def _in_turn(seed: int, budgets: Sequence[int], turn: int) -> int:
    """Every budget once in each round of as many turns."""
    round_, place = divmod(turn, len(budgets))
    return sorted(budgets, key=lambda k: hashlib.sha256(f"round {seed} {round_} {k}".encode()).digest())[place]


def _floor(config: Config, step: int) -> int:
    """The smallest K allowed: falls from K_max to 1 over the first `min_k_steps` updates."""
    over = config.budget.min_k_steps
    if over is None or step >= over:
        return 1
    return math.ceil(config.model.num_channels * (1 - step / over))


def _log_uniform(least: int, most: int, draw: float) -> int:
    """K with probability log((K+1)/K) / log((most+1)/least)."""
    return min(most, int(least * ((most + 1) / least) ** draw))


def _is_full_update(budget: BudgetConfig, step: int) -> bool:
    if budget.full_every is None:
        return False
    counted = step if budget.sampler == "authors" else step + 1
    return counted % budget.full_every == 0


def _listed(budgets: Sequence[int], bias: float, draw: float) -> int:
    cumulative = list(itertools.accumulate(k**bias for k in budgets))
    return budgets[bisect.bisect_right(cumulative, draw * cumulative[-1])]


def _nearest(budgets: Sequence[int], bias: float, draw: float) -> int:
    """The authors' draw: u' = 1 - (1 - u)^(1/bias), K = least (most / least)^u', and of the list the nearest."""
    least, most = budgets[0], budgets[-1]
    wanted = least * (most / least) ** (1 - (1 - draw) ** (1 / bias))
    return min(budgets, key=lambda k: abs(k - wanted))


def _uniform(seed: int, step: int, micro_step: int) -> float:
    """A number in [0, 1) from a cryptographic hash: the same in every version of every library."""
    digest = hashlib.sha256(f"budget {seed} {step} {micro_step}".encode()).digest()
    return int.from_bytes(digest[:6], "little") / 2.0**48
