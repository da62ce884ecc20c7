"""What goes on inside an elastic run: the channels' shares, and the two ways in which its training fails.

    gate mass     mean of alpha_k over positions and heads, layer by layer: which channels the gate listens to. Of a
                  normalised gate (softmax) a layer's sum is 1; of the sigmoid each is between 0 and 2
    memory        1 / (mean log decay) of each head of a selective layer, positions: over so many its past fades by e
    updates       how often each channel took part, given the budgets that were drawn: channel k in every update whose
                  largest budget is at least k
    norm          Frobenius norm of M_k, layer by layer

The failures of elastic training (ES-SSM, arXiv 2601.22488); the thresholds are ours:

    cliff collapse     the loss at a budget breaks away from the next larger one (`megassm.eval.curve` says when)
    oscillating loss   the training loss jumps with the K that was drawn. Over the last records, with s_tK the share of
                       record t's micro-steps at K:  loss_t = a + b t + sum_K c_K s_tK + noise.
                       Explained by K is 1 - (variance with the c_K) / (variance without), both per degree of freedom.

Nothing here writes or prints; `tools/diagnose.py` does, and a training loop may.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from megassm.eval.curve import describe, shape
from megassm.layers.spectral import SpectralMixer
from megassm.ops.selective import log_decays

OSCILLATION_RECORDS = 200
"""Journal records looked at, the newest."""
OSCILLATION_MIN_RECORDS = 32
"""Fewer say nothing."""
OSCILLATION_EXPLAINED = 0.5
"""Oscillating: K explains at least this share of the loss variance ..."""
OSCILLATION_SWING = 0.02
"""... and moves the loss by at least this share of its mean (standard deviation over records)."""

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Finding:
    """A named failure with the figures that show it."""

    name: Literal["cliff collapse", "oscillating loss"]
    text: str
    figures: dict[str, float]


@dataclass
class GateMass:
    """Sums of the gates' weights over positions, by spectral layer; `mean` when done."""

    num_channels: int
    sums: list[Floats] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    fades: dict[int, Floats] = field(default_factory=dict)
    """Sums of the log decays of each head, of the layers that are selective."""

    def add(self, layer: int, alpha_BLHK: Tensor) -> None:
        alpha_NK = alpha_BLHK.detach().double().mean(2).flatten(0, 1).cpu().numpy()
        self.sums[layer][: alpha_NK.shape[1]] += alpha_NK.sum(0)
        self.positions[layer] += len(alpha_NK)

    def add_decays(self, layer: int, scores_BLH: Tensor) -> None:
        sums_H = log_decays(scores_BLH.detach()).double().sum((0, 1)).cpu().numpy()
        self.fades[layer] = self.fades.get(layer, 0.0) + sums_H

    def memory(self, layer: int) -> Floats | None:
        """(H,) positions over which each head's past fades by e; None where it does not by what is read."""
        sums_H = self.fades.get(layer)
        return None if sums_H is None else self.positions[layer] / np.maximum(-sums_H, 1e-300)

    def mean(self) -> Floats:
        """(spectral layers, K_max) mean alpha_k; of a normalised gate each row sums to 1, if anything was computed."""
        counts = np.maximum(1, np.array(self.positions, dtype=np.float64))
        return np.stack(self.sums) / counts[:, None] if self.sums else np.empty((0, self.num_channels))


@contextmanager
def gate_masses(model: nn.Module) -> Iterator[GateMass]:
    """Counts every gate's weights in the forward passes within the block; a mixer without a gate has constant ones."""
    mixers = spectral_mixers(model)
    masses = GateMass(max((mixer.channels_KDD.shape[0] for _, mixer in mixers), default=0))
    handles: list[Any] = []
    for place, (_, mixer) in enumerate(mixers):
        masses.sums.append(np.zeros(masses.num_channels))
        masses.positions.append(0)
        handles += _watch(mixer, place, masses)
    try:
        yield masses
    finally:
        for handle in handles:
            handle.remove()


def _watch(mixer: SpectralMixer, place: int, masses: GateMass) -> Iterator[Any]:
    if mixer.decay is not None:
        yield mixer.decay.register_forward_hook(lambda _module, _inputs, scores: masses.add_decays(place, scores))
    if mixer.gate is not None:
        yield mixer.gate.register_forward_hook(lambda _module, _inputs, alpha: masses.add(place, alpha))
        return

    def constant_weights(_module: nn.Module, inputs: tuple[Any, ...], _output: Tensor) -> None:
        u_BLD, context = inputs
        masses.add(place, torch.full((*u_BLD.shape[:-1], 1, context.k), 1 / mixer.constant_divisor(context.k)))

    yield mixer.register_forward_hook(constant_weights)


