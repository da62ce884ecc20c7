"""The product of heads that writes no feature: its Triton kernels against torch, alone and in a whole layer."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from megassm.ops import head_mixing
from megassm.ops.mixing import gated_product
from tests.conftest import run_python

KERNELS = """
import warnings
import torch
from megassm.ops import head_mixing, head_mixing_triton

def hold(n, c, i, heads, p, e, k, dtype, tolerance, parameters=None):
    generator = torch.Generator().manual_seed(n + k)
    def noise(*shape):
        return torch.randn(shape, generator=generator)
    kept = parameters or dtype  # under autocast wider than the inputs
    rows, dy = (noise(c, k, i) / i**0.5).to(dtype), noise(n, c, heads * e).to(kept)
    given = noise(n, i, heads * p).to(dtype), noise(n, c, heads, k), (noise(k, heads * p, e) / p**0.5).to(kept)
    found = head_mixing.product_with_gradients(head_mixing.gated_product, given, rows, dy)
    exact = [x.double() for x in given], rows.double(), dy.double()
    truth = head_mixing.product_with_gradients(head_mixing._truth, *exact)
    assert [x.dtype for x in found] == [kept, dtype, torch.float32, kept]
    for mine, true in zip(found, truth, strict=True):
        assert mine.shape == true.shape
        off = float((mine.double() - true).norm() / true.norm())
        assert off < tolerance, (off, n, c, i, heads, p, e, k, dtype)

# Triton's interpreter has no product of bfloat16; float16 goes the same way through the kernels
sizes = [(1, 1, 1, 1, 1, 1, 1), (2, 5, 7, 3, 9, 4, 3), (3, 33, 26, 2, 48, 70, 2), (1, 64, 108, 2, 96, 96, 3),
         (1, 16, 128, 1, 16, 128, 2), (1, 3, 109, 1, 100, 20, 33), (2, 8, 40, 3, 64, 64, 4)]
for i, size in enumerate(sizes):
    hold(*size, torch.float32, 1e-6)
    if i % 2:
        hold(*size, torch.float16, 2e-3)
hold(*sizes[1], torch.float16, 2e-3, torch.float32)
for programs in (1, 3):  # the chunks in one part, and in parts of two and the rest
    head_mixing.PROGRAMS = programs
    hold(5, 4, 9, 1, 16, 16, 1, torch.float32, 1e-6)
head_mixing_triton._capability = lambda device: 90  # other tiles
hold(2, 5, 20, 2, 80, 100, 3, torch.float16, 2e-3)

with torch.inference_mode():  # where a text is generated
    assert head_mixing._is_right(torch.device("cpu"), torch.float16, 24, 40)
right = head_mixing_triton.inputs_backward
head_mixing_triton.inputs_backward = lambda *given: (right(*given)[0], right(*given)[1] * 1.01)
head_mixing._is_right.cache_clear()
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    assert not head_mixing._is_right(torch.device("cpu"), torch.float16, 24, 40)
assert "product of heads of 24 inputs is off by 1.0e-02 here; torch's is used" in str(said[0].message), said[0].message
print("equal")
"""

LAYER = """
import torch
from megassm import SpectralLayer
from megassm.ops import head_mixing

calls = []
def serves(z, *rest):
    calls.append(z.shape[1])
    return on
head_mixing.kernel_serves = serves
layer = SpectralLayer(d_model=24, seq_len=2048, num_channels=6, mixer_heads=3, gate="sigmoid")
generator = torch.Generator().manual_seed(0)
x = torch.randn(2, 150, 24, generator=generator)
documents = (torch.arange(150) > 70).long().expand(2, -1)
gradient = torch.randn(x.shape, generator=generator)
found = []
for on in (True, False):
    for k, apart in ((6, None), (5, documents), (1, None)):
        u = x.clone().requires_grad_()
        y = layer(u, k, apart)
        found.append([y, *torch.autograd.grad(y, (u, *layer.parameters()), gradient)])
    for length in (7, 100):  # a short chunk after a state, and whole ones
        state = layer.state(x)
        y = layer.mixer.extend(x[:, :length], state, layer._context(4))[0]
        found.append([y, *torch.autograd.grad(y, layer.parameters(), gradient[:, :length])])
assert max(calls) <= 128 and len(calls) == 12, calls
for mine, others in zip(found[:5], found[5:], strict=True):
    for one, other in zip(mine, others, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5
print("equal")
"""


HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed (Linux only)")
@pytest.mark.parametrize("code", [KERNELS, LAYER], ids=["kernels", "layer"])
def test_kernels_equal_their_truth(code: str) -> None:
    done = run_python("-c", code, check=False, TRITON_INTERPRET="1")
    assert done.stdout == "equal\n", done.stderr


def test_the_truth_is_what_a_processor_computes() -> None:
    noise = torch.Generator().manual_seed(0)
    rows, dy = torch.randn(5, 3, 7, generator=noise).double(), torch.randn(2, 5, 8, generator=noise).double()
    given = [torch.randn(shape, generator=noise).double() for shape in ((2, 7, 6), (2, 5, 2, 3), (3, 6, 4))]
    assert not head_mixing.kernel_serves(given[0], rows, given[1], given[2])
    found = head_mixing.product_with_gradients(gated_product, given, rows, dy)
    for mine, true in zip(found, head_mixing.product_with_gradients(head_mixing._truth, given, rows, dy), strict=True):
        torch.testing.assert_close(mine, true)


@pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed (Linux only)")
def test_grids_are_legal_at_sixteen_million_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first axis of a grid ends at 2^31, the others at 65,535; nothing is launched."""
    from megassm.ops import head_mixing_triton

    class Recorder:
        def __init__(self) -> None:
            self.grids: list[tuple[int, ...]] = []

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            self.grids.append(grid)
            return lambda *arguments, **options: None

    recorder = Recorder()
    for name in ("_forward_kernel", "_inputs_kernel", "_channels_kernel"):
        monkeypatch.setattr(head_mixing_triton, name, recorder)
    for k, heads, width in ((1, 512, 16), (32, 64, 128)):
        z, dy = (torch.empty(2**18, size, heads * width, dtype=torch.bfloat16, device="meta") for size in (108, 64))
        rows = head_mixing_triton.padded(torch.empty(64, k, 108, dtype=torch.bfloat16, device="meta"))
        weights = torch.empty(2**18, 64, heads, k, device="meta")
        channels = torch.empty(k, heads * width, width, dtype=torch.bfloat16, device="meta")
        head_mixing_triton.gated_product(z, rows, weights, channels)
        head_mixing_triton.inputs_backward(z, rows, weights, channels, dy)
        head_mixing_triton.channels_backward(z, rows, weights, channels, dy)
        assert z.numel() > 2**32
    assert len(recorder.grids) == 6
    assert all(0 < first < 2**31 and 0 < second < 2**16 for first, second in recorder.grids), recorder.grids
