"""Filters of another kind in a model: what they are, and that a training takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch

from megassm.config.schema import Config
from megassm.errors import UserError
from megassm.model import build_model
from megassm.ops.bases import spectral_filters
from megassm.ops.filterbank import direct_filterbank
from megassm.ops.mixing import mix_channels
from tests.test_model import config
from tools.experiments.arms import Arm
from tools.experiments.bases import Basis, basis, use_basis
from tools.experiments.measure import plain_points

L, K = 128, 24


def errors(name: Basis) -> np.ndarray:
    """Distance of each filter from the right one, both of norm 1 and of one sign."""
    _, true_LK = spectral_filters(L, K)
    _, phi_LK = basis(name, L, K)
    found: np.ndarray = np.linalg.norm(phi_LK * np.sign((phi_LK * true_LK).sum(0)) - true_LK, axis=0)
    return found


@pytest.mark.parametrize("name", get_args(Basis))
def test_filters_have_norm_one(name: Basis) -> None:
    sigma_K, phi_LK = basis(name, L, K)
    assert (sigma_K.shape, phi_LK.shape) == ((K,), (L, K))
    np.testing.assert_allclose(np.linalg.norm(phi_LK, axis=0), 1, atol=1e-6)
    if name not in ("exponentials", "alternating"):
        np.testing.assert_allclose(phi_LK.T @ phi_LK, np.eye(K), atol=1e-5)


def test_kinds_are_what_they_are_called() -> None:
    single = errors("float32")
    assert single[:8].max() < 1e-2 < 0.5 < single[18:].min(), "right up to about the 10th"
    sigma_K, _ = spectral_filters(L, K)
    found_K, _ = basis("float32", L, K)
    assert found_K[-1] > 1e3 * sigma_K[-1], "and too loud after it"
    assert errors("random").min() > 0.5
    tail = errors("random_tail")
    assert tail[:8].max() == 0
    assert tail[8:].min() > 0.5
    np.testing.assert_array_equal(basis("random_tail", L, 6)[1], basis("true", L, K)[1][:, :6])
    assert errors("true").max() == 0
    _, phi_LK = basis("exponentials", L, 5)
    times = -1 / np.log(phi_LK[1] / phi_LK[0])
    np.testing.assert_allclose(times, [L, 1, L**0.5, L**0.25, L**0.75])
    _, both_LK = basis("alternating", L, 4)
    _, true_LK = spectral_filters(L, 2)
    signs_L = (-1.0) ** np.arange(L)
    np.testing.assert_array_equal(
        both_LK, np.stack([f for k in (0, 1) for f in (true_LK[:, k], signs_L * true_LK[:, k])], 1)
    )
    sigma_K, either_LK = basis("hankel_l", L, 4)
    decay_L = (-0.9) ** np.arange(L)
    of_either, of_true = (np.linalg.norm(phi.T @ decay_L) for phi in (either_LK, spectral_filters(L, 4)[1]))
    assert of_either > 0.95 * np.linalg.norm(decay_L) > 1.5 * of_true
    assert bool((np.diff(sigma_K) < 0).all())
    leading = basis("exponentials", L, 3)[1]
    np.testing.assert_array_equal(leading, phi_LK[:, :3])


@pytest.mark.parametrize("name", get_args(Basis))
def test_a_model_computes_with_them(name: Basis) -> None:
    """Its features are their convolutions; learned ones get a gradient, at the budget in use."""
    model = build_model(config(pattern="S", mixer_heads=2, gate="sigmoid", input_taps=3), 0)
    before = model(torch.arange(24)[None])
    use_basis(model, name)
    after = model(torch.arange(24)[None])
    if name != "float32":  # the signs of these are as they come
        assert torch.allclose(before, after, atol=1e-4) == (name in ("true", "learned", "random_tail"))  # K is 4
    bank = model.filterbank
    assert bank is not None
    u_BLD, weights_BLHK, channels_KDE = torch.randn(2, 24, 8), torch.rand(2, 24, 2, 4), torch.randn(4, 8, 4)
    _, phi_LK = basis(name, bank.seq_len, bank.num_channels)
    features = direct_filterbank(u_BLD, torch.from_numpy(phi_LK).float(), 4)
    expected = mix_channels(features, weights_BLHK, channels_KDE)
    torch.testing.assert_close(bank.mix(u_BLD, weights_BLHK, channels_KDE), expected, atol=1e-4, rtol=1e-4)
    model(torch.arange(24)[None], 3).sum().backward()
    learned = dict(model.named_parameters()).get("filterbank.filters_LK")
    assert (learned is not None) == (name == "learned")
    if learned is not None:
        assert learned.grad is not None
        assert float(learned.grad[:, :3].abs().sum(0).min()) > 0
        assert float(learned.grad[:, 3:].abs().max()) == 0


def test_a_model_without_filters_refuses_them() -> None:
    with pytest.raises(UserError, match="the model has no spectral layer, pattern 'A'"):
        use_basis(build_model(config(pattern="A"), 0), "random")


def test_a_training_takes_them(small_config: Callable[..., Config]) -> None:
    def trained(name: Basis) -> list[float]:
        own = small_config("train.steps=3", f"run.dir={small_config().run.dir}-{name}", "optim.lr=0.05")
        points = plain_points(own, Arm(name, basis=name), torch.device("cpu"))
        return [point.y for point in points if point.metric == "validation bits per byte"]

    found = {name: trained(name) for name in ("true", "random", "learned")}
    assert len({tuple(values) for values in found.values()}) == 3
    assert found["learned"] == pytest.approx(found["true"], rel=0.05)
