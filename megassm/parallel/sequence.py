"""Sequence parallelism: every rank of a sequence group holds L/R consecutive positions of the same sequences.

A spectral layer needs nothing of the past but its state, S x D numbers a sequence. Each rank computes the state e_r
that its part would end with from zero, tells it to the others, and starts from

    x_r = sum_{j<r} (A^n)^(r-1-j) e_j                     n chunks a part

which is exact. One message of S x D forward and one backward; the layer's direct product runs while it is under way,
in both directions: autograd takes `receive` back before that product, and `send` after it.

Taps before a mixer (`megassm.layers.taps`) need the last inputs of the part before: one more message, of T inputs.

Attention layers exchange positions for heads (all-to-all; DeepSpeed-Ulysses, arXiv 2309.14509): between two exchanges
every rank sees all positions of its share of the heads.

Gradients: the parts' losses add up, so the sequence ranks of a group count as replicas (see `megassm.parallel.mesh`).
Shapes: B batch, L length, D width, S states, H heads, G key-value heads, P dimensions a head, R ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from megassm.layers.attention import Attend, Attention, Mask
from megassm.layers.block import Block
from megassm.model import LanguageModel
from megassm.parallel.link import Link
from megassm.parallel.world import Group


def split_sequence(model: LanguageModel, group: Group) -> None:
    """Makes `model` compute this rank's part of every sequence; what it is given are the ids of that part."""
    if group.size() == 1:
        return
    link = Link(group)
    model.part = (link.rank, link.size)
    if model.filterbank is not None:
        assert model.filterbank.state_size, "there is a state to hand on"
        model.filterbank.carry = StateCarry(link)
    for block in cast(list[Block], model.blocks):
        if block.taps is not None:
            block.taps.before = InputsBefore(link)
        if isinstance(block.mixer, Attention):
            block.mixer.attend = ExchangeHeads(link, block.mixer.attend)


class _Exchange:
    """One layer's message between the ranks of a group: forward, and back."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.rank, self.ranks = group.rank(), group.size()
        self.power_SS = torch.empty(0)
        self._work: Any = None

    def start(self, mine_BSD: Tensor) -> Tensor:
        """A buffer (R, B, S, D) that has every rank's once `finish` returns."""
        buffer = mine_BSD.new_empty(self.ranks, *mine_BSD.shape)
        self._work = dist.all_gather(list(buffer), mine_BSD.contiguous(), group=self.group, async_op=True)
        return buffer

    def finish(self) -> None:
        self._work.wait()


class StateCarry:
    """A `megassm.layers.filterbank.Carry` over the ranks of a group."""

    def __init__(self, link: Link) -> None:
        self.link = link

    def send(self, end_BSD: Tensor) -> tuple[Tensor, _Exchange]:
        exchange = _Exchange(self.link.group)
        return _Send.apply(end_BSD, exchange), exchange  # type: ignore[no-untyped-call]

    def receive(self, sent: tuple[Tensor, _Exchange], power_SS: Tensor) -> Tensor:
        before_BSD: Tensor = _Receive.apply(*sent, power_SS)  # type: ignore[no-untyped-call]
        return before_BSD


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, end_BSD: Tensor, exchange: _Exchange) -> Tensor:
        ctx.exchange = exchange
        # detached: the message's views of a tensor with a graph would keep that graph alive for ever
        return exchange.start(end_BSD).detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """`grads` is the buffer that `_Receive.backward` has begun to fill: the gradient of every rank's x_r.

        de_j = sum_{r>j} ((A^n)^T)^(r-1-j) dx_r.
        """
        exchange: _Exchange = ctx.exchange
        exchange.finish()
        later_RBSD = grads[0][exchange.rank + 1 :].flip(0)
        return _scan(later_RBSD, exchange.power_SS.t(), like=grads[0][0]), None


class _Receive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sent_RBSD: Tensor, exchange: _Exchange, power_SS: Tensor) -> Tensor:
        exchange.finish()
        exchange.power_SS = power_SS
        ctx.exchange = exchange
        return _scan(sent_RBSD[: exchange.rank], power_SS, like=sent_RBSD[0])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return ctx.exchange.start(grads[0]), None, None


def _scan(parts_RBSD: Tensor, power_SS: Tensor, like: Tensor) -> Tensor:
    """The last of x = power x + part, from x = 0 on."""
    x_BSD = torch.zeros_like(like)
    for part_BSD in parts_RBSD:
        x_BSD = power_SS @ x_BSD + part_BSD
    return x_BSD


@dataclass(frozen=True)
class InputsBefore:
    """A `megassm.layers.taps.Before` over the ranks of a group."""

    link: Link

    def __call__(self, end_BTD: Tensor) -> Tensor:
        before_BTD: Tensor = _InputsBefore.apply(end_BTD, self.link.group)  # type: ignore[no-untyped-call]
        return before_BTD


class _InputsBefore(torch.autograd.Function):
    """Forward, the end of the part before; backward, to this part's end the gradient of the part after."""

    @staticmethod
    def forward(ctx: Any, end_BTD: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _neighbours(end_BTD, group, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _neighbours(grads[0], ctx.group, 1), None


def _neighbours(mine: Tensor, group: Group, distance: int) -> Tensor:
    """What the rank at this distance has; zeros beyond the group's ends."""
    every = [torch.empty_like(mine, memory_format=torch.contiguous_format) for _ in range(group.size())]
    dist.all_gather(every, mine.contiguous(), group=group)
    rank = group.rank() + distance
    return every[rank] if 0 <= rank < group.size() else torch.zeros_like(mine)


@dataclass(frozen=True)
class ExchangeHeads:
    """An `Attention.attend` between two exchanges: of all positions, and of this rank's share of the heads."""

    link: Link
    whole: Attend

    def __call__(self, query_BHLP: Tensor, key_BGLP: Tensor, value_BGLP: Tensor, mask: Mask) -> Tensor:
        group, ranks = self.link.group, self.link.size
        copies = ranks // math.gcd(key_BGLP.shape[1], ranks)  # so that every rank gets whole key-value heads
        key_BGLP, value_BGLP = (x.repeat_interleave(copies, dim=1) for x in (key_BGLP, value_BGLP))
        query_BHLP, key_BGLP, value_BGLP = (_to_heads(x, group) for x in (query_BHLP, key_BGLP, value_BGLP))
        return _to_positions(self.whole(query_BHLP, key_BGLP, value_BGLP, mask), group)


def _to_heads(x_BHLP: Tensor, group: Group) -> Tensor:
    """(B, H, L/R, P) of all heads -> (B, H/R, L, P) of all positions."""
    x_RBHLP = torch.stack(x_BHLP.chunk(group.size(), dim=1))
    return torch.cat(list(_all_to_all(x_RBHLP, group)), dim=2)


def _to_positions(x_BHLP: Tensor, group: Group) -> Tensor:
    """The inverse of `_to_heads`."""
    x_RBHLP = torch.stack(x_BHLP.chunk(group.size(), dim=2))
    return torch.cat(list(_all_to_all(x_RBHLP, group)), dim=1)


def _all_to_all(x: Tensor, group: Group) -> Tensor:
    exchanged: Tensor = _AllToAll.apply(x, group)  # type: ignore[no-untyped-call]
    return exchanged


class _AllToAll(torch.autograd.Function):
    """x[r] goes to rank r; what comes from rank r is at r. Its own inverse, and its own gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _exchanged(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _exchanged(grads[0], ctx.group), None


def _exchanged(x: Tensor, group: Group) -> Tensor:
    received = torch.empty_like(x, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received, x.contiguous(), group=group)
    return received
