"""Triton kernels of the gates; `mixing.gate_weights` and `open_weights` have the truth.

    2 sigmoid(s);    or:
    shat = r s,  r = sqrt(K) / max(||s||, floor), or 1;    alpha = softmax(shat)
    dshat = alpha (dalpha - <alpha, dalpha>);    ds = r (dshat - s <s, dshat> / ||s||^2), or r dshat below the floor

A program has some rows of K scores, a row for each position and head. Sums are float32.

Shapes: B batch, L length, H heads, K channels, X = K H scores, channel by channel; R = B L H rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megassm.ops.mixing import NORM_FLOOR

BLOCK, WARPS = 2048, 4
"""Numbers of a program."""


@triton.jit
def _softmax(s, ks, K, root, floor, GATE: tl.constexpr):  # type: ignore[no-untyped-def]
    """(softmax of the rescaled scores, the factor r, the norm)."""
    norm = tl.sqrt(tl.sum(s * s, axis=1))
    r = root / tl.maximum(norm, floor) if GATE == 2 else norm * 0.0 + 1.0
    shat = tl.where(ks[None, :] < K, s * r[:, None], -float("inf"))
    e = tl.exp(shat - tl.max(shat, axis=1)[:, None])
    return e / tl.sum(e, axis=1)[:, None], r, norm


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    scores_ptr, alpha_ptr, R, K, H, root, floor,
    GATE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    ks = tl.arange(0, BLOCK_K)
    inside = (rows[:, None] < R) & (ks[None, :] < K)
    places = ((rows // H)[:, None] * K + ks[None, :]) * H + (rows % H)[:, None]
    s = tl.load(scores_ptr + places, mask=inside, other=0.0).to(tl.float32)
    if GATE == 0:
        alpha = 2.0 * tl.sigmoid(s)
    else:
        alpha, _, _ = _softmax(s, ks, K, root, floor, GATE)
    tl.store(alpha_ptr + rows[:, None] * K + ks[None, :], alpha, mask=inside)


@triton.jit
def _backward_kernel(  # type: ignore[no-untyped-def]
    scores_ptr, dalpha_ptr, dscores_ptr, R, K, H, root, floor,
    GATE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    ks = tl.arange(0, BLOCK_K)
    inside = (rows[:, None] < R) & (ks[None, :] < K)
    places = ((rows // H)[:, None] * K + ks[None, :]) * H + (rows % H)[:, None]
    s = tl.load(scores_ptr + places, mask=inside, other=0.0).to(tl.float32)
    dalpha = tl.load(dalpha_ptr + rows[:, None] * K + ks[None, :], mask=inside, other=0.0)
    if GATE == 0:
        share = tl.sigmoid(s)
        ds = dalpha * 2.0 * share * (1.0 - share)
    else:
        alpha, r, norm = _softmax(s, ks, K, root, floor, GATE)
        ds = alpha * (dalpha - tl.sum(alpha * dalpha, axis=1)[:, None])
        if GATE == 2:
            along = tl.where(norm > floor, tl.sum(s * ds, axis=1) / tl.maximum(norm * norm, floor * floor), 0.0)
            ds = r[:, None] * (ds - s * along[:, None])
    tl.store(dscores_ptr + places, ds.to(dscores_ptr.dtype.element_ty), mask=inside)


def weights(scores_BLX: Tensor, heads: int, gate: int) -> Tensor:
    """alpha (B, L, H, K) float32; `gate` is a `megassm.ops.gates.Gate`."""
    batch, length, x = scores_BLX.shape
    alpha_BLHK = torch.empty(batch, length, heads, x // heads, dtype=torch.float32, device=scores_BLX.device)
    _launch(_forward_kernel, scores_BLX, (alpha_BLHK,), heads, gate)
    return alpha_BLHK


def weights_backward(scores_BLX: Tensor, dalpha_BLHK: Tensor, heads: int, gate: int) -> Tensor:
    """The gradient of the scores, in their dtype."""
    dscores_BLX = torch.empty_like(scores_BLX)
    _launch(_backward_kernel, scores_BLX, (dalpha_BLHK, dscores_BLX), heads, gate)
    return dscores_BLX


def _launch(kernel, scores_BLX: Tensor, others: tuple[Tensor, ...], heads: int, gate: int) -> None:  # type: ignore[no-untyped-def]
    k = scores_BLX.shape[-1] // heads
    rows, block_k = scores_BLX.numel() // k, triton.next_power_of_2(k)
    block_r = max(1, BLOCK // block_k)
    kernel[(triton.cdiv(rows, block_r),)](
        scores_BLX, *others, rows, k, heads, k**0.5, NORM_FLOOR,
        GATE=int(gate), BLOCK_R=block_r, BLOCK_K=block_k, num_warps=WARPS,
    )  # fmt: skip
