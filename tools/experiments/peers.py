"""Models that elastic ones are held against and that the package itself does not have: plain PyTorch, no parallelism.

* `Mamba2`: a stack of Mamba-2 mixers (arXiv 2405.21060), the published equations in chunks.
* `EarlyExit`: a transformer of this package whose every layer is an exit (LayerSkip, arXiv 2404.16710, without its
  dropout of layers): at K it stops after K of its layers, under the same norm and head.

Each is called as `peer(ids_BL, k)` and returns logits (B, L, V), like `LanguageModel`.

Shapes: B batch, L length, D width, I inner width, H heads, P dimensions a head, N state dimensions, C chunk.
"""

from __future__ import annotations

from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megassm.config.model import ModelConfig
from megassm.layers.block import Block
from megassm.model import LanguageModel, build_model

Peer = Literal["mamba2", "early_exit"]

EXPAND = 2
HEAD_DIM = 16
STATE = 16
TAPS = 4
CHUNK = 64


def build_peer(name: Peer, config: ModelConfig, seed: int) -> nn.Module:
    """An initialised model of `config`'s width, depth and vocabulary."""
    torch.manual_seed(seed)
    return Mamba2(config) if name == "mamba2" else EarlyExit(config, seed)


def peer_sizes(name: Peer, config: ModelConfig) -> list[int]:
    """The budgets that a peer can run at: its full size, or numbers of layers."""
    return [1] if name == "mamba2" else list(range(1, config.n_layers + 1))


def peer_parameters(peer: nn.Module, k: int) -> int:
    """Parameters that are used at k."""
    total = sum(parameter.numel() for parameter in peer.parameters())
    if isinstance(peer, EarlyExit):
        blocks = peer.model.blocks
        total -= sum(parameter.numel() for block in blocks[k:] for parameter in block.parameters())
    return total


class EarlyExit(nn.Module):
    """A transformer that may stop after any of its layers."""

    def __init__(self, config: ModelConfig, seed: int) -> None:
        super().__init__()
        self.model: LanguageModel = build_model(config, seed)

    def forward(self, ids_BL: Tensor, k: int) -> Tensor:
        model = self.model
        context = model.context(0, ids_BL.shape[1], model.config.num_channels)
        x_BLD = model.embed(ids_BL)
        for block in cast(list[Block], model.blocks[:k]):
            x_BLD = block(x_BLD, context)
        logits_BLV: Tensor = model.logits(model.head_norm(x_BLD))
        return logits_BLV


