"""What a model costs, as functions of the budget K: parameters, FLOPs, bytes. Imports no torch.

FLOPs count each multiply-add as two. "Model FLOPs" are the products that parameters take part in, and attention's
two products over the positions that a causal (or windowed) query really sees. The filter bank is left out: it has no
parameters, and its cost belongs to the algorithm that computes it, not to the model.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

from megassm.config.model import CHUNK, FUSED_HEAD_WIDTH, FUSED_INPUTS, Budget, ModelConfig
from megassm.config.schema import Config

FLOAT32 = 4
TOKEN_ID = 8
REDUCE_BUCKET = 500_000_000

LayerKind = Literal["spectral mixer", "attention", "feed-forward", "norm", "embedding", "head and loss"]

PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "GH200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A30": 165.0,
    "A40": 150.0,
    "A10": 125.0,
    "A10G": 70.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "RTX 6000 Ada": 364.0,
    "RTX A6000": 155.0,
    "RTX 4090": 165.0,
    "RTX 3090": 71.0,
    "MI300X": 1307.0,
    "MI325X": 1307.0,
    "MI250X": 383.0,
}
"""Dense bf16 matrix products with float32 sums, TFLOP/s, by words of a device's name: the vendors' data sheets. A name
that has the words of several has the first's."""


def mixer_parameters(config: ModelConfig, mixer: str, k: int) -> int:
    """Parameters of one mixer ("S" or "A") cut to k channels."""
    d = config.d_model
    if mixer == "A":
        kv_width = d // config.n_heads * config.kv_heads
        return 2 * d * d + 2 * d * kv_width
    return d * _spectral_columns(config, k) + _gate_parameters(config, k)


