"""One spectral layer's core, each way of computing it, side by side: time, memory, error, share of the machine's rate.

    y = sum_{k<=K} alpha_k sigma_k^(1/4) M_k f_k          u (B, L, D), alpha (B, L, K), M (K, D, D) -> y (B, L, D)

`authors` is the formulation of the ES-SSM notebook as published: FFTs over groups of 8 filters, then every channel
projected by every M_k, then the gate's sum over (B, L, K, D) products. It is written anew here from its description.
`authors_by_input` is the same with groups of 8 of the D inputs, which is faster.
`attention`, `mamba2` and `gated_deltanet` are other layers, of as many parameters (`tools.bench.peers`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from megassm.errors import UserError
from megassm.eval.measure import peak_tensor_bytes, timed_seconds
from megassm.layers.filterbank import FilterBank
from megassm.ops.filterbank import check_flashfft, fft_filterbank
from tools.bench.peers import PEERS, peer_layer, why_no_peer

METHODS = ("authors", "authors_by_input", "fft", "direct", "chunked", "flashfft", *PEERS)
AUTHORS_GROUP = 8
"""Filters that the authors transform at a time."""
DIRECT_LIMIT = 4096

Core = Callable[..., Tensor]
"""(u (B, L, D), weights (B, L, K), channels (K, D, D)) -> y (B, L, D); a peer takes u and its own parameters."""


@dataclass(frozen=True)
class MixerRow:
    """One method at one length and budget."""

    method: str
    length: int
    k: int
    parameters: int
    """K D^2; of a peer nearly as many."""
    forward_s: float
    forward_backward_s: float
    peak_bytes: int
    """Inputs and all that forward and backward keep besides."""
    relative_error: float | None
    """Of the output, against `fft` in float64; None for the peers, other functions."""
    gflops_per_s: float
    """Matrix products of forward and backward, recomputed ones included; FFTs do not count."""
    share_of_matmul: float
    """... over the rate of one large product, measured in the same run."""


@dataclass(frozen=True)
class MixerBenchPlan:
    """What to measure."""

    lengths: Sequence[int]
    budgets: Sequence[int]
    methods: Sequence[str] = METHODS
    d_model: int = 256
    batch: int = 1
    dtype: torch.dtype = torch.float32
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    repeats: int = 5


def bench(plan: MixerBenchPlan, say: Callable[[str], None] = lambda _: None) -> Iterator[MixerRow]:
    """Rows in the order of lengths, budgets, methods. `say` is told which methods are left out, and why.

    Raises:
        UserError: an unknown method.
    """
    unknown = sorted(set(plan.methods) - set(METHODS))
    if unknown:
        raise UserError(f"methods {', '.join(unknown)}: must be among {', '.join(METHODS)}")
    timing = (matmul_rate(plan.device, plan.dtype), plan.repeats)
    for length in plan.lengths:
        bank = FilterBank(length, max(plan.budgets), "chunked").to(plan.device)
        bank.reset()
        absent = {method: _why_not(method, bank, length) for method in plan.methods}
        for method, reason in absent.items():
            if reason:
                say(f"no row for {method} at L={length}: {reason}")
        for k in plan.budgets:
            inputs = _inputs(plan, length, k)
            truth = _truth(bank, inputs, k)
            for method in plan.methods:
                if absent[method]:
                    continue
                if method in PEERS:
                    yield _measure(method, k, *_peer(method, inputs), None, timing)
                else:
                    yield _measure(method, k, _core(method, bank), inputs, truth, timing)


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one large square product: what the machine gives at best."""
    size = 2048 if device.type == "cpu" else 8192
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2.0 * size**3 / min(timed_seconds(lambda: a @ b, device, 5))


def authors_core(filters_LK: Tensor, by_input: bool = False) -> Core:
    """The published formulation."""

    def core(u_BLD: Tensor, weights_BLK: Tensor, channels_KDE: Tensor) -> Tensor:
        k = weights_BLK.shape[2]
        wide = u_BLD.to(torch.promote_types(u_BLD.dtype, torch.float32))
        bank_LK = filters_LK[:, :k].to(wide.dtype)
        if by_input:
            parts = [fft_filterbank(part, bank_LK, k) for part in torch.split(wide, AUTHORS_GROUP, dim=2)]
        else:
            parts = [fft_filterbank(wide, part, part.shape[1]) for part in torch.split(bank_LK, AUTHORS_GROUP, dim=1)]
        features_BLKD = torch.cat(parts, dim=3 if by_input else 2).to(u_BLD.dtype)
        projected_BLKE = torch.einsum("blkd,kde->blke", features_BLKD, channels_KDE)
        return (projected_BLKE * weights_BLK[..., None]).sum(2).to(u_BLD.dtype)

    return core


def _core(method: str, bank: FilterBank) -> Core:
    if method in ("authors", "authors_by_input"):
        return authors_core(bank.filters_LK, by_input=method == "authors_by_input")
    other = FilterBank(bank.seq_len, bank.num_channels, method)  # type: ignore[arg-type]
    other.take(bank)
    return lambda u_BLD, weights_BLK, channels_KDE: other.mix(u_BLD, weights_BLK[:, :, None], channels_KDE)


def _peer(method: str, inputs: Sequence[Tensor]) -> tuple[Core, list[Tensor]]:
    """A peer of as many parameters as `inputs` has channel matrices, with what it takes instead of them."""
    u_BLD, _, channels_KDE = inputs
    layer = peer_layer(method, u_BLD.shape[2], channels_KDE.numel()).to(u_BLD.device, u_BLD.dtype)

    def core(u_BLD: Tensor, *_: Tensor) -> Tensor:
        return layer(u_BLD)  # type: ignore[no-any-return]

    return core, [u_BLD, *layer.parameters()]


def _why_not(method: str, bank: FilterBank, length: int) -> str | None:
    """Why a method cannot run here, or None."""
    if method == "direct" and length > DIRECT_LIMIT:
        return f"its matrix has K L^2 entries; at most L={DIRECT_LIMIT}"
    if method == "flashfft":
        try:
            check_flashfft(bank.filters_LK, length)
        except UserError as error:
            return str(error)
    return why_no_peer(method, bank.filters_LK.device) if method in PEERS else None


def _inputs(plan: MixerBenchPlan, length: int, k: int) -> list[Tensor]:
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


def _measure(
    method: str, k: int, core: Core, inputs: list[Tensor], truth: Tensor | None, timing: tuple[float, int]
) -> MixerRow:
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
    error = None if truth is None else float((forward().double() - truth).norm() / truth.norm())
    return MixerRow(
        method=method,
        length=u_BLD.shape[1],
        k=k,
        parameters=sum(tensor.numel() for tensor in inputs[1 if truth is None else 2 :]),
        forward_s=statistics.median(timed_seconds(forward, u_BLD.device, repeats)),
        forward_backward_s=seconds,
        peak_bytes=peak_tensor_bytes(inputs, forward_backward, u_BLD.device),
        relative_error=error,
        gflops_per_s=counter.get_total_flops() / seconds / 1e9,
        share_of_matmul=counter.get_total_flops() / seconds / rate,
    )
