"""The chunks' states by one Triton kernel, forward and backward, against `chunk_inputs` by torch's products."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch

from megassm.ops import filterbank, states
from tests.conftest import run_python

CHECK = """
import warnings, torch
from megassm.layers.filterbank import FilterBank
from megassm.ops import filterbank, states, states_triton
from megassm.ops.filterbank import ChunkTables

def both(way, u, dz, tables):
    u = u.detach().clone().requires_grad_()
    z = way(u, tables)
    return z.detach(), torch.autograd.grad(z, u, dz.to(z))[0]

def off(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))

noise = torch.Generator().manual_seed(0)
shapes = (
    (256, 8, "plus", 2, 256, 20), (256, 8, "alternating", 1, 250, 3), (512, 4, "hankel_l", 3, 65, 33),
    (128, 2, "plus", 1, 1, 1),
)
for seq_len, k, basis, batch, length, width in shapes:
    bank = FilterBank(seq_len, k, "chunked", basis)
    bank.reset()
    tables = bank.tables(torch.float64, k)
    u = torch.randn(batch, length, width, generator=noise)
    dz = torch.randn(batch * -(-length // 64), 64 + bank.state_size, width, generator=noise)
    truth = both(lambda u, t: filterbank.chunk_inputs(u, t), u.double(), dz, tables)
    for dtype, bound in ((torch.float32, 2e-6), (torch.float16, 1e-3)):
        own = ChunkTables(tables.transition_SS, tables.input_SC.float(), tables.rows_CKI)
        rounded = u.to(dtype)
        exact = both(lambda u, t: filterbank.chunk_inputs(u, t), rounded.double(), dz.to(dtype), tables)
        found = both(lambda u, t: states.chunk_inputs(u, t.transition_SS, t.input_SC), rounded, dz, own)
        for mine, true in zip(found, exact):
            assert off(mine, true) < bound, (seq_len, length, dtype, off(mine, true))
            assert mine.dtype == dtype
device = torch.device("cpu")
assert states._is_right(device, torch.float32)
right = states_triton.chunk_inputs_backward
states_triton.chunk_inputs_backward = lambda *a: right(*a) * 1.001
states._is_right.cache_clear()
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    assert not states._is_right(device, torch.float32)
assert "off by" in str(said[0].message)
print("equal")
"""


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (Linux only)")
def test_the_kernels_equal_their_truth() -> None:
    done = run_python("-c", CHECK, check=False, TRITON_INTERPRET="1")
    assert done.stdout.strip() == "equal", done.stderr


def test_the_truth_beside_the_kernels_is_the_filter_banks_own() -> None:
    noise = torch.Generator().manual_seed(1)
    transition = torch.linspace(0.2, 0.999, 5, dtype=torch.float64).diag()
    inputs = torch.randn(5, 16, generator=noise, dtype=torch.float64)
    u = torch.randn(2, 100, 3, generator=noise, dtype=torch.float64)
    tables = filterbank.ChunkTables(transition, inputs, inputs)
    assert torch.allclose(states._truth(u, transition, inputs), filterbank.chunk_inputs(u, tables))


def test_a_device_without_the_kernels_takes_torchs_products() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not states.kernel_serves(torch.zeros(1, 64, 2), torch.zeros(5, 64))
