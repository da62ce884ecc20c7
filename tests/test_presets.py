"""`preset: paper`: where its knobs stand among the others, and that its layer and draws are the authors'."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megassm.budget import budget_at
from megassm.config.load import dump_config, load_config
from megassm.config.model import ModelConfig
from megassm.config.presets import PRESETS
from megassm.config.schema import Config
from megassm.layers.spectral import SpectralMixer
from megassm.model import build_model, initial_weights
from tests.conftest import ROOT
from tests.test_config import MINIMAL, mistakes

OTHER = "model:\n  gate: sigmoid\n  mixer_heads: 4\n"
TINY = ROOT / "configs/tiny.yaml"


def load(tmp_path: Path, text: str, *overrides: str) -> Config:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path, overrides)


def values(config: Config) -> dict[str, object]:
    return {
        f"{section}.{key}": getattr(getattr(config, section), key)
        for section, knobs in PRESETS["paper"].items()
        for key in knobs
    }


def test_every_knob_of_a_preset_is_one_of_the_configuration() -> None:
    for knobs in PRESETS.values():
        for section, keys in knobs.items():
            assert set(keys) <= set(Config.model_fields[section].annotation.model_fields)


def test_a_file_overrides_its_preset_whatever_the_order(tmp_path: Path) -> None:
    plain = load(tmp_path, MINIMAL)
    paper = load(tmp_path, "preset: paper\n" + MINIMAL)
    assert paper.budget.sampler == "authors" != plain.budget.sampler
    assert paper.budget.draws == 1
    text = MINIMAL.replace("model:\n", OTHER)
    for both in ("preset: paper\n" + text, text + "preset: paper\n"):
        mixed = load(tmp_path, both)
        assert (mixed.model.gate, mixed.model.mixer_heads) == ("sigmoid", 4)
        assert mixed.budget == paper.budget
    assert values(load(tmp_path, dump_config(mixed))) == values(mixed), "a resolved configuration has no preset"


def test_on_the_command_line_a_preset_stands_among_the_overrides(tmp_path: Path) -> None:
    text = MINIMAL.replace("model:\n", OTHER)
    paper = load(tmp_path, "preset: paper\n" + MINIMAL)
    assert load(tmp_path, text, "preset=paper") == paper, "over the file"
    assert load(tmp_path, text, "preset=paper", "model.gate=sigmoid").model.gate == "sigmoid"
    assert load(tmp_path, text, "model.gate=none", "preset=paper") == paper


def test_mistakes_name_the_preset(tmp_path: Path) -> None:
    assert mistakes(tmp_path, "preset: papr\n" + MINIMAL) == ["c.yaml:1: preset = 'papr': must be 'paper', or left out"]
    assert mistakes(tmp_path, "preset: [1]\n" + MINIMAL) == ["c.yaml:1: preset = [1]: must be 'paper', or left out"]
    assert mistakes(tmp_path, MINIMAL, "preset=x") == [
        "command line 'preset=x': preset = 'x': must be 'paper', or left out"
    ]
    assert mistakes(tmp_path, "prest: paper\n" + MINIMAL) == ["c.yaml:1: no key 'prest'; did you mean 'preset'?"]
    wrong = MINIMAL + "budget: {budgets: [2, 64]}\n"
    assert (
        "c.yaml:15: budget.budgets = [2, 64]: must be at most" in mistakes(tmp_path, "preset: paper\n" + wrong)[0][:60]
    )
    found = mistakes(tmp_path, "preset: paper\n" + MINIMAL + "optim: {warmup_steps: 10}\n", "budget.draws=3")
    assert found == [
        "command line 'budget.draws=3': budget.draws = 3: must be a divisor of the 4 micro-steps of a rank"
    ]


def authors_layer(mixer: SpectralMixer, phi_LK: Tensor, sigma_K: Tensor, u_BLD: Tensor, k: int) -> Tensor:
    """Their notebook's layer, written anew from its description: all K_max channels by FFT, a prefix mask, the scores'
    root mean square brought to 1 with a floor of 1e-6, sigma^(1/4), every feature projected, then the gate's sum."""
    length, channels = phi_LK.shape
    mask_K = (torch.arange(channels) < k).double()
    u_F, phi_F = torch.fft.rfft(u_BLD, 2 * length, dim=1), torch.fft.rfft(phi_LK, 2 * length, dim=0)
    features_BLKD = torch.fft.irfft(u_F[:, :, None] * phi_F[None, :, :, None], 2 * length, dim=1)[:, :length]
    projected_BLKE = torch.einsum("blkd,kde->blke", features_BLKD * sigma_K[:, None] ** 0.25, mixer.channels_KDD)
    gate = mixer.gate
    assert gate is not None
    hidden = F.linear(u_BLD, gate.hidden.weight, gate.hidden.bias)
    hidden = 0.5 * hidden * (1 + torch.erf(hidden / math.sqrt(2)))
    scores = F.linear(hidden, gate.score_KH, gate.score_bias_K) * mask_K
    scores = math.sqrt(k) * scores / scores.norm(dim=-1, keepdim=True).clamp_min(1e-6)
    alpha_BLK = scores.masked_fill(mask_K == 0, -torch.inf).softmax(-1)
    return u_BLD @ mixer.direct_DD + torch.einsum("blk,blke->ble", alpha_BLK, projected_BLKE)


