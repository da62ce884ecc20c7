"""The next token's loss, and a student's divergence from its teacher, from logits.

Neither keeps a float32 tensor of the logits' size, as torch's own ways do (a copy, its log-softmax, the gradients of
both): rows are summed in float32, and the gradient is made from the logits in their own dtype. On CUDA 16-bit logits
are summed by Triton (`losses_triton`), where it is and is right, so that no such tensor exists at all; `losses_torch`
is the truth beside it.

Several ranks may hold the columns in parts; `combine` then puts their sums of a row together.

Shapes: N positions, V vocabulary, or this rank's part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from megassm.ops import losses_torch
from megassm.ops.kernel_check import agrees, has_triton

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of the norm, for `_is_right`: that of the rounded gradient."""

Combine = Callable[[Tensor, Literal["max", "sum"]], Tensor]
"""The largest or the sum of what all ranks have, on each; the argument stays as it is."""


class Ways(Protocol):
    """How rows are summed: `losses_torch` or `losses_triton`."""

    def row_sums(self, logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        """(log of the sum of exponentials (N,), the target's logit (N,), 0 if it is none of these columns)."""

    def loss_gradient(self, logits_NV: Tensor, targets_N: Tensor, log_sums_N: Tensor, dnll_N: Tensor) -> Tensor:
        """The gradient of the logits, in their dtype; `log_sums_N` are those of whole rows."""

    def divergence_sums(self, student_NV: Tensor, teacher_NV: Tensor, temperature: float) -> Tensor:
        """(3, N): the logs of the sums of exponentials of student and teacher, both divided by the temperature, and
        the teacher's expectation of its logits less the student's."""

    def divergence_gradient(
        self, student_NV: Tensor, teacher_NV: Tensor, temperature: float, log_sums_2N: Tensor, dkl_N: Tensor
    ) -> Tensor:
        """The gradient of the student's logits, in their dtype; `log_sums_2N` are those of whole rows."""


def token_losses(logits_NV: Tensor, targets_N: Tensor, combine: Combine | None = None) -> Tensor:
    """Negative log-likelihood in nats of the targets, (N,) float32; a target counts from the first of these columns."""
    ways = _ways(logits_NV)
    if combine is None and ways is losses_torch:
        return F.cross_entropy(logits_NV.float(), targets_N, reduction="none")
    nll_N: Tensor = _TokenLosses.apply(logits_NV, targets_N, combine, ways)  # type: ignore[no-untyped-call]
    return nll_N


def divergences(student_NV: Tensor, teacher_NV: Tensor, temperature: float, combine: Combine | None = None) -> Tensor:
    """KL(teacher || student) (N,) float32 of the predictions at a temperature; the teacher gets no gradient."""
    ways = _ways(student_NV)
    kl_N: Tensor = _Divergences.apply(student_NV, teacher_NV, temperature, combine, ways)  # type: ignore[no-untyped-call]
    return kl_N


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, combine: Combine | None, ways: Ways) -> Tensor:
        logits_NV, targets_N = logits_NV.contiguous(), targets_N.contiguous()
        log_sums_N, target_N = ways.row_sums(logits_NV, targets_N)
        if combine is not None:
            top_N = combine(log_sums_N, "max")
            total_N, target_N = combine(torch.stack(((log_sums_N - top_N).exp(), target_N)), "sum")
            log_sums_N = total_N.log() + top_N
        ctx.save_for_backward(logits_NV, targets_N, log_sums_N)
        ctx.ways = ways
        return log_sums_N - target_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        logits_NV, targets_N, log_sums_N = ctx.saved_tensors
        dnll_N = grads[0].float().contiguous()
        return ctx.ways.loss_gradient(logits_NV, targets_N, log_sums_N, dnll_N), None, None, None


class _Divergences(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student_NV: Tensor, teacher_NV: Tensor, temperature: float, combine: Combine | None, ways: Ways
    ) -> Tensor:
        student_NV, teacher_NV = student_NV.contiguous(), teacher_NV.contiguous()
        sums_3N = ways.divergence_sums(student_NV, teacher_NV, temperature)
        log_sums_2N, expected_N = sums_3N[:2], sums_3N[2]
        if combine is not None:
            top_2N = combine(log_sums_2N, "max")
            shares_2N = (log_sums_2N - top_2N).exp()
            totals_3N = combine(torch.cat((shares_2N, (shares_2N[1] * expected_N)[None])), "sum")
            log_sums_2N, expected_N = totals_3N[:2].log() + top_2N, totals_3N[2] / totals_3N[1]
        ctx.save_for_backward(student_NV, teacher_NV, log_sums_2N)
        ctx.ways, ctx.temperature = ways, temperature
        return expected_N + log_sums_2N[0] - log_sums_2N[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        student_NV, teacher_NV, log_sums_2N = ctx.saved_tensors
        dkl_N = grads[0].float().contiguous()
        gradient = ctx.ways.divergence_gradient(student_NV, teacher_NV, ctx.temperature, log_sums_2N, dkl_N)
        return gradient, None, None, None, None


def _ways(logits_NV: Tensor) -> Ways:
    narrow = logits_NV.device.type == "cuda" and logits_NV.dtype.itemsize == 2
    if narrow and _is_right(logits_NV.device, logits_NV.dtype):
        from megassm.ops import losses_triton

        return losses_triton
    return losses_torch


@lru_cache
@torch.inference_mode(False)
def _is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the kernels agree with torch on this device, forward and backward: asked once."""
    if not has_triton() or dtype not in TOLERANCE:
        return False
    from megassm.ops import losses_triton

    generator = torch.Generator().manual_seed(0)
    logits_NV, teacher_NV = ((4 * torch.randn(7, 5001, generator=generator)).to(device, dtype) for _ in range(2))
    targets_N = torch.tensor([0, 5000, 17, 4095, 4096, -1, 5001], device=device)
    gradient_N = torch.randn(7, generator=generator).to(device)
    own = logits_NV, teacher_NV, targets_N, gradient_N
    return agrees(
        lambda: _both(losses_triton, *own), lambda: _both(losses_torch, *own), TOLERANCE[dtype], "loss", "torch's is"
    )


@torch.enable_grad()
def _both(
    ways: Ways, logits_NV: Tensor, teacher_NV: Tensor, targets_N: Tensor, gradient_N: Tensor
) -> tuple[Tensor, ...]:
    """(losses, the logits' gradient, divergences at temperature 2, the student's gradient)."""
    logits_NV = logits_NV.detach().requires_grad_()
    nll_N = _TokenLosses.apply(logits_NV, targets_N, None, ways)  # type: ignore[no-untyped-call]
    kl_N = _Divergences.apply(logits_NV, teacher_NV, 2.0, None, ways)  # type: ignore[no-untyped-call]
    gradients = (torch.autograd.grad(value_N, logits_NV, gradient_N)[0] for value_N in (nll_N, kl_N))
    return nll_N.detach(), kl_N.detach(), *gradients
