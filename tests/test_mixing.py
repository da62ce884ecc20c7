"""The gated product that keeps no feature, and its Triton kernels, against the plain product."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megassm.ops import mixing
from megassm.ops.mixing import gated_product, mix_channels
from tests.conftest import run_python


def noise(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype)


@given(
    n=st.integers(1, 3), c=st.integers(1, 5), i=st.integers(1, 6), p=st.integers(1, 5), k=st.integers(1, 7),
    group=st.integers(1, 8), heads=st.integers(1, 3),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_outputs_and_gradients_in_any_grouping(n: int, c: int, i: int, p: int, k: int, group: int, heads: int) -> None:
    rows, d = noise(c, k, i), heads * p
    inputs = [t.requires_grad_() for t in (noise(n, i, d), noise(n, c, heads, k), noise(k, d, p + 1))]
    z, weights, channels = inputs
    features = torch.einsum("cki,nid->nckd", rows, z)
    expected = mix_channels(features, weights, channels)
    before = dict(mixing.GROUP_BYTES)
    mixing.GROUP_BYTES["cpu"] = group * n * c * d * 8
    try:
        found = gated_product(z, rows, weights, channels)
        assert torch.allclose(found, expected, atol=1e-12)
        gradient = noise(*expected.shape, seed=1)
        expected_grads = torch.autograd.grad((expected * gradient).sum(), inputs)
        found_grads = torch.autograd.grad((found * gradient).sum(), inputs)
    finally:
        mixing.GROUP_BYTES.update(before)
    for expected_grad, found_grad in zip(expected_grads, found_grads, strict=True):
        assert torch.allclose(found_grad, expected_grad, atol=1e-11)


@pytest.mark.parametrize(("k", "heads", "p", "e"), [(1, 1, 1, 1), (3, 1, 4, 5), (4, 3, 2, 2), (2, 5, 1, 3)])
def test_heads_are_layers_of_their_own(k: int, heads: int, p: int, e: int) -> None:
    features, weights, channels = noise(2, 3, k, heads * p), noise(2, 3, heads, k), noise(k, heads * p, e)
    found = mix_channels(features, weights, channels)
    for head in range(heads):
        mine = slice(head * p, (head + 1) * p)
        expected = sum(weights[:, :, head, i, None] * (features[:, :, i, mine] @ channels[i, mine]) for i in range(k))
        assert torch.allclose(found[..., head * e : (head + 1) * e], expected, atol=1e-12)


def test_bfloat16_sums_in_float32() -> None:
    rows = noise(16, 32, 24, dtype=torch.bfloat16)
    z, weights, channels = noise(4, 24, 64), noise(4, 16, 1, 32).softmax(-1), noise(32, 64, 64) / 8
    expected = mix_channels(torch.einsum("cki,nid->nckd", rows.double(), z), weights, channels)
    low = [t.bfloat16().requires_grad_() for t in (z, channels)]
    weights = weights.float().requires_grad_()
    found = gated_product(low[0], rows, weights, low[1])
    assert found.dtype == torch.bfloat16
    assert float((found.detach().double() - expected).norm() / expected.norm()) < 0.02
    found.float().square().sum().backward()
    assert low[0].grad is not None
    assert low[0].grad.dtype == torch.bfloat16
    assert weights.grad is not None
    assert weights.grad.dtype == torch.float32


def test_activations_do_not_grow_with_the_budget() -> None:
    """What autograd keeps is z, the weights and the parameters: no feature."""
    kept: list[int] = []
    rows = noise(16, 8, 20, dtype=torch.float32)
    z, weights, channels = noise(8, 20, 32).float(), noise(8, 16, 2, 8).float(), noise(8, 32, 16).float()
    for tensor in (z, weights, channels):
        tensor.requires_grad_()

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in {x.data_ptr() for x in (z, rows, weights, channels)}:
            kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        gated_product(z, rows, weights, channels)
    assert kept == []


TRITON_CHECK = """
import torch
from megassm.ops import mixing, mixing_triton
for n, c, g, i, d in [(1, 1, 1, 1, 1), (2, 5, 3, 7, 9), (3, 16, 4, 26, 70), (2, 33, 2, 130, 65)]:
    torch.manual_seed(0)
    # Triton's interpreter has no product of bfloat16; float16 goes the same way through the kernels
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 2e-3)):
        z, rows = torch.randn(n, i, d).to(dtype), (torch.randn(c * g, i) / i**0.5).to(dtype)
        weights, gradient = torch.rand(n, c * g), torch.randn(n, c * g, d).to(dtype)
        exact = [t.float() for t in (z, rows, weights)]
        expected = mixing.gated_features(*exact)
        found = mixing_triton.gated_features(z, rows, weights)
        assert found.dtype == dtype
        torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)
        expected_d, found_d = gradient.float(), gradient.clone()
        expected_parts = mixing.gated_features_backward(*exact, expected_d)
        found_parts = mixing_triton.gated_features_backward(z, rows, weights, found_d)
        torch.testing.assert_close(found_d.float(), expected_d, atol=tolerance, rtol=tolerance)
        for mine, other in zip(found_parts, expected_parts):
            torch.testing.assert_close(mine.float(), other, atol=10 * tolerance, rtol=tolerance)
assert mixing._triton_is_right(torch.device("cpu"), torch.float32)
mixing_triton.gated_features = lambda z, rows, weights: mixing.gated_features(z, rows, weights) * 1.01
mixing._triton_is_right.cache_clear()
import warnings
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    assert not mixing._triton_is_right(torch.device("cpu"), torch.float32)
assert "off by 1.0e-02" in str(said[0].message)
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (Linux only)")
def test_triton_kernels_equal_their_truth() -> None:
    done = run_python("-c", TRITON_CHECK, check=False, TRITON_INTERPRET="1")
    assert done.stdout == "equal\n", done.stderr
