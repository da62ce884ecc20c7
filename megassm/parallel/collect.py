"""A job's state put together for a save: each parameter whole at one rank, its home, and nowhere else.

A number travels once, from a replica that holds it to the home, and where the home holds it already not at all: at
stage 0 of ZeRO that is everything, at stages 1 and 2, which divide all parameters as one long row, nearly so. The home
is the replica that holds most of a parameter; of several, and among tensor ranks, the one with the least so far.
Messages are between hosts, over gloo: that is where the state goes anyway.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from megassm.parallel.tensor import WeightSlice
from megassm.parallel.world import World, gather_rows


class Piece(NamedTuple):
    """The numbers [first, first + size) of a rank's part of a parameter, flat, that a replica holds."""

    first: int
    size: int


class Home(NamedTuple):
    """The rank where a parameter is put together: its place among the replicas, and in the tensor group."""

    replica: int
    tensor: int


Held = Sequence[Sequence[Piece]]
"""Who holds what of a parameter: by tensor rank and replica."""


def choose_homes(held: Mapping[str, Held], sizes: Mapping[str, int]) -> dict[str, Home]:
    """The home of every parameter; `sizes` are numbers of whole ones."""
    tensor_ranks, replicas = next(iter((len(of), len(of[0])) for of in held.values()))
    loads = [[0] * tensor_ranks for _ in range(replicas)]
    homes = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        counts = [sum(pieces[replica].size for pieces in held[name]) for replica in range(replicas)]
        most = max(counts)
        replica = min((r for r in range(replicas) if counts[r] == most), key=lambda r: sum(loads[r]))
        tensor = loads[replica].index(min(loads[replica]))
        loads[replica][tensor] += sizes[name]
        homes[name] = Home(replica, tensor)
    return homes


class Collection:
    """Homes of all parameters, and the messages that bring their pieces there. All ranks must call the same."""

    def __init__(
        self, world: World, parts: Sequence[Mapping[str, WeightSlice]], shapes: Mapping[str, torch.Size],
        mine: Mapping[str, Piece],
    ) -> None:  # fmt: skip
        """`parts` are by tensor rank; `mine` is what this rank holds of its part."""
        self._world, self._parts, self._shapes = world, parts, shapes
        rows = gather_rows([number for piece in mine.values() for number in piece])
        self._held: dict[str, Held] = {
            name: [[Piece(*map(int, rows[rank][place : place + 2])) for rank in group] for group in
                   world.mesh.replica_groups()]
            for place, name in zip(range(0, 2 * len(mine), 2), mine, strict=True)
        }  # fmt: skip
        self._place = Home(world.replicas.rank(), world.tensor.rank())
        self._homes = choose_homes(self._held, {name: shape.numel() for name, shape in shapes.items()})
        self.here = [name for name, home in self._homes.items() if home == self._place]
        """Parameters whose home this rank is."""

    def put_together(self, name: str, piece: Tensor, whole: Tensor | None) -> None:
        """Brings one kind of state of a parameter home: `piece` is what this rank holds of it, flat; at home alone
        `whole`, float32 on the CPU and contiguous, takes it."""
        home, part = self._homes[name], self._parts[self._place.tensor][name]
        if part.axis is None and self._place.tensor != home.tensor:
            return  # all tensor ranks have the same
        if self._place.replica != home.replica:
            if self._travels(name) and piece.numel():
                dist.send(piece.cpu(), group=self._world.replicas, group_dst=home.replica)
            return
        shape, direct = part.shape(self._shapes[name]), whole is not None and self._is_whole(name)
        own = whole if direct else torch.empty(shape, dtype=torch.float32)
        assert own is not None
        self._receive(name, piece, own.view(-1))
        if not direct:
            self._join(name, own, whole)

    def _is_whole(self, name: str) -> bool:
        """Whether a tensor rank's part is all of the parameter."""
        return len(self._parts) == 1 or self._parts[0][name].axis is None

    def _travels(self, name: str) -> bool:
        """Whether the home does not hold all of its part itself."""
        tensor = self._place.tensor
        size = self._parts[tensor][name].shape(self._shapes[name]).numel()
        return self._held[name][tensor][self._homes[name].replica].size < size

    def _receive(self, name: str, piece: Tensor, part: Tensor) -> None:
        for replica, (first, size) in enumerate(self._held[name][self._place.tensor]):
            if replica == self._place.replica:
                part[first : first + size].copy_(piece)
            elif size and self._travels(name):
                dist.recv(part[first : first + size], group=self._world.replicas, group_src=replica)

    def _join(self, name: str, part: Tensor, whole: Tensor | None) -> None:
        """The parts of a tensor group."""
        if whole is None:
            dist.send(part, group=self._world.tensor, group_dst=self._homes[name].tensor)
            return
        for tensor, parts in enumerate(self._parts):
            other = part
            if tensor != self._place.tensor:
                other = torch.empty(parts[name].shape(self._shapes[name]), dtype=torch.float32)
                dist.recv(other, group=self._world.tensor, group_src=tensor)
            parts[name].of(whole).copy_(other)
