"""What a run needs of a cluster before it is started: memory by kind, bytes between ranks, time a step; and a search
for the mesh, ZeRO stage and micro-batch that fit. Formulas only, but for `filters_of`.

Memory is what DeepSpeed 0.19.8 was seen to allocate (docs/LOG.md), with P parameters a rank, R replicas of them, and
weights of W bytes (4 in fp32, 2 in bf16); master weights and moments are float32:

    stage             weights      gradients              master, moments    bucket
    0                 4P           4P                     8P                 -
    1, fp32           4P           4P                     12P/R              4b     b: `reduce_bucket_numbers`
    1, bf16           2P           4P + 2P                12P/R              -      accumulated in float32, and whole
    2                 WP           4P/R + one layer's     12P/R              Wb
    3                 WP/R         4P/R + one layer's     12P/R              Wb + gathered weights

The peak is in the backward pass, or in the reduction or update after it, when activations are gone.
Times are compute and messages one after another, as DeepSpeed runs them; stage 3 alone overlaps its own. A message
costs its bytes and its hops: without the latter, a small model would be as fast on a thousand GPUs as on eight.
"""

from __future__ import annotations

from collections import Counter
from math import ceil, gcd, log2
from typing import NamedTuple

from megassm.budget import budget_at
from megassm.config import CHUNK, Config
from megassm.cost import (
    FLOAT32,
    REDUCE_BUCKET,
    Workload,
    filterbank_flops_per_token,
    forward_flops_per_token,
    peak_activation_bytes,
    rank_parameters,
    reduce_bucket_numbers,
)
from megassm.parallel.mesh import Mesh, mesh_of

KEPT_GATHERED = 550_000_000
"""Weights that ZeRO-3 keeps gathered between forward and backward: half of DeepSpeed's stage3_max_reuse_distance, for
each is passed twice, and its prefetch bucket. Read, not measured."""
DRAWS = 1000
"""Updates over which budgets are counted."""
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


class Plan(NamedTuple):
    """A configuration on a cluster."""

    config: Config
    mesh: Mesh
    memory: dict[str, float]
    """Bytes a rank by kind; their sum is the peak."""
    sent: dict[str, float]
    """Bytes a rank sends in an update, by kind."""
    messages: dict[str, int]
    """How many, by kind."""
    seconds: dict[int, float]
    """Of an update, by budget."""
    mean_seconds: float
    """Of an update, over the budgets the run draws after its start."""

    @property
    def total_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def tokens_per_second(self) -> float:
        return self.config.tokens_per_step() / self.mean_seconds

    def fits(self, cluster: Cluster) -> bool:
        return self.total_bytes <= cluster.memory_bytes * cluster.memory_share


def filters_of(config: Config) -> Filters:
    """Derives the filters, or reads them from the cache; imports torch."""
    from megassm.layers.filterbank import FilterBank

    model = config.model
    if "S" not in model.mixers:
        return Filters(CHUNK, 0, 0)
    bank = FilterBank(model.seq_len, model.num_channels, model.filterbank)
    bank.reset()
    table_bytes = sum(table.nbytes for table in bank.buffers())
    if bank.way(model.seq_len) == "chunked":
        return Filters(CHUNK, bank.state_size, table_bytes)
    return Filters(model.seq_len, 0, table_bytes)


def plan_run(config: Config, cluster: Cluster, filters: Filters, shares: dict[int, float] | None = None) -> Plan:
    """The plan of a configuration without violations; `shares` is `budget_shares(config)` where it is known already."""
    mesh = mesh_of(config, cluster.size)
    sent, messages = bytes_sent(config, mesh, filters), messages_sent(config, mesh)
    budgets = planned_budgets(config)
    shares = shares or budget_shares(config)
    mean = sum(share * rank_flops_per_token(config, mesh, k, filters) for k, share in shares.items())

    def seconds(flops_per_token: float) -> float:
        return step_seconds(config, mesh, cluster, flops_per_token, sent, messages)

    return Plan(
        config,
        mesh,
        rank_memory(config, mesh, filters, cluster.group_bytes),
        sent,
        messages,
        {k: seconds(rank_flops_per_token(config, mesh, k, filters)) for k in budgets},
        seconds(mean),
    )


def planned_budgets(config: Config) -> list[int]:
    """The budgets worth a line: those of training and validation, and the largest."""
    k_max = config.model.num_channels
    return sorted({k for k in (*config.budget.budgets, *config.eval.budgets, k_max) if k <= k_max})


def budget_shares(config: Config) -> dict[int, float]:
    """The part of the updates that each K has, after those at full budget."""
    first = config.full_budget_steps()
    drawn = Counter(budget_at(config, first + step, 0) for step in range(DRAWS))
    return {k: count / DRAWS for k, count in drawn.items()}


def workload(config: Config, mesh: Mesh, filters: Filters) -> Workload:
    """What one rank computes in a micro-step."""
    length = config.model.seq_len // mesh.sequence
    chunk = filters.chunk if filters.state_size else length
    number_bytes = _number_bytes(config)
    return Workload(config.train.micro_batch_sequences, length, number_bytes, chunk, filters.state_size, mesh.tensor)


