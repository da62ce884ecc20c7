"""The gated feed-forward layer, SwiGLU (arXiv 2002.05202): down(silu(gate(x)) * up(x)).

At budget K it uses the leading `width(K)` hidden units, and computes no other. Gradients beyond are zeros, for the
reason that `megassm.layers.spectral` gives.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, cast

from torch import Tensor, nn
from torch.nn import functional as F

from megassm.ops.swiglu import swiglu


class LeadingLinear(nn.Linear):
    """x (..., i) -> (..., outputs) by the leading rows and columns of a matrix; all rows where `outputs` is None."""

    def reset_parameters(self) -> None:
        """The matrix starts at standard deviation 1/sqrt(inputs), a bias at 0, from torch's random state."""
        nn.init.normal_(self.weight, std=self.in_features**-0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, outputs: int | None = None) -> Tensor:
        return _product(self, x, self.weight.shape[0] if outputs is None else outputs)


class FeedForward(nn.Module):
    """x (B, L, D) -> (B, L, D) at budget k.

    Args:
        d_model: D.
        d_ffn: the hidden width there is.
        width: the hidden width in use, by k.
    """

    linear: ClassVar[type[nn.Linear]] = LeadingLinear

    def __init__(self, d_model: int, d_ffn: int, width: Callable[[int], int]) -> None:
        super().__init__()
        self.width = width
        self.gate = self.linear(d_model, d_ffn, bias=False)
        self.up = self.linear(d_model, d_ffn, bias=False)
        self.down = self.linear(d_ffn, d_model, bias=False)

    def forward(self, x_BLD: Tensor, k: int) -> Tensor:
        """y (B, L, D) by the leading `width(k)` hidden units."""
        width = self.width(k)
        hidden_BLF = swiglu(leading(self.gate, x_BLD, width), leading(self.up, x_BLD, width))
        return leading(self.down, hidden_BLF, x_BLD.shape[-1])


def leading(linear: nn.Module, x: Tensor, outputs: int) -> Tensor:
    """The leading outputs of a linear layer, (.., outputs), for x (.., i) of its leading inputs.

    A `LeadingLinear` knows them. What has taken its place, an adapter's layer or a quantised one, knows whole matrices:
    x is filled up with zeros, and the outputs beyond are left out.
    """
    if isinstance(linear, LeadingLinear):
        known: Tensor = linear(x, outputs)
        return known
    if is_plain(linear) and (outputs, x.shape[-1]) != linear.weight.shape:
        return _product(cast(nn.Linear, linear), x, outputs)
    missing = cast(int, linear.in_features) - x.shape[-1]
    whole: Tensor = linear(F.pad(x, (0, missing)) if missing else x)
    return whole[..., :outputs]


def is_plain(linear: nn.Module) -> bool:
    """Whether parts of a layer's weight can be taken in place of calling it: it is a linear layer itself, neither
    quantised nor on disk until it is called, and nobody listens to its calls."""
    return (
        type(linear) is nn.Linear
        and type(linear.weight) in (nn.Parameter, Tensor)
        and not linear.weight.is_meta
        and not (linear._forward_hooks or linear._forward_pre_hooks)
    )


def _product(linear: nn.Linear, x: Tensor, outputs: int) -> Tensor:
    if (outputs, x.shape[-1]) == linear.weight.shape:
        return F.linear(x, linear.weight, linear.bias)
    bias = None if linear.bias is None else linear.bias[:outputs]
    return F.linear(x, linear.weight[:outputs, : x.shape[-1]], bias)
