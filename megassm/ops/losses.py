"""The next token's loss from its logits; on CUDA, from 16-bit logits, by Triton where it is and is right.

torch's way makes four float32 tensors of the logits' size (a copy, its log-softmax, and the gradients of both), which
are a large part of a small model's time and memory.

Shapes: N positions, V vocabulary.
"""

from __future__ import annotations

import importlib.util
import warnings
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of the norm, for `_is_right`: that of the rounded gradient."""


def token_losses(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    """Negative log-likelihood in nats of the targets, (N,) float32."""
    narrow = logits_NV.device.type == "cuda" and logits_NV.dtype.itemsize == 2
    if narrow and _is_right(logits_NV.device, logits_NV.dtype):
        nll_N: Tensor = _TokenLosses.apply(logits_NV, targets_N)  # type: ignore[no-untyped-call]
        return nll_N
    return _truth(logits_NV, targets_N)


def _truth(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    return F.cross_entropy(logits_NV.float(), targets_N, reduction="none")


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor) -> Tensor:
        from megassm.ops import losses_triton

        logits_NV, targets_N = logits_NV.contiguous(), targets_N.contiguous()
        nll_N, total_N = losses_triton.token_losses(logits_NV, targets_N)
        ctx.save_for_backward(logits_NV, targets_N, total_N)
        return nll_N

    @staticmethod
    def backward(ctx: Any, dnll_N: Tensor) -> tuple[Tensor, None]:
        from megassm.ops import losses_triton

        logits_NV, targets_N, total_N = ctx.saved_tensors
        dnll_N = dnll_N.float().contiguous()
        return losses_triton.token_losses_backward(logits_NV, targets_N, total_N, dnll_N), None


@lru_cache
def _is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels agree with torch on this device, forward and backward: asked once."""
    if importlib.util.find_spec("triton") is None or dtype not in TOLERANCE:
        return False
    generator = torch.Generator().manual_seed(0)
    logits_NV = (4 * torch.randn(7, 5001, generator=generator)).to(device, dtype)
    targets_N = torch.tensor([0, 5000, 17, 4095, 4096, 2500, 17], device=device)
    dnll_N = torch.randn(7, generator=generator).to(device)
    try:
        found = _both(_TokenLosses.apply, logits_NV, targets_N, dnll_N)
    except Exception as error:  # a compiler's refusal has many types
        warnings.warn(f"Triton's loss does not run here ({error}); torch's is used", stacklevel=2)
        return False
    for mine, other in zip(found, _both(_truth, logits_NV, targets_N, dnll_N), strict=True):
        off = float((mine.double() - other.double()).norm() / other.double().norm())
        if not off < TOLERANCE[dtype]:
            warnings.warn(f"Triton's loss is off by {off:.1e} here; torch's is used", stacklevel=2)
            return False
    return True


@torch.enable_grad()
def _both(way: Any, logits_NV: Tensor, targets_N: Tensor, dnll_N: Tensor) -> tuple[Tensor, Tensor]:
    """(the losses, the gradient of the logits)."""
    logits_NV = logits_NV.detach().requires_grad_()
    nll_N = way(logits_NV, targets_N)
    (dlogits_NV,) = torch.autograd.grad(nll_N, logits_NV, dnll_N)
    return nll_N.detach(), dlogits_NV
