"""How weights start: a pure function of the configuration, the seed and a parameter's name.

Matrices start at standard deviation 1/sqrt(inputs); those that write into the residual stream are divided by
sqrt(2 n_layers), so that its variance does not grow with depth. Channel matrices whose K_max products are added
unnormalised are divided by sqrt(K_max). Biases start at 0, the gates' last ones at `config.gate_bias_init`, the decays'
at `config.decay_start`, taps as the identity, norm gains at 1; the last norm's at `config.width_factor`, which is muP's
multiplier of the logits.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from megassm.config.model import ModelConfig

UNIT = 16
"""Numbers that torch's generator of normal numbers makes at a time on a CPU."""
BLOCK_NUMBERS = 2**22
"""Of a parameter that is drawn in blocks, about so many at a time."""


def initial_blocks(name: str, shape: torch.Size, config: ModelConfig, seed: int) -> Iterator[Tensor]:
    """The float32 values that a parameter starts at, in blocks of its rows, from a stream keyed by (seed, name)."""
    std = _initial_std(name, shape, config)
    if name.endswith("norm.weight"):
        yield torch.full(shape, config.width_factor if name == "head_norm.weight" else 1.0)
    elif name.endswith("mixer.gate.score_bias_K"):
        yield torch.full(shape, config.gate_bias_init)
    elif name.endswith("mixer.decay.bias"):
        yield torch.full(shape, config.decay_start)
    elif name.endswith("taps.weight_ND"):
        yield torch.eye(config.input_taps)[0].repeat_interleave(config.d_model)
    elif std == 0.0:
        yield torch.zeros(shape)
    else:
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        for rows in _row_counts(shape):
            yield torch.randn((rows, *shape[1:]), generator=generator).mul_(std)


def _row_counts(shape: torch.Size) -> list[int]:
    """Rows of each block, such that the blocks are what one draw of the whole tensor would be.

    torch draws `UNIT` numbers from as many of the generator's, and the last `UNIT` once more where their number is no
    multiple of that: so every block but the last is one, and the last is not smaller.
    """
    inner = shape[1:].numel()
    least = UNIT // math.gcd(inner, UNIT)
    rows = max(1, BLOCK_NUMBERS // (inner * least)) * least
    counts = [min(rows, shape[0] - first) for first in range(0, shape[0], rows)]
    if len(counts) > 1 and counts[-1] * inner < UNIT:
        counts[-2:] = [sum(counts[-2:])]
    return counts


def _initial_std(name: str, shape: torch.Size, config: ModelConfig) -> float:
    depth = 1.0 / math.sqrt(2 * config.n_layers)
    inputs = 1.0 / math.sqrt(shape[-1])
    match name.rpartition("blocks.")[2].partition(".")[2] or name:
        case "embedding_VD" | "head_VD":
            return config.embed_init_std
        case "mixer.channels_KDD":
            summands = config.num_channels if config.gate in ("sigmoid", "none") else 1
            std = inputs / math.sqrt(summands) * (depth if config.mixer_heads == 1 else 1.0)
            return config.channel_init_std or std
        case "mixer.gate.hidden.weight" | "mixer.gate.score_KH":
            return inputs * config.gate_init_scale
        case "mixer.direct_DD" | "mixer.out_DD" | "mixer.out.weight" | "ffn.down.weight":
            return inputs * depth
        case _:
            return inputs if len(shape) > 1 else 0.0
