"""Blocks compiled for training: the same numbers, whole graphs, and none made again once every budget has been seen.

The compiler's last stage, which makes C++ or Triton, is left out: it takes minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.library import opcheck

from megassm.config.schema import Config
from megassm.errors import UserError
from megassm.layers.block import Block
from megassm.layers.compiled import compile_blocks
from megassm.model import LanguageModel, build_model, losses_at
from megassm.ops import filterbank, mixing
from megassm.ops.filterbank import ChunkTables
from megassm.parallel import engine
from megassm.parallel.mesh import Mesh
from megassm.run.journal import read_records
from megassm.train.channels import gate_masses
from tests.ranks import run_on_ranks
from tests.test_engine import HYBRID, Curve, check_curve, curves, on_mesh
from tests.test_mixing import noise
from tests.test_model import config
from tests.test_resume import configured, train_legs

Make = Callable[..., Config]
BACKEND = "aot_eager_decomp_partition"
"""All of the compiler but its code."""
END = 7
PAPER = (
    "budget.strategy=paper",
    "budget.budgets=[2,5]",
    "budget.full_every=3",
    "train.steps=6",
    "optim.warmup_steps=1",
)


def blocks(model: LanguageModel) -> list[Block]:
    return cast(list[Block], list(model.blocks))


def gradients(model: LanguageModel, ids: torch.Tensor, k: int, document_end: int | None) -> list[torch.Tensor]:
    losses = losses_at(model, ids, k, document_end)
    return [losses.detach(), *torch.autograd.grad(losses.mean(), list(model.parameters()))]


@pytest.mark.parametrize(
    ("changes", "recompute"),
    [
        ({}, False),
        ({"mixer_heads": 2, "gate": "sigmoid", "input_taps": 3, "window": 20, "beyond": "window", "d_ffn": 60,
          "ffn_elastic": {"knee_k": 3, "below": 16, "above": 8}, "selective": True}, True),
    ],
)  # fmt: skip
def test_losses_and_gradients_are_those_of_the_layers(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], recompute: bool
) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    torch._dynamo.reset()
    counters.clear()
    plain, compiled = (build_model(config(seq_len=160, **changes), 0, again) for again in (False, recompute))
    compile_blocks(blocks(compiled), 2, BACKEND)
    generator = torch.Generator().manual_seed(0)

    def check(k: int, ends: int) -> None:
        ids = torch.randint(10, 50, (2, 161), generator=generator)
        ids[:, torch.randperm(160, generator=generator)[:ends]] = END
        for document_end in (None, END) if recompute else (None,):
            found, expected = (gradients(model, ids, k, document_end) for model in (compiled, plain))
            for mine, other in zip(found, expected, strict=True):
                assert torch.allclose(mine, other, atol=1e-6, rtol=1e-4), (k, ends, document_end)

    for k in (2, 5):
        check(k, 3)
    made = counters["stats"]["unique_graphs"]
    with torch.compiler.set_stance("fail_on_recompile"):
        for k, ends in ((2, 0), (5, 1), (5, 9), (2, 1), (2, 159)):
            check(k, ends)
    assert counters["stats"]["unique_graphs"] == made
    assert not counters["graph_break"]
    # spectral layers at each budget; attention layers where their feed-forward layer has another width; documents
    assert made == (2 * (2 + 2) if recompute else 2 + 1)


def test_validation_hears_the_gates_of_a_compiled_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    model = build_model(config(), 0)
    compile_blocks(blocks(model), 1, BACKEND)
    ids = torch.randint(0, 50, (1, 25))
    losses_at(model, ids, 4)
    model.eval()
    with torch.no_grad(), gate_masses(model) as masses:
        losses_at(model, ids, 4)
    assert masses.mean().sum(1) == pytest.approx(1)


def test_a_compiler_that_is_switched_off_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.raises(UserError, match=r"train\.compile = true, but .* TORCHDYNAMO_DISABLE = 1 .* unset it, or set"):
        compile_blocks(blocks(build_model(config(), 0)), 1)


@pytest.mark.parametrize("heads", [1, 3])
def test_the_product_as_a_node(monkeypatch: pytest.MonkeyPatch, heads: int) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    z, rows = noise(3, 6, 4 * heads).requires_grad_(), noise(5, 7, 6)
    weights, channels = noise(3, 5, heads, 7).requires_grad_(), noise(7, 4 * heads, 3).requires_grad_()
    opcheck(mixing.product_node, (z, rows, weights, channels))
    found, expected = (form(z, rows, weights, channels) for form in (mixing.product_node, mixing.gated_product))
    assert torch.equal(found, expected)
    given = [z, weights, channels]
    pairs = zip(*(torch.autograd.grad(y.square().sum(), given) for y in (found, expected)), strict=True)
    assert all(torch.equal(mine, other) for mine, other in pairs)


@pytest.mark.parametrize("length", [1, 8, 37])
def test_the_states_as_a_node(monkeypatch: pytest.MonkeyPatch, length: int) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    u, transition, inputs = noise(2, length, 3).requires_grad_(), noise(5, 5) / 3, noise(5, 8)
    tables = ChunkTables(transition, inputs, inputs)
    opcheck(filterbank.inputs_node, (u, transition, inputs, transition))
    found, expected = filterbank.inputs_node(u, transition, inputs, transition), filterbank.chunk_inputs(u, tables)
    assert torch.equal(found, expected)
    mine, other = (torch.autograd.grad(z.square().sum(), u)[0] for z in (found, expected))
    assert torch.allclose(mine, other, rtol=1e-12, atol=1e-12)


def compiled_curves(configs: list[Config]) -> tuple[list[Curve], int, int]:
    """`curves`, graphs made and breaks."""
    from torch._dynamo.utils import counters

    engine.compile_blocks = partial(compile_blocks, backend=BACKEND)
    return curves(configs), counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


@pytest.mark.long
@pytest.mark.ranks
def test_on_ranks_and_with_every_stage(small_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    more = (*PAPER, "budget.distill_weight=0.5")
    truth = run_on_ranks(1, curves, [on_mesh(small_config, Mesh(1, 1, 1), 0, HYBRID, *more)])[0][0]
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    cases = [(Mesh(2, 1, 1), 2, ()), (Mesh(2, 1, 1), 3, ("train.recompute=true",)), (Mesh(1, 1, 2), 1, ())]
    configs = [
        on_mesh(small_config, mesh, stage, HYBRID, *more, *own, "train.compile=true") for mesh, stage, own in cases
    ]
    found, graphs, breaks = run_on_ranks(2, compiled_curves, configs)[0]
    for case, curve in zip(cases, found, strict=True):
        check_curve(curve, truth, case)
    assert breaks == 0
    # of two kinds of layer: three budgets, and the teacher's without gradients
    assert graphs == len(cases) * 2 * (3 + 1)


def compiled_legs(legs: list[tuple[Config, int]]) -> None:
    engine.compile_blocks = partial(compile_blocks, backend=BACKEND)
    train_legs(legs)


@pytest.mark.ranks
def test_a_resumed_run_is_the_same_to_the_last_bit(
    small_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    own = (*PAPER, "budget.draws=2", "train.compile=true")
    whole, parts = (
        configured(small_config, (Mesh(1, 1, 1), 1, 0), *own, f"run.dir={tmp_path / name}")
        for name in ("whole", "parts")
    )
    run_on_ranks(1, compiled_legs, [(whole, 6), (parts, 3), (parts, 6)])
    expected, found = (read_records(Path(each.run.dir)) for each in (whole, parts))
    assert len(found) == 6
    assert [row["loss"] for row in found] == [row["loss"] for row in expected]
