"""Memory of a rank, by kind. Formulas only.

Memory is what DeepSpeed 0.19.8 was seen to allocate (docs/LOG.md), with P parameters a rank, R replicas of them, and
weights of W bytes (4 in fp32, 2 in bf16); master weights and moments are float32:

    stage             weights      gradients              master, moments    bucket
    0                 4P           4P                     8P                 -
    1, fp32           4P           4P                     12P/R              4b     b: `reduce_bucket_numbers`
    1, bf16           2P           4P + one layer's       12P/R              -      accumulated in float32, and whole
    2                 WP           4P/R + one layer's     12P/R              Wb
    3                 WP/R         4P/R + one layer's     12P/R              Wb + gathered weights, 4b in bf16

The peak is in the backward pass, or in the reduction or update after it, when activations are gone.
"""

from __future__ import annotations

from megassm.config.schema import Config
from megassm.cost import (
    FLOAT32,
    REDUCE_BUCKET,
    Workload,
    peak_activation_bytes,
    rank_parameters,
    reduce_bucket_numbers,
)
from megassm.parallel.mesh import Mesh
from megassm.plan.cluster import Filters

BLOCK_BYTES = 2**24
"""Of a parameter that is drawn or read in blocks."""
KEPT_GATHERED = 550_000_000
"""Weights that ZeRO-3 keeps gathered between forward and backward: half of DeepSpeed's stage3_max_reuse_distance, for
each is passed twice, and its prefetch bucket. Read, not measured."""


def workload(config: Config, mesh: Mesh, filters: Filters, fused: bool = True) -> Workload:
    """What one rank computes in a micro-step; `fused` as on CUDA."""
    length = config.model.seq_len // mesh.sequence
    chunk = filters.chunk if filters.state_size else length
    number_bytes = _number_bytes(config)
    sequences = config.train.micro_batch_sequences
    return Workload(sequences, length, number_bytes, chunk, filters.state_size, mesh.tensor, fused)


def rank_memory(config: Config, mesh: Mesh, filters: Filters, group_bytes: int, fused: bool = True) -> dict[str, float]:
    """Bytes of one rank by kind, at full budget; `fused` are optimizer, norms and losses, as on CUDA."""
    model, stage, w = config.model, config.parallel.zero_stage, _number_bytes(config)
    replicas, numbers = mesh.replicas, rank_parameters(config.model, mesh.tensor)
    share = numbers / replicas
    largest = largest_parameter(config, mesh.tensor)
    work = workload(config, mesh, filters, fused)
    memory: dict[str, float] = {
        "weights": w * (share if stage == 3 else numbers),
        "gradients": _gradient_bytes(config, numbers, share) + _layer_gradient_bytes(config, largest),
        "master weights": 0 if stage == 0 else FLOAT32 * share,
        "moments": 2 * FLOAT32 * (numbers if stage == 0 else share),
        "buckets": w * _bucket_numbers(config, replicas, numbers, largest),
        "filters": filters.table_bytes,
        "activations": peak_activation_bytes(model, model.num_channels, work, group_bytes, config.train.recompute),
    }
    if config.optim.ema is not None:
        memory["running average"] = FLOAT32 * (numbers if stage == 0 else share)
    after = _after_backward_bytes(config, replicas, numbers, fused)
    backward = memory["gradients"] + memory["buckets"] + memory["activations"]
    return memory | {"update beyond that": max(0.0, after - backward)}


def start_memory(config: Config, mesh: Mesh) -> float:
    """Bytes of a rank's device while its weights are made (`megassm.parallel.start`): those it keeps, and a parameter.

    At stages 1 and 2 DeepSpeed then flattens them, which needs them once more.
    """
    stage, w = config.parallel.zero_stage, _number_bytes(config)
    numbers = rank_parameters(config.model, mesh.tensor)
    kept = numbers / mesh.replicas if stage == 3 else numbers * (1 if stage == 0 else 2)
    return w * (kept + largest_parameter(config, mesh.tensor))


def host_memory(config: Config, mesh: Mesh) -> dict[str, float]:
    """Bytes of host memory that a rank needs beside its device's, by what needs them; not all at once.

    On a CPU the host is the device: this is then needed on top of `rank_memory` for a save, and before it else.
    """
    numbers = rank_parameters(config.model, mesh.tensor)
    largest = largest_parameter(config, mesh.tensor)
    kinds = 3 + (config.optim.ema is not None)
    total = rank_parameters(config.model, 1)
    return {
        "start: weights made ahead": _number_bytes(config) * max(numbers / mesh.replicas, largest) + 3 * BLOCK_BYTES,
        "resume: a parameter": FLOAT32 * largest / mesh.replicas + BLOCK_BYTES,
        "save: copy": FLOAT32 * kinds * (total / mesh.size + largest_parameter(config, 1)),
    }


def _number_bytes(config: Config) -> int:
    return 2 if config.train.precision == "bf16" else FLOAT32


def _gradient_bytes(config: Config, numbers: float, share: float) -> float:
    """Gradients that outlive a layer's backward pass."""
    if config.parallel.zero_stage >= 2:
        return FLOAT32 * share
    return FLOAT32 * numbers


def _layer_gradient_bytes(config: Config, largest: int) -> float:
    """The gradient that is being made, where another kind of it is kept."""
    apart = config.parallel.zero_stage >= 2 or (config.parallel.zero_stage == 1 and config.train.precision == "bf16")
    return _number_bytes(config) * largest if apart else 0


def _bucket_numbers(config: Config, replicas: int, numbers: int, largest: int) -> float:
    """The reduction's bucket; at stage 3 also the weights that are gathered."""
    stage = config.parallel.zero_stage
    if stage == 0 or (stage == 1 and config.train.precision == "bf16"):
        return 0
    bucket = reduce_bucket_numbers(config)
    gathered = min(numbers, KEPT_GATHERED + largest) if stage == 3 and replicas > 1 else 0
    # between ranks gradients are summed in float32: a copy of the bucket, or of a parameter larger than that
    summed = FLOAT32 / _number_bytes(config) * max(bucket, largest) if replicas > 1 and stage == 3 else 0
    return bucket + gathered + (summed if config.train.precision == "bf16" else 0)


def _after_backward_bytes(config: Config, replicas: int, numbers: int, fused: bool) -> float:
    """The most that reduction and update hold besides weights, master weights and moments: two temporaries of an AdamW
    that is not fused."""
    share, bucket = numbers / replicas, reduce_bucket_numbers(config)
    temporaries = 0 if fused else 2 * FLOAT32 * (numbers if config.parallel.zero_stage == 0 else share)
    match config.parallel.zero_stage, config.train.precision:
        case 0, _:
            return FLOAT32 * (numbers + (min(numbers, bucket) if replicas > 1 else 0)) + temporaries
        case 1, "bf16":
            copies = 0 if numbers > REDUCE_BUCKET else FLOAT32  # a larger group than the bucket is sent alone
            return FLOAT32 * numbers + max(copies * numbers if replicas > 1 else 0, temporaries)
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
    columns = max(d, model.num_channels * (d // model.mixer_heads)) if "S" in model.mixers else d
    return max(columns * width, d * -(-model.d_ffn // tensor), -(-model.vocab_size // tensor) * d)