def rank_memory(config: Config, mesh: Mesh, filters: Filters, group_bytes: int) -> dict[str, float]:
    """Bytes of one rank by kind, at full budget."""
    model, stage, w = config.model, config.parallel.zero_stage, _number_bytes(config)
    replicas, numbers = mesh.replicas, rank_parameters(config.model, mesh.tensor)
    share = numbers / replicas
    largest = largest_parameter(config, mesh.tensor)
    work = workload(config, mesh, filters)
    memory: dict[str, float] = {
        "weights": w * (share if stage == 3 else numbers),
        "gradients": _gradient_bytes(config, numbers, share) + (w * largest if stage >= 2 else 0),
        "master weights": 0 if stage == 0 else FLOAT32 * share,
        "moments": 2 * FLOAT32 * (numbers if stage == 0 else share),
        "buckets": w * _bucket_numbers(config, replicas, numbers, largest),
        "filters": filters.table_bytes,
        "activations": peak_activation_bytes(model, model.num_channels, work, group_bytes, config.train.recompute),
    }
    after = _after_backward_bytes(config, replicas, numbers)
    backward = memory["gradients"] + memory["buckets"] + memory["activations"]
    return memory | {"update beyond that": max(0.0, after - backward)}


def _number_bytes(config: Config) -> int:
    return 2 if config.train.precision == "bf16" else FLOAT32


def _gradient_bytes(config: Config, numbers: float, share: float) -> float:
    """Gradients that outlive a layer's backward pass."""
    if config.parallel.zero_stage >= 2:
        return FLOAT32 * share
    return (FLOAT32 + 2 if config.train.precision == "bf16" else FLOAT32) * numbers


def _bucket_numbers(config: Config, replicas: int, numbers: int, largest: int) -> float:
    """The reduction's bucket; at stage 3 also the weights that are gathered."""
    stage = config.parallel.zero_stage
    if stage == 0 or (stage == 1 and config.train.precision == "bf16"):
        return 0
    gathered = min(numbers, KEPT_GATHERED + largest) if stage == 3 and replicas > 1 else 0
    return reduce_bucket_numbers(config) + gathered


def _after_backward_bytes(config: Config, replicas: int, numbers: int) -> float:
    """The most that reduction and update hold besides weights, master weights and moments: two temporaries of AdamW."""
    share, bucket = numbers / replicas, reduce_bucket_numbers(config)
    temporaries = 2 * FLOAT32 * share
    match config.parallel.zero_stage, config.train.precision:
        case 0, _:
            return FLOAT32 * (numbers + (min(numbers, bucket) if replicas > 1 else 0)) + 2 * FLOAT32 * numbers
        case 1, "bf16":
            copies = 2 if numbers > REDUCE_BUCKET else FLOAT32 + 2  # a larger group than the bucket is sent alone
            return 6 * numbers + max(copies * numbers if replicas > 1 else 0, temporaries)
        case 1, _:
            return max(FLOAT32 * (numbers + bucket + share), 2 * FLOAT32 * share + temporaries)
        case 2, precision:
            return (FLOAT32 if precision == "bf16" else 2 * FLOAT32) * share + temporaries
        case _:
            return _number_bytes(config) * bucket + 2 * FLOAT32 * share + temporaries


