"""What a curve of bits per byte over the budget K says: how good on the whole, whether it falls, where it breaks.

    area = integral of bits per byte over log2 K, divided by the width of the range: the mean over budgets when each
           doubling of K counts the same; trapezia between the measured budgets

A cliff is one step to the next smaller budget that takes most of what the whole range loses: below it the model
has collapsed, and no truncation should go there. A rise is a larger budget that is worse than a smaller one, however
many small steps lie between them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations, pairwise

import numpy as np
import numpy.typing as npt

CLIFF_SHARE = 0.5
"""A cliff loses at least this share of the whole gap between the smallest and the largest measured budget ..."""
CLIFF_LOSS = 0.05
"""... and at least this share of the bits per byte at the largest: a small gap has no cliff."""
RISE_TOLERANCE = 0.001
"""A rise is at least this share of the bits per byte at the largest budget."""
NEAR_FULL = 0.01
"""A budget within this share of the bits per byte at the largest one is as good as full."""
RESAMPLES = 1000
CONFIDENCE = 0.95

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Step:
    """Two budgets; neighbours, but in a rise."""

    k: int
    next_k: int
    """The larger one."""
    loss: float
    """Bits per byte at `k` above those at `next_k`; negative where more channels are worse."""
    share_of_gap: float
    """... over the same difference between the smallest and the largest budget; 0 where there is no such gap."""
    per_doubling: float
    """... for each doubling of K."""


@dataclass(frozen=True)
class Shape:
    """A curve in a few figures; thresholds above."""

    area: float
    """Bits per byte, mean over log2 K."""
    area_gap_percent: float
    """`area` above the bits per byte at the largest budget, in percent of them."""
    near_full_k: int
    """The smallest budget from which on every one is within `NEAR_FULL` of the largest."""
    rises: list[Step]
    """The largest rise, if there is one."""
    cliffs: list[Step]


def shape(curve: Mapping[int, float], resampled: Mapping[int, Floats] | None = None) -> Shape:
    """What a curve says.

    Args:
        curve: bits per byte by K, at least one.
        resampled: (R,) bits per byte of the same resamples at every K, from `resample`; a rise must then be one in
            `CONFIDENCE` of them, so that chance is not called one.
    """
    budgets = sorted(curve)
    full = curve[budgets[-1]]
    rise = min((_step(curve, k, next_k) for k, next_k in combinations(budgets, 2)), key=_loss, default=None)
    is_rise = rise is not None and -rise.loss > RISE_TOLERANCE * full and _is_certain(rise, resampled)
    steps = [_step(curve, k, next_k) for k, next_k in pairwise(budgets)]
    cliffs = [step for step in steps if step.share_of_gap >= CLIFF_SHARE and step.loss >= CLIFF_LOSS * full]
    worse = [k for k in budgets if curve[k] > full * (1 + NEAR_FULL)]
    area = _area(curve, budgets)
    near = next(k for k in budgets if not worse or k > worse[-1])
    return Shape(area, 100 * (area / full - 1) if full else 0.0, near, [rise] if rise and is_rise else [], cliffs)


def describe(step: Step) -> str:
    """A step for people."""
    word = "above" if step.loss >= 0 else "below"
    return f"K={step.k}: {abs(step.loss):.3f} bits per byte {word} K={step.next_k}"


def resample(scores_NC: Floats, seed: int = 0) -> Floats:
    """(R, C) sums of C figures over N sequences drawn with replacement, R times.

    The draws depend on N and the seed only: two budgets on the same sequences are resampled alike, so that their
    difference has an interval too (Efron and Tibshirani, "An Introduction to the Bootstrap", 1993).
    """
    count = len(scores_NC)
    generator = np.random.default_rng(seed)
    draws_RN = generator.multinomial(count, np.full(count, 1 / count), size=RESAMPLES)
    sums_RC: Floats = draws_RN @ scores_NC
    return sums_RC


def interval(values_R: Floats) -> tuple[float, float]:
    """The middle `CONFIDENCE` of resampled values."""
    low, high = np.quantile(values_R, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _step(curve: Mapping[int, float], k: int, next_k: int) -> Step:
    gap = curve[min(curve)] - curve[max(curve)]
    loss = curve[k] - curve[next_k]
    return Step(k, next_k, loss, loss / gap if gap > 0 else 0.0, loss / math.log2(next_k / k))


def _loss(step: Step) -> float:
    return step.loss


def _area(curve: Mapping[int, float], budgets: list[int]) -> float:
    if len(budgets) == 1:
        return curve[budgets[0]]
    trapezia = (math.log2(next_k / k) * (curve[k] + curve[next_k]) / 2 for k, next_k in pairwise(budgets))
    return sum(trapezia) / math.log2(budgets[-1] / budgets[0])


def _is_certain(step: Step, resampled: Mapping[int, Floats] | None) -> bool:
    return resampled is None or interval(resampled[step.next_k] - resampled[step.k])[0] > 0
