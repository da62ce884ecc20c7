"""How a model's parameters start, each by its name."""

from __future__ import annotations

import hashlib
import math

import torch
from torch import Tensor

from megassm.config.model import ModelConfig


def initial_values(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Tensor:
    """Float32 values of the parameter `name`, drawn from its own stream, keyed by (seed, name).

    Matrices start at standard deviation 1/sqrt(inputs); those that write into the residual stream are divided by
    sqrt(2 n_layers), so that its variance does not grow with depth. Channel matrices whose K_max products are added
    unnormalised are divided by sqrt(K_max). Biases start at 0, the gates' last ones at `config.gate_bias_init`, taps as
    the identity, norm gains at 1; the last norm's at `config.width_factor`, which is muP's multiplier of the logits.
    """
    std = _initial_std(name, shape, config)
    if name.endswith("norm.weight"):
        return torch.full(shape, config.width_factor if name == "head_norm.weight" else 1.0)
    if name.endswith("mixer.gate.score_bias_K"):
        return torch.full(shape, config.gate_bias_init)
    if name.endswith("taps.weight_ND"):
        return torch.eye(config.input_taps)[0].repeat_interleave(config.d_model)
    if std == 0.0:
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randn(shape, generator=generator) * std


def _initial_std(name: str, shape: torch.Size, config: ModelConfig) -> float:
    depth = 1.0 / math.sqrt(2 * config.n_layers)
    inputs = 1.0 / math.sqrt(shape[-1])
    match name.rpartition("blocks.")[2].partition(".")[2] or name:
        case "embedding_VD" | "head_VD":
            return config.embed_init_std
        case "mixer.channels_KDD":
            summands = config.num_channels if config.gate in ("sigmoid", "none") else 1
            std = config.channel_init_std or inputs / math.sqrt(summands)
            return std * depth if config.mixer_heads == 1 else std
        case "mixer.direct_DD" | "mixer.out_DD" | "mixer.out.weight" | "ffn.down.weight":
            return inputs * depth
        case _:
            return inputs if len(shape) > 1 else 0.0
