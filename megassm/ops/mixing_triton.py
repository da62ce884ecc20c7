"""Triton kernels that form gated features in one pass, forward and backward; the truth stands in `mixing`.

    gated = (rows @ z) * weights

The product with the constant rows and the gate's factor are fused, so that features are written once, ready for the
large product with the channel matrices; backward makes them again, and reads and writes each gradient once.

Shapes: N chunks, I inputs and states of a chunk, X positions x filters of a group, D width.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_X, BLOCK_D, STAGES = 64, 128, 2
"""On an H100 the fastest of seven tried, in bf16 (1b_hybrid's layer at K=32: 0.43 ms)."""
FORWARD_WARPS, BACKWARD_WARPS = 4, 8
"""With fewer the backward kernel spills registers."""


@triton.jit
def _product(z_ptr, rows_ptr, n, xs, ds, X, I, D, BLOCK_I: tl.constexpr):  # type: ignore[no-untyped-def]
    """rows[xs] @ z[n][:, ds], float32."""
    inputs = tl.arange(0, BLOCK_I)
    rows_mask = (xs[:, None] < X) & (inputs[None, :] < I)
    z_mask = (inputs[:, None] < I) & (ds[None, :] < D)
    rows = tl.load(rows_ptr + xs[:, None] * I + inputs[None, :], mask=rows_mask, other=0.0)
    z = tl.load(z_ptr + (n * I + inputs[:, None]) * D + ds[None, :], mask=z_mask, other=0.0)
    return tl.dot(rows, z, input_precision="ieee")  # of float32, which tests alone use


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    z_ptr, rows_ptr, weights_ptr, out_ptr, X, I, D,
    BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(X, BLOCK_X)  # one axis for chunks and positions: the second and third end at 65,535
    n = (tl.program_id(0) // across).to(tl.int64)
    xs = tl.program_id(0) % across * BLOCK_X + tl.arange(0, BLOCK_X)
    ds = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    features = _product(z_ptr, rows_ptr, n, xs, ds, X, I, D, BLOCK_I)
    weights = tl.load(weights_ptr + n * X + xs, mask=xs < X, other=0.0)
    mask = (xs[:, None] < X) & (ds[None, :] < D)
    out = out_ptr + (n * X + xs[:, None]) * D + ds[None, :]
    tl.store(out, (features * weights[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    z_ptr, rows_ptr, weights_ptr, gradient_ptr, gated_ptr, dweights_ptr, X, I, D,
    BLOCK_X: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(X, BLOCK_X)
    n = (tl.program_id(0) // across).to(tl.int64)
    xs = tl.program_id(0) % across * BLOCK_X + tl.arange(0, BLOCK_X)
    weights = tl.load(weights_ptr + n * X + xs, mask=xs < X, other=0.0)
    dweights = tl.zeros((BLOCK_X,), dtype=tl.float32)
    for first in range(0, D, BLOCK_D):
        ds = first + tl.arange(0, BLOCK_D)
        mask = (xs[:, None] < X) & (ds[None, :] < D)
        places = (n * X + xs[:, None]) * D + ds[None, :]
        features = _product(z_ptr, rows_ptr, n, xs, ds, X, I, D, BLOCK_I)
        gradient = tl.load(gradient_ptr + places, mask=mask, other=0.0).to(tl.float32)
        dweights += tl.sum(features * gradient, axis=1)
        tl.store(gated_ptr + places, (features * weights[:, None]).to(gated_ptr.dtype.element_ty), mask=mask)
        tl.store(gradient_ptr + places, (gradient * weights[:, None]).to(gradient_ptr.dtype.element_ty), mask=mask)
    tl.store(dweights_ptr + n * X + xs, dweights, mask=xs < X)


def gated_features(z_NID: Tensor, rows_XI: Tensor, weights_NX: Tensor) -> Tensor:
    """(rows @ z) * weights, (N, X, D) in z's dtype, summed in float32."""
    n, i, d = z_NID.shape
    x = rows_XI.shape[0]
    out_NXD = z_NID.new_empty(n, x, d)
    _forward_kernel[triton.cdiv(x, BLOCK_X) * n, triton.cdiv(d, BLOCK_D)](
        z_NID.contiguous(), rows_XI.contiguous(), weights_NX.contiguous(), out_NXD, x, i, d,
        BLOCK_X=BLOCK_X, BLOCK_D=BLOCK_D, BLOCK_I=_block_i(i), num_warps=FORWARD_WARPS, num_stages=STAGES,
    )  # fmt: skip
    return out_NXD


def gated_features_backward(
    z_NID: Tensor, rows_XI: Tensor, weights_NX: Tensor, dgated_NXD: Tensor
) -> tuple[Tensor, Tensor]:
    """(`gated_features` made again, the gradient of the weights); turns `dgated_NXD` into that of the features."""
    n, i, d = z_NID.shape
    x = rows_XI.shape[0]
    assert dgated_NXD.is_contiguous()
    gated_NXD = torch.empty_like(dgated_NXD)
    dweights_NX = torch.empty(n, x, dtype=torch.float32, device=z_NID.device)
    _backward_kernel[(triton.cdiv(x, BLOCK_X) * n,)](
        z_NID.contiguous(), rows_XI.contiguous(), weights_NX.contiguous(), dgated_NXD, gated_NXD, dweights_NX, x, i, d,
        BLOCK_X=BLOCK_X, BLOCK_D=BLOCK_D, BLOCK_I=_block_i(i), num_warps=BACKWARD_WARPS, num_stages=STAGES,
    )  # fmt: skip
    return gated_NXD, dweights_NX.to(weights_NX.dtype)


def _block_i(inputs: int) -> int:
    """All of a chunk's inputs and states in one block: a power of two, at least 16 for the tensor cores."""
    return max(16, 1 << (inputs - 1).bit_length())
