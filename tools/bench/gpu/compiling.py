"""What torch's compiler makes on the device: attention by blocks, and whole blocks compiled for training."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from megassm.config.model import ModelConfig
from megassm.layers.attention import attend, attention_mask
from megassm.layers.block import Block
from megassm.layers.compiled import compile_blocks
from megassm.model import build_model
from megassm.ops import flex
from megassm.ops.kernel_check import with_gradients
from tools.bench.gpu.cases import case_by_case, compared
from tools.bench.gpu.checks import cast_parameters, losses_and_gradients
from tools.bench.gpu.plan import Found, Plan

SEEN = (
    ("bfloat16", 1000, 64, 200, True), ("float32", 640, 64, None, True), ("bfloat16", 1024, 128, 130, False),
)  # fmt: skip
"""Dtype, length, dimensions of a head, window, whether documents are kept apart; each compiles for tens of seconds."""
BOUND = {"bfloat16": 2e-2, "float32": 1e-3}
END = 0
BUDGETS = (2, 5)


def attention(plan: Plan, _folder: Path) -> Iterator[Found]:
    """FlexAttention in windows and documents: whether it is taken, its values and gradients against a dense mask in
    float64 on the CPU."""
    device = torch.device(plan.device)
    yield from case_by_case(
        (f"{dtype} L={length} P={p} window={window}{' documents' * apart}",
         partial(_attended, device, dtype, (length, p), window, apart))
        for dtype, length, p, window, apart in SEEN
    )  # fmt: skip


def _attended(device: torch.device, dtype: str, sizes: tuple[int, int], window: int | None, apart: bool) -> Found:
    length, p = sizes
    noise = torch.Generator().manual_seed(length)
    query, key, value, gradient = (
        torch.randn(2, heads, length, p, generator=noise).to(getattr(torch, dtype)) for heads in (4, 2, 2, 4)
    )
    begins = torch.rand(2, length, generator=noise) < torch.tensor([[0.005], [0.03]])
    documents = begins.cumsum(1) if apart else None
    on = [tensor.to(device) for tensor in (query, key, value)]
    documents_on = None if documents is None else documents.to(device)
    taken = flex.serves(on[0], length, p)
    mask = (
        flex.block_mask(length, window, documents_on, device)
        if device.type == "cuda"
        else attention_mask(length, window, documents, query)
    )
    found = with_gradients(partial(attend, mask=mask), on, gradient.to(device))
    exact = [tensor.double() for tensor in (query, key, value)]
    dense = attention_mask(length, window, documents, exact[0])
    truth = with_gradients(partial(attend, mask=dense), exact, gradient.double())
    row = compared(("y", "dquery", "dkey", "dvalue"), found, truth, BOUND[dtype])
    return row | {"taken": taken, "ok": row["ok"] and taken == (device.type == "cuda")}


def compiled(plan: Plan, _folder: Path, dtype: str) -> Iterator[Found]:
    """Losses and gradients of compiled blocks at two K, documents together and apart, against those of the layers one
    by one and the CPU's in float64; graphs made, their breaks, and whether one is made again for another batch."""
    from torch._dynamo.utils import counters

    device = torch.device(plan.device)
    config = ModelConfig(vocab_size=300, d_model=128, n_layers=4, pattern="SA", seq_len=640, num_channels=8, n_heads=4,
                         n_kv_heads=2, window=200, d_ffn=192, mixer_heads=4, gate="sigmoid", input_taps=3,
                         beyond="window")  # fmt: skip
    exact, plain, whole = (build_model(config, 3) for _ in range(3))
    cast_parameters(exact, torch.float64)
    for model in (plain, whole):
        cast_parameters(model.to(device), getattr(torch, dtype))
    ids = torch.randint(1, 300, (2, 641), generator=torch.Generator().manual_seed(1))
    ids[:, 70:600:41] = END
    kinds = [(k, end) for end in (None, END) for k in BUDGETS]
    backend = "inductor" if device.type == "cuda" else "aot_eager_decomp_partition"  # C++ takes minutes
    compile_blocks(cast(list[Block], list(whole.blocks)), len(BUDGETS), backend)

    def case(kind: tuple[int, int | None]) -> Found:
        by_layers, before = losses_and_gradients(plain, ids.to(device), *kind), counters["stats"]["unique_graphs"]
        found, made = losses_and_gradients(whole, ids.to(device), *kind), counters["stats"]["unique_graphs"] - before
        return _beside(found, by_layers, losses_and_gradients(exact, ids, *kind), dtype) | {"graphs": made}

    def again(kind: tuple[int, int | None]) -> Found:
        others = ids.flip(1).to(device)
        others[:, ::17] = END
        with torch.compiler.set_stance("fail_on_recompile"):
            begun = time.perf_counter()
            found = losses_and_gradients(whole, others, *kind)
        seconds = time.perf_counter() - begun
        return _beside(found, losses_and_gradients(plain, others, *kind), None, dtype) | {"step_s": round(seconds, 4)}

    cases = [(f"K={k}{' apart' * (end is not None)}{text}", partial(part, (k, end)))
             for text, part in (("", case), (", another batch", again)) for k, end in kinds]  # fmt: skip
    yield from case_by_case(cases)
    breaks = dict(counters["graph_break"])
    yield {"backend": backend, "breaks": breaks}
    if breaks:
        yield {"ok": False, "error": "graphs are broken"}


def _beside(
    found: tuple[Tensor, Tensor], by_layers: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor] | None, dtype: str
) -> Found:
    """Errors of compiled blocks beside the layers, and of both beside float64."""
    pairs = {"compiled, layers": (found, by_layers)}
    if exact is not None:
        pairs |= {"compiled, exact": (found, exact), "layers, exact": (by_layers, exact)}
    names = [f"{name}: {part}" for name in pairs for part in ("losses", "gradient")]
    mine, true = ([tensor for pair in pairs.values() for tensor in pair[side]] for side in (0, 1))
    return compared(names, mine, true, 5e-2 if dtype == "bfloat16" else BOUND[dtype])
