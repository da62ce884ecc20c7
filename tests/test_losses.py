"""The next token's loss by Triton, forward and backward, against torch's."""

from __future__ import annotations

import importlib.util
import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from megassm.ops import losses, losses_torch
from megassm.ops.losses import divergences, token_losses
from tests.conftest import run_python

CHECK = """
import warnings, torch
from megassm.ops import losses, losses_torch, losses_triton

noise = torch.Generator().manual_seed(0)
for n, v in ((3, 5), (5, 257), (2, 4096), (4, 4097), (3, 9000)):
    for dtype, bound in ((torch.float32, 1e-5), (torch.float16, 1e-3)):
        logits = (20 * torch.randn(n, v, generator=noise)).to(dtype)
        logits[0, 0] = 30000.0  # nothing overflows
        targets = torch.randint(-1, v + 1, (n,), generator=noise)  # also other ranks' targets
        dnll = torch.randn(n, generator=noise)
        teacher = (3 * torch.randn(n, v, generator=noise)).to(dtype)
        found = losses._both(losses_triton, logits, teacher, targets, dnll)
        truth = losses._both(losses_torch, logits, teacher, targets, dnll)
        for mine, true in zip(found, truth):
            off = float((mine.double() - true.double()).norm() / true.double().norm().clamp_min(1e-9))
            assert off < bound, (n, v, dtype, off)
            assert mine.dtype == true.dtype
device = torch.device("cpu")
assert losses._is_right(device, torch.float16)
for name in ("loss_gradient", "divergence_sums"):
    right = getattr(losses_triton, name)
    setattr(losses_triton, name, lambda *a: right(*a) * 1.05)
    losses._is_right.cache_clear()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        assert not losses._is_right(device, torch.float16)
    assert any("off by" in str(warning.message) for warning in said)
    setattr(losses_triton, name, right)
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


def in_parts(way: str, parts: list[tuple[Any, ...]]) -> list[Tensor]:
    """What `way` gives to the holder of each part of the columns, all of them together."""
    barrier, sums = threading.Barrier(len(parts)), dict[int, Tensor]()

    def holder(number: int) -> Tensor:
        def combine(mine: Tensor, of: str) -> Tensor:
            sums[number] = mine.clone()
            barrier.wait(30)
            every = torch.stack([sums[other] for other in range(len(parts))])
            barrier.wait(30)
            return every.amax(0) if of == "max" else every.sum(0)

        found: Tensor = getattr(losses, way)(*parts[number], combine)
        return found

    with ThreadPoolExecutor(len(parts)) as threads:
        return list(threads.map(holder, range(len(parts))))


@pytest.mark.parametrize("edges", [(0, 3, 40), (0, 1, 39, 40)])
def test_parts_of_the_columns_give_what_all_of_them_do(edges: tuple[int, ...]) -> None:
    noise = torch.Generator().manual_seed(1)
    logits, teacher = ((5 * torch.randn(6, 40, generator=noise)).requires_grad_() for _ in range(2))
    targets = torch.tensor([0, 1, 2, 3, 38, 39])
    weights = torch.randn(6, generator=noise)
    spans = [slice(first, last) for first, last in pairwise(edges)]
    own = {
        "token_losses": [(logits[:, span], targets - span.start) for span in spans],
        "divergences": [(logits[:, span], teacher[:, span].detach(), 1.7) for span in spans],
    }
    log_p, log_q = (x.detach().double().div(1.7).log_softmax(-1) for x in (teacher, logits))
    truths = {
        "token_losses": torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none"),
        "divergences": (log_p.exp() * (log_p - log_q)).sum(-1),
    }
    for way, parts in own.items():
        found = in_parts(way, parts)
        for part in found:
            torch.testing.assert_close(part.double(), truths[way], atol=1e-5, rtol=1e-5)
        (gradient,) = torch.autograd.grad(sum((part * weights).sum() for part in found), logits)
        whole = token_losses(logits, targets) if way == "token_losses" else divergences(logits, teacher, 1.7)
        (true,) = torch.autograd.grad((whole * weights).sum(), logits)
        torch.testing.assert_close(gradient, true, atol=1e-6, rtol=1e-5)


def test_the_divergence_is_the_kl_of_two_softmaxes_and_so_is_its_gradient() -> None:
    noise = torch.Generator().manual_seed(2)
    student, teacher = ((4 * torch.randn(5, 33, generator=noise)).requires_grad_() for _ in range(2))
    weights = torch.randn(5, generator=noise)
    found = divergences(student, teacher, 2.5)
    log_p, log_q = (teacher.double() / 2.5).log_softmax(-1), (student.double() / 2.5).log_softmax(-1)
    truth = (log_p.exp() * (log_p - log_q)).sum(-1)
    torch.testing.assert_close(found.double(), truth, atol=1e-5, rtol=1e-5)
    (mine,) = torch.autograd.grad((found * weights).sum(), student)
    (true,) = torch.autograd.grad((truth * weights).sum(), student)
    torch.testing.assert_close(mine, true, atol=1e-6, rtol=1e-5)
    assert losses._ways(student) is losses_torch