class Mamba2(nn.Module):
    """Embedding, x + mixer(norm(x)) for every layer, norm, tied head."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.embedding_VD = nn.Parameter(torch.randn(config.vocab_size, config.d_model) * config.embed_init_std)
        self.norms = nn.ModuleList(nn.RMSNorm(config.d_model) for _ in range(config.n_layers))
        self.mixers = nn.ModuleList(Mamba2Mixer(config.d_model, config.n_layers) for _ in range(config.n_layers))
        self.head_norm = nn.RMSNorm(config.d_model)

    def forward(self, ids_BL: Tensor, k: int) -> Tensor:
        x_BLD = F.embedding(ids_BL, self.embedding_VD)
        for norm, mixer in zip(self.norms, self.mixers, strict=True):
            x_BLD = x_BLD + mixer(norm(x_BLD))
        return F.linear(self.head_norm(x_BLD), self.embedding_VD)


class Mamba2Mixer(nn.Module):
    """One Mamba-2 layer (arXiv 2405.21060, section 7), one group of B and C.

    z, x, B, C, dt = in(u);   x, B, C = silu(conv(x, B, C))
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T;   y_t = C_t h_t + D x_t;   out(norm(y silu(z)))
    """

    def __init__(self, d_model: int, n_layers: int) -> None:
        super().__init__()
        inner = EXPAND * d_model
        self.heads = inner // HEAD_DIM
        self.inner = inner
        mixed = inner + 2 * STATE
        self.inputs = nn.Linear(d_model, inner + mixed + self.heads, bias=False)
        self.conv = nn.Conv1d(mixed, mixed, TAPS, groups=mixed, padding=TAPS - 1)
        step_H = torch.exp(torch.empty(self.heads).uniform_(-6.9, -2.3))  # 0.001 to 0.1, as published
        self.step_bias_H = nn.Parameter(step_H + torch.log(-torch.expm1(-step_H)))
        self.log_decay_H = nn.Parameter(torch.log(torch.empty(self.heads).uniform_(1, 16)))
        self.skip_H = nn.Parameter(torch.ones(self.heads))
        self.norm = nn.RMSNorm(inner, eps=1e-5)
        self.out = nn.Linear(inner, d_model, bias=False)
        nn.init.normal_(self.inputs.weight, std=d_model**-0.5)
        nn.init.normal_(self.out.weight, std=(2 * n_layers * inner) ** -0.5)

    def forward(self, u_BLD: Tensor) -> Tensor:
        length = u_BLD.shape[1]
        widths = [self.inner, self.inner + 2 * STATE, self.heads]
        z_BLI, mixed_BLM, step_BLH = torch.split(self.inputs(u_BLD), widths, dim=-1)
        mixed_BLM = F.silu(self.conv(mixed_BLM.transpose(1, 2))[..., :length].transpose(1, 2))
        x_BLI, input_BLN, output_BLN = torch.split(mixed_BLM, [self.inner, STATE, STATE], dim=-1)
        x_BLHP = x_BLI.view(*x_BLI.shape[:2], self.heads, HEAD_DIM)
        step_BLH = F.softplus(step_BLH + self.step_bias_H)
        decay_BLH = -self.log_decay_H.exp() * step_BLH
        y_BLHP = state_space_duality(x_BLHP * step_BLH[..., None], decay_BLH, input_BLN, output_BLN)
        y_BLI = (y_BLHP + x_BLHP * self.skip_H[:, None]).flatten(2)
        mixed_BLD: Tensor = self.out(self.norm(y_BLI * F.silu(z_BLI)))
        return mixed_BLD


def state_space_duality(x_BLHP: Tensor, log_decay_BLH: Tensor, input_BLN: Tensor, output_BLN: Tensor) -> Tensor:
    """y_t = C_t h_t with h_t = exp(log_decay_t) h_{t-1} + B_t x_t^T, from h = 0, computed in chunks."""
    batch, length, heads, _ = x_BLHP.shape
    pad = -length % CHUNK

    def chunks(part: Tensor) -> Tensor:
        padded = F.pad(part, [0, 0] * (part.dim() - 2) + [0, pad])
        return padded.view(batch, -1, CHUNK, *part.shape[2:])

    x, log_decay, inputs, outputs = (chunks(part) for part in (x_BLHP, log_decay_BLH, input_BLN, output_BLN))
    total = log_decay.cumsum(2)  # (B, chunks, C, H): log of the decay since before the chunk
    between = total[:, :, :, None] - total[:, :, None]
    causal = torch.ones(CHUNK, CHUNK, dtype=torch.bool, device=x.device).tril()[..., None]
    kernel = torch.exp(between.masked_fill(~causal, -torch.inf))  # (B, chunks, C, C, H)
    scores = torch.einsum("bctn,bcsn->bcts", outputs, inputs)
    y = torch.einsum("bctsh,bcshp->bcthp", kernel * scores[..., None], x)
    left = torch.exp(total[:, :, -1:] - total)
    written = torch.einsum("bcsn,bcsh,bcshp->bchnp", inputs, left, x)  # what a chunk adds to the state
    state = x.new_zeros(batch, heads, inputs.shape[-1], x.shape[-1])
    before = []
    for chunk in range(x.shape[1]):
        before.append(state)
        state = state * total[:, chunk, -1].exp()[..., None, None] + written[:, chunk]
    y = y + torch.einsum("bctn,bcth,bchnp->bcthp", outputs, total.exp(), torch.stack(before, 1))
    return y.flatten(1, 2)[:, :length]
