"""The input taps by Triton, forward and backward, against torch's."""

from __future__ import annotations

import importlib.util

import pytest

from tests.conftest import run_python

CHECK = """
import warnings, torch
from megassm.layers.context import Context
from megassm.layers.taps import InputTaps
from megassm.ops import taps, taps_triton
from megassm.ops.kernel_check import with_gradients

noise = torch.Generator().manual_seed(0)
for batch, length, width, count in ((1, 1, 1, 4), (2, 33, 65, 2), (3, 70, 20, 5), (1, 3, 130, 64)):
    for dtype, bound in ((torch.float32, 2e-6), (torch.float16, 1e-3)):
        u, dv = (torch.randn(batch, length, width, generator=noise).to(dtype) for _ in range(2))
        weight = torch.randn(count, width, generator=noise).to(dtype)
        found = with_gradients(taps.causal_taps, (u, weight), dv)
        exact = with_gradients(taps._truth, (u.double(), weight.double()), dv.double())
        for mine, true in zip(found, exact):
            assert mine.dtype == dtype and mine.shape == true.shape
            off = float((mine.double() - true).norm() / true.norm())
            assert off < bound, (batch, length, width, count, dtype, off)
    layer = InputTaps(width, count)
    layer.weight_ND.data = weight.float().flatten()
    found = layer(u.float(), Context(1, None, None))
    assert torch.allclose(found, taps.causal_taps(u.float(), weight.float()), atol=1e-4)
device = torch.device("cpu")
assert taps._is_right(device, torch.float16)
right = taps_triton.causal_taps_backward
taps_triton.causal_taps_backward = lambda *a: (right(*a)[0], right(*a)[1] * 1.05)
taps._is_right.cache_clear()
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    assert not taps._is_right(device, torch.float16)
assert any("off by" in str(warning.message) for warning in said)
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (Linux only)")
def test_the_kernels_equal_their_truth() -> None:
    done = run_python("-c", CHECK, check=False, TRITON_INTERPRET="1")
    assert done.stdout.strip() == "equal", done.stderr