def paper_model(*overrides: str) -> ModelConfig:
    return load_config(TINY, ["preset=paper", "model.num_channels=32", *overrides]).model


def test_weights_start_as_the_authors() -> None:
    """M_k by 1e-3 N(0, 1), at any depth; the scores' bias at -2, so that the rescaled softmax uses nearly all of the 32
    channels at the start (theirs 31.85 by the exponential of its entropy), which it does not from 0."""
    config = paper_model()
    assert config.channel_init_std == 1e-3
    for name, value in initial_weights(config, 3):
        if name.endswith("channels_KDD"):
            assert float(value.std()) == pytest.approx(1e-3, rel=0.01), name
            assert abs(float(value.mean())) < 1e-5, name
    u_BLD = torch.randn(4, 64, config.d_model)

    @torch.no_grad()
    def used(config: ModelConfig) -> float:
        alpha_BLK = build_model(config, 0).blocks[0].mixer.gate(u_BLD, 32)[:, :, 0]
        return float(torch.special.entr(alpha_BLK).sum(-1).exp().mean())

    assert used(config) == pytest.approx(31.85, abs=0.03)
    assert used(config.model_copy(update={"gate_bias_init": 0.0})) < 25


@pytest.mark.parametrize("k", [1, 5, 32])
def test_the_layer_is_the_authors(k: int) -> None:
    model = build_model(paper_model("model.d_model=24", "model.seq_len=100", "model.n_layers=1"), 0).double()
    model.reset_filters()
    mixer, bank = model.blocks[0].mixer, model.filterbank
    assert bank is not None
    assert mixer.out_DD is None
    u_BLD = torch.randn(2, 100, 24, dtype=torch.float64, requires_grad=True)
    expected = authors_layer(mixer, bank.filters_LK, bank.scale_K**4, u_BLD, k)
    found = mixer(u_BLD, model.context(0, 100, k))
    assert float((found - expected).detach().norm() / expected.detach().norm()) < 1e-6
    gradient = torch.randn_like(expected)
    inputs = [u_BLD, *mixer.parameters()]
    for mine, theirs in zip(*(torch.autograd.grad(y, inputs, gradient) for y in (found, expected)), strict=True):
        assert float((mine - theirs).norm()) <= 1e-6 * float(theirs.norm()) + 1e-12


def test_the_draws_are_the_authors() -> None:
    """One K an update; K_max in the warm-up and wherever the update's number, from 0, is divisible by 8; otherwise
    exp(log 2 + u' log 16) taken to the nearest of the list, u' = 1 - (1 - u)^(1/0.6)."""
    config = load_config(TINY, ["preset=paper", "model.num_channels=32"])
    drawn = [budget_at(config, step, 0) for step in range(40_000)]
    assert set(drawn[: config.optim.warmup_steps]) == {32}
    assert set(drawn[::8]) == {32}
    found = Counter(k for step, k in enumerate(drawn) if step >= config.optim.warmup_steps and step % 8)
    budgets = (2, 3, 4, 6, 8, 12, 16, 24, 32)
    edges = [(a + b) / 2 for a, b in itertools.pairwise(budgets)]
    bent = [math.log(edge / 2) / math.log(16) for edge in edges]
    below = [0.0, *(1 - (1 - u) ** 0.6 for u in bent), 1.0]
    for k, (low, high) in zip(budgets, itertools.pairwise(below), strict=True):
        assert found[k] / found.total() == pytest.approx(high - low, abs=0.01), k
    assert found[32] > found[16] > found[8] > found[2]
