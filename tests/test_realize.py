"""The state-space form of the filter bank: chunks and steps against float64 FFT, stability, one state for both."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.signal import fftconvolve

import megassm.ops.realize
from megassm.errors import UserError
from megassm.files import CACHE_VARIABLE
from megassm.ops.bases import extended_filters, spectral_filters
from megassm.ops.realize import TOLERANCE, Realization, realize


def convolve(noise: np.ndarray, filters: np.ndarray) -> np.ndarray:
    return fftconvolve(noise[:, None], filters, axes=0)[: len(noise)]


def run_chunks(model: Realization, noise: np.ndarray, dtype: type) -> tuple[np.ndarray, np.ndarray]:
    """Features (time, K) of a signal padded to whole chunks, and the state after the last chunk."""
    inputs, toeplitz, outputs = (matrix.astype(dtype) for matrix in model[1:4])
    change = (model.transition_SS - np.eye(len(model.transition_SS))).astype(dtype)
    chunk = inputs.shape[1]
    padded = np.zeros(-(-len(noise) // chunk) * chunk, dtype)
    padded[: len(noise)] = noise
    state = np.zeros(len(change), dtype)
    features = []
    for u in padded.reshape(-1, chunk):
        features.append(toeplitz @ u + outputs @ state)
        state = state + (change @ state + inputs @ u)
    return np.concatenate(features)[: len(noise)], state


def run_steps(model: Realization, noise: np.ndarray, state: np.ndarray) -> np.ndarray:
    features = []
    for u in noise:
        features.append(model.step_output_KS @ state + model.step_direct_K * u)
        state = model.step_transition_SS @ state + model.step_input_S * u
    return np.array(features)


def response(model: Realization, length: int) -> np.ndarray:
    """(length, K) features of an impulse."""
    return run_steps(model, np.eye(length, 1)[:, 0], np.zeros(len(model.step_input_S)))


def relative_error(features: np.ndarray, exact: np.ndarray) -> float:
    """Of the worst channel."""
    return float((np.linalg.norm(features - exact, axis=0) / np.linalg.norm(exact, axis=0)).max())


def radius(matrix: np.ndarray) -> float:
    return float(np.abs(np.linalg.eigvals(matrix)).max())


SIZES = [
    (1, 1, 16), (2, 2, 16), (8, 8, 16), (63, 8, 128), (63, 32, 16), (64, 32, 64), (100, 16, 32), (100, 32, 64),
    (256, 16, 64), (256, 24, 64), (256, 32, 32), (512, 16, 16), (512, 32, 128), (1000, 32, 64), (2048, 32, 16),
    (2048, 32, 64), (2048, 32, 256), (8192, 32, 64), (8192, 36, 128), (32768, 32, 128), (65536, 32, 256),
]  # fmt: skip


@pytest.mark.parametrize(("length", "channels", "chunk"), SIZES)
def test_chunks_are_the_convolution(length: int, channels: int, chunk: int) -> None:
    model = realize(length, channels, chunk)
    noise = np.random.default_rng(length).standard_normal(length)
    exact = convolve(noise, spectral_filters(length, channels)[1])
    assert relative_error(run_chunks(model, noise, np.float32)[0], exact) < 5e-6
    assert relative_error(run_chunks(model, noise, np.float64)[0], exact) < 5e-7
    assert radius(model.step_transition_SS) < 1
    assert radius(model.transition_SS) < 1


@pytest.mark.parametrize(("length", "channels"), [(2048, 32), (8192, 32), (32768, 32), (512, 16)])
def test_the_state_is_short_and_the_entries_sane(length: int, channels: int) -> None:
    model = realize(length, channels, 64)
    assert len(model.step_input_S) <= channels + 20
    for matrix in model:
        assert matrix.dtype == np.float64
        assert np.abs(matrix).max() < 2


def test_chunk_form_is_the_power_of_the_step_form() -> None:
    model = realize(2048, 32, 64)
    power = np.linalg.matrix_power(model.step_transition_SS, 64)
    assert np.abs(model.transition_SS - power).max() < 1e-12
    state = np.random.default_rng(0).standard_normal(len(power))
    steps = run_steps(model, np.zeros(64), state)
    assert np.abs(model.output_CKS @ state - steps).max() < 1e-11


@pytest.mark.parametrize(("length", "channels"), [(1, 1), (100, 32), (300, 16), (2048, 32)])
def test_the_state_does_not_depend_on_the_chunk(length: int, channels: int) -> None:
    first, second = realize(length, channels, 16), realize(length, channels, 128)
    assert all(np.array_equal(a, b) for a, b in zip(first[4:], second[4:], strict=True))


@settings(max_examples=20, deadline=None)
@given(data=st.data(), length=st.integers(1, 700), chunk=st.integers(1, 200))
def test_decoding_starts_where_the_prefill_ended(data: st.DataObject, length: int, chunk: int) -> None:
    channels = data.draw(st.integers(1, min(length, 32)))
    model = realize(length, channels, chunk)
    prefill = min(length // 2 // chunk, 3) * chunk
    noise = np.random.default_rng(length).standard_normal(min(length, prefill + 64))
    features, state = run_chunks(model, noise[:prefill], np.float64) if prefill else (np.empty((0, channels)), None)
    start = np.zeros(len(model.step_input_S)) if state is None else state
    both = np.concatenate((features, run_steps(model, noise[prefill:], start)))
    scale = np.linalg.norm(noise)  # a model of few steps was tried on another noise, and errs more here or less
    assert np.abs(both - convolve(noise, spectral_filters(length, channels)[1][: len(noise)])).max() < 2e-5 * scale


@settings(max_examples=20, deadline=None)
@given(length=st.integers(2, 300), chunk=st.integers(1, 300))
def test_chunks_continue_beyond_the_trained_length(length: int, chunk: int) -> None:
    """Also with a chunk longer than L, the chunk form is the convolution with the model's own response."""
    model = realize(length, min(length, 8), chunk)
    noise = np.random.default_rng(0).standard_normal(2 * length + 3)
    own = response(model, len(noise))
    # the tolerance is of outputs for one noise; a single entry may be further off, by how much depends on the processor
    assert np.abs(own[:length] - spectral_filters(length, min(length, 8))[1]).max() < 5 * TOLERANCE
    own[:length] = spectral_filters(length, min(length, 8))[1]
    assert np.abs(run_chunks(model, noise, np.float64)[0] - convolve(noise, own)).max() < 1e-4


