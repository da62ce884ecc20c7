"""What ranks send each other in an update, in bytes and in messages. Formulas only."""

from __future__ import annotations

from math import ceil, gcd

from megassm.config.schema import Config
from megassm.cost import (
    FLOAT32,
    rank_parameters,
    reduce_bucket_numbers,
)
from megassm.parallel.mesh import Mesh
from megassm.plan.cluster import Filters
from megassm.plan.memory import _number_bytes


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
    weights = (k + model.selective) * model.mixer_heads
    widths += (d + weights) * model.mixers.count("S") + (d + kv) * model.mixers.count("A")
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
    taps = (ranks - 1) * batch * (model.input_taps - 1) * model.d_model * _number_bytes(config) * model.n_layers
    return passes * (state * model.mixers.count("S") + exchange * model.mixers.count("A") + taps)


def _data_bytes(config: Config, mesh: Mesh, steps: int) -> float:
    """Gradients, in float32, and weights between replicas: at stages 2 and 3 gradients travel in every micro-step."""
    others = (mesh.replicas - 1) / mesh.replicas * rank_parameters(config.model, mesh.tensor)
    gather, reduce = others * _number_bytes(config), others * FLOAT32
    match config.parallel.zero_stage:
        case 0:
            return 2 * reduce
        case 1:
            return 2 * reduce + gather
        case 2:  # DeepSpeed reduces its buckets by all-reduce (use_multi_rank_bucket_allreduce)
            return 2 * reduce * steps + gather
        case _:  # forward, backward, and a reduce-scatter
            return (2 * gather + reduce) * steps


def messages_sent(config: Config, mesh: Mesh) -> dict[str, int]:
    """How many collectives a rank takes part in, in an update, by the group."""
    model, steps = config.model, config.micro_steps(mesh.data)
    layers, spectral, attention = model.n_layers, model.mixers.count("S"), model.mixers.count("A")
    again = layers if config.train.recompute else 0  # as in `_tensor_message_bytes`
    tensor = (1 + 2 * layers + again) + (1 + 2 * layers) + 3
    sequence = (3 if config.train.recompute else 2) * (spectral + 4 * attention + layers * (model.input_taps > 1))
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
