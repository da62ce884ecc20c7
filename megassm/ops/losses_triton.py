"""Triton kernels of `megassm.ops.losses`: logits are read once forward, once backward; `losses_torch` has the truth.

No float32 copy of the logits exists: sums are float32, what is read and written has the logits' own dtype.

Shapes: N positions, V vocabulary, or a part of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_V, WARPS = 4096, 8


@triton.jit
def _sums_kernel(logits_ptr, targets_ptr, target_logits_ptr, total_ptr, V, BLOCK_V: tl.constexpr):  # type: ignore[no-untyped-def]
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
    target = tl.load(targets_ptr + row)
    mine = (target >= 0) & (target < V)
    target_logit = tl.load(logits_ptr + tl.where(mine, target, 0), mask=mine, other=0.0)
    tl.store(total_ptr + row, highest + tl.log(total))
    tl.store(target_logits_ptr + row, target_logit.to(tl.float32))


@triton.jit
def _gradient_kernel(  # type: ignore[no-untyped-def]
    logits_ptr, targets_ptr, total_ptr, dnll_ptr, dlogits_ptr, V, BLOCK_V: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    vs = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    logits = tl.load(logits_ptr + row * V + vs, mask=vs < V, other=-float("inf")).to(tl.float32)
    share = tl.exp(logits - tl.load(total_ptr + row)) - tl.where(vs == tl.load(targets_ptr + row), 1.0, 0.0)
    gradient = share * tl.load(dnll_ptr + row)
    tl.store(dlogits_ptr + row * V + vs, gradient.to(dlogits_ptr.dtype.element_ty), mask=vs < V)


@triton.jit
def _divergence_kernel(student_ptr, teacher_ptr, sums_ptr, scale, N, V, BLOCK_V: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    student_ptr += row * V
    teacher_ptr += row * V
    student_highest, teacher_highest = -float("inf"), -float("inf")
    student_total, teacher_total, product = 0.0, 0.0, 0.0
    for first in range(0, V, BLOCK_V):
        vs = first + tl.arange(0, BLOCK_V)
        student = tl.load(student_ptr + vs, mask=vs < V, other=-float("inf")).to(tl.float32) * scale
        teacher = tl.load(teacher_ptr + vs, mask=vs < V, other=-float("inf")).to(tl.float32) * scale
        higher = tl.maximum(student_highest, tl.max(student, axis=0))
        student_total = student_total * tl.exp(student_highest - higher) + tl.sum(tl.exp(student - higher), axis=0)
        student_highest = higher
        higher = tl.maximum(teacher_highest, tl.max(teacher, axis=0))
        weights = tl.exp(teacher - higher)
        shrunk = tl.exp(teacher_highest - higher)
        teacher_total = teacher_total * shrunk + tl.sum(weights, axis=0)
        product = product * shrunk + tl.sum(tl.where(vs < V, weights * (teacher - student), 0.0), axis=0)
        teacher_highest = higher
    tl.store(sums_ptr + row, student_highest + tl.log(student_total))
    tl.store(sums_ptr + N + row, teacher_highest + tl.log(teacher_total))
    tl.store(sums_ptr + 2 * N + row, product / teacher_total)


@triton.jit
def _divergence_gradient_kernel(  # type: ignore[no-untyped-def]
    student_ptr, teacher_ptr, sums_ptr, dkl_ptr, dstudent_ptr, scale, N, V, BLOCK_V: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    vs = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside = vs < V
    student = tl.load(student_ptr + row * V + vs, mask=inside, other=-float("inf")).to(tl.float32) * scale
    teacher = tl.load(teacher_ptr + row * V + vs, mask=inside, other=-float("inf")).to(tl.float32) * scale
    difference = tl.exp(student - tl.load(sums_ptr + row)) - tl.exp(teacher - tl.load(sums_ptr + N + row))
    gradient = difference * tl.load(dkl_ptr + row) * scale
    tl.store(dstudent_ptr + row * V + vs, gradient.to(dstudent_ptr.dtype.element_ty), mask=inside)


def row_sums(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """See `megassm.ops.losses.Ways`."""
    n, v = logits_NV.shape
    target_N, total_N = (torch.empty(n, dtype=torch.float32, device=logits_NV.device) for _ in range(2))
    _sums_kernel[(n,)](logits_NV, targets_N, target_N, total_N, v, BLOCK_V=BLOCK_V, num_warps=WARPS)
    return total_N, target_N


def loss_gradient(logits_NV: Tensor, targets_N: Tensor, log_sums_N: Tensor, dnll_N: Tensor) -> Tensor:
    """See `megassm.ops.losses.Ways`."""
    n, v = logits_NV.shape
    dlogits_NV = torch.empty_like(logits_NV)
    _gradient_kernel[n, triton.cdiv(v, BLOCK_V)](
        logits_NV, targets_N, log_sums_N, dnll_N, dlogits_NV, v, BLOCK_V=BLOCK_V, num_warps=WARPS
    )
    return dlogits_NV


def divergence_sums(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
    """See `megassm.ops.losses.Ways`."""
    n, v = student_NV.shape
    sums_3N = torch.empty(3, n, dtype=torch.float32, device=student_NV.device)
    _divergence_kernel[(n,)](
        student_NV, teacher_NV, sums_3N, 1 / temperature, n, v, BLOCK_V=BLOCK_V, num_warps=WARPS
    )  # fmt: skip
    return sums_3N


def divergence_gradient(
    student_NV: Tensor, teacher_NV: Tensor, temperature: float, log_sums_2N: Tensor, dkl_N: Tensor
) -> Tensor:
    """See `megassm.ops.losses.Ways`."""
    n, v = student_NV.shape
    dstudent_NV = torch.empty_like(student_NV)
    _divergence_gradient_kernel[n, triton.cdiv(v, BLOCK_V)](
        student_NV, teacher_NV, log_sums_2N.contiguous(), dkl_N, dstudent_NV, 1 / temperature, n, v,
        BLOCK_V=BLOCK_V, num_warps=WARPS,
    )  # fmt: skip
    return dstudent_NV
