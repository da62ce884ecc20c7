"""What all blocks of one forward pass share: budget, filter bank, rotary tables, who may see whom."""

from __future__ import annotations

from collections.abc import MutableSequence
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from megassm.layers.filterbank import FilterBank
from megassm.ops.documents import Segments

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


class Context(NamedTuple):
    """Made once a forward pass by the model; a mixer takes from it what it needs."""

    k: int
    """The budget: spectral channels in use, in every layer or in the layer that this context is `of`."""
    filterbank: FilterBank | None
    rope: tuple[Tensor, Tensor] | None
    """Cosine and sine (L, head_dim / 2) of the rotary positions, float32."""
    mask: Tensor | BlockMask | None = None
    """Added to attention's scores (`megassm.layers.attention.attention_mask`), or the same by blocks
    (`megassm.ops.flex`); None: the whole past is seen."""
    segments: Segments | None = None
    """Where documents begin, for the filter bank; None: all of a sequence is one document."""
    documents_BL: Tensor | None = None
    """The number of each position's document; None: all of a sequence is one document."""
    real_BL1: Tensor | None = None
    """False at padding, which no other position may see; None: there is no padding."""
    attentions: MutableSequence[Tensor] | None = None
    """Where attention layers that form the weights (B, H, L, T) of their heads leave them (`megassm.hf.layers`)."""
    layers: tuple[int, ...] | None = None
    """k of each layer, where they differ."""

    @classmethod
    def at(cls, budgets: tuple[int, ...], filterbank: FilterBank | None) -> Context:
        """With the budget of each layer, and all else left out."""
        mixed = len(set(budgets)) > 1
        return cls(max(budgets), filterbank, None, layers=budgets if mixed else None)

    def of(self, layer: int) -> Context:
        """What the layer of that number is given."""
        return self if self.layers is None else self._replace(k=self.layers[layer])

    def without_padding(self, u_BLD: Tensor) -> Tensor:
        """A mixer's inputs, zero at padding: to the filter bank a text that follows zeros begins there."""
        return u_BLD if self.real_BL1 is None else u_BLD.where(self.real_BL1, 0)
