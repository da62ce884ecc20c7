"""Triton kernels that form [U_c ; x_c] of all chunks in one pass, and carry gradients back; `filterbank` has the truth.

    x_{c+1} = x_c + (A - 1) x_c + B U_c              forward, from x_0 = 0
    y_c = y_{c+1} + (A - 1)^T y_{c+1} + dx_c         backward, from beyond the last chunk, where y = 0
    dU_c = (the gradient of U_c's copy) + B^T y_{c+1}

A program has all chunks of some channels of one sequence: the state stays in registers, in float32, u is read once and
what is made of it written once. A - 1 is rounded and not A, whose eigenvalues are too near 1 to be. Products are of
three tf32 ones each, which is float32's accuracy.

Shapes: B sequences, L length, D channels, N chunks of a sequence, C chunk, S states, I = C + S.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_D, WARPS = 16, 4
"""On an H100 the fastest of five tried (1b_hybrid's layer: 0.11 ms)."""


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    u_ptr, change_ptr, input_ptr, z_ptr, L, D, N, S,
    C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    ds = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    s, c = tl.arange(0, BLOCK_S), tl.arange(0, C)
    held = (s[:, None] < S) & (s[None, :] < S)
    change = tl.load(change_ptr + s[:, None] * S + s[None, :], mask=held, other=0.0)
    inputs = tl.load(input_ptr + s[:, None] * C + c[None, :], mask=s[:, None] < S, other=0.0).to(tl.float32)
    x = tl.zeros((BLOCK_S, BLOCK_D), dtype=tl.float32)
    inside = ds[None, :] < D
    for n in range(0, N):
        t = n * C + c
        u = tl.load(u_ptr + (b * L + t[:, None]) * D + ds[None, :], mask=(t[:, None] < L) & inside, other=0.0)
        first = (b * N + n) * (C + S)
        tl.store(z_ptr + (first + c[:, None]) * D + ds[None, :], u, mask=inside)
        place = z_ptr + (first + C + s[:, None]) * D + ds[None, :]
        tl.store(place, x.to(z_ptr.dtype.element_ty), mask=(s[:, None] < S) & inside)
        x += tl.dot(change, x, input_precision="tf32x3") + tl.dot(inputs, u.to(tl.float32), input_precision="tf32x3")


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    dz_ptr, change_ptr, input_ptr, du_ptr, L, D, N, S,
    C: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    ds = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    s, c = tl.arange(0, BLOCK_S), tl.arange(0, C)
    held = (s[:, None] < S) & (s[None, :] < S)
    change_t = tl.load(change_ptr + s[None, :] * S + s[:, None], mask=held, other=0.0)
    inputs_t = tl.load(input_ptr + s[None, :] * C + c[:, None], mask=s[None, :] < S, other=0.0).to(tl.float32)
    y = tl.zeros((BLOCK_S, BLOCK_D), dtype=tl.float32)
    inside = ds[None, :] < D
    for back in range(0, N):
        n = N - 1 - back
        t = n * C + c
        first = (b * N + n) * (C + S)
        du = tl.load(dz_ptr + (first + c[:, None]) * D + ds[None, :], mask=inside, other=0.0).to(tl.float32)
        place = dz_ptr + (first + C + s[:, None]) * D + ds[None, :]
        dx = tl.load(place, mask=(s[:, None] < S) & inside, other=0.0).to(tl.float32)
        du += tl.dot(inputs_t, y, input_precision="tf32x3")
        place = du_ptr + (b * L + t[:, None]) * D + ds[None, :]
        tl.store(place, du.to(du_ptr.dtype.element_ty), mask=(t[:, None] < L) & inside)
        y += tl.dot(change_t, y, input_precision="tf32x3") + dx


def chunk_inputs(u_BLD: Tensor, change_SS: Tensor, input_SC: Tensor) -> Tensor:
    """[U_c ; x_c] (B N, I, D) in u's dtype; `change` is A - 1 in float32, `input` is B."""
    batch, length, width = u_BLD.shape
    states, chunk = input_SC.shape
    chunks = triton.cdiv(length, chunk)
    z_NID = u_BLD.new_empty(batch * chunks, chunk + states, width)
    _forward_kernel[batch, triton.cdiv(width, BLOCK_D)](
        u_BLD.contiguous(), change_SS.contiguous(), input_SC.contiguous(), z_NID, length, width, chunks, states,
        C=chunk, BLOCK_S=_block(states), BLOCK_D=BLOCK_D, num_warps=WARPS,
    )  # fmt: skip
    return z_NID


def chunk_inputs_backward(dz_NID: Tensor, change_SS: Tensor, input_SC: Tensor, shape: torch.Size) -> Tensor:
    """The gradient of `chunk_inputs` (B, L, D), which are in `shape`, in u."""
    batch, length, width = shape
    states, chunk = input_SC.shape
    du_BLD = dz_NID.new_empty(shape)
    _backward_kernel[batch, triton.cdiv(width, BLOCK_D)](
        dz_NID.contiguous(), change_SS.contiguous(), input_SC.contiguous(), du_BLD, length, width,
        triton.cdiv(length, chunk), states, C=chunk, BLOCK_S=_block(states), BLOCK_D=BLOCK_D, num_warps=WARPS,
    )  # fmt: skip
    return du_BLD


def _block(states: int) -> int:
    """All states in one block: a power of two, at least 16 for the tensor cores."""
    return max(16, 1 << (states - 1).bit_length())
