"""Cost formulas against what torch counts."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from megassm.config.schema import Config
from megassm.cost import (
    forward_flops_per_token,
    mixer_parameters,
    parameters,
    training_flops_per_token,
)
from megassm.model import build_model, losses_at, truncate
from megassm.train.loop import update_flops_per_token
from tests.test_model import K_MAX, config

LENGTH, BATCH = 24, 2
HEADS: dict[str, object] = {"mixer_heads": 4, "gate": "sigmoid"}
ELASTIC: dict[str, object] = {"d_ffn": 72, "ffn_elastic": {"knee_k": 3, "below": 16, "above": 8}}


def counted(pattern: str, k: int, backward: bool = False, **changes: object) -> float:
    """FLOPs a token that torch counts, less those of the filter bank, which model FLOPs leave out."""
    model = build_model(config(pattern=pattern, filterbank="direct", **changes), 0)
    text = torch.randint(0, 50, (BATCH, LENGTH))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        loss = model(text, k).sum()
        if backward:
            loss.backward()
    # backward makes the features again, and their gradients with respect to input and gate
    filterbank = 2 * k * 16 * model.config.mixers.count("S") * (3 * LENGTH + 1 if backward else LENGTH)
    return counter.get_total_flops() / (BATCH * LENGTH) - filterbank


@pytest.mark.parametrize("k", range(1, K_MAX + 1))
@pytest.mark.parametrize("gate", ["softmax", "sigmoid", "none", "equal"])
@pytest.mark.parametrize("heads", [1, 2, 8])
def test_spectral_flops(k: int, gate: str, heads: int) -> None:
    changes: dict[str, object] = {"gate": gate, "mixer_heads": heads, "selective": heads == 2}
    settings = config(pattern="S", **changes)
    assert counted("S", k, **changes) == pytest.approx(forward_flops_per_token(settings, k, LENGTH), rel=1e-9)
    assert counted("S", k, True, **changes) == pytest.approx(training_flops_per_token(settings, k, LENGTH), rel=1e-9)


@pytest.mark.parametrize("k", range(1, K_MAX + 1))
def test_flops_of_an_elastic_width(k: int) -> None:
    settings = config(pattern="S", **ELASTIC)
    assert counted("S", k, **ELASTIC) == pytest.approx(forward_flops_per_token(settings, k, LENGTH), rel=1e-9)
    assert counted("S", k, True, **ELASTIC) == pytest.approx(training_flops_per_token(settings, k, LENGTH), rel=1e-9)


@pytest.mark.parametrize("changes", [{}, ELASTIC])
def test_relative_cost_of_a_teacher(changes: dict[str, object], small_config: Callable[..., Config]) -> None:
    """What the journal says of an update, against the FLOPs that torch counts with and without the teacher."""
    settings = config(pattern="S", seq_len=LENGTH, filterbank="direct", **changes)
    run = small_config("budget.distill_weight=0.5").model_copy(update={"model": settings})
    model = build_model(settings, 0)
    text = torch.randint(0, 50, (BATCH, LENGTH + 1))

    def flops(k: int, taught: bool) -> float:
        with FlopCounterMode(display=False) as counter:
            if taught:
                with torch.no_grad():
                    model(text[:, :-1], K_MAX)
            losses_at(model, text, k).sum().backward()
        teachers = LENGTH * K_MAX if taught else 0  # its filters, forward alone
        filterbank = 2 * 16 * settings.n_layers * (k * (3 * LENGTH + 1) + teachers)
        return counter.get_total_flops() / (BATCH * LENGTH) - filterbank

    plain = flops(K_MAX, False)
    for k in range(1, K_MAX):
        found = update_flops_per_token(run, k) / update_flops_per_token(run, K_MAX)
        assert found == pytest.approx(flops(k, True) / plain, rel=1e-9)


@pytest.mark.parametrize("pattern", ["A", "SA"])
def test_attention_flops(pattern: str) -> None:
    settings = config(pattern=pattern, n_kv_heads=4)
    unseen = 4.0 * 16 * (LENGTH - (LENGTH + 1) / 2) * settings.mixers.count("A")  # torch counts the masked half too
    expected = forward_flops_per_token(settings, 3, LENGTH)
    assert counted(pattern, 3, n_kv_heads=4) - unseen == pytest.approx(expected, rel=1e-9)


def test_window_bounds_attention_flops() -> None:
    short, whole = config(pattern="A", window=4), config(pattern="A")
    saved = whole.n_layers * 4.0 * 16 * ((1000 + 1) / 2 - (4 - 4 * 3 / 2000))
    found = forward_flops_per_token(whole, 1, 1000) - forward_flops_per_token(short, 1, 1000)
    assert found == pytest.approx(saved)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gate": "equal"},
        HEADS,
        {**HEADS, "gate": "none", "input_taps": 4},
        {**HEADS, "selective": True},
        {"tie_embeddings": False},
        {"pattern": "A"},
        ELASTIC,
    ],
)
@pytest.mark.parametrize("k", [1, 4, K_MAX])
def test_parameters_at_k(changes: dict[str, object], k: int) -> None:
    model = truncate(build_model(config(**changes), 0), k)
    assert sum(p.numel() for p in model.parameters()) == parameters(config(**changes), k)
    mixer = model.blocks[0].mixer
    assert sum(p.numel() for p in mixer.parameters()) == mixer_parameters(config(**changes), model.config.mixers[0], k)
