"""The elastic mixer against loops written from the paper's equations, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megassm.config.model import SigmaScale
from megassm.layers.context import Context
from megassm.layers.filterbank import FilterBank
from megassm.layers.spectral import SpectralMixer

LENGTH, WIDTH, K_MAX = 9, 6, 5


def equations(mixer: SpectralMixer, bank: FilterBank, u_BLD: Tensor, k_budget: int) -> Tensor:
    """Section 1 of the model's definition, one position and one channel at a time; all K_max channels are computed
    and those beyond the budget are masked, as the definition has it."""
    phi = bank.filters_LK
    scale = bank.scale_K if mixer.sigma_scale == "quarter_power" else torch.ones(K_MAX)
    outputs = []
    for u_LD in u_BLD:
        rows = []
        for t in range(u_LD.shape[0]):
            features = [sum(phi[s, k] * u_LD[t - s] for s in range(t + 1)) for k in range(K_MAX)]
            alpha = masked_weights(mixer, u_LD[t], k_budget)
            y = u_LD[t] @ mixer.direct_DD
            for k in range(K_MAX):
                y = y + alpha[k] * scale[k] * (features[k] @ mixer.channels_KDD[k])
            rows.append(y)
        outputs.append(torch.stack(rows))
    return torch.stack(outputs)


def masked_weights(mixer: SpectralMixer, u_D: Tensor, k_budget: int) -> list[Tensor]:
    gate = mixer.gate
    if gate is None:
        return [torch.tensor(1.0 / k_budget if k < k_budget else 0.0, dtype=u_D.dtype) for k in range(K_MAX)]
    pre = gate.hidden.weight @ u_D + gate.hidden.bias
    hidden = torch.stack([x * 0.5 * (1 + torch.erf(x / math.sqrt(2))) for x in pre])
    scores = [gate.score_KH[k] @ hidden + gate.score_bias_K[k] for k in range(k_budget)]
    if gate.rescale:
        norm = torch.sqrt(sum(score**2 for score in scores))
        scores = [math.sqrt(k_budget) * score / norm for score in scores]
    exponentials = [torch.exp(score) for score in scores]
    total = sum(exponentials)
    zero = torch.zeros((), dtype=u_D.dtype)
    return [e / total for e in exponentials] + [zero] * (K_MAX - k_budget)


def make(gate: bool, rescale: bool, scale: SigmaScale) -> tuple[SpectralMixer, FilterBank]:
    torch.manual_seed(0)
    mixer = SpectralMixer(WIDTH, K_MAX, gate, rescale, scale).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    bank = FilterBank(LENGTH, K_MAX, "auto")
    bank.reset()
    return mixer, bank


@pytest.mark.parametrize("k", range(1, K_MAX + 1))
@pytest.mark.parametrize(
    ("gate", "rescale", "scale"),
    [(True, True, "quarter_power"), (True, True, "none"), (True, False, "quarter_power"), (False, True, "none")],
    ids=["paper", "no sigma", "no rescaling", "no gate"],
)
def test_layer_equals_its_equations(k: int, gate: bool, rescale: bool, scale: SigmaScale) -> None:
    mixer, bank = make(gate, rescale, scale)
    u_BLD = torch.randn(2, LENGTH, WIDTH, dtype=torch.float64, requires_grad=True)
    expected = equations(mixer, bank, u_BLD, k)
    found = mixer(u_BLD, Context(k, bank, None))
    assert torch.allclose(found, expected, atol=1e-12)

    weight = torch.randn_like(expected)
    inputs = [u_BLD, *mixer.parameters()]
    expected_grads = torch.autograd.grad((expected * weight).sum(), inputs, materialize_grads=True)
    found_grads = torch.autograd.grad((found * weight).sum(), inputs)
    for expected_grad, found_grad in zip(expected_grads, found_grads, strict=True):
        assert torch.allclose(found_grad, expected_grad, atol=1e-11)


def test_channels_beyond_the_budget_get_zero_gradient_and_are_not_read() -> None:
    mixer, bank = make(True, True, "quarter_power")
    assert mixer.gate is not None
    with torch.no_grad():
        for stacked in (mixer.channels_KDD, mixer.gate.score_KH, mixer.gate.score_bias_K):
            stacked[3:] = torch.nan  # would spread, were it multiplied by a zero weight
    mixer(torch.randn(1, LENGTH, WIDTH, dtype=torch.float64), Context(3, bank, None)).sum().backward()
    for stacked in (mixer.channels_KDD, mixer.gate.score_KH, mixer.gate.score_bias_K):
        assert stacked.grad is not None, "every parameter needs a gradient, or ZeRO-3 keeps a stale one"
        assert (stacked.grad[3:] == 0).all()
        assert torch.isfinite(stacked.grad).all()


def test_rescaling_keeps_the_temperature_at_every_budget() -> None:
    from megassm.ops.mixing import gate_weights

    scores = torch.randn(1, 1, 8) * 100
    for k in range(1, 9):
        logits = gate_weights(scores[..., :k], rescale=True).log()
        spread = (logits - logits.mean()).pow(2).mean().sqrt()
        centred = scores[..., :k] / scores[..., :k].pow(2).mean().sqrt()
        assert torch.allclose(spread, (centred - centred.mean()).pow(2).mean().sqrt(), atol=1e-4)


def test_gate_weights_survive_extreme_scores() -> None:
    from megassm.ops.mixing import gate_weights

    for value in (0.0, 1e-20, 1e4):
        weights = gate_weights(torch.full((1, 1, 4), value), rescale=True)
        assert torch.allclose(weights, torch.full((1, 1, 4), 0.25))
