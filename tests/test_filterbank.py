"""Every way of computing the causal filter bank against the sum it is defined by; steps against the parallel form."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megassm.errors import UserError
from megassm.layers.filterbank import FilterBank
from megassm.ops.filterbank import ChunkTables, MadeTables, check_flashfft, direct_filterbank, fft_filterbank
from megassm.ops.mixing import mix_channels

WAYS = ("direct", "fft", "chunked")


@lru_cache
def bank_of(seq_len: int, num_channels: int) -> FilterBank:
    bank = FilterBank(seq_len, num_channels, "auto")
    bank.reset()
    return bank


def make(seq_len: int, num_channels: int, method: str = "auto") -> FilterBank:
    bank = FilterBank(seq_len, num_channels, method)  # type: ignore[arg-type]
    bank.take(bank_of(seq_len, num_channels))
    return bank


def naive(u_BLD: Tensor, filters_LK: Tensor) -> Tensor:
    features = torch.zeros(*u_BLD.shape[:2], filters_LK.shape[1], u_BLD.shape[2], dtype=u_BLD.dtype)
    for t in range(u_BLD.shape[1]):
        for s in range(t + 1):
            features[:, t] += filters_LK[s][:, None] * u_BLD[:, t - s, None, :]
    return features


@pytest.mark.parametrize("method", [direct_filterbank, fft_filterbank])
@given(batch=st.integers(1, 3), length=st.integers(1, 19), width=st.integers(1, 4), k=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_outputs_and_gradients(method, batch: int, length: int, width: int, k: int) -> None:  # type: ignore[no-untyped-def]
    generator = torch.Generator().manual_seed(length)
    u_BLD = torch.randn(batch, length, width, dtype=torch.float64, generator=generator, requires_grad=True)
    filters_LK = torch.randn(length + 3, 5, dtype=torch.float64, generator=generator)
    expected, found = naive(u_BLD, filters_LK[:, :k]), method(u_BLD, filters_LK, k)
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), u_BLD)
    (found_grad,) = torch.autograd.grad((found * weight).sum(), u_BLD)
    assert torch.allclose(found, expected, atol=1e-12)
    assert torch.allclose(found_grad, expected_grad, atol=1e-12)


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest relative error of a filter's output, norm over everything else."""
    error, size = ((x.detach().double()).pow(2).sum((0, 1, 3)).sqrt() for x in (found - expected, expected))
    return float((error / size).max())


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 100, 2048])
def test_chunked_in_float32_against_direct_in_float64(length: int) -> None:
    bank = make(max(length, 2048), 32, "chunked")
    u_BLD = torch.randn(1, length, 2, generator=torch.Generator().manual_seed(0))
    expected = direct_filterbank(u_BLD.double(), bank.filters_LK, 32)
    whole = bank(u_BLD, 32)
    assert whole.dtype == torch.float32
    assert relative(whole, expected) < 1e-5
    for k in range(1, 33):
        assert torch.allclose(bank(u_BLD, k), whole[:, :, :k], atol=1e-6)


def test_chunked_at_8192() -> None:
    bank = make(8192, 32, "chunked")
    u_BLD = torch.randn(1, 8192, 2, generator=torch.Generator().manual_seed(0))
    assert relative(bank(u_BLD, 32), fft_filterbank(u_BLD.double(), bank.filters_LK, 32)) < 1e-5


@pytest.mark.parametrize("length", [1, 65, 300])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("k", [1, 3, 16])
def test_mix_has_the_outputs_and_gradients_of_the_definition(way: str, length: int, k: int) -> None:
    bank = make(512, 16, way)
    generator = torch.Generator().manual_seed(length)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    inputs = [noise(2, length, 6), noise(2, length, 3, k), noise(k, 6, 4)]
    features = direct_filterbank(inputs[0], bank.filters_LK, k)
    expected = mix_channels(features, *inputs[1:])
    found = bank.mix(*inputs)
    gradient = torch.randn(expected.shape, generator=generator, dtype=torch.float64)
    expected_grads = torch.autograd.grad(expected, inputs, gradient)
    found_grads = torch.autograd.grad(found, inputs, gradient)
    for mine, other in zip((found, *found_grads), (expected, *expected_grads), strict=True):
        assert float((mine - other).detach().norm() / other.detach().norm()) < (1e-5 if way == "chunked" else 1e-11)


@given(batch=st.integers(1, 3), length=st.integers(1, 200), width=st.integers(1, 3), k=st.integers(1, 16))
@settings(max_examples=20, deadline=None)
def test_chunked_at_odd_shapes(batch: int, length: int, width: int, k: int) -> None:
    bank = make(512, 16, "chunked")
    u_BLD = torch.randn(batch, length, width, generator=torch.Generator().manual_seed(length))
    assert relative(bank(u_BLD, k), direct_filterbank(u_BLD.double(), bank.filters_LK, k)) < 1e-5


