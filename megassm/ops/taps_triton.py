"""Triton kernels of `megassm.ops.taps`: inputs are read once from memory and written once, each way.

    v_t = sum_i w_i u_{t-i};    du_t = sum_i w_i dv_{t+i};    dw_i = sum_t dv_t u_{t-i}

Summed in float32; the taps' gradients first over some positions each.

Shapes: B batch, L length, D width, N taps, P programs along all sequences.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_T, BLOCK_D, WARPS = 32, 64, 4


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    u_ptr, weight_ptr, v_ptr, L, D, N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    across = tl.cdiv(L, BLOCK_T)
    first = (tl.program_id(0) // across).to(tl.int64) * L
    t = tl.program_id(0) % across * BLOCK_T + tl.arange(0, BLOCK_T)
    ds = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = ds < D
    v = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    for i in tl.static_range(N):
        weight = tl.load(weight_ptr + i * D + ds, mask=inside, other=0.0).to(tl.float32)
        mask = ((t >= i) & (t < L))[:, None] & inside[None, :]
        u = tl.load(u_ptr + (first + t[:, None] - i) * D + ds[None, :], mask=mask, other=0.0).to(tl.float32)
        v += weight[None, :] * u
    mask = (t < L)[:, None] & inside[None, :]
    tl.store(v_ptr + (first + t[:, None]) * D + ds[None, :], v.to(v_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    u_ptr, weight_ptr, dv_ptr, du_ptr, dweight_ptr, L, D,
    N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(L, BLOCK_T)
    first = (tl.program_id(0) // across).to(tl.int64) * L
    t = tl.program_id(0) % across * BLOCK_T + tl.arange(0, BLOCK_T)
    ds = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = ds < D
    own = (t < L)[:, None] & inside[None, :]
    dv = tl.load(dv_ptr + (first + t[:, None]) * D + ds[None, :], mask=own, other=0.0).to(tl.float32)
    du = tl.zeros((BLOCK_T, BLOCK_D), dtype=tl.float32)
    for i in tl.static_range(N):
        weight = tl.load(weight_ptr + i * D + ds, mask=inside, other=0.0).to(tl.float32)
        mask = (t + i < L)[:, None] & inside[None, :]
        later = tl.load(dv_ptr + (first + t[:, None] + i) * D + ds[None, :], mask=mask, other=0.0).to(tl.float32)
        du += weight[None, :] * later
        mask = ((t >= i) & (t < L))[:, None] & inside[None, :]
        u = tl.load(u_ptr + (first + t[:, None] - i) * D + ds[None, :], mask=mask, other=0.0).to(tl.float32)
        place = dweight_ptr + (tl.program_id(0).to(tl.int64) * N + i) * D + ds
        tl.store(place, tl.sum(dv * u, axis=0), mask=inside)
    tl.store(du_ptr + (first + t[:, None]) * D + ds[None, :], du.to(du_ptr.dtype.element_ty), mask=own)


def causal_taps(u_BLD: Tensor, weight_ND: Tensor) -> Tensor:
    """See `megassm.ops.taps`; both contiguous."""
    batch, length, width = u_BLD.shape
    v_BLD = torch.empty_like(u_BLD)
    grid = (batch * triton.cdiv(length, BLOCK_T), triton.cdiv(width, BLOCK_D))
    _forward_kernel[grid](
        u_BLD, weight_ND, v_BLD, length, width, N=len(weight_ND), BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D, num_warps=WARPS
    )
    return v_BLD


def causal_taps_backward(u_BLD: Tensor, weight_ND: Tensor, dv_BLD: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of u and of the taps."""
    (batch, length, width), taps = u_BLD.shape, len(weight_ND)
    grid = (batch * triton.cdiv(length, BLOCK_T), triton.cdiv(width, BLOCK_D))
    du_BLD = torch.empty_like(u_BLD)
    dweight_PND = torch.empty(grid[0], taps, width, dtype=torch.float32, device=u_BLD.device)
    _backward_kernel[grid](
        u_BLD, weight_ND, dv_BLD, du_BLD, dweight_PND, length, width,
        N=taps, BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D, num_warps=WARPS,
    )  # fmt: skip
    return du_BLD, dweight_PND.sum(0).to(weight_ND.dtype)
