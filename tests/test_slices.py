"""What is read of a checkpoint: each rank its own numbers, a file's checksum by one rank, damage seen by all."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from megassm.checkpoint import format
from megassm.checkpoint.tensors import CheckedTensor
from megassm.config.schema import Config
from megassm.data.dataset import open_dataset
from megassm.errors import UserError
from megassm.model import parameter_shapes
from megassm.parallel.engine import Engine
from megassm.parallel.slices import flat_blocks, read_flat
from megassm.parallel.tensor import WeightSlice, weight_slices
from megassm.parallel.world import join_world, leave_world
from megassm.run.events import Events
from megassm.train.resuming import checkpoint_to_continue, restore
from megassm.train.setup import enter, set_up
from tests.ranks import run_on_ranks
from tests.test_train import flip

Make = Callable[..., Config]
SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@given(data=st.data(), shape=SHAPES)
def test_blocks_are_the_numbers_one_after_another(data: st.DataObject, shape: list[int]) -> None:
    size = math.prod(shape)
    first = data.draw(st.integers(0, size))
    last = data.draw(st.integers(first, size))
    whole = torch.arange(size).view(shape)
    blocks = list(flat_blocks(shape, first, last))
    found = torch.cat([torch.empty(0), *(whole[block].flatten() for block in blocks)])
    assert found.tolist() == list(range(first, last))
    assert len(blocks) <= 2 * len(shape) - 1


@given(data=st.data(), shape=SHAPES, dealt=st.booleans())
def test_a_rank_reads_its_part_from_a_file(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject, shape: list[int], dealt: bool
) -> None:
    axis = data.draw(st.sampled_from([None, *range(len(shape))]))
    part = WeightSlice(None, 0, 0)
    if axis is not None:
        start = data.draw(st.integers(0, shape[axis] - 1))
        part = WeightSlice(axis, start, data.draw(st.integers(start + 1, shape[axis])), 2 if dealt else 1)
    whole = torch.randn(shape)
    path = tmp_path_factory.mktemp("file") / "tensor"
    save_file({"x": whole}, path)
    mine = part.of(whole)
    assert part.shape(whole.shape) == mine.shape
    first = data.draw(st.integers(0, mine.numel()))
    last = data.draw(st.integers(first, mine.numel()))
    with safe_open(path, framework="pt") as file:
        found = read_flat(file.get_slice("x"), part, mine.shape, first, last)
    assert torch.equal(found, mine.flatten()[first:last])


def save_once(config: Config) -> None:
    Path(config.run.dir).mkdir(parents=True, exist_ok=True)
    try:
        run = set_up(config, open_dataset(config), join_world(config))
        run.saver.begin(1)
        run.saver.finish()
    finally:
        leave_world()


class Counted:
    """What this rank reads of tensors and of files."""

    def __init__(self) -> None:
        self.numbers, self.files = 0, list[str]()
        piece, whole = CheckedTensor.__getitem__, format._crc32

        def read(tensor: CheckedTensor, block: Any) -> torch.Tensor:
            found = piece(tensor, block)
            self.numbers += found.numel()
            return found

        def crc(path: Path, *more: Any) -> int:
            self.files.append(path.name)
            return whole(path, *more)

        CheckedTensor.__getitem__, format._crc32 = read, crc  # type: ignore[method-assign]


def resume(configs: list[Config]) -> list[tuple[int, list[str], int]]:
    """By configuration, (numbers read of tensors, files read for their checksum, most numbers held at a time)."""
    counted, seen = Counted(), []
    try:
        for config in configs:
            world = join_world(config)
            fence, _ = enter(Path(config.run.dir), world)
            events = Events(Path(config.run.dir), False, fence)
            engine = Engine(config, world)
            before = counted.numbers, len(counted.files)
            checkpoint = checkpoint_to_continue(config, open_dataset(config).train.fingerprint, events, world)
            assert checkpoint is not None
            restore(engine, checkpoint, events)
            seen.append((counted.numbers - before[0], counted.files[before[1] :], checkpoint.manifest.step))
    finally:
        leave_world()
    return seen


@pytest.mark.ranks
def test_four_ranks_read_a_checkpoint_once(small_config: Make, tmp_path: Path) -> None:
    knobs = ("model.pattern=SA", "model.seq_len=128", "train.micro_batch_sequences=1", "model.vocab_size=260")
    first = small_config(*knobs, "parallel.zero_stage=1", "budget.draws=1", world_size=2)
    run_on_ranks(2, save_once, first)
    meshes = [("parallel.zero_stage=3",), ("parallel.zero_stage=1",), ("parallel.zero_stage=3", "parallel.tensor=2")]
    configs = [small_config(*knobs, *mesh, "budget.draws=1", world_size=4) for mesh in meshes]
    ranks = run_on_ranks(4, resume, configs)
    numbers = sum(shape.numel() for shape in parameter_shapes(first.model).values())
    small = sum(shape.numel() for shape in parameter_shapes(first.model).values() if shape.numel() < 4096)
    twice = sum(parameter_shapes(first.model)[name].numel()
                for name, part in weight_slices(first.model, 2, 0).items() if part.axis is None)  # fmt: skip
    expected = [3 * numbers, 3 * numbers + 3 * small, 3 * (numbers + twice)]
    assert [sum(rank[number][0] for rank in ranks) for number in range(3)] == expected
    for number in range(3):
        files = sorted(name for rank in ranks for name in rank[number][1])
        assert files == sorted(f"{kind}-0000{writer}-of-00002.safetensors" for kind in ("weights", "moments")
                               for writer in (1, 2)), "each by one rank"  # fmt: skip


def resume_from_damage(config: Config) -> tuple[int, list[str]]:
    world, said = join_world(config), list[str]()
    try:
        fence, _ = enter(Path(config.run.dir), world)
        events = Events(Path(config.run.dir), False, fence)
        events.add = lambda kind, step, text, **figures: said.append(text)  # type: ignore[method-assign]
        fingerprint = open_dataset(config).train.fingerprint
        checkpoint = checkpoint_to_continue(config, fingerprint, events, world)
        assert checkpoint is not None
        if int(os.environ["RANK"]) == 0:
            flip(next(checkpoint.folder.glob("weights-00002*")))
        world.progress.note("damaged")
        enter(Path(config.run.dir), world)
        with pytest.raises(UserError, match="has checkpoints, but none that can be continued"):
            checkpoint_to_continue(config, fingerprint, events, world)
        return checkpoint.manifest.step, said
    finally:
        leave_world()


@pytest.mark.ranks
def test_damage_that_one_rank_finds_is_passed_over_by_all(small_config: Make) -> None:
    config = small_config("parallel.zero_stage=1", world_size=2)
    run_on_ranks(2, save_once, config)
    folder = Path(config.run.dir) / "checkpoints"
    shutil.copytree(folder / "step-00000001", folder / "step-00000002")
    for step, said in run_on_ranks(2, resume_from_damage, config):
        assert step == 1
        assert len(said) == 3
        assert "step-00000002: holds step 1: not this run's, or renamed by hand" in said[0]
        assert "damaged: the checksum of weights-00002-of-00002.safetensors is not the manifest's" in said[2]