@pytest.mark.parametrize(("seq_len", "channels"), [(24, 6), (256, 32), (512, 16), (2048, 32)])
def test_steps_equal_the_parallel_form_from_any_position(seq_len: int, channels: int) -> None:
    bank = make(seq_len, channels, "direct")
    u_BLD = torch.randn(2, min(seq_len, 300), 3, generator=torch.Generator().manual_seed(0))
    expected = bank(u_BLD, channels)
    for start in (0, 1, 63, 64, 130):
        if start >= u_BLD.shape[1]:
            continue
        state = bank.advance(u_BLD[:, :start], None)
        for t in range(start, u_BLD.shape[1]):
            features, state = bank.step(u_BLD[:, t], state, channels)
            assert torch.allclose(features, expected[:, t], atol=2e-5)


@pytest.mark.parametrize("way", WAYS)
def test_longer_than_trained(way: str) -> None:
    """All ways continue the filters alike beyond the length they were made for."""
    bank, u_BLD = make(512, 16, way), torch.randn(1, 1500, 2, generator=torch.Generator().manual_seed(0))
    found = bank(u_BLD, 16)
    state = bank.advance(u_BLD[:, :1400], None)
    for t in range(1400, 1500):
        features, state = bank.step(u_BLD[:, t], state, 16)
        assert torch.allclose(features, found[:, t], atol=5e-5)
    short = bank(u_BLD[:, :512], 16)
    assert torch.allclose(found[:, :512], short, atol=1e-5), "what comes later changes nothing before"


def test_low_precision_input_gives_float32_features() -> None:
    for way in WAYS:
        assert make(64, 4, way)(torch.randn(1, 10, 2).bfloat16(), 4).dtype == torch.float32


def test_scale_is_the_quarter_power_or_one() -> None:
    bank = make(64, 4)
    assert bank.scale(1, "quarter_power", torch.float32).item() == pytest.approx(0.3603933415747810**0.25, rel=1e-3)
    assert bank.scale(4, "none", torch.float32).tolist() == [1, 1, 1, 1]


def test_a_cast_of_the_model_leaves_the_filters_exact() -> None:
    bank, exact = make(64, 8), make(64, 8)
    model = torch.nn.Sequential(bank, torch.nn.Linear(2, 2))
    for cast in (model.bfloat16, model.half, lambda: model.to(torch.float32), lambda: model.to("cpu", torch.bfloat16)):
        cast()
        assert model[1].weight.dtype != torch.float64
        for name, buffer in exact.named_buffers():
            assert torch.equal(bank.get_buffer(name), buffer), name
    assert {buffer.device.type for buffer in model.to("meta")[0].buffers()} == {"meta"}


def test_filters_are_not_part_of_a_checkpoint() -> None:
    assert make(16, 2).state_dict() == {}


def test_flashfft_is_refused_where_it_is_not() -> None:
    with pytest.raises(UserError, match=r"model\.filterbank = 'flashfft'.*set model\.filterbank: chunked"):
        check_flashfft(make(16, 2).filters_LK, 16)


@pytest.mark.parametrize(("seq_len", "k", "steady"), [(128, 16, 12), (256, 16, 14), (2048, 32, 22)])
def test_filters_that_explode_beyond_their_length_are_known(seq_len: int, k: int, steady: int) -> None:
    bank = bank_of(seq_len, k)
    assert bank.steady_channels(seq_len) == k
    assert bank.steady_channels(4 * seq_len) == steady
    impulse = torch.zeros(1, 4 * seq_len, 1, dtype=torch.float64)
    impulse[:, 0] = 1
    largest_K = bank(impulse, k)[0, seq_len:, :, 0].abs().amax(0) / bank.filters_LK.abs().amax(0)
    assert largest_K[:steady].max() <= 2 < largest_K[steady]


def test_tables_are_made_once_until_the_filters_change() -> None:
    made = MadeTables()
    bank, other = (FilterBank(256, count, "chunked") for count in (4, 3))
    for each in (bank, other):
        each.reset()

    def ask(of: FilterBank, k: int) -> ChunkTables:
        return made.get(of.transition_SS, (torch.float32, k), lambda: of.tables(torch.float32, k))

    with torch.inference_mode():
        first = ask(bank, 2)
    assert not first.rows_CKI.is_inference()
    assert ask(bank, 2) is first
    assert ask(bank, 3) is not first
    assert ask(bank, 2) is first
    assert ask(other, 2) is not first
    assert torch.equal(ask(bank, 2).rows_CKI, first.rows_CKI)
