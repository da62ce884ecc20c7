"""The elastic mixer against loops written from the paper's equations, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from megassm.config.model import Gate, SigmaScale
from megassm.layers.context import Context
from megassm.layers.filterbank import FilterBank
from megassm.layers.spectral import SpectralMixer
from tests.test_model import config

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
            past = [faded(mixer, u_LD, t, s) for s in range(t + 1)]
            features = [sum(phi[s, k] * past[s] for s in range(t + 1)) for k in range(K_MAX)]
            heads = [head_sum(mixer, u_LD[t], features, scale, head, k_budget) for head in range(mixer.heads)]
            mixed = torch.cat(heads) if mixer.out_DD is None else torch.cat(heads) @ mixer.out_DD
            rows.append(u_LD[t] @ mixer.direct_DD + mixed)
        outputs.append(torch.stack(rows))
    return torch.stack(outputs)


def faded(mixer: SpectralMixer, u_LD: Tensor, t: int, s: int) -> Tensor:
    """u_{t-s} as position t has it: in a selective layer times its head's decays of all positions since."""
    u_D = u_LD[t - s]
    if mixer.decay is None:
        return u_D
    for r in range(t - s + 1, t + 1):
        scores_H = mixer.decay.weight @ u_LD[r] + mixer.decay.bias
        u_D = u_D * torch.exp(-1 / (1 + torch.exp(-scores_H))).repeat_interleave(WIDTH // mixer.heads)
    return u_D


def head_sum(
    mixer: SpectralMixer, u_D: Tensor, features: list[Tensor], scale: Tensor, head: int, k_budget: int
) -> Tensor:
    """sum_k alpha_k sigma_k^(1/4) M_k f_k of one head, which has its own inputs, weights and block of M_k."""
    size = WIDTH // mixer.heads
    mine = slice(head * size, (head + 1) * size)
    alpha = masked_weights(mixer, u_D, head, k_budget)
    return sum(alpha[k] * scale[k] * (features[k][mine] @ mixer.channels_KDD[k, mine]) for k in range(K_MAX))


def masked_weights(mixer: SpectralMixer, u_D: Tensor, head: int, k_budget: int) -> list[Tensor]:
    gate = mixer.gate
    zeros = [torch.zeros((), dtype=u_D.dtype)] * (K_MAX - k_budget)
    if gate is None:
        alpha = 1.0 / k_budget if mixer.normalised else 1.0
        return [torch.tensor(alpha, dtype=u_D.dtype)] * k_budget + zeros
    pre = gate.hidden.weight @ u_D + gate.hidden.bias
    hidden = torch.stack([x * 0.5 * (1 + torch.erf(x / math.sqrt(2))) for x in pre])
    rows = [k * mixer.heads + head for k in range(k_budget)]
    scores = [gate.score_KH[row] @ hidden + gate.score_bias_K[row] for row in rows]
    if not mixer.normalised:
        return [2 / (1 + torch.exp(-score)) for score in scores] + zeros
    if gate.rescale:
        norm = torch.sqrt(sum(score**2 for score in scores))
        scores = [math.sqrt(k_budget) * score / norm for score in scores]
    exponentials = [torch.exp(score) for score in scores]
    total = sum(exponentials)
    return [e / total for e in exponentials] + zeros


def make(
    gate: Gate, rescale: bool, scale: SigmaScale, heads: int = 1, **more: bool
) -> tuple[SpectralMixer, FilterBank]:
    torch.manual_seed(0)
    choices = {"mixer_heads": heads, "gate": gate, "gate_rescale": rescale, **more}
    mixer = SpectralMixer(config(d_model=WIDTH, num_channels=K_MAX, **choices), scale).double()
    for parameter in mixer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    bank = FilterBank(LENGTH, K_MAX, "auto")
    bank.reset()
    return mixer, bank


@pytest.mark.parametrize("k", range(1, K_MAX + 1))
@pytest.mark.parametrize(
    ("gate", "rescale", "scale"),
    [
        ("softmax", True, "quarter_power"), ("softmax", True, "none"), ("softmax", False, "quarter_power"),
        ("equal", True, "none"), ("sigmoid", True, "none"), ("none", True, "quarter_power"),
    ],
    ids=["paper", "no sigma", "no rescaling", "no gate", "sigmoid", "plain sum"],
)  # fmt: skip
@pytest.mark.parametrize(("heads", "selective"), [(1, False), (2, False), (3, True), (6, False), (1, True)])
def test_layer_equals_its_equations(
    k: int, gate: Gate, rescale: bool, scale: SigmaScale, heads: int, selective: bool
) -> None:
    mixer, bank = make(gate, rescale, scale, heads, selective=selective)
    assert (mixer.out_DD is None) == (heads == 1), "one head is the paper's layer"
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


@pytest.mark.parametrize(("gate", "heads"), [("softmax", 1), ("sigmoid", 1), ("softmax", 2), ("sigmoid", 3)])
def test_channels_beyond_the_budget_get_zero_gradient_and_are_not_read(gate: Gate, heads: int) -> None:
    mixer, bank = make(gate, True, "quarter_power", heads)
    assert mixer.gate is not None
    stacks = {mixer.channels_KDD: 3, mixer.gate.score_KH: 3 * heads, mixer.gate.score_bias_K: 3 * heads}
    with torch.no_grad():
        for stacked, used in stacks.items():
            stacked[used:] = torch.nan  # would spread, were it multiplied by a zero weight
    mixer(torch.randn(1, LENGTH, WIDTH, dtype=torch.float64), Context(3, bank, None)).sum().backward()
    for stacked, used in stacks.items():
        assert stacked.grad is not None, "every parameter needs a gradient, or ZeRO-3 keeps a stale one"
        assert (stacked.grad[used:] == 0).all()
        assert torch.isfinite(stacked.grad).all()
    assert all(parameter.grad is not None for parameter in mixer.parameters())


@pytest.mark.parametrize(("gate", "selective"), [("sigmoid", False), ("sigmoid", True), ("none", False)])
def test_a_budget_is_a_partial_sum_where_weights_are_not_normalised(gate: Gate, selective: bool) -> None:
    """A channel adds to the output what it adds at every other budget; of a softmax it does not."""
    u_BLD = torch.randn(1, LENGTH, WIDTH, dtype=torch.float64)
    mixer, bank = make(gate, True, "none", 2, selective=selective)
    whole = mixer(u_BLD, Context(K_MAX, bank, None))
    for k in range(1, K_MAX):
        with torch.no_grad():
            kept = mixer.channels_KDD.clone()
            mixer.channels_KDD[:k] = 0
            rest = mixer(u_BLD, Context(K_MAX, bank, None)) - u_BLD @ mixer.direct_DD
            mixer.channels_KDD.copy_(kept)
        assert torch.allclose(mixer(u_BLD, Context(k, bank, None)) + rest, whole, atol=1e-12)


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
