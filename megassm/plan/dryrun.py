"""A job of any size in one process, before it is started: its groups, what its ranks hold, whether that is all.

Nothing is allocated and nothing is sent: models stand on the meta device, process groups are torch's fake ones.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megassm.config.schema import Config
from megassm.errors import UserError
from megassm.model import LanguageModel, parameter_shapes
from megassm.optim import parameter_groups
from megassm.parallel.mesh import Mesh, mesh_of
from megassm.parallel.sequence import split_sequence
from megassm.parallel.tensor import WeightSlice, build_split_model, weight_slices

FLAT_ALIGNMENT = 2
"""Numbers that DeepSpeed's stages 1 and 2 align a rank's flat share to."""

Interval = tuple[int, int]


def dry_run(config: Config, world_size: int) -> dict[str, Any]:
    """Facts about the job, for people; `config` has no violations at this world size.

    Raises:
        UserError: groups or shards that do not cover the job exactly once: a mistake of this program.
    """
    mesh = mesh_of(config, world_size)
    check_groups(mesh)
    sizes = [check_rank(config, mesh, shapes_of(meta_model(config, mesh, rank)), rank) for rank in range(mesh.tensor)]
    check_tensor_parts(config, mesh.tensor)
    shares = [size / (1 if config.parallel.zero_stage == 0 else mesh.replicas) for size in sizes]
    return {
        "ranks": world_size,
        "mesh": f"data {mesh.data} x sequence {mesh.sequence} x tensor {mesh.tensor}",
        "ZeRO stage": config.parallel.zero_stage,
        "parameters": sum(shape.numel() for shape in parameter_shapes(config.model).values()),
        "parameters of a rank": max(sizes),
        "optimizer's share of them": round(max(shares)),
        "sequences a batch and data rank": config.train.batch_sequences // mesh.data,
        "tokens a batch and rank": config.tokens_per_step() // mesh.replicas,
        "micro-steps": config.micro_steps(mesh.data),
    }


def check_groups(mesh: Mesh) -> None:
    """Every kind of group must have every rank once, in groups of the axis' size."""
    kinds = {
        "tensor": (mesh.tensor_groups(), mesh.tensor),
        "sequence": (mesh.sequence_groups(), mesh.sequence),
        "replica": (mesh.replica_groups(), mesh.replicas),
        "reader": (mesh.reader_groups(), mesh.sequence * mesh.tensor),
    }
    for kind, (groups, size) in kinds.items():
        if sorted(itertools.chain(*groups)) != list(range(mesh.size)) or any(len(group) != size for group in groups):
            raise UserError(f"the {kind} groups of {mesh} do not divide its {mesh.size} ranks into groups of {size}")


def meta_model(config: Config, mesh: Mesh, rank: int) -> LanguageModel:
    """The model of a rank of the job's first tensor group, split as in a real job."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=mesh.size)
    try:
        tensor, sequence = (
            dist.new_group(next(group for group in groups if rank in group))
            for groups in (mesh.tensor_groups(), mesh.sequence_groups())
        )
        shapes = parameter_shapes(config.model)
        weights = ((name, torch.empty(shape, device="meta")) for name, shape in shapes.items())
        model = build_split_model(config.model, weights, tensor, config.train.recompute)
        split_sequence(model, sequence)
        return model
    finally:
        dist.destroy_process_group()


def shapes_of(model: LanguageModel) -> dict[str, torch.Size]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def check_tensor_parts(config: Config, ranks: int) -> None:
    """The parts of a parameter must cover it once; what is not divided is whole on every rank."""
    parts = [weight_slices(config.model, ranks, rank) for rank in range(ranks)]
    for name, shape in parameter_shapes(config.model).items():
        axis = parts[0][name].axis
        if axis is not None:
            _check_cover(name, [run for part in parts for run in _runs(part[name])], shape[axis])
        elif any(part[name].axis is not None for part in parts):
            raise UserError(f"{name}: whole on tensor rank 0, divided on another")


def _runs(part: WeightSlice) -> list[Interval]:
    return [(part.start, part.stop)] if part.step == 1 else [(index, index + 1) for index in part.indices]


def check_rank(config: Config, mesh: Mesh, shapes: dict[str, torch.Size], rank: int) -> int:
    """The shapes must be those of the rank's parts, and the replicas' shares must cover them; returns their numbers."""
    whole, parts = parameter_shapes(config.model), weight_slices(config.model, mesh.tensor, rank)
    for name, shape in whole.items():
        part = parts[name]
        expected = list(shape)
        if part.axis is not None:
            expected[part.axis] = len(part.indices)
        if name not in shapes or list(shapes[name]) != expected:
            raise UserError(f"{name}: tensor rank {rank} holds {shapes.get(name)}, not its part {expected}")
    numbers = {name: shape.numel() for name, shape in shapes.items()}
    for group in parameter_groups(shapes, config.model.width_factor, config.optim.weight_decay):
        shares = zero_shares(config.parallel.zero_stage, [(n, numbers[n]) for n in group.names], mesh.replicas)
        for name, intervals in shares:
            _check_cover(f"{name}, ZeRO shares", intervals, numbers[name])
    return sum(numbers.values())


def zero_shares(stage: int, numbers: Sequence[tuple[str, int]], replicas: int) -> Iterator[tuple[str, list[Interval]]]:
    """(a parameter, what each replica that has some of it updates) of one optimizer group, as DeepSpeed divides it.

    Stages 1 and 2 divide the group's parameters, one after another, into equal shares; stage 3 each for itself.
    """
    total = sum(size for _, size in numbers)
    unit = FLAT_ALIGNMENT * replicas
    share = -(-total // unit) * unit // replicas
    offset = 0
    for name, size in numbers:
        if stage == 0:
            yield name, [(0, size)]
        elif stage == 3:
            own = -(-size // replicas)
            yield name, [(start, min(start + own, size)) for start in range(0, size, own)]
        else:
            edges = [edge * share for edge in range(replicas + 1)]
            first, last = bisect.bisect_right(edges, offset) - 1, bisect.bisect_left(edges, offset + size)
            inside = [(max(edges[i], offset), min(edges[i + 1], offset + size)) for i in range(first, last)]
            yield name, [(start - offset, stop - offset) for start, stop in inside]
        offset += size


def _check_cover(what: str, intervals: Sequence[Interval], size: int) -> None:
    position = 0
    for start, stop in sorted(intervals):
        if start != position or stop < start:
            raise UserError(f"{what}: {start}..{stop} does not continue {position}: not everything exactly once")
        position = stop
    if position != size:
        raise UserError(f"{what}: {position} of {size} are held")
