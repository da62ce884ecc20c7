"""A rank's place in the mesh data x sequence x tensor. Pure: `megassm.parallel.world` has the processes.

    rank = (data * sequence_size + sequence) * tensor_size + tensor

Tensor ranks, which communicate most, are neighbours, so that they stay inside a node; then sequence ranks; then data
ranks.

* A tensor group holds one copy of the weights, in parts, and computes the same positions.
* A sequence group holds copies of the same part, and computes parts of the same sequences.
* The replicas of a rank are all ranks with its part of the weights: gradients are averaged over them, and ZeRO
  divides optimizer state among them. They are its data and sequence peers.
* A reader group gets the same sequences: it is the tensor and sequence peers of a data rank.
"""

from __future__ import annotations

from typing import NamedTuple

from megassm.config.schema import Config


class Coordinates(NamedTuple):
    """Of a rank, along the axes."""

    data: int
    sequence: int
    tensor: int


class Mesh(NamedTuple):
    """Sizes of the three axes."""

    data: int
    sequence: int
    tensor: int

    @property
    def size(self) -> int:
        return self.data * self.sequence * self.tensor

    @property
    def replicas(self) -> int:
        """Ranks that hold the same part of the weights."""
        return self.data * self.sequence

    def coordinates(self, rank: int) -> Coordinates:
        rest, tensor = divmod(rank, self.tensor)
        data, sequence = divmod(rest, self.sequence)
        return Coordinates(data, sequence, tensor)

    def rank(self, at: Coordinates) -> int:
        return (at.data * self.sequence + at.sequence) * self.tensor + at.tensor

    def tensor_groups(self) -> list[list[int]]:
        return self._groups("tensor")

    def sequence_groups(self) -> list[list[int]]:
        return self._groups("sequence")

    def replica_groups(self) -> list[list[int]]:
        return self._groups("data", "sequence")

    def reader_groups(self) -> list[list[int]]:
        return self._groups("sequence", "tensor")

    def _groups(self, *axes: str) -> list[list[int]]:
        """The ranks that differ along `axes` only, group by group."""
        groups: dict[Coordinates, list[int]] = {}
        for rank in range(self.size):
            key = self.coordinates(rank)._replace(**dict.fromkeys(axes, 0))
            groups.setdefault(key, []).append(rank)
        return list(groups.values())


def mesh_of(config: Config, world_size: int) -> Mesh:
    """The mesh of a configuration that `violations` has passed for this world size."""
    parallel = config.parallel
    return Mesh(config.data_ranks(world_size), parallel.sequence, parallel.tensor)
