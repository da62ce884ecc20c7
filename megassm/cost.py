"""What a model costs, as functions of the budget K: parameters, FLOPs, bytes. Imports no torch.

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


def decoding_flops_per_token(config: ModelConfig, k: int, context: int, state_size: int) -> float:
    """FLOPs of one decoding step at budget k after `context` tokens, the filter bank's own products included.

    `state_size` is S, `FilterBank.state_size`: a step multiplies the state by (S, S) and reads k features from it.
    """
    model_flops = forward_flops_per_token(config, k, 1) - 4.0 * config.d_model * config.mixers.count("A")
    visible = min(context + 1, config.window or context + 1)
    attention = 4.0 * config.d_model * visible * config.mixers.count("A")
    filterbank = 2.0 * config.d_model * state_size * (state_size + k) * config.mixers.count("S")
    return model_flops + attention + filterbank


def decoding_state_bytes(config: ModelConfig, context: int, state_size: int, bytes_per_number: int) -> int:
    """Bytes that a sequence keeps between steps: S x d numbers a spectral layer whatever the context; keys and values,
    at most a window of them, an attention layer."""
    spectral = config.mixers.count("S") * state_size * config.d_model
    kept = min(context, config.window - 1) if config.window else context
    attention = config.mixers.count("A") * 2 * kept * config.d_model // config.n_heads * config.kv_heads
    return (spectral + attention) * bytes_per_number


def decoding_bytes_per_token(config: ModelConfig, k: int, context: int, state_size: int, bytes_per_number: int) -> int:
    """Bytes one step has to move: every weight within the budget once, the state read and written.

    Of an untied embedding one row is read; a tied one is the head, and read whole.
    """
    unread = 0 if config.tie_embeddings else (config.vocab_size - 1) * config.d_model
    weights = (parameters(config, k) - unread) * bytes_per_number
    return weights + 2 * decoding_state_bytes(config, context, state_size, bytes_per_number)
