"""SwiGLU by Triton, forward and backward, against torch's."""

from __future__ import annotations

import importlib.util

import pytest

from tests.conftest import run_python

CHECK = """
import warnings, torch
from megassm.ops import swiglu, swiglu_triton
from megassm.ops.kernel_check import with_gradients

noise = torch.Generator().manual_seed(0)
for shape in ((1,), (3, 5), (2, 7, 333), (1, 1024), (1, 1025)):
    for dtype, bound in ((torch.float32, 1e-6), (torch.float16, 1e-3)):
        gate, up, gradient = ((4 * torch.randn(shape, generator=noise)).to(dtype) for _ in range(3))
        if len(shape) > 1:
            gate.view(-1)[:3] = torch.tensor([-60.0, 60.0, 0.0])
        exact = with_gradients(swiglu._truth, (gate.double(), up.double()), gradient.double())
        for mine, true in zip(with_gradients(swiglu._Swiglu.apply, (gate, up), gradient), exact):
            assert mine.dtype == dtype and mine.shape == shape
            off = float((mine.double() - true).norm() / true.norm())
            assert off < bound, (shape, dtype, off)
device = torch.device("cpu")
assert swiglu._is_right(device, torch.float16)
right = swiglu_triton.swiglu_backward
swiglu_triton.swiglu_backward = lambda *a: tuple(gradient * 1.05 for gradient in right(*a))
swiglu._is_right.cache_clear()
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    assert not swiglu._is_right(device, torch.float16)
assert any("off by" in str(warning.message) for warning in said)
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (Linux only)")
def test_the_kernels_equal_their_truth() -> None:
    done = run_python("-c", CHECK, check=False, TRITON_INTERPRET="1")
    assert done.stdout.strip() == "equal", done.stderr
