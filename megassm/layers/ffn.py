"""The gated feed-forward layer, SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x)).

At budget K it uses the leading `width(K)` hidden units, and computes no other. Gradients beyond are zeros, for the
reason that `megassm.layers.spectral` gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F


class FeedForward(nn.Module):
    """x (B, L, D) -> (B, L, D) at budget k.

    Args:
        d_model: D.
        d_ffn: the hidden width there is.
        width: the hidden width in use, by k.
    """

    def __init__(self, d_model: int, d_ffn: int, width: Callable[[int], int]) -> None:
        super().__init__()
        self.width = width
        self.gate = LeadingLinear(d_model, d_ffn)
        self.up = LeadingLinear(d_model, d_ffn)
        self.down = LeadingLinear(d_ffn, d_model)

    def forward(self, x_BLD: Tensor, k: int) -> Tensor:
        """y (B, L, D) by the leading `width(k)` hidden units."""
        width = self.width(k)
        hidden_BLF = F.silu(leading(self.gate, x_BLD, width)) * leading(self.up, x_BLD, width)
        return leading(self.down, hidden_BLF, x_BLD.shape[-1])


class LeadingLinear(nn.Linear):
    """x (..., i) -> (..., outputs) by the leading rows and columns of a matrix; all rows where `outputs` is None."""

    def __init__(self, d_in: int, d_out: int, bias: bool = False) -> None:
        super().__init__(d_in, d_out, bias)

    def reset_parameters(self) -> None:
        """The matrix starts at standard deviation 1/sqrt(inputs), a bias at 0, from torch's random state."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def is_plain(self) -> bool:
        """Whether the weight is an ordinary tensor whose rows and columns can be taken: it is not quantised, and not on
        disk until the layer is called."""
        return type(self.weight) in (nn.Parameter, Tensor) and not self.weight.is_meta

    def forward(self, x: Tensor, outputs: int | None = None) -> Tensor:
        used = (self.weight.shape[0] if outputs is None else outputs, x.shape[-1])
        if used == self.weight.shape:
            return F.linear(x, self.weight, self.bias)
        return F.linear(x, self.weight[: used[0], : used[1]], None if self.bias is None else self.bias[: used[0]])


def leading(linear: nn.Module, x: Tensor, outputs: int) -> Tensor:
    """`LeadingLinear`'s product, also by what has taken its place: an adapter's layer or a quantised one.

    Those know whole matrices only: x is filled up with zeros, and the outputs beyond are left out.
    """
    if isinstance(linear, LeadingLinear) and linear.is_plain:
        y: Tensor = linear(x, outputs)
        return y
    missing = cast(int, linear.in_features) - x.shape[-1]
    whole: Tensor = linear(F.pad(x, (0, missing)) if missing else x)
    return whole[..., :outputs]
