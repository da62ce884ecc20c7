"""The gated feed-forward layer, SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x)).

At budget K it uses the leading `width(K)` hidden units, and computes no other. Gradients beyond are zeros, for the
reason that `megassm.layers.spectral` gives.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
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
        width = self.width(k)
        hidden_BLF = F.silu(self.gate(x_BLD, width)) * self.up(x_BLD, width)
        mixed: Tensor = self.down(hidden_BLF, x_BLD.shape[-1])
        return mixed


class LeadingLinear(nn.Module):
    """x (..., i) -> (..., outputs) by the leading rows and columns of a matrix."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_out, d_in))

    def forward(self, x: Tensor, outputs: int) -> Tensor:
        used = (outputs, x.shape[-1])
        return F.linear(x, self.weight if used == self.weight.shape else self.weight[: used[0], : used[1]])