def spectral_mixers(model: nn.Module) -> list[tuple[str, SpectralMixer]]:
    """(name, mixer) of every spectral layer, in order of depth."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, SpectralMixer)]


@torch.no_grad()
def channel_norms(model: nn.Module) -> Floats:
    """(spectral layers, K_max) Frobenius norms of M_k, of a model whose parameters are whole on this rank."""
    norms = [mixer.channels_KDD.double().flatten(1).norm(dim=1).cpu().numpy() for _, mixer in spectral_mixers(model)]
    return np.stack(norms) if norms else np.empty((0, 0))


def update_counts(budgets: Iterable[Sequence[int]], num_channels: int) -> npt.NDArray[np.int64]:
    """(K_max,) in how many updates each channel took part.

    Args:
        budgets: of every update the K of its micro-steps, as the journal's `k_micro`.
        num_channels: K_max.
    """
    largest = np.bincount([max(drawn) for drawn in budgets], minlength=num_channels + 1)[1:]
    return np.asarray(largest[::-1].cumsum()[::-1])


def warnings_of(records: Sequence[Mapping[str, Any]], last: int = OSCILLATION_RECORDS) -> list[Finding]:
    """What a journal warns of: its newest validation, and its last records' losses."""
    found = [cliff_collapse(_newest_validation(records)), oscillating_loss(records, last)]
    return [warning for warning in found if warning is not None]


def cliff_collapse(valid: Mapping[int, float]) -> Finding | None:
    """A cliff in bits per byte by K, the steepest where there are several."""
    if len(valid) < 2:
        return None
    cliffs = shape(valid).cliffs
    if not cliffs:
        return None
    cliff = max(cliffs, key=lambda step: step.loss)
    figures = {"k": float(cliff.k), "next_k": float(cliff.next_k), "bits_per_byte": cliff.loss,
               "share_of_gap": cliff.share_of_gap}  # fmt: skip
    text = f"{describe(cliff)}, {cliff.share_of_gap:.0%} of the whole gap; do not cut below K={cliff.next_k}"
    return Finding("cliff collapse", text, figures)


def oscillating_loss(records: Sequence[Mapping[str, Any]], last: int = OSCILLATION_RECORDS) -> Finding | None:
    """Whether the K that was drawn, and not chance, moves the training loss from update to update."""
    explained, swing = loss_explained_by_budget(records, last)
    if explained < OSCILLATION_EXPLAINED or swing < OSCILLATION_SWING:
        return None
    text = f"the drawn K explains {explained:.0%} of the loss variance and moves the loss by {swing:.1%} of its mean"
    return Finding("oscillating loss", text, {"explained": explained, "swing": swing})


def loss_explained_by_budget(
    records: Sequence[Mapping[str, Any]], last: int = OSCILLATION_RECORDS
) -> tuple[float, float]:
    """(share of the detrended loss variance that K explains, standard deviation of that part over the mean loss).

    Records without a finite loss are left out; (0, 0) where fewer than `OSCILLATION_MIN_RECORDS` are left or K never
    changes.
    """
    records = [record for record in records[-last:] if record.get("loss") is not None]
    budgets = sorted({k for record in records for k in record["k_micro"]})
    if len(records) < max(OSCILLATION_MIN_RECORDS, len(budgets) + 3) or len(budgets) < 2:
        return 0.0, 0.0
    loss_T = np.array([record["loss"] for record in records])
    shares_TK = np.array([[record["k_micro"].count(k) / len(record["k_micro"]) for k in budgets] for record in records])
    trend_T2 = np.stack((np.ones(len(records)), np.linspace(-1, 1, len(records))), axis=1)
    plain_T, plain_free = _residual(trend_T2, loss_T)
    rest_T, rest_free = _residual(np.concatenate((trend_T2, shares_TK), axis=1), loss_T)
    before, after = float(plain_T @ plain_T) / plain_free, float(rest_T @ rest_T) / rest_free
    if before == 0.0:
        return 0.0, 0.0
    return max(0.0, 1 - after / before), float((plain_T - rest_T).std() / loss_T.mean())


def _residual(columns_TC: Floats, values_T: Floats) -> tuple[Floats, int]:
    """(what the columns leave of the values by least squares, degrees of freedom left)."""
    solution_C, _, rank, _ = np.linalg.lstsq(columns_TC, values_T, rcond=None)
    return values_T - columns_TC @ solution_C, len(values_T) - int(rank)


def _newest_validation(records: Sequence[Mapping[str, Any]]) -> dict[int, float]:
    valid: Mapping[str, float | None] = next(
        (record["valid"] for record in reversed(records) if record.get("valid")), {}
    )
    return {int(k): float(bits) for k, bits in valid.items() if bits is not None}
