"""The next token's loss by Triton, forward and backward, against torch's."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from megassm.ops.losses import token_losses
from tests.conftest import run_python

CHECK = """
import warnings, torch
from megassm.ops import losses, losses_triton

noise = torch.Generator().manual_seed(0)
for n, v in ((3, 5), (5, 257), (2, 4096), (4, 4097), (3, 9000)):
    for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 1e-3)):
        logits = (20 * torch.randn(n, v, generator=noise)).to(dtype)
        logits[0, 0] = 30000.0  # nothing overflows
        targets = torch.randint(0, v, (n,), generator=noise)
        dnll = torch.randn(n, generator=noise)
        found = losses._both(losses._TokenLosses.apply, logits, targets, dnll)
        truth = losses._both(losses._truth, logits, targets, dnll)
        for mine, true in zip(found, truth):
            off = float((mine.double() - true.double()).norm() / true.double().norm().clamp_min(1e-9))
            assert off < bound, (n, v, dtype, off)
            assert mine.dtype == true.dtype
device = torch.device("cpu")
assert losses._is_right(device, torch.float16)
right = losses_triton.token_losses_backward
losses_triton.token_losses_backward = lambda *a: right(*a) * 1.05
losses._is_right.cache_clear()
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    assert not losses._is_right(device, torch.float16)
assert "off by" in str(said[0].message)
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (Linux only)")
def test_the_kernels_equal_their_truth() -> None:
    done = run_python("-c", CHECK, check=False, TRITON_INTERPRET="1")
    assert done.stdout.strip() == "equal", done.stderr


def test_on_a_processor_it_is_torchs() -> None:
    logits, targets = torch.randn(4, 9), torch.tensor([0, 8, 3, 3])
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    assert torch.equal(token_losses(logits, targets), expected)
