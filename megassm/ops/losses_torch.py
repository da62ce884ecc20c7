"""The sums of `megassm.ops.losses` by torch: the truth, and the way on a CPU.

Shapes: N positions, V vocabulary, or a part of it.
"""

from __future__ import annotations

import torch
from torch import Tensor


def row_sums(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """See `megassm.ops.losses.Ways`."""
    logits_NV = logits_NV.float()
    mine_N, column_N1 = _targets(logits_NV, targets_N)
    return logits_NV.logsumexp(dim=-1), logits_NV.gather(1, column_N1)[:, 0] * mine_N


def loss_gradient(logits_NV: Tensor, targets_N: Tensor, log_sums_N: Tensor, dnll_N: Tensor) -> Tensor:
    """See `megassm.ops.losses.Ways`."""
    mine_N, column_N1 = _targets(logits_NV, targets_N)
    gradient_NV = (logits_NV.float() - log_sums_N[:, None]).exp_()
    gradient_NV.scatter_add_(1, column_N1, -mine_N.to(gradient_NV.dtype)[:, None])
    gradient_NV *= dnll_N[:, None]
    return gradient_NV.to(logits_NV.dtype)


def divergence_sums(student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
    """See `megassm.ops.losses.Ways`."""
    student_NV, teacher_NV = student_NV.float() / temperature, teacher_NV.float() / temperature
    student_N, teacher_N = student_NV.logsumexp(dim=-1), teacher_NV.logsumexp(dim=-1)
    student_NV = teacher_NV - student_NV
    student_NV *= (teacher_NV - teacher_N[:, None]).exp_()
    return torch.stack((student_N, teacher_N, student_NV.sum(dim=-1)))


def divergence_gradient(
    student_NV: Tensor, teacher_NV: Tensor, temperature: float, log_sums_2N: Tensor, dkl_N: Tensor
) -> Tensor:
    """See `megassm.ops.losses.Ways`."""
    gradient_NV = (student_NV.float() / temperature).sub_(log_sums_2N[0][:, None]).exp_()
    gradient_NV -= (teacher_NV.float() / temperature).sub_(log_sums_2N[1][:, None]).exp_()
    gradient_NV *= dkl_N[:, None] / temperature
    return gradient_NV.to(student_NV.dtype)


def _targets(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """(whether the target is one of these columns (N,), its column or the first (N, 1))."""
    mine_N = (targets_N >= 0) & (targets_N < logits_NV.shape[-1])
    return mine_N, targets_N.where(mine_N, 0)[:, None]
