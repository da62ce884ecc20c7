"""One spectral layer's core, each way of computing it, side by side: time, memory, error, share of the machine's rate.

    y = sum_{k<=K} alpha_k sigma_k^(1/4) M_k f_k          u (B, L, D), alpha (B, L, K), M (K, D, D) -> y (B, L, D)

`authors` is the formulation of the ES-SSM notebook as published: FFTs over groups of 8 channels, then every channel
projected by every M_k, then the gate's sum over (B, L, K, D) products. It is written anew here from its description.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from megassm.errors import UserError
from megassm.eval.memory import peak_tensor_bytes
from megassm.eval.timing import timed_seconds
from megassm.layers.filterbank import FilterBank
from megassm.ops.filterbank import check_flashfft, fft_filterbank

METHODS = ("authors", "fft", "direct", "chunked", "flashfft", "attention")
AUTHORS_GROUP = 8
"""Model channels that the authors transform at a time."""
ATTENTION_HEAD_DIM = 64

Core = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(u (B, L, D), weights (B, L, K), channels (K, D, D)) -> y (B, L, D)."""


@dataclass(frozen=True)
class BenchRow:
    """One method at one length and budget."""

    method: str
    length: int
    k: int
    forward_s: float
    forward_backward_s: float
    peak_bytes: int
    """Inputs and all that forward and backward keep besides."""
    relative_error: float | None
    """Of the output, against `fft` in float64; None for attention, another function."""
    gflops_per_s: float
    """Matrix products of forward and backward, recomputed ones included; FFTs do not count."""
    share_of_matmul: float
    """... over the rate of one large product, measured in the same run."""


@dataclass(frozen=True)
class BenchPlan:
    """What to measure."""

    lengths: Sequence[int]
    budgets: Sequence[int]
    methods: Sequence[str] = METHODS
    d_model: int = 256
    batch: int = 1
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    repeats: int = 5


def bench(plan: BenchPlan) -> Iterator[BenchRow]:
    """Rows in the order of lengths, budgets, methods. Methods that cannot run on this machine are left out.

    Raises:
        UserError: an unknown method.
    """
    unknown = sorted(set(plan.methods) - set(METHODS))
    if unknown:
        raise UserError(f"methods {', '.join(unknown)}: must be among {', '.join(METHODS)}")
    rate = matmul_rate(plan.device, plan.dtype)
    for length in plan.lengths:
        bank = FilterBank(length, max(plan.budgets), "quarter_power", "chunked").to(plan.device)
        bank.reset()
        for k in plan.budgets:
            inputs = _inputs(plan, length, k)
            truth = _truth(bank, inputs, k)
            for method in plan.methods:
                if _is_possible(method, bank, length):
                    yield _measure(method, _core(method, bank), inputs, truth, (rate, plan.repeats))


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large square product: what the machine gives at best."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2.0 * size**3 / min(timed_seconds(lambda: a @ b, device, 5))


def authors_core(filters_LK: Tensor) -> Core:
    """The published formulation."""

    def core(u_BLD: Tensor, weights_BLK: Tensor, channels_KDE: Tensor) -> Tensor:
        k = weights_BLK.shape[2]
        wide = u_BLD.to(torch.promote_types(u_BLD.dtype, torch.float32))
        groups = [
            fft_filterbank(part, filters_LK.to(wide.dtype), k) for part in torch.split(wide, AUTHORS_GROUP, dim=2)
        ]
        features_BLKD = torch.cat(groups, dim=3).to(u_BLD.dtype)
        projected_BLKE = torch.einsum("blkd,kde->blke", features_BLKD, channels_KDE)
        return (projected_BLKE * weights_BLK[..., None]).sum(2).to(u_BLD.dtype)

    return core


def attention_core(u_BLD: Tensor, weights_BLK: Tensor, channels_KDE: Tensor) -> Tensor:
    """torch's causal attention with as many of its four D x D projections as the budget has matrices, at most."""
    batch, length, width = u_BLD.shape
    heads = max(1, width // ATTENTION_HEAD_DIM)
    query, key, value = (
        (u_BLD @ channels_KDE[i % channels_KDE.shape[0]]).view(batch, length, heads, -1).transpose(1, 2)
        for i in range(3)
    )
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True).transpose(1, 2).flatten(2)
    return mixed @ channels_KDE[-1]


def _core(method: str, bank: FilterBank) -> Core:
    if method == "authors":
        return authors_core(bank.filters_LK)
    if method == "attention":
        return attention_core
    other = FilterBank(bank.seq_len, bank.num_channels, bank.sigma_scale, method)  # type: ignore[arg-type]
    other.take(bank)
    return other.mix


def _is_possible(method: str, bank: FilterBank, length: int) -> bool:
    if method == "direct":
        return length <= 4096  # its matrix has K L^2 entries
    if method == "flashfft":
        try:
            check_flashfft(bank.filters_LK, length)
        except UserError:
            return False
    return True


def _inputs(plan: BenchPlan, length: int, k: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(plan.device)

    u_BLD = noise(plan.batch, length, plan.d_model).to(plan.dtype)
    weights_BLK = noise(plan.batch, length, k).softmax(-1)
    channels_KDD = (noise(k, plan.d_model, plan.d_model) / plan.d_model**0.5).to(plan.dtype)
    return [tensor.requires_grad_() for tensor in (u_BLD, weights_BLK, channels_KDD)]


@torch.no_grad()
def _truth(bank: FilterBank, inputs: Sequence[Tensor], k: int) -> Tensor:
    """The output in float64, one filter at a time."""
    u_BLD, weights_BLK, channels_KDE = (tensor.double() for tensor in inputs)
    y_BLE = torch.zeros_like(u_BLD)
    for i in range(k):
        feature_BLD = fft_filterbank(u_BLD, bank.filters_LK[:, i : i + 1], 1)[:, :, 0]
        y_BLE += weights_BLK[..., i : i + 1] * (feature_BLD @ channels_KDE[i])
    return y_BLE


def _measure(method: str, core: Core, inputs: list[Tensor], truth: Tensor, timing: tuple[float, int]) -> BenchRow:
    rate, repeats = timing
    u_BLD = inputs[0]
    gradient = torch.ones_like(u_BLD)

    @torch.no_grad()
    def forward() -> Tensor:
        return core(*inputs)

    def forward_backward() -> None:
        for tensor in inputs:
            tensor.grad = None
        torch.autograd.backward(core(*inputs), gradient)

    with FlopCounterMode(display=False) as counter:
        forward_backward()
    seconds = statistics.median(timed_seconds(forward_backward, u_BLD.device, repeats))
    error = None if method == "attention" else float((forward().double() - truth).norm() / truth.norm())
    return BenchRow(
        method=method,
        length=u_BLD.shape[1],
        k=inputs[1].shape[2],
        forward_s=statistics.median(timed_seconds(forward, u_BLD.device, repeats)),
        forward_backward_s=seconds,
        peak_bytes=sum(tensor.nbytes for tensor in inputs) + peak_tensor_bytes([], forward_backward, u_BLD.device),
        relative_error=error,
        gflops_per_s=counter.get_total_flops() / seconds / 1e9,
        share_of_matmul=counter.get_total_flops() / seconds / rate,
    )
