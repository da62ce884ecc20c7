"""Triton kernels of the next token's loss: logits are read once forward, and once backward; `losses` has the truth.

No float32 copy of the logits exists: sums are float32, what is read and written has the logits' own dtype.

Shapes: N positions, V vocabulary.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_V, WARPS = 4096, 8


@triton.jit
def _forward_kernel(logits_ptr, targets_ptr, nll_ptr, total_ptr, V, BLOCK_V: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    highest = -float("inf")
    total = 0.0
    for first in range(0, V, BLOCK_V):
        vs = first + tl.arange(0, BLOCK_V)
        logits = tl.load(logits_ptr + vs, mask=vs < V, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(logits, axis=0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(logits - higher), axis=0)
        highest = higher
    log_total = highest + tl.log(total)
    target = tl.load(targets_ptr + row)
    tl.store(total_ptr + row, log_total)
    tl.store(nll_ptr + row, log_total - tl.load(logits_ptr + target).to(tl.float32))


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, targets_ptr, total_ptr, dnll_ptr, dlogits_ptr, V, BLOCK_V: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    vs = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    logits = tl.load(logits_ptr + row * V + vs, mask=vs < V, other=-float("inf")).to(tl.float32)
    share = tl.exp(logits - tl.load(total_ptr + row)) - tl.where(vs == tl.load(targets_ptr + row), 1.0, 0.0)
    gradient = share * tl.load(dnll_ptr + row)
    tl.store(dlogits_ptr + row * V + vs, gradient.to(dlogits_ptr.dtype.element_ty), mask=vs < V)


def token_losses(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """(negative log-likelihood in nats (N,), log of the sum of exponentials (N,)), float32."""
    n, v = logits_NV.shape
    nll_N, total_N = (torch.empty(n, dtype=torch.float32, device=logits_NV.device) for _ in range(2))
    _forward_kernel[(n,)](logits_NV, targets_N, nll_N, total_N, v, BLOCK_V=BLOCK_V, num_warps=WARPS)
    return nll_N, total_N


def token_losses_backward(logits_NV: Tensor, targets_N: Tensor, total_N: Tensor, dnll_N: Tensor) -> Tensor:
    """The gradient of the logits, in their dtype."""
    n, v = logits_NV.shape
    dlogits_NV = torch.empty_like(logits_NV)
    _backward_kernel[n, triton.cdiv(v, BLOCK_V)](
        logits_NV, targets_N, total_N, dnll_N, dlogits_NV, v, BLOCK_V=BLOCK_V, num_warps=WARPS
    )
    return dlogits_NV
