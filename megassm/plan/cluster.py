"""Machines: their memory, rates and latencies; and how a model's filter bank is computed on them."""

from __future__ import annotations

from math import log2
from typing import NamedTuple

from megassm.config.model import CHUNK
from megassm.config.schema import Config

MESSAGE_S, NODE_HOP_S, NETWORK_HOP_S = 8.4e-6, 3.4e-6, 9.6e-6
"""To start a ring of NCCL's, and of each hop by NVLink and between nodes: its src/graph/tuning.cc, protocol Simple."""
TREE_NODE_HOP_S, TREE_NETWORK_HOP_S = 28e-6, 50e-6
"""The same of its trees, which large groups sum by."""


class Cluster(NamedTuple):
    """Machines, and how well they are assumed to be used. Rates are of one GPU in one direction, a second."""

    nodes: int
    gpus_per_node: int
    memory_bytes: float
    peak_flops: float
    node_rate: float
    network_rate: float
    compute_share: float
    link_share: float
    memory_share: float
    group_bytes: int
    """`megassm.ops.mixing.GROUP_BYTES` of the device."""

    @property
    def size(self) -> int:
        return self.nodes * self.gpus_per_node

    def rate(self, ranks: int, apart: int) -> float:
        """Of one rank's messages in a group of `ranks` that are `apart` in the numbering: inside a node its own link;
        between nodes a ring enters and leaves each node once for each network card, so that the members of a node
        share their cards."""
        if ranks * apart <= self.gpus_per_node:
            return self.node_rate * self.link_share
        members = max(1, self.gpus_per_node // apart)
        return min(self.node_rate, members * self.network_rate) * self.link_share

    def hops_seconds(self, ranks: int, apart: int, sums: bool) -> float:
        """Of an empty message in such a group: a ring passes every rank, twice for a sum, which takes the tree where
        that is shorter."""
        if ranks == 1:
            return 0.0
        nodes = max(1, ranks * apart // self.gpus_per_node)
        ring = (ranks - nodes) * NODE_HOP_S + (nodes - 1) * NETWORK_HOP_S
        if not sums:
            return MESSAGE_S + ring
        tree = (ranks / nodes - 1) * TREE_NODE_HOP_S + log2(nodes) * TREE_NETWORK_HOP_S
        return min(MESSAGE_S + 2 * ring, 2 * tree)


class Filters(NamedTuple):
    """How a model's filter bank is computed (`megassm.layers.filterbank`)."""

    chunk: int
    state_size: int
    table_bytes: int


def filters_of(config: Config) -> Filters:
    """Derives the filters, or reads them from the cache; imports torch."""
    from megassm.layers.filterbank import FilterBank

    model = config.model
    if "S" not in model.mixers:
        return Filters(CHUNK, 0, 0)
    bank = FilterBank(model.seq_len, model.num_channels, model.filterbank, model.basis)
    bank.reset()
    table_bytes = sum(table.nbytes for table in bank.buffers())
    if bank.way(model.seq_len) == "chunked":
        return Filters(CHUNK, bank.state_size, table_bytes)
    return Filters(model.seq_len, 0, table_bytes)
