"""Whole models in training, of equal size: an elastic spectral stack, a transformer, and Mamba-2 in the spectral stack.

    es_ssm       the spectral stack at full K, or a configuration's model
    transformer  as many blocks, all of attention, of the width that makes the parameters equal
    mamba2       the spectral stack with Mamba-2 layers of as many parameters (`tools.bench.peers`) for mixers

Timed is a forward and backward pass of one micro-batch, the loss included; no optimizer, no communication.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from megassm.config.model import ModelConfig
from megassm.cost import mixer_parameters, parameters, training_flops_per_token
from megassm.eval.measure import peak_tensor_bytes, timed_seconds
from megassm.layers.block import Block
from megassm.layers.context import Context
from megassm.model import LanguageModel, build_model, losses_at
from megassm.run.journal import peak_flops
from tools.bench.peers import peer_layer, why_no_peer

MODELS = ("es_ssm", "transformer", "mamba2")

SIZES = {
    "1.3b": ModelConfig(
        vocab_size=32_000, d_model=1536, n_layers=13, seq_len=2048, num_channels=32, n_heads=24, d_ffn=4096
    ),
    "tiny": ModelConfig(vocab_size=257, d_model=64, n_layers=2, seq_len=256, num_channels=8, n_heads=4, d_ffn=128),
}
"""The spectral stack, by name."""


@dataclass(frozen=True)
class ModelRow:
    """One model at one length."""

    model: str
    length: int
    parameters: int
    k: int
    """The budget it was timed at; 1 for a model without channels of ours."""
    tokens_per_s: float
    mfu: float | None
    """Model FLOPs (`megassm.cost`; Mamba-2 counted as its parameters) over the device's peak rate; None where that is
    not known."""
    peak_memory_gib: float
    """Weights, gradients and activations."""


@dataclass(frozen=True)
class ModelBenchPlan:
    """What to measure."""

    config: ModelConfig
    """The spectral stack; its seq_len is replaced by each length."""
    lengths: Sequence[int]
    device: torch.device
    dtype: torch.dtype
    batch: int = 1
    recompute: bool = False
    repeats: int = 5
    budgets: Sequence[int] = ()
    """Of the spectral stack; empty for K_max."""
    peak_tflops: float | None = None
    """Null is looked up; on a CPU there is none."""


def bench_models(plan: ModelBenchPlan, say: Callable[[str], None] = lambda _: None) -> Iterator[ModelRow]:
    """Rows in the order of lengths and `MODELS`. `say` is told of what is left out, and the peak rate."""
    peak, source = peak_flops(plan.peak_tflops, plan.device)
    say(f"peak rate {source}" if peak is None else f"peak rate {peak / 1e12:.3g} TFLOP/s ({source})")
    reason = why_no_peer("mamba2", plan.device)
    if reason:
        say(f"no row for mamba2: {reason}")
    for length in plan.lengths:
        spectral = plan.config.model_copy(update={"seq_len": length})
        for name in MODELS:
            if name != "mamba2" or not reason:
                yield from _measure(name, plan, spectral, peak)


def transformer_of_equal_size(spectral: ModelConfig) -> ModelConfig:
    """As deep, all of attention, with heads as wide; the feed-forward layers take up what whole heads leave over."""
    size, head = parameters(spectral, spectral.num_channels), spectral.d_model // spectral.n_heads
    candidates = [
        spectral.model_copy(
            update={
                "pattern": "A",
                "d_model": head * heads,
                "n_heads": heads,
                "n_kv_heads": None,
                "input_taps": 1,
                "ffn_elastic": None,
                "d_ffn": 8 * head * heads // 3,
            }
        )
        for heads in range(1, 16 * spectral.n_heads)
    ]
    nearest = min(candidates, key=lambda config: abs(parameters(config, 1) - size))
    left = round((size - parameters(nearest, 1)) / (3 * nearest.d_model * nearest.n_layers))
    return nearest.model_copy(update={"d_ffn": nearest.d_ffn + left})


class _Peer(nn.Module):
    """Another layer in a mixer's place."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, u_BLD: Tensor, context: Context) -> Tensor:
        y_BLD: Tensor = self.layer(u_BLD)
        return y_BLD


def _build(name: str, plan: ModelBenchPlan, spectral: ModelConfig) -> LanguageModel:
    config = transformer_of_equal_size(spectral) if name == "transformer" else spectral
    model = build_model(config, 0, plan.recompute)
    if name == "mamba2":
        size = mixer_parameters(spectral, "S", spectral.num_channels)
        for block in cast(list[Block], model.blocks):
            block.mixer = _Peer(peer_layer("mamba2", spectral.d_model, size))
    model.to(plan.device)
    for parameter in model.parameters():  # the filters stay float64
        parameter.data = parameter.data.to(plan.dtype)
    return model


def _measure(name: str, plan: ModelBenchPlan, spectral: ModelConfig, peak: float | None) -> Iterator[ModelRow]:
    model, length, full = _build(name, plan, spectral), spectral.seq_len, spectral.num_channels
    ids_BT = torch.randint(0, spectral.vocab_size, (plan.batch, length + 1), device=plan.device)

    def step(k: int) -> None:
        model.zero_grad(set_to_none=True)
        losses_at(model, ids_BT, k).mean().backward()  # type: ignore[no-untyped-call]

    for k in (plan.budgets if name == "es_ssm" else ()) or (full,):
        rate = plan.batch * length / statistics.median(timed_seconds(partial(step, k), plan.device, plan.repeats))
        model.zero_grad(set_to_none=True)
        memory = peak_tensor_bytes([*model.parameters(), *model.buffers()], partial(step, k), plan.device)
        flops = training_flops_per_token(model.config, k, length)
        if name == "mamba2":
            own = sum(p.numel() for block in cast(list[Block], model.blocks) for p in block.mixer.parameters())
            flops += 6.0 * (own - spectral.n_layers * mixer_parameters(spectral, "S", k))
        size, mfu = sum(p.numel() for p in model.parameters()), None if peak is None else rate * flops / peak
        yield ModelRow(name, length, size, k if name == "es_ssm" else 1, rate, mfu, memory / 2**30)