def _spectral_columns(config: ModelConfig, k: int) -> int:
    """Columns of a spectral mixer's matrices with a row for each of d inputs: M_k, D, and several heads' projection."""
    d = config.d_model
    return k * (d // config.mixer_heads) + (d if config.mixer_heads == 1 else 2 * d)


def _gate_parameters(config: ModelConfig, k: int) -> int:
    """Of the channels' weights and of the decays: what of a spectral mixer is on all ranks."""
    hidden = max(1, config.d_model // 2)
    weights = (config.d_model + 1) * hidden + k * config.mixer_heads * (hidden + 1) if config.has_gate else 0
    return weights + (config.mixer_heads * (config.d_model + 1) if config.selective else 0)


def parameters(config: ModelConfig, k: Budget) -> int:
    """Parameters of the model cut to k channels, or to one K a layer."""
    d = config.d_model
    layers = sum(
        mixer_parameters(config, mixer, each) + 2 * d + _taps_parameters(config) + 3 * d * config.ffn_width(each)
        for mixer, each in zip(config.mixers, config.layer_budgets(k), strict=True)
    )
    embeddings = (config.vocab_size + (config.outputs if config.has_head else 0)) * d
    return embeddings + layers + d


def _taps_parameters(config: ModelConfig) -> int:
    """Of one layer; as gains are, they are on all ranks, and count no FLOPs."""
    return config.input_taps * config.d_model if config.input_taps > 1 else 0


def rank_parameters(config: ModelConfig, tensor: int) -> int:
    """Parameters that the fullest of `tensor` ranks holds (`megassm.parallel.tensor`): norms and gates are on all."""
    d = config.d_model
    width, kv_ranks = d // config.n_heads, tensor if config.kv_heads >= tensor else 1
    attention = 2 * d * width * -(-config.n_heads // tensor) + 2 * d * width * -(-config.kv_heads // kv_ranks)
    head = -(-config.outputs // tensor) if config.has_head else 0
    embeddings = (-(-config.vocab_size // tensor) + head) * d
    layers = 0
    for mixer, k in zip(config.mixers, config.channels_of_layers, strict=True):
        spectral = _spectral_columns(config, k) * -(-d // tensor) + _gate_parameters(config, k)
        layers += (attention if mixer == "A" else spectral) + 3 * d * -(-config.ffn_width(k) // tensor)
    return embeddings + layers + config.n_layers * (2 * d + _taps_parameters(config)) + d


def reduce_bucket_numbers(config: Config) -> int:
    """Size of DeepSpeed's bucket of gradients: its default, but no more than there are; it is allocated whole."""
    return min(REDUCE_BUCKET, parameters(config.model, config.model.num_channels))


def forward_flops_per_token(config: ModelConfig, k: Budget, seq_len: int) -> float:
    """Model FLOPs of a forward pass at budget k, a token, in sequences of `seq_len` tokens."""
    return sum(forward_flops_by_kind(config, k, seq_len).values())


def forward_flops_by_kind(config: ModelConfig, k: Budget, seq_len: int) -> dict[LayerKind, float]:
    """`forward_flops_per_token`, all layers of a kind together; norms and the embedding have none."""
    d = config.d_model
    window = min(config.window or seq_len, seq_len)
    visible = window - window * (window - 1) / (2 * seq_len)  # positions a query sees, on average
    budgets = config.layer_budgets(k)
    spectral = sum(
        2.0 * d * _spectral_columns(config, each) + gate_flops_per_token(config, each)
        for mixer, each in zip(config.mixers, budgets, strict=True)
        if mixer == "S"
    )
    attention = 2.0 * mixer_parameters(config, "A", 1) + 4.0 * d * visible
    predictions = 1.0 if config.classes is None else 1.0 / seq_len  # a class: once a sequence
    return {
        "spectral mixer": spectral,
        "attention": config.mixers.count("A") * attention,
        "feed-forward": sum(6.0 * d * config.ffn_width(each) for each in budgets),
        "norm": 0.0,
        "embedding": 0.0,
        "head and loss": 2.0 * d * config.outputs * predictions,
    }


def gate_flops_per_token(config: ModelConfig, k: int) -> float:
    """Of `forward_flops_per_token`, the gate of one spectral mixer."""
    hidden = max(1, config.d_model // 2)
    weights = 2.0 * hidden * (config.d_model + k * config.mixer_heads) if config.has_gate else 0.0
    return weights + (2.0 * config.d_model * config.mixer_heads if config.selective else 0.0)


def filterbank_flops_per_token(config: ModelConfig, k: int, work: Workload, backward: bool = False) -> float:
    """FLOPs that the filter bank adds to the model's, by chunks or directly, a token of one forward pass, or of forward
    and backward: the features are made again there, and their gradients go to the inputs; the chunk states, the sums
    over earlier chunks by doubling, and their gradients."""
    inputs, size = work.chunk + work.state_size, work.state_size
    budgets = zip(config.mixers, config.layer_budgets(k), strict=True)
    layers = [each for mixer, each in budgets if mixer == "S"]
    products = 2.0 * sum(layers) * inputs * (3 if backward else 1)
    doublings = math.ceil(math.log2(work.chunks)) if size and work.chunks > 1 else 0
    states = 2.0 * size * (1 + size * doublings / work.chunk) * (2 if backward else 1)
    return (products + states * len(layers)) * config.d_model


def training_flops_per_token(config: ModelConfig, k: int, seq_len: int) -> float:
    """Forward and backward, 3 x forward; recomputed activations do not count."""
    return 3.0 * forward_flops_per_token(config, k, seq_len)


class Workload(NamedTuple):
    """What one rank computes at a time, and how the filter bank computes it."""

    batch: int
    """Sequences of a micro-batch."""
    length: int
    """L, tokens a sequence."""
    number_bytes: int
    """Of an activation: 4 in fp32, 2 in bf16."""
    chunk: int
    """C, positions a chunk; L where the filter bank is computed directly."""
    state_size: int
    """S, `FilterBank.state_size`; 0 where it is computed directly."""
    tensor: int = 1
    """Ranks among which a layer's inner width is divided (`megassm.parallel.tensor`)."""
    fused: bool = False
    """Whether norms, gates, SwiGLU and, in 16 bits, losses are single kernels, as on CUDA: they keep what they are
    given, no float32 copy of it."""

    def share(self, size: int) -> int:
        """The largest rank's part of an inner width."""
        return -(-size // self.tensor)

    @property
    def positions(self) -> int:
        return self.batch * self.length

    @property
    def chunks(self) -> int:
        """Of one sequence, the last filled up."""
        return -(-self.length // self.chunk)

    @property
    def chunked_positions(self) -> int:
        return self.batch * self.chunks * self.chunk


def _loss_gradient_bytes(work: Workload) -> int:
    """Of a prediction, while its gradient is made, beside what is kept of it."""
    n = work.number_bytes
    if n == FLOAT32:
        return 2 * n
    return n if work.fused else n + 2 * FLOAT32


def activation_bytes(config: ModelConfig, k: int, work: Workload, recompute: bool = False) -> int:
    """Bytes that autograd keeps from the forward pass to the backward pass at budget k, the loss included.

    K enters through 12 bytes a position and head of gate weights, the filters' matrices, which do not grow with the
    batch, and an elastic feed-forward width: no feature is kept.
    """
    n, head = work.number_bytes, _head_bytes(config, work)
    ids = TOKEN_ID * work.batch * (2 * work.length + 1)  # the targets once more, without their row's first
    if recompute:
        return ids + head + config.n_layers * work.positions * config.d_model * n
    shared = 0
    if "A" in config.mixers:
        shared += _rope_bytes(config, work.length, FLOAT32) if n == FLOAT32 else 0
        shared += work.length**2 * n if config.window and config.window < work.length else 0
    layers = zip(config.mixers, config.layer_budgets(k), strict=True)
    return ids + head + shared + sum(layer_activation_bytes(config, *layer, work) for layer in layers)


def layer_activation_bytes(config: ModelConfig, mixer: str, k: int, work: Workload) -> int:
    """Of `activation_bytes`, what one block with the mixer "S" or "A" keeps."""
    norm = work.positions * _norm_bytes(config.d_model, work)
    mixing = _attention_bytes(config, work) if mixer == "A" else _spectral_bytes(config, k, work)
    taps = work.batch * (work.length + config.input_taps - 1) if config.input_taps > 1 else 0  # u after zeros
    return norm + taps * config.d_model * work.number_bytes + mixing + _feed_forward_bytes(config, k, work)


def _feed_forward_bytes(config: ModelConfig, k: int, work: Workload) -> int:
    kept = 3 if work.fused else 4  # gate and up, its silu, their product
    hidden = kept * work.number_bytes * work.share(config.ffn_width(k))
    return work.positions * (_norm_bytes(config.d_model, work) + hidden)


def _head_bytes(config: ModelConfig, work: Workload) -> int:
    """The last norm, and the predictions' log-probabilities, or their logits."""
    predictions = _predictions(config, work) * _kept_loss_bytes(work) * work.share(config.outputs)
    return work.positions * _norm_bytes(config.d_model, work) + predictions


def _kept_loss_bytes(work: Workload) -> int:
    """Of a prediction, from the forward to the backward pass."""
    return work.number_bytes if work.fused else FLOAT32


def _predictions(config: ModelConfig, work: Workload) -> int:
    """One a position, or one an example."""
    return work.positions if config.classes is None else work.batch


def _norm_bytes(d: int, work: Workload) -> int:
    """A position of RMSNorm: its input and the normalised input in float32, or its input as it is; the factor, the
    output."""
    n = work.number_bytes
    return (n if work.fused else 2 * FLOAT32) * d + FLOAT32 + n * d


def _spectral_bytes(config: ModelConfig, k: int, work: Workload) -> int:
    n, inputs, heads = work.number_bytes, work.chunk + work.state_size, config.mixer_heads
    rescaled = FLOAT32 * (k + 3) if config.gate == "softmax" and config.gate_rescale else 0
    scores = n * k if work.fused else FLOAT32 * k + rescaled
    gate = 2 * n * max(1, config.d_model // 2) + heads * scores
    kept = work.positions * gate if config.has_gate else 0
    kept += work.chunked_positions * FLOAT32 * k * heads  # the weights as the products take them
    own = work.positions * n * work.share(config.d_model)
    kept += own * ((work.tensor > 1) + (heads > 1))  # its own channels of u, what the output projection takes
    kept += _decay_bytes(config, k, work) if config.selective else 0
    rows = n * work.chunk * k * inputs
    if not work.state_size:
        return kept + rows
    doublings = math.ceil(math.log2(work.chunks)) if work.chunks > 1 and not config.selective else 0
    states = FLOAT32 * work.state_size * (work.chunk + work.state_size * doublings)
    return kept + rows + states + work.batch * work.chunks * inputs * work.share(config.d_model) * n


def _decay_bytes(config: ModelConfig, k: int, work: Workload) -> int:
    """Of a selective mixer: decays, weights once more, factors; states, or without them each chunk's past, u filled."""
    n, heads, width = work.number_bytes, config.mixer_heads, work.share(config.d_model)
    decays = FLOAT32 * heads * work.positions * (k + 2)
    if work.state_size:
        states = work.state_size * width + 3 * heads
        return decays + FLOAT32 * (3 * heads * work.chunked_positions + work.batch * work.chunks * states)
    chunk = min(CHUNK, work.length)
    count = -(-work.length // chunk)
    past = FLOAT32 * heads * count * (count + 1) + n * width * (count**2 + 2 * count - 1)
    return decays + work.batch * chunk * past


def _attention_bytes(config: ModelConfig, work: Workload) -> int:
    """Queries, keys, values, the output twice, the softmax's logarithms; rotary tables where they are cast."""
    n, d = work.number_bytes, work.share(config.d_model)
    kv_width = config.d_model // config.n_heads * -(-config.kv_heads // min(work.tensor, config.kv_heads))
    tables = 0 if n == FLOAT32 else 2 * _rope_bytes(config, work.length, n)
    return work.positions * (n * (3 * d + 2 * kv_width) + FLOAT32 * work.share(config.n_heads)) + tables


def _rope_bytes(config: ModelConfig, length: int, n: int) -> int:
    return length * config.d_model // config.n_heads * n


def peak_activation_bytes(
    config: ModelConfig, k: int, work: Workload, group_bytes: int, recompute: bool = False
) -> int:
    """The most that one forward and backward pass holds besides weights and their gradients.

    It is reached in the loss (logits and their gradient), or in the backward pass of the last block, when what the loss
    kept is free again: in its feed-forward layer, or in its spectral mixer, where features are written by a group of
    gated ones and their gradients, each of `group_bytes` (`megassm.ops.mixing.GROUP_BYTES`) or of one filter. In a
    hybrid the last spectral block is taken for the last of all.
    """
    n, d = work.number_bytes, config.d_model
    kept = activation_bytes(config, k, work, recompute)
    rest = kept - _head_bytes(config, work)
    mixer = "S" if "S" in config.mixers else "A"
    if recompute:
        rest += layer_activation_bytes(config, mixer, k, work)
    logits = _predictions(config, work) * work.share(config.outputs)
    peaks = [
        kept + logits * _loss_gradient_bytes(work),
        rest + work.positions * n * (2 * work.share(config.ffn_width(k)) + d),
    ]
    if mixer == "S":
        peaks.append(rest - _feed_forward_bytes(config, k, work) + _mixing_bytes(config, k, work, group_bytes))
    return max(peaks)


def _mixing_bytes(config: ModelConfig, k: int, work: Workload, group_bytes: int) -> int:
    """Of a spectral mixer's backward pass, beside what it kept: features, and gradients of inputs, output, both paths
    around and gate."""
    n, d, heads = work.number_bytes, config.d_model, config.mixer_heads
    inputs = work.batch * work.chunks * (work.chunk + work.state_size) * work.share(d)
    around, weights = work.positions * 3 * d * n, work.positions * FLOAT32 * k * heads
    if _writes_no_feature(config, work):
        return n * inputs + around + 2 * weights
    one = work.chunked_positions * work.share(d) * n
    filters = max(1, min(k, group_bytes // one))
    group, rows = filters * one, filters * n * work.chunk * (work.chunk + work.state_size)
    apart = n * (inputs + work.positions * d) if heads > 1 else 0  # inputs and gradients head by head
    return 2 * group + rows + FLOAT32 * inputs + around + weights + apart


def _writes_no_feature(config: ModelConfig, work: Workload) -> bool:
    """Whether its mixers are those of `megassm.ops.head_mixing`."""
    narrow = config.d_model // config.mixer_heads <= FUSED_HEAD_WIDTH and work.number_bytes < FLOAT32
    return work.fused and narrow and work.chunk + work.state_size <= FUSED_INPUTS
