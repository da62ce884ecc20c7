"""Triton kernels of `megassm.ops.swiglu`: each number is read once and written once, each way.

    y = g s u,  s = 1 / (1 + exp(-g));    dup = dy g s;    dgate = dy u s (1 + g (1 - s))

Computed in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 1024, 4
"""Numbers of a program."""


@triton.jit
def _forward_kernel(gate_ptr, up_ptr, out_ptr, N, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < N
    gate = tl.load(gate_ptr + places, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + places, mask=inside, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + places, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(gate_ptr, up_ptr, dout_ptr, dgate_ptr, dup_ptr, N, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = places < N
    gate = tl.load(gate_ptr + places, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + places, mask=inside, other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + places, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    tl.store(dup_ptr + places, (dout * gate * share).to(dup_ptr.dtype.element_ty), mask=inside)
    dgate = dout * up * share * (1.0 + gate * (1.0 - share))
    tl.store(dgate_ptr + places, dgate.to(dgate_ptr.dtype.element_ty), mask=inside)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, both contiguous."""
    out, n = torch.empty_like(gate), gate.numel()
    _forward_kernel[(triton.cdiv(n, BLOCK),)](gate, up, out, n, BLOCK=BLOCK, num_warps=WARPS)
    return out


def swiglu_backward(gate: Tensor, up: Tensor, dout: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    dgate, dup, n = torch.empty_like(gate), torch.empty_like(up), gate.numel()
    _backward_kernel[(triton.cdiv(n, BLOCK),)](gate, up, dout, dgate, dup, n, BLOCK=BLOCK, num_warps=WARPS)
    return dgate, dup
