"""Kernels against float64 case by case, each case's findings as soon as they are there."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from megassm.ops import head_mixing as at_once
from megassm.ops import mixing
from megassm.ops import taps as by_kernel
from megassm.ops.kernel_check import with_gradients
from tools.bench.gpu.checks import BOUND, hold, off
from tools.bench.gpu.plan import Found, Plan

HEADS = (
    (16, 8, 128, 5, 64, 108), (2, 8, 96, 40, 64, 108), (8, 4, 16, 3, 64, 128), (5, 3, 40, 7, 33, 65),
    (3, 2, 64, 1, 1, 2),
)  # fmt: skip
"""Channels K, heads, their inputs P, chunks N, positions C, inputs and states I; each compiles programs of its own."""
TAPS = ((4, 2, 2048, 768), (4, 3, 150, 70), (3, 2, 33, 130), (8, 1, 5, 64), (2, 1, 1, 1))
"""Taps, sequences, positions, width."""


def case_by_case(cases: Iterable[tuple[str, Callable[[], Found]]]) -> Iterator[Found]:
    """What each case finds and what it warned of, as soon as it is there. One that fails does not hide the others."""
    found: dict[str, Found] = {}
    for name, case in cases:
        begun = time.perf_counter()
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            try:
                row = case()
            except Exception as error:  # a compiler's refusal has many types
                row = {"ok": False, "error": f"{type(error).__name__}: {error}"[:400]}
        texts = sorted({str(warning.message)[:300] for warning in said})
        found[name] = row | {"s": round(time.perf_counter() - begun, 2)} | ({"warnings": texts[:5]} if texts else {})
        yield {"cases": found}
    failed = [name for name, row in found.items() if not row["ok"]]
    yield {"ok": not failed, **({"error": f"wrong: {', '.join(failed)}"} if failed else {})}


def compared(parts: Sequence[str], found: Sequence[Tensor], truth: Sequence[Tensor], bound: float) -> Found:
    """The errors by part, and whether all are within the bound."""
    errors = {part: off(mine, true) for part, mine, true in zip(parts, found, truth, strict=True)}
    return hold(errors, dict.fromkeys(parts, bound))


def head_mixing(plan: Plan, _folder: Path) -> Iterator[Found]:
    """The mixer's product by the kernels that write no feature: whether they are taken, their values and gradients
    against float64, and whether two runs give the same bits."""
    device = torch.device(plan.device)
    kinds = [*((torch.bfloat16, sizes) for sizes in HEADS), (torch.float16, HEADS[1])]
    yield from case_by_case(
        (f"{dtype} K={k} H={h} P={p} N={n} C={c} I={i}", partial(_of_heads, device, dtype, (k, h, p, n, c, i)))
        for dtype, (k, h, p, n, c, i) in kinds
    )


def _of_heads(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> Found:
    k, heads, width, n, c, i = sizes
    noise = torch.Generator().manual_seed(width)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=noise).to(dtype)

    rows, dy, z = random(c, k, i) / 10, random(n, c, heads * width), random(n, i, heads * width)
    given = [z, torch.rand(n, c, heads, k, generator=noise), random(k, heads * width, width) / width**0.5]
    rows_on, dy_on, *on = (tensor.to(device) for tensor in (rows, dy, *given))
    taken = at_once.kernel_serves(on[0], rows_on, *on[1:])
    way = at_once.gated_product if device.type == "cuda" else mixing.gated_product
    found, again = (at_once.product_with_gradients(way, on, rows_on, dy_on) for _ in range(2))
    exact = [tensor.double() for tensor in given]
    truth = at_once.product_with_gradients(mixing.gated_product, exact, rows.double(), dy.double())
    row = compared(("y", "dz", "dweights", "dM"), found, truth, BOUND[str(dtype).removeprefix("torch.")])
    same = all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    return row | {"taken": taken, "same_bits": same, "ok": row["ok"] and same and taken == (device.type == "cuda")}


def taps(plan: Plan, _folder: Path) -> Iterator[Found]:
    """The taps by one kernel each way: whether they are taken, their values and gradients against float64."""
    device = torch.device(plan.device)
    yield from case_by_case(
        (f"{dtype} N={n} B={b} L={length} D={d}", partial(_of_taps, device, dtype, (n, b, length, d)))
        for n, b, length, d in TAPS
        for dtype in (torch.bfloat16, torch.float32, torch.float16)
    )


def _of_taps(device: torch.device, dtype: torch.dtype, sizes: tuple[int, ...]) -> Found:
    n, b, length, d = sizes
    noise = torch.Generator().manual_seed(d)
    u, weight, dv = (
        torch.randn(shape, generator=noise).to(dtype) for shape in ((b, length, d), (n, d), (b, length, d))
    )
    taken = by_kernel.kernel_serves(u.to(device))
    way = by_kernel.causal_taps if device.type == "cuda" else _convolved
    found = with_gradients(way, [u.to(device), weight.to(device)], dv.to(device))
    truth = with_gradients(_convolved, [u.double(), weight.double()], dv.double())
    row = compared(("v", "du", "dweight"), found, truth, BOUND[str(dtype).removeprefix("torch.")])
    return row | {"taken": taken, "ok": row["ok"] and taken == (device.type == "cuda")}


def _convolved(u: Tensor, weight: Tensor) -> Tensor:
    n, d = weight.shape
    return F.conv1d(F.pad(u.mT, (n - 1, 0)), weight.flip(0).t()[:, None], groups=d).mT
