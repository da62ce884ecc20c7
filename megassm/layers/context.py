"""What all blocks of one forward pass share: the budget, the filter bank, the rotary tables."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from megassm.layers.filterbank import FilterBank


class Context(NamedTuple):
    """Made once a forward pass by the model; a mixer takes from it what it needs."""

    k: int
    """The budget: spectral channels in use, the same in every layer."""
    filterbank: FilterBank | None
    rope: tuple[Tensor, Tensor] | None
    """Cosine and sine (L, head_dim / 2) of the rotary positions, float32."""
