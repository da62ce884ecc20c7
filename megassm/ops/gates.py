"""`mixing.gate_weights` and `open_weights` by one Triton kernel each way, on devices where it is and is right.

torch's way is up to seven kernels forward and more backward, over numbers so few that launching them takes longer.

Shapes: B batch, L length, H heads, K channels within the budget, X = K H scores, channel by channel.
"""

from __future__ import annotations

from enum import IntEnum
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from megassm.ops.kernel_check import agrees, has_triton, with_gradients
from megassm.ops.mixing import gate_weights, open_weights

MOST_CHANNELS = 128


class Gate(IntEnum):
    """How weights come from scores."""

    OPEN = 0
    """2 sigmoid."""
    SOFTMAX = 1
    RESCALED = 2
    """The softmax of scores whose root mean square is 1."""


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of the norm, for `_is_right`: that of the rounded gradient."""


def kernel_serves(scores_BLX: Tensor, heads: int) -> bool:
    """Whether `weights` computes these."""
    return (
        scores_BLX.device.type == "cuda"
        and scores_BLX.shape[-1] <= MOST_CHANNELS * heads
        and not torch.compiler.is_compiling()
        and _is_right(scores_BLX.device, scores_BLX.dtype)
    )


def weights(scores_BLX: Tensor, heads: int, gate: Gate) -> Tensor:
    """alpha (B, L, H, K) float32, of each head's scores."""
    alpha: Tensor = _Weights.apply(scores_BLX, heads, gate)  # type: ignore[no-untyped-call]
    return alpha


class _Weights(torch.autograd.Function):
    """Nothing but the scores is kept."""

    @staticmethod
    def forward(ctx: Any, scores_BLX: Tensor, heads: int, gate: Gate) -> Tensor:
        from megassm.ops import gates_triton

        scores_BLX = scores_BLX.contiguous()
        ctx.save_for_backward(scores_BLX)
        ctx.heads, ctx.gate = heads, gate
        return gates_triton.weights(scores_BLX, heads, gate)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        from megassm.ops import gates_triton

        (scores_BLX,) = ctx.saved_tensors
        gradient = gates_triton.weights_backward(scores_BLX, grads[0].contiguous(), ctx.heads, ctx.gate)
        return gradient, None, None


@lru_cache
@torch.inference_mode(False)
def _is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels agree with torch on this device, forward and backward: asked once."""
    if not has_triton() or dtype not in TOLERANCE:
        return False
    generator = torch.Generator().manual_seed(0)
    for heads, k, gate in ((1, 32, Gate.RESCALED), (4, 5, Gate.RESCALED), (2, 24, Gate.SOFTMAX), (8, 16, Gate.OPEN)):
        scores_BLX = (3 * torch.randn(2, 70, k * heads, generator=generator)).to(device, dtype)
        dalpha = torch.randn(2, 70, heads, k, generator=generator).to(device)
        own = scores_BLX, heads, gate, dalpha
        if not agrees(
            partial(_both, weights, *own), partial(_both, _truth, *own), TOLERANCE[dtype], "gate", "torch's is"
        ):
            return False
    return True


def _truth(scores_BLX: Tensor, heads: int, gate: Gate) -> Tensor:
    scores_BLHK = torch.unflatten(scores_BLX, -1, (-1, heads)).transpose(-1, -2)
    return open_weights(scores_BLHK) if gate == Gate.OPEN else gate_weights(scores_BLHK, gate == Gate.RESCALED)


def _both(way: Any, scores_BLX: Tensor, heads: int, gate: Gate, dalpha: Tensor) -> tuple[Tensor, ...]:
    """(the weights, the gradient of the scores)."""
    return with_gradients(partial(way, heads=heads, gate=gate), (scores_BLX,), dalpha)
