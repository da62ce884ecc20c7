"""Comparisons that raise where they do not hold, and else say in a few words what was seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def largest(one: Tensor, other: Tensor) -> float:
    """The largest difference."""
    return float((one - other).detach().abs().max())


def at_most(value: float, limit: float) -> str:
    assert value <= limit, f"{value:.2g} is more than {limit:.2g}"
    return f"{value:.1e} (at most {limit:.0e})"


def equal(one: Any, other: Any) -> str:
    same = torch.equal(one, other) if isinstance(one, Tensor) else one == other
    assert same, f"{one} is not {other}"
    return "equal"
