"""What a model costs, as functions of the budget K: parameters and FLOPs. Imports no torch.

FLOPs count each multiply-add as two. "Model FLOPs" are the products that parameters take part in, and attention's
two products over the positions that a causal (or windowed) query really sees. The filter bank is left out: it has no
parameters, and its cost belongs to the algorithm that computes it, not to the model.
"""

from __future__ import annotations

from megassm.config import ModelConfig


def mixer_parameters(config: ModelConfig, mixer: str, k: int) -> int:
    """Parameters of one mixer ("S" or "A") cut to k channels."""
    d = config.d_model
    if mixer == "A":
        kv_width = d // config.n_heads * config.kv_heads
        return 2 * d * d + 2 * d * kv_width
    hidden = max(1, d // 2)
    gate = (d * hidden + hidden + k * hidden + k) if config.gate else 0
    return (k + 1) * d * d + gate


def parameters(config: ModelConfig, k: int) -> int:
    """Parameters of the model cut to k channels."""
    d = config.d_model
    block = 2 * d + 3 * d * config.d_ffn
    mixers = sum(mixer_parameters(config, mixer, k) for mixer in config.mixers)
    embeddings = config.vocab_size * d * (1 if config.tie_embeddings else 2)
    return embeddings + mixers + config.n_layers * block + d


def forward_flops_per_token(config: ModelConfig, k: int, seq_len: int) -> float:
    """Model FLOPs of a forward pass at budget k, a token, in sequences of `seq_len` tokens."""
    d = config.d_model
    window = min(config.window or seq_len, seq_len)
    visible = window - window * (window - 1) / (2 * seq_len)  # positions a query sees, on average
    total = 2.0 * d * config.vocab_size + config.n_layers * 6.0 * d * config.d_ffn
    for mixer in config.mixers:
        if mixer == "A":
            total += 2.0 * mixer_parameters(config, mixer, k) + 4.0 * d * visible
        else:
            hidden = max(1, d // 2)
            total += 2.0 * (k + 1) * d * d + (2.0 * hidden * (d + k) if config.gate else 0.0)
    return total


def training_flops_per_token(config: ModelConfig, k: int, seq_len: int) -> float:
    """Forward and backward, 3 x forward; recomputed activations do not count."""
    return 3.0 * forward_flops_per_token(config, k, seq_len)
