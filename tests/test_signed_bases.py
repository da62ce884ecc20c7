"""Filters for decays of both signs: what they are, their state-space models, and what a bank makes of them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from torch import Tensor

from megassm.checkpoint.exported import write_model_folder
from megassm.checkpoint.open import open_model
from megassm.config.model import Basis, ModelConfig
from megassm.data.tokenizer.base import BytesTokenizer
from megassm.layers.filterbank import FilterBank
from megassm.model import build_model
from megassm.ops.bases import extended_filters, spectral_filters
from megassm.ops.filterbank import direct_filterbank, fft_filterbank
from megassm.ops.mixing import mix_channels
from megassm.ops.realize import realize
from tests.test_filterbank import relative
from tests.test_model import config
from tests.test_realize import convolve, radius, relative_error, run_chunks, run_steps

SIGNED: tuple[Basis, ...] = ("alternating", "hankel_l")


def both_signs_matrix(length: int) -> np.ndarray:
    """Of the paper's definition, indices from 1."""
    place = np.arange(1, length + 1)
    total = place[:, None] + place
    sign = (-1.0) ** (total - 2) + 1
    return sign * 8 / ((total + 3.0) * (total - 1) * (total + 1))


def test_alternating_filters_are_the_plain_ones_and_their_mirror_images() -> None:
    sigma, phi = spectral_filters(41, 7, "alternating")
    plain_sigma, plain = spectral_filters(41, 4)
    signs = (-1.0) ** np.arange(41)[:, None]
    assert np.array_equal(phi[:, 0::2], plain)
    assert np.array_equal(phi[:, 1::2], signs * plain[:, :3])
    assert np.array_equal(sigma, np.repeat(plain_sigma, 2)[:7])
    continued, plain_continued = extended_filters(41, 7, 99, "alternating"), extended_filters(41, 4, 99)
    assert np.array_equal(continued[:, 5], plain_continued[:, 2] * (-1.0) ** np.arange(99))


@pytest.mark.parametrize("length", [24, 25])
def test_hankel_l_against_sixty_digits(length: int) -> None:
    """Of the whole matrix, whose halves are never told apart there."""
    with mpmath.workdps(60):
        matrix = mpmath.matrix(length, length)
        for i in range(1, length + 1):
            for j in range(1, length + 1):
                below = (i + j + 3) * (i + j - 1) * (i + j + 1)
                matrix[i - 1, j - 1] = mpmath.mpf(((-1) ** (i + j - 2) + 1) * 8) / below
        values, vectors = mpmath.eigsy(matrix)
        exact_sigma = np.array([float(value) for value in values])[::-1]
        exact_phi = np.array([[float(x) for x in row] for row in vectors.tolist()])[:, ::-1]
    sigma, phi = spectral_filters(length, 20, "hankel_l")
    assert np.abs(sigma / exact_sigma[:20] - 1).max() < 1e-10
    signs = np.sign((phi * exact_phi[:, :20]).sum(axis=0))
    assert np.abs(phi - signs * exact_phi[:, :20]).max() < 1e-10
    assert (phi[0, 0::2] > 0).all()
    assert (phi[1, 1::2] > 0).all()
    assert not phi[1::2, 0::2].any()
    assert not phi[0::2, 1::2].any()


@pytest.mark.parametrize("length", [1, 2, 3, 40, 1001])
def test_hankel_l_solves_its_eigenvalue_equation_beyond_the_matrix_too(length: int) -> None:
    count = min(length, 6)
    sigma, phi = spectral_filters(length, count, "hankel_l")
    matrix = both_signs_matrix(3 * length + 1)[:, :length]
    extended = extended_filters(length, count, 3 * length + 1, "hankel_l")
    assert np.array_equal(extended[:length], phi)
    assert np.abs(matrix @ phi / sigma - extended).max() < 1e-8
    assert (np.diff(sigma) < 0).all(), "the halves' eigenvalues interlace"
    assert np.abs(phi.T @ phi - np.eye(count)).max() < 1e-13


SIZES = [(1, 1, 8), (2, 2, 8), (24, 8, 16), (63, 32, 64), (100, 15, 9), (256, 32, 64), (1001, 32, 128), (8192, 33, 64)]


@pytest.mark.parametrize("basis", SIGNED)
@pytest.mark.parametrize(("length", "channels", "chunk"), SIZES)
def test_chunks_and_steps_are_the_convolution(length: int, channels: int, chunk: int, basis: Basis) -> None:
    model = realize(length, channels, chunk, basis)
    noise = np.random.default_rng(length).standard_normal(length)
    exact = convolve(noise, spectral_filters(length, channels, basis)[1])
    assert relative_error(run_chunks(model, noise, np.float32)[0], exact) < 5e-6
    assert relative_error(run_chunks(model, noise, np.float64)[0], exact) < 5e-7
    assert radius(model.step_transition_SS) < 1
    short = min(length, 500)
    steps = run_steps(model, noise[:short], np.zeros(len(model.step_input_S)))
    assert relative_error(steps, exact[:short]) < 1e-6


@pytest.mark.parametrize(
    ("length", "channels", "basis", "states"),
    [(2048, 32, "alternating", 64), (2048, 32, "hankel_l", 64), (64, 32, "alternating", 50),
     (1024, 60, "alternating", 100), (64, 30, "hankel_l", 50), (64, 32, "hankel_l", 63), (100, 34, "hankel_l", 99),
     (24, 18, "alternating", 23)],
)  # fmt: skip
def test_the_state_is_short_up_to_so_many_channels(length: int, channels: int, basis: Basis, states: int) -> None:
    """More than so many have the last inputs for a state, on every processor."""
    model = realize(length, channels, 64, basis)
    size = len(model.step_input_S)
    assert size == length - 1 if states == length - 1 else size <= states
    assert length < 1000 or all(np.abs(matrix).max() < 2 for matrix in model)


