"""Every way of computing the causal filter bank against the sum it is defined by."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megassm.errors import UserError
from megassm.layers.filterbank import FilterBank
from megassm.ops.filterbank import direct_filterbank, fft_filterbank

METHODS = [direct_filterbank, fft_filterbank]
Method = Callable[[Tensor, Tensor], Tensor]


def naive(u_BLD: Tensor, filters_LK: Tensor) -> Tensor:
    features = torch.zeros(*u_BLD.shape[:2], filters_LK.shape[1], u_BLD.shape[2], dtype=u_BLD.dtype)
    for t in range(u_BLD.shape[1]):
        for s in range(t + 1):
            features[:, t] += filters_LK[s][:, None] * u_BLD[:, t - s, None, :]
    return features


@pytest.mark.parametrize("method", METHODS)
@given(batch=st.integers(1, 3), length=st.integers(1, 19), width=st.integers(1, 4), channels=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_outputs_and_gradients(method: Method, batch: int, length: int, width: int, channels: int) -> None:
    generator = torch.Generator().manual_seed(length)
    u_BLD = torch.randn(batch, length, width, dtype=torch.float64, generator=generator, requires_grad=True)
    filters_LK = torch.randn(length + 3, channels, dtype=torch.float64, generator=generator)
    expected, found = naive(u_BLD, filters_LK), method(u_BLD, filters_LK)
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=generator)
    (expected_grad,) = torch.autograd.grad((expected * weight).sum(), u_BLD)
    (found_grad,) = torch.autograd.grad((found * weight).sum(), u_BLD)
    assert torch.allclose(found, expected, atol=1e-12)
    assert torch.allclose(found_grad, expected_grad, atol=1e-12)


@pytest.mark.parametrize("method", ["auto", "direct", "fft"])
@pytest.mark.parametrize("length", [1, 7, 600])
def test_module_uses_the_leading_filters_in_float32(method: str, length: int) -> None:
    bank = FilterBank(700, 6, "none", method)  # type: ignore[arg-type]
    bank.reset()
    u_BLD = torch.randn(2, length, 3)
    expected = direct_filterbank(u_BLD.double(), bank.filters_LK[:, :4])
    found = bank(u_BLD, 4)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, atol=1e-5)
    assert bank(u_BLD.bfloat16(), 4).dtype == torch.float32


def test_scale_is_the_quarter_power_or_one() -> None:
    paper, flat = FilterBank(64, 4, "quarter_power", "auto"), FilterBank(64, 4, "none", "auto")
    paper.reset()
    flat.reset()
    like = torch.zeros(1)
    assert paper.scale(1, like).item() == pytest.approx(0.3603933415747810**0.25, rel=1e-3)
    assert flat.scale(4, like).tolist() == [1, 1, 1, 1]


def test_a_cast_of_the_filters_is_noticed() -> None:
    bank = FilterBank(16, 2, "none", "auto")
    bank.check_dtype()
    with pytest.raises(RuntimeError, match=r"cast to torch\.bfloat16"):
        bank.bfloat16().check_dtype()


def test_longer_than_the_filters_is_refused() -> None:
    bank = FilterBank(16, 2, "none", "auto")
    with pytest.raises(UserError, match=r"17 tokens.*seq_len = 16"):
        bank(torch.zeros(1, 17, 3), 2)


def test_filters_are_not_part_of_a_checkpoint() -> None:
    assert FilterBank(16, 2, "none", "auto").state_dict() == {}
