"""A short causal convolution of each channel by itself, before a mixer: v_t = sum_{i<n} w_i u_{t-i}.

Smooth spectral channels answer slowly: K of them cannot say exactly what stood i positions ago. A few taps can, at
n d parameters a layer and n - 1 inputs more to remember between decoding steps. It starts as the identity.

Shapes: B batch, L length, D width, N taps, T = N - 1 positions before.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from megassm.layers.context import Context
from megassm.ops import taps


class Before(Protocol):
    """Where the positions before a part of a sequence come from (`megassm.parallel.sequence`)."""

    def __call__(self, end_BTD: Tensor) -> Tensor:
        """The inputs (B, T, D) before this part, given the last ones of it; zeros before a sequence begins."""


class InputTaps(nn.Module):
    """u (B, L, D) -> v (B, L, D)."""

    def __init__(self, d_model: int, count: int) -> None:
        super().__init__()
        self.taps = count
        self.before: Before | None = None
        # a vector to the optimizer, as gains and biases are; tap by tap
        self.weight_ND = nn.Parameter(torch.empty(count * d_model))

    def forward(self, u_BLD: Tensor, context: Context, past_BTD: Tensor | None = None) -> Tensor:
        """`past_BTD` is what `before` would tell, where it is known already."""
        if past_BTD is None:
            if self.before is None and context.documents_BL is None and taps.kernel_serves(u_BLD):
                return taps.causal_taps(u_BLD, self.weight_ND.view(self.taps, -1))
            past_BTD = self._nothing(u_BLD)
            if self.before is not None:
                past_BTD = self.before(u_BLD[:, u_BLD.shape[1] - self.taps + 1 :])
        return self._convolved(torch.cat((past_BTD, u_BLD), dim=1), context.documents_BL)

    def extend(self, u_BLD: Tensor, past_BTD: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
        """(v of L positions that follow those of `past_BTD`, the inputs (B, T + L, D) of all); None: of none."""
        past_BTD = self._nothing(u_BLD) if past_BTD is None else past_BTD
        # called as a module, so that what offloads weights finds them
        return self(u_BLD, context, past_BTD), torch.cat((past_BTD, u_BLD), dim=1)

    def _nothing(self, u_BLD: Tensor) -> Tensor:
        return u_BLD.new_zeros(u_BLD.shape[0], self.taps - 1, u_BLD.shape[2])

    def _convolved(self, inputs_BXD: Tensor, documents_BL: Tensor | None) -> Tensor:
        """v of all but the first T positions; with `documents_BL` no position takes an input of another document."""
        length = inputs_BXD.shape[1] - self.taps + 1
        weight_ND = self.weight_ND.view(self.taps, -1)
        v_BLD = inputs_BXD[:, self.taps - 1 :] * weight_ND[0]
        for i in range(1, min(self.taps, length if documents_BL is not None else self.taps)):
            earlier_BLD = inputs_BXD[:, self.taps - 1 - i : self.taps - 1 - i + length]
            if documents_BL is not None:
                same_BL = documents_BL[:, i:] == documents_BL[:, :-i]
                earlier_BLD = earlier_BLD * nn.functional.pad(same_BL, (i, 0))[..., None]
            v_BLD = torch.addcmul(v_BLD, earlier_BLD, weight_ND[i])
        return v_BLD
