"""A model starts from the same weights on every mesh, each number drawn once, and no rank holds them all."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megassm import model
from megassm.config.load import load_config
from megassm.config.schema import Config
from megassm.eval.measure import peak_tensor_bytes
from megassm.layers import initial
from megassm.model import initial_weights, parameter_shapes
from megassm.parallel import engine
from megassm.parallel.engine import Engine
from megassm.parallel.start import ALONE, fill, shared_out
from megassm.parallel.tensor import WeightSlice, weight_slices
from megassm.parallel.world import join_world, leave_world
from tests.conftest import ROOT
from tests.ranks import first_of, run_on_ranks, whole_state

Make = Callable[..., Config]
SHAPES = st.lists(st.integers(1, 40), min_size=1, max_size=3)


@given(shape=SHAPES, block=st.integers(1, 2000))
def test_a_parameter_drawn_in_blocks_is_one_draw(shape: list[int], block: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(initial, "BLOCK_NUMBERS", block)
        counts = initial._row_counts(torch.Size(shape))
    assert sum(counts) == shape[0]
    one, blocks = (torch.Generator().manual_seed(3) for _ in range(2))
    drawn = torch.cat([torch.randn((rows, *shape[1:]), generator=blocks) for rows in counts])
    assert torch.equal(drawn, torch.randn(shape, generator=one))


def test_the_seed_says_every_weight(small_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config("model.pattern=SA").model
    monkeypatch.setattr(initial, "BLOCK_NUMBERS", 500)
    found = dict(initial_weights(config, seed=7))
    name = "blocks.0.mixer.channels_KDD"
    key = int.from_bytes(hashlib.sha256(f"7 {name}".encode()).digest()[:8], "little") >> 1
    whole = torch.randn(8, 32, 32, generator=torch.Generator().manual_seed(key))
    std = 1 / math.sqrt(32) / math.sqrt(2 * 2)
    assert torch.equal(found[name], whole * std)
    assert {name: value.shape for name, value in found.items()} == dict(parameter_shapes(config))


@given(data=st.data(), shape=SHAPES, step=st.integers(1, 3))
def test_a_part_is_filled_from_blocks(data: st.DataObject, shape: list[int], step: int) -> None:
    axis = data.draw(st.sampled_from([None, *range(len(shape))]))
    part = WeightSlice(None, 0, 0)
    if axis is not None:
        start = data.draw(st.integers(0, shape[axis] - 1))
        part = WeightSlice(axis, start, data.draw(st.integers(start + 1, shape[axis])), step)
    whole = torch.randn(shape)
    edges = sorted(data.draw(st.sets(st.integers(1, shape[0]), max_size=4)) | {0, shape[0]})
    target = torch.full(part.shape(whole.shape), float("nan"))
    fill(target, [whole[first:last] for first, last in pairwise(edges)], part)
    assert torch.equal(target, part.of(whole))


def test_work_is_shared_out_evenly() -> None:
    owner = shared_out({"a": 9, "b": 5, "c": 4, "d": 1}, 2)
    assert owner == {"a": 0, "b": 1, "c": 1, "d": 0}


def start(configs: list[Config]) -> list[tuple[dict[str, Tensor], int]]:
    """By configuration, (the weights as they are put together, numbers that this rank has drawn)."""
    drawn, whole = [0], initial.initial_blocks

    def counted(*arguments: object) -> Iterator[Tensor]:
        for block in whole(*arguments):  # type: ignore[arg-type]
            drawn[0] += block.numel()
            yield block

    model.initial_blocks = counted  # type: ignore[attr-defined]
    initial.BLOCK_NUMBERS = 3000
    found = []
    try:
        for config in configs:
            drawn[0] = 0
            engine = Engine(config, join_world(config))
            numbers = drawn[0]
            state = whole_state(engine, ["weight", "exp_avg"])
            assert not any(kinds["exp_avg"].any() for kinds in state.values())
            for name, parameter in engine.model.named_parameters():
                assert not parameter.is_meta, name
            found.append(({name: kinds["weight"].numpy() for name, kinds in state.items()}, numbers))
    finally:
        leave_world()
    return found


@pytest.mark.ranks
def test_every_mesh_starts_from_the_same_weights_and_draws_each_once(small_config: Make) -> None:
    common = ("model.pattern=SA", "model.seq_len=128", "model.vocab_size=260", "train.micro_batch_sequences=1",
              "model.mixer_heads=4", "model.d_ffn=99",
              "model.ffn_elastic={knee_k: 3, below: 16, above: 8}")  # fmt: skip
    cases = [
        (4, ("parallel.zero_stage=3",)),
        (4, ("parallel.zero_stage=3", "parallel.tensor=2", "train.precision=bf16")),
        (4, ("parallel.zero_stage=1", "parallel.sequence=2", "train.precision=bf16")),
        (4, ("parallel.zero_stage=0", "parallel.tensor=2")),
    ]
    configs = [small_config(*common, *knobs, world_size=ranks) for ranks, knobs in cases]
    truth = dict(initial_weights(configs[0].model, configs[0].run.seed))
    ranks = run_on_ranks(4, start, configs)
    for number, config in enumerate(configs):
        tensor = config.parallel.tensor
        bf16 = config.train.precision == "bf16"
        for found, _ in (rank[number] for rank in ranks):
            for name, value in truth.items():
                expected = value.bfloat16().float() if bf16 else value
                assert torch.equal(torch.from_numpy(found[name]), expected), (config.parallel, name)
        shapes, parts = parameter_shapes(config.model), weight_slices(config.model, tensor, 0)
        alone = {name for name, shape in shapes.items() if parts[name].shape(shape).numel() < ALONE}
        once = sum(shape.numel() for name, shape in shapes.items() if name not in alone)
        always = sum(shapes[name].numel() for name in alone)
        assert sum(rank[number][1] for rank in ranks) == tensor * once + 4 * always


def started_alone(config: Config, ranks: int) -> int:
    """The most bytes of tensors that live at a time while the first of many ranks makes its weights."""
    world, peaks, whole = first_of(config, ranks, torch.device("cpu")), list[int](), engine.start_weights

    def watched(*arguments: Any) -> None:  # the model stands on the meta device then
        peaks.append(peak_tensor_bytes([], lambda: whole(*arguments), world.device))

    engine.start_weights = watched
    Engine(config, world)
    return peaks[0]


@pytest.mark.ranks
def test_a_rank_of_many_holds_its_share_and_one_parameter() -> None:
    ranks = 64
    small = ("model.n_layers=4", "model.vocab_size=2000", "parallel.zero_stage=3", "train.device=cpu", "data.path=x")
    config = load_config(ROOT / "configs/1b_hybrid.yaml", small, ranks)
    numbers = [shape.numel() for shape in parameter_shapes(config.model).values()]
    (peak,) = run_on_ranks(1, started_alone, config, ranks)
    drawn = 40_000_000  # blocks of numbers in float32
    assert 2 * max(numbers) < peak < 2 * (max(numbers) + sum(numbers) / ranks) + drawn
