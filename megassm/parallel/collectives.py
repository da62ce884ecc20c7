"""Functions with collectives in them: what they send forward, and what their gradients send backward.

Shapes: B batch, L length, D width, H heads, K budget, V this rank's outputs, N = B * L.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megassm.parallel.world import Group


def spread(x: Tensor, group: Group) -> Tensor:
    """The same x on all ranks of the group; backward, its gradients are summed."""
    spread: Tensor = _Spread.apply(x, group)  # type: ignore[no-untyped-call]
    return spread


def summed(x: Tensor, group: Group) -> Tensor:
    """The sum of the ranks' x; backward, the gradient is that of each."""
    total: Tensor = _Sum.apply(x, group)  # type: ignore[no-untyped-call]
    return total


def all_reduce(x: Tensor, group: Group, op: Any = dist.ReduceOp.SUM) -> Tensor:
    """The sum, or another `op`, of the ranks' x, in x itself where that is contiguous; without a gradient."""
    x = x.contiguous()
    dist.all_reduce(x, op=op, group=group)
    return x


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return all_reduce(grads[0].clone(), ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        return all_reduce(x.clone(), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class EnterMixer(torch.autograd.Function):
    """(this rank's channels of u, its heads' weights); backward, one message carries the gradients of both.

    The message is (D + H K) wide and in u's dtype: the gate's H K numbers ride along with u's D.
    """

    @staticmethod
    def forward(
        ctx: Any, u_BLD: Tensor, weights_BLHK: Tensor, channels: slice, heads: slice, group: Group
    ) -> tuple[Tensor, Tensor]:
        ctx.mine, ctx.group = (channels, heads), group
        ctx.width, ctx.heads = u_BLD.shape[-1], weights_BLHK.shape[2]
        return u_BLD[..., channels].contiguous(), weights_BLHK[:, :, heads].clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (du_BLd, dweights_BLhK), (channels, heads) = grads, ctx.mine
        shape = (ctx.heads, dweights_BLhK.shape[-1])
        both = du_BLd.new_zeros(*du_BLd.shape[:-1], ctx.width + shape[0] * shape[1])
        both[..., : ctx.width][..., channels] = du_BLd
        torch.unflatten(both[..., ctx.width :], -1, shape)[:, :, heads] = dweights_BLhK
        both = all_reduce(both, ctx.group)
        dweights_BLHK = torch.unflatten(both[..., ctx.width :], -1, shape).to(dweights_BLhK.dtype)
        return both[..., : ctx.width], dweights_BLHK, None, None, None


class SplitCrossEntropy(torch.autograd.Function):
    """Cross-entropy (N,) from each rank's columns of the logits; `targets_N` count from the rank's first column."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, group: Group) -> Tensor:
        top_N = all_reduce(logits_NV.amax(dim=-1), group, dist.ReduceOp.MAX)
        shifted_NV = logits_NV - top_N[:, None]
        mine_N = (targets_N >= 0) & (targets_N < logits_NV.shape[-1])
        column_N1 = targets_N.where(mine_N, 0)[:, None]
        target_N = shifted_NV.gather(1, column_N1)[:, 0] * mine_N
        exp_NV = shifted_NV.exp_()
        totals_2N = all_reduce(torch.stack((exp_NV.sum(dim=-1), target_N)), group)
        ctx.save_for_backward(exp_NV.div_(totals_2N[0][:, None]), mine_N, column_N1)
        return totals_2N[0].log() - totals_2N[1]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        softmax_NV, mine_N, column_N1 = ctx.saved_tensors
        dlogits_NV = softmax_NV.scatter_add(1, column_N1, -mine_N.to(softmax_NV.dtype)[:, None])
        return dlogits_NV * grads[0][:, None], None, None


class SplitDivergence(torch.autograd.Function):
    """KL(teacher || student) (B, L) from each rank's columns of both logits; the teacher gets no gradient."""

    @staticmethod
    def forward(ctx: Any, student_BLV: Tensor, teacher_BLV: Tensor, group: Group) -> Tensor:
        both = torch.stack((student_BLV, teacher_BLV))
        top = all_reduce(both.amax(dim=-1), group, dist.ReduceOp.MAX)
        both -= top[..., None]
        totals = all_reduce(both.exp().sum(dim=-1), group)
        both -= totals.log()[..., None]
        teacher_BLV = both[1].exp()
        ctx.save_for_backward(both[0].exp() - teacher_BLV)
        return all_reduce((teacher_BLV * (both[1] - both[0])).sum(dim=-1), group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (difference_BLV,) = ctx.saved_tensors
        return difference_BLV * grads[0][..., None], None, None