@lru_cache
def bank_of(basis: Basis, method: Any, seq_len: int = 512, k: int = 16) -> FilterBank:
    bank = FilterBank(seq_len, k, method, basis)
    bank.reset()
    return bank


@pytest.mark.parametrize("basis", SIGNED)
@torch.no_grad()
def test_two_thousand_steps_in_float32_lose_nothing(basis: Basis) -> None:
    """Eigenvalues near -1 are stepped as exactly as those near 1, and a state is carried over odd distances so."""
    bank, k = bank_of(basis, "chunked", 2047, 32), 31
    u_BLD = torch.randn(1, 2047, 2, generator=torch.Generator().manual_seed(0))
    expected = fft_filterbank(u_BLD.double(), bank.filters_LK, k)
    assert relative(bank(u_BLD, k), expected) < 1e-5
    state, rows = bank.advance(u_BLD[:, :1], None), []
    for t in range(1, 2047):
        features, state = bank.step(u_BLD[:, t], state, k)
        rows.append(features)
    assert relative(torch.stack(rows, 1), expected[:, 1:]) < 1e-5
    carried = None
    for first in range(0, 2046, 93):
        carried = bank.advance(u_BLD[:, first : first + 93], carried)
    last, _ = bank.step(u_BLD[:, 2046], carried, k)
    assert relative(last[:, None], expected[:, 2046:]) < 1e-4  # of one position, whose feature may be small


@pytest.mark.parametrize("basis", SIGNED)
@pytest.mark.parametrize("way", ["direct", "fft", "chunked"])
def test_all_ways_mix_and_continue_alike(way: str, basis: Basis) -> None:
    bank, generator = bank_of(basis, way), torch.Generator().manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    inputs = [noise(2, 301, 6), noise(2, 301, 3, 5), noise(5, 6, 4)]
    expected = mix_channels(direct_filterbank(inputs[0], bank.filters_LK, 5), *inputs[1:])
    found = bank.mix(*inputs)
    gradient = noise(*expected.shape).detach()
    for mine, other in zip(
        (found, *torch.autograd.grad(found, inputs, gradient)),
        (expected, *torch.autograd.grad(expected, inputs, gradient)),
        strict=True,
    ):
        assert float((mine - other).detach().norm() / other.detach().norm()) < 1e-5
    u_BLD = torch.randn(1, 1301, 2, generator=generator)
    state = bank.advance(u_BLD[:, :1201], None)
    whole = bank(u_BLD, 16)
    for t in range(1201, 1301):
        features, state = bank.step(u_BLD[:, t], state, 16)
        torch.testing.assert_close(features, whole[:, t], atol=5e-5, rtol=1e-4)


@pytest.mark.parametrize("basis", SIGNED)
def test_what_grows_beyond_the_length_is_known(basis: Basis) -> None:
    bank = bank_of(basis, "auto", 128, 30)
    steady = bank.steady_channels(512)
    assert steady % 2 == 0 or basis == "hankel_l", "a filter grows as its mirror image does"
    impulse = torch.eye(512, 1, dtype=torch.float64)[None]
    largest_K = bank(impulse, 30)[0, 128:, :, 0].abs().amax(0) / bank.filters_LK.abs().amax(0)
    assert largest_K[:steady].max() <= 2 < largest_K[steady]


def test_signs_hear_what_alternates_and_cost_memory() -> None:
    """What eight filters and the direct term leave of a response, by least squares."""

    def left(basis: Basis, target: np.ndarray) -> float:
        columns = np.column_stack((np.eye(1024, 1), spectral_filters(1024, 8, basis)[1]))
        solution = np.linalg.lstsq(columns, target, rcond=None)[0]
        return float(np.linalg.norm(target - columns @ solution) / np.linalg.norm(target))

    time = np.arange(1024.0)
    for basis in SIGNED:
        assert left(basis, (-0.9) ** time) < 0.05 < 0.5 < left("plus", (-0.9) ** time)
        assert left(basis, 0.999**time) > 1.5 * left("plus", 0.999**time)


@pytest.mark.parametrize("basis", SIGNED)
@torch.no_grad()
def test_a_model_opened_small_grows_by_both_signs(basis: Basis, tmp_path: Path) -> None:
    model = build_model(config(vocab_size=257, basis=basis, num_channels=7), 0).eval()
    write_model_folder(tmp_path, model, BytesTokenizer(), torch.float32)
    ids_BL = torch.randint(0, 257, (2, 60))
    small, trained = open_model(tmp_path, 3), model.config.seq_len
    assert (small.config.num_channels, small.config.basis) == (3, basis)
    for k in (3, 6):
        found, expected = small.grow(k)(ids_BL), model(ids_BL, k)
        torch.testing.assert_close(found[:, :trained], expected[:, :trained], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found, expected, atol=2e-3, rtol=0)  # each has its own state beyond that


def test_a_model_that_says_nothing_has_the_plain_filters() -> None:
    written = config().model_dump(mode="json")
    del written["basis"]
    assert ModelConfig.model_validate(written) == config(basis="plus")
    assert FilterBank(16, 2, "auto").basis == "plus"