@pytest.mark.parametrize(("length", "channels"), [(256, 16), (2048, 24), (8192, 32), (16384, 32)])
def test_beyond_the_trained_length_it_follows_the_continuation_and_fades(length: int, channels: int) -> None:
    model = realize(length, channels, 64)
    own, natural = response(model, 4 * length), extended_filters(length, channels, 4 * length)
    largest = np.abs(natural).max(axis=0)
    error = np.abs(own - natural)
    assert (error[: 2 * length].max(axis=0) / largest).max() < 5e-3
    assert (error.max(axis=0) / largest).max() < 0.1
    power = np.linalg.matrix_power(model.step_transition_SS, 1000 * length)
    assert np.abs(power).max() < 1e-3


def test_without_a_short_recurrence_the_state_is_the_inputs() -> None:
    model = realize(100, 32, 64)
    assert len(model.step_input_S) == 99
    assert np.abs(response(model, 150)[:100] - spectral_filters(100, 32)[1]).max() < 1e-15
    assert not response(model, 150)[100:].any()


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="chunk = 0"):
        realize(64, 8, 0)
    with pytest.raises(UserError, match="between 1 and seq_len"):
        realize(4, 5, 16)
    monkeypatch.setattr(megassm.ops.realize, "SHIFT_REGISTER_LIMIT", 90)
    with pytest.raises(UserError, match="no state-space model"):
        realize(100, 32, 64)


@pytest.mark.parametrize(("length", "channels"), [(300, 16), (100, 32)])  # with a short state, and without
def test_the_outcome_is_found_once(length: int, channels: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(tmp_path))
    first = realize(length, channels, 64)
    (path,) = tmp_path.glob("realize-*.npz")

    def again(*_: object) -> None:
        raise AssertionError("not served from the cache")

    with monkeypatch.context() as patch:
        patch.setattr(megassm.ops.realize, "_find_short_step", again)
        served = realize(length, channels, 64)
        assert all(np.array_equal(a, b) for a, b in zip(first, served, strict=True))
        with pytest.raises(AssertionError, match="not served"):
            realize(length, channels, 64, tolerance=1e-5)
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(AssertionError, match="not served"):
            realize(length, channels, 64)
    healed = realize(length, channels, 64)
    assert all(np.array_equal(a, b) for a, b in zip(first, healed, strict=True))


@pytest.mark.parametrize(("length", "channels", "short"), [(512, 28, True), (512, 29, False), (1024, 32, True)])
def test_whether_a_state_is_short_does_not_depend_on_the_processor(length: int, channels: int, short: bool) -> None:
    size = len(realize(length, channels, 64).step_input_S)
    assert size < 50 if short else size == length - 1
