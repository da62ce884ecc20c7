"""The gates by Triton, forward and backward, against torch's."""

from __future__ import annotations

import importlib.util

import pytest

from tests.conftest import run_python

CHECK = """
import warnings, torch
from megassm.ops import gates, gates_triton

noise = torch.Generator().manual_seed(0)
for batch, length, heads, k in ((1, 1, 1, 1), (2, 70, 1, 2), (1, 33, 4, 5), (3, 9, 2, 24), (1, 20, 1, 128)):
    for gate in gates.Gate:
        for dtype, bound in ((torch.float32, 2e-6), (torch.float16, 1e-3)):
            scores = (3 * torch.randn(batch, length, k * heads, generator=noise)).to(dtype)
            if dtype == torch.float32:
                scores[0, 0] = 1e-8  # below the floor of the norm; the gradient is a million times the others'
            dalpha = torch.randn(batch, length, heads, k, generator=noise)
            found = gates._both(gates.weights, scores, heads, gate, dalpha)
            truth = gates._both(gates._truth, scores, heads, gate, dalpha)
            exact = gates._both(gates._truth, scores.double(), heads, gate, dalpha.double())
            for mine, torchs, true in zip(found, truth, exact):
                assert mine.dtype == torchs.dtype and mine.shape == torchs.shape
                for rows in (slice(0, 1), slice(1, None)):
                    a, b = mine.double().flatten(0, 1)[rows], true.flatten(0, 1)[rows]
                    off = float((a - b).norm() / b.norm().clamp_min(1e-6))
                    assert off < bound, (heads, k, gate, dtype, rows, off)
device = torch.device("cpu")
assert gates._is_right(device, torch.float16)
right = gates_triton.weights_backward
gates_triton.weights_backward = lambda *a: right(*a) * 1.05
gates._is_right.cache_clear()
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    assert not gates._is_right(device, torch.float16)
assert "off by" in str(said[0].message)
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (Linux only)")
def test_the_kernels_equal_their_truth() -> None:
    done = run_python("-c", CHECK, check=False, TRITON_INTERPRET="1")
    assert done.stdout.strip() == "equal", done.stderr