def largest_parameter(config: Config, tensor: int) -> int:
    """Numbers of a rank's largest part of a parameter."""
    model = config.model
    d, width = model.d_model, -(-model.d_model // tensor)
    mixer = model.num_channels * d * width if "S" in model.mixers else d * width
    return max(mixer, d * -(-model.d_ffn // tensor), -(-model.vocab_size // tensor) * d)


def rank_flops_per_token(config: Config, mesh: Mesh, k: int, filters: Filters) -> float:
    """FLOPs of one tensor rank a token at budget k, filter bank and recomputation included; all compute the gates."""
    model = config.model
    hidden = max(1, model.d_model // 2)
    gate = 2.0 * hidden * (model.d_model + k) * model.mixers.count("S") if model.gate else 0.0
    work = workload(config, mesh, filters)
    forwards = 4 if config.train.recompute else 3
    bank = filterbank_flops_per_token(model, k, work, backward=True)
    if config.train.recompute:
        bank += filterbank_flops_per_token(model, k, work)
    products = forwards * (forward_flops_per_token(model, k, model.seq_len) - gate) + bank
    return products / mesh.tensor + forwards * gate


def bytes_sent(config: Config, mesh: Mesh, filters: Filters) -> dict[str, float]:
    """Bytes that one rank sends in an update by the group it sends in: ring all-reduces, gathers, all-to-alls."""
    steps = config.micro_steps(mesh.data)
    return {
        "tensor": steps * _ring_sum(mesh.tensor) * _tensor_message_bytes(config, mesh),
        "sequence": steps * _sequence_bytes(config, mesh, filters),
        "data": _data_bytes(config, mesh, steps),
    }


def _ring_sum(ranks: int) -> float:
    return 2 * (ranks - 1) / ranks


def _tensor_message_bytes(config: Config, mesh: Mesh) -> float:
    """Sizes of all that a tensor group sums in a micro-step (`megassm.parallel.tensor`)."""
    model, k = config.model, config.model.num_channels
    if mesh.tensor == 1:
        return 0
    d, layers = model.d_model, model.n_layers
    again = layers if config.train.recompute else 0  # recomputation stops before a block's last sum
    kv = 2 * d // model.n_heads * model.kv_heads if model.kv_heads < mesh.tensor else 0
    widths = d * (1 + 2 * layers + again)  # forward: embedding, mixers, feed-forward layers
    widths += d * (1 + layers)  # backward: head, feed-forward layers
    widths += (d + k) * model.mixers.count("S") + (d + kv) * model.mixers.count("A")
    positions = config.train.micro_batch_sequences * model.seq_len // mesh.sequence
    return positions * (_number_bytes(config) * widths + 3 * FLOAT32)


def _sequence_bytes(config: Config, mesh: Mesh, filters: Filters) -> float:
    """What a rank sends in its sequence group in a micro-step (`megassm.parallel.sequence`)."""
    model, ranks, batch = config.model, mesh.sequence, config.train.micro_batch_sequences
    if ranks == 1:
        return 0
    passes = 3 if config.train.recompute else 2
    state = (ranks - 1) * batch * filters.state_size * model.d_model / mesh.tensor * FLOAT32
    heads = max(1, model.kv_heads // mesh.tensor)
    heads *= ranks // gcd(heads, ranks)
    width = 2 * model.d_model / mesh.tensor + 2 * heads * (model.d_model // model.n_heads)
    exchange = (ranks - 1) / ranks * batch * model.seq_len / ranks * width * _number_bytes(config)
    return passes * (state * model.mixers.count("S") + exchange * model.mixers.count("A"))


def _data_bytes(config: Config, mesh: Mesh, steps: int) -> float:
    """Gradients and weights between replicas: at stages 2 and 3 gradients travel in every micro-step."""
    weights = rank_parameters(config.model, mesh.tensor) * _number_bytes(config)
    gather = (mesh.replicas - 1) / mesh.replicas * weights
    match config.parallel.zero_stage:
        case 0:
            return 2 * gather
        case 1:
            return 2 * gather + gather
        case 2:  # DeepSpeed reduces its buckets by all-reduce (use_multi_rank_bucket_allreduce)
            return 2 * gather * steps + gather
        case _:  # forward, backward, and a reduce-scatter
            return 3 * gather * steps


def messages_sent(config: Config, mesh: Mesh) -> dict[str, int]:
    """How many collectives a rank takes part in, in an update, by the group."""
    model, steps = config.model, config.micro_steps(mesh.data)
    layers, spectral, attention = model.n_layers, model.mixers.count("S"), model.mixers.count("A")
    again = layers if config.train.recompute else 0  # as in `_tensor_message_bytes`
    tensor = (1 + 2 * layers + again) + (1 + 2 * layers) + 3
    sequence = (3 if config.train.recompute else 2) * (spectral + 4 * attention)
    numbers = rank_parameters(model, mesh.tensor)
    buckets = ceil(numbers / reduce_bucket_numbers(config))
    match config.parallel.zero_stage:
        case 0:
            data = buckets
        case 1:
            data = 2 * buckets
        case 2:
            data = (steps + 1) * buckets
        case _:  # a mixer's and a feed-forward layer's weights in one message each: prefetching joins them
            data = 3 * 2 * layers * steps
    return {"tensor": tensor * steps, "sequence": sequence * steps, "data": data}


def step_seconds(
    config: Config,
    mesh: Mesh,
    cluster: Cluster,
    flops_per_token: float,
    sent: dict[str, float],
    messages: dict[str, int],
) -> float:
    """Of one update; optimizer, data and launching are not counted."""
    stage = config.parallel.zero_stage

    def seconds(kind: str, ranks: int, apart: int, sums: bool) -> float:
        return sent[kind] / cluster.rate(ranks, apart) + messages[kind] * cluster.hops_seconds(ranks, apart, sums)

    tokens = config.tokens_per_step() / mesh.replicas
    compute = flops_per_token * tokens / (cluster.peak_flops * cluster.compute_share)
    compute += seconds("tensor", mesh.tensor, 1, sums=True)
    compute += seconds("sequence", mesh.sequence, mesh.tensor, sums=False)
    data = seconds("data", mesh.replicas, mesh.tensor, sums=stage != 3)
    return max(compute, data) if stage == 3 else compute + data


def model_flops_share(plan: Plan, cluster: Cluster) -> float:
    """Model FLOPs utilisation at full budget: what the journal calls mfu."""
    model = plan.config.model
    flops = 3 * forward_flops_per_token(model, model.num_channels, model.seq_len) * plan.config.tokens_per_step()
    return flops / plan.seconds[model.num_channels] / (cluster.size * cluster.peak_flops)
