"""Other sequence layers of a given number of parameters, to measure spectral ones against.

Attention is torch's. Mamba-2 (arXiv 2405.21060) and the gated delta-net (arXiv 2412.06464) are those of
flash-linear-attention, where it is installed: on CUDA only, and Mamba-2 only with the kernels of mamba_ssm, for its
fallback is no measure.

Shapes: B batch, L length, D width, H heads, P dimensions a head.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PEERS = ("attention", "mamba2", "gated_deltanet")
NEEDED = {"attention": (), "mamba2": ("fla", "mamba_ssm"), "gated_deltanet": ("fla",)}
ATTENTION_HEAD_DIM = 64
MAMBA2_HEAD_DIM = 64
DELTANET_HEAD_DIM = 128


def why_no_peer(name: str, device: torch.device) -> str | None:
    """Why a peer cannot run on `device`, or None."""
    missing = [package for package in NEEDED[name] if importlib.util.find_spec(package) is None]
    if missing:
        return f"{' and '.join(missing)} not installed"
    return f"runs on CUDA only, this is {device.type}" if NEEDED[name] and device.type != "cuda" else None


def peer_layer(name: str, d_model: int, parameters: int) -> nn.Module:
    """A layer (B, L, D) -> (B, L, D) of nearly `parameters` parameters; whole heads decide how nearly."""
    if name == "attention":
        return WideAttention(d_model, max(1, parameters // (4 * d_model)))
    if name == "mamba2":
        from fla.layers import Mamba2

        heads = max(1, round(parameters / (3 * d_model * MAMBA2_HEAD_DIM)))
        expand = (heads * MAMBA2_HEAD_DIM + 0.5) / d_model  # it takes the whole part of expand * hidden_size
        return FirstOutput(Mamba2(num_heads=heads, head_dim=MAMBA2_HEAD_DIM, hidden_size=d_model, expand=expand))
    if name == "gated_deltanet":
        from fla.layers import GatedDeltaNet

        heads = max(1, round(parameters / (8 * d_model * DELTANET_HEAD_DIM)))
        return FirstOutput(GatedDeltaNet(hidden_size=d_model, head_dim=DELTANET_HEAD_DIM, num_heads=heads))
    raise AssertionError(f"no peer {name}")


class WideAttention(nn.Module):
    """Causal attention whose heads are `width` wide in all."""

    def __init__(self, d_model: int, width: int) -> None:
        super().__init__()
        self.heads = max(1, width // ATTENTION_HEAD_DIM)
        width = width // self.heads * self.heads
        self.inputs = nn.Linear(d_model, 3 * width, bias=False)
        self.out = nn.Linear(width, d_model, bias=False)

    def forward(self, u_BLD: Tensor) -> Tensor:
        heads_BLHP = (part.unflatten(2, (self.heads, -1)) for part in self.inputs(u_BLD).chunk(3, dim=2))
        query, key, value = (part.transpose(1, 2) for part in heads_BLHP)
        mixed_BHLP = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        mixed_BLD: Tensor = self.out(mixed_BHLP.transpose(1, 2).flatten(2))
        return mixed_BLD


class FirstOutput(nn.Module):
    """fla's layers give their state besides."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, u_BLD: Tensor) -> Tensor:
        found: Any = self.layer(u_BLD)
        y_BLD: Tensor = found[0] if isinstance(found, tuple) else found
        return y_BLD
