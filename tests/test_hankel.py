"""Spectral filters against a 70-digit eigensolver, against themselves, and their cache."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megassm.config.load import load_config
from megassm.config.model import Basis, ModelConfig
from megassm.errors import UserError
from megassm.files import CACHE_VARIABLE
from megassm.ops import hankel
from megassm.ops.bases import extended_filters, family_rows, spectral_filters
from megassm.ops.hankel import MAX_CHANNELS, Family, cache_path, compute_eigenpairs
from megassm.train.setup import introduce
from tests.conftest import ROOT

REFERENCE = Path(__file__).parents[2] / "shared/reference/hankel_L96.json"

LARGEST_BEYOND_96 = (0.17456609, 94.386688, 398012.71, 1.2401341e09)


def hankel_matrix(length: int) -> np.ndarray:
    total = np.arange(1, length + 1)[:, None] + np.arange(1, length + 1)
    return 2.0 / (total**3.0 - total)


@pytest.mark.skipif(not REFERENCE.exists(), reason=f"the 70-digit reference is not beside the project: {REFERENCE}")
@pytest.mark.parametrize("leaf_rows", [1024, 32, 20])
def test_against_seventy_digits(monkeypatch: pytest.MonkeyPatch, leaf_rows: int) -> None:
    monkeypatch.setattr(hankel, "LEAF_ROWS", leaf_rows)  # the small ones climb two and three doublings on the way
    reference = json.loads(REFERENCE.read_text(encoding="utf-8"))
    sigma, phi = compute_eigenpairs(96, 32)
    exact_sigma = np.array([float(text) for text in reference["eigenvalues"]])
    exact_phi = np.array(reference["eigenvectors"]).T
    assert np.abs(sigma / exact_sigma - 1)[:20].max() < 1e-9
    error = np.abs(phi - exact_phi).max(axis=0)
    assert error[:20].max() < 1e-9
    assert error[:24].max() < 2e-8


def test_leading_pairs_satisfy_the_eigenvalue_equation() -> None:
    # no reference needed: for the few eigenvalues far above rounding the matrix itself is a witness
    matrix = hankel_matrix(200)
    sigma, phi = spectral_filters(200, 8)
    assert np.abs(matrix @ phi - phi * sigma).max() < 1e-15
    assert np.allclose(sigma, np.linalg.eigvalsh(matrix)[::-1][:8], rtol=0, atol=1e-15)


@pytest.mark.parametrize(
    ("family", "length", "channels", "tolerance"),
    [
        ("plus", 2048, 32, 2e-9),
        ("plus", 3001, 32, 2e-9),
        ("plus", 65536, 32, 1e-10),
        ("even", 1501, 32, 4e-9),
        ("odd", 1024, 30, 4e-9),
    ],
)
def test_two_quadratures_agree(family: Family, length: int, channels: int, tolerance: float) -> None:
    sigma, phi = compute_eigenpairs(length, channels, 20, family)
    other_sigma, other_phi = compute_eigenpairs(length, channels, 24, family)
    assert np.abs(phi - other_phi).max() < tolerance
    assert np.abs(sigma / other_sigma - 1).max() < tolerance
    assert np.abs(phi[:, :16] - other_phi[:, :16]).max() < 1e-12
    assert np.abs(phi.T @ phi - np.eye(channels)).max() < 1e-13


@pytest.mark.parametrize("length", [1, 2, 16, 32, 64, 100, 256, 1000, 2048, 65536])
@pytest.mark.parametrize(("basis", "family"), [("plus", "plus"), ("hankel_l", "even"), ("hankel_l", "odd")])
def test_known_channels_are_those_that_do_not_depend_on_rounding(length: int, basis: Basis, family: Family) -> None:
    model = ModelConfig(vocab_size=2, d_model=8, n_layers=1, d_ffn=8, seq_len=length, basis=basis)
    rows = family_rows(family, length)
    known = model.known_channels if basis == "plus" else (model.known_channels + (family == "even")) // 2
    if not rows:
        return
    beyond = min(math.ceil(1.3 * known) + 2, rows)
    filters, others = (compute_eigenpairs(rows, beyond, nodes, family)[1] for nodes in (20, 24))
    error = np.abs(filters - others).max(axis=0)
    assert error[:known].max() < 0.02
    assert beyond - known < 5 or error.max() > 0.1, "more are known than the model says"


@settings(max_examples=30, deadline=None)
@given(length=st.integers(1, 400), leaf_rows=st.integers(2, 64), family=st.sampled_from(get_args(Family)))
def test_the_tree_is_the_factorization(length: int, leaf_rows: int, family: Family) -> None:
    """Any length, odd or even at any level of the tree, gives the filters a single leaf gives."""
    channels = min(length, 8)
    sigma, phi = compute_eigenpairs(length, channels, family=family)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hankel, "LEAF_ROWS", leaf_rows)
        tree_sigma, tree_phi = compute_eigenpairs(length, channels, family=family)
    assert np.abs(tree_sigma / sigma - 1).max() < 1e-9
    assert np.abs(tree_phi - phi).max() < 1e-9


@pytest.mark.parametrize(("length", "channels"), [(1, 1), (2, 2), (3, 1), (33, 16), (100, 32), (1000, 24), (1025, 64)])
def test_form(length: int, channels: int) -> None:
    sigma, phi = spectral_filters(length, channels)
    assert sigma.shape == (channels,)
    assert phi.shape == (length, channels)
    assert sigma.dtype == phi.dtype == np.float64
    assert (phi[0] > 0).all()
    assert (np.diff(sigma) < 0).all()
    assert (sigma > 0).all()
    assert np.abs(phi.T @ phi - np.eye(channels)).max() < 1e-13


@settings(max_examples=15, deadline=None)
@given(
    length=st.one_of(st.integers(1, 140), st.integers(1000, 1100)),
    basis=st.sampled_from(get_args(Basis)),
    data=st.data(),
)
def test_fewer_channels_are_the_leading_ones(length: int, basis: Basis, data: st.DataObject) -> None:
    """Bit for bit, on any processor: truncating a model is building the smaller one."""
    channels = data.draw(st.integers(1, min(length, MAX_CHANNELS)), label="channels")
    fewer = data.draw(st.integers(1, channels), label="fewer")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(hankel, "CACHE_LIMIT_BYTES", 0)  # computed each time
        sigma, phi = spectral_filters(length, channels, basis)
        few_sigma, few_phi = spectral_filters(length, fewer, basis)
    assert np.array_equal(sigma[:fewer], few_sigma)
    assert np.array_equal(phi[:, :fewer], few_phi)
    extended, few_extended = (extended_filters(length, count, length + 70, basis) for count in (channels, fewer))
    assert np.array_equal(extended[:length], phi)
    assert np.array_equal(extended[:, :fewer], few_extended)


def test_fewer_channels_come_from_the_same_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    sigma, phi = spectral_filters(80, 40)
    assert len(list(tmp_path.iterdir())) == 2

    def no_computing(*_: object) -> None:
        raise AssertionError("not served from the cache")

    with monkeypatch.context() as patch:
        patch.setattr(hankel, "_compute_group", no_computing)
        few_sigma, few_phi = spectral_filters(80, 35)
    assert np.array_equal(sigma[:35], few_sigma)
    assert np.array_equal(phi[:, :35], few_phi)
    assert few_phi.flags.c_contiguous


@pytest.mark.parametrize("length", [60, 1030])
def test_continuation_solves_the_eigenvalue_equation_beyond_the_matrix(length: int) -> None:
    # sigma phi(i) = sum_j Z[i, j] phi(j) for rows i that Z does not have; 1 / sigma magnifies rounding, so few channels
    sigma, phi = spectral_filters(length, 6)
    extended = extended_filters(length, 6, 3 * length + 1)
    assert extended.shape == (3 * length + 1, 6)
    assert np.array_equal(extended[:length], phi)
    total = np.arange(length + 1, 3 * length + 2)[:, None] + np.arange(1, length + 1)
    expected = (2.0 / (total**3.0 - total)) @ phi / sigma
    assert np.abs(extended[length:] - expected).max() < 1e-9


def test_continuation_of_high_channels_at_96() -> None:
    # the largest values in rows 96..383 by 110-digit arithmetic: they grow, and float64 still knows them
    largest = np.abs(extended_filters(96, 32, 384)[96:]).max(axis=0)
    assert np.allclose(largest[[8, 16, 24, 31]], LARGEST_BEYOND_96, rtol=1e-4)


def test_short_continuation_is_a_slice() -> None:
    assert np.array_equal(extended_filters(64, 8, 10), spectral_filters(64, 8)[1][:10])


def test_more_channels_than_float64_knows_are_refused() -> None:
    with pytest.raises(UserError, match="num_channels = 129: must be at most 128"):
        spectral_filters(1000, 129)


@pytest.mark.parametrize(("length", "channels"), [(4, 5), (4, 0), (0, 0), (-1, 1)])
def test_impossible_sizes_are_refused(length: int, channels: int) -> None:
    with pytest.raises(UserError, match="between 1 and seq_len"):
        spectral_filters(length, channels)


def test_cache_serves_and_survives_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    first = spectral_filters(64, 8)
    path = cache_path(64, hankel.GROUP)
    assert path.parent == tmp_path
    assert [file.name for file in tmp_path.iterdir()] == [path.name]

    def no_computing(*_: object) -> None:
        raise AssertionError("not served from the cache")

    with monkeypatch.context() as patch:
        patch.setattr(hankel, "_compute_group", no_computing)
        assert np.array_equal(spectral_filters(64, 8)[1], first[1])

    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)
    assert np.array_equal(spectral_filters(64, 8)[1], first[1])
    assert bytes(raw) != path.read_bytes(), "the damaged file was not replaced"


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way", encoding="utf-8")
    monkeypatch.setenv(CACHE_VARIABLE, str(blocked / "cache"))
    assert spectral_filters(32, 4)[1].shape == (32, 4)


def test_filters_beyond_the_limit_are_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    monkeypatch.setattr(hankel, "CACHE_LIMIT_BYTES", 8 * 64 * hankel.GROUP)
    spectral_filters(65, 9)
    assert not list(tmp_path.iterdir())
    spectral_filters(64, 9)
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("channels", "warned"), [(30, False), (31, True)])
def test_a_run_with_channels_of_noise_is_warned(
    capsys: pytest.CaptureFixture[str], channels: int, warned: bool
) -> None:
    config = load_config(ROOT / "configs/tiny.yaml", ("model.seq_len=64", f"model.num_channels={channels}",
                         "budget.budgets=[2]", "eval.budgets=[2]"), 1)  # fmt: skip
    split = SimpleNamespace(tokens=1000)
    world = SimpleNamespace(is_main=True, size=1, device=torch.device("cpu"))
    introduce(config, SimpleNamespace(train=split, valid=split, task="any"), world, 0)  # type: ignore[arg-type]
    said = capsys.readouterr().out
    assert "1,000 training tokens" in said
    assert ("warning: float64 knows about 30 filters at model.seq_len = 64. Channels 31 to 31 are" in said) == warned
