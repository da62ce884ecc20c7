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
