"""N ranks equal one: the same weights, losses, gradients and updates whatever the mesh and the ZeRO stage."""

from __future__ import annotations

import copy
import math
import os
import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megassm.config.model import ModelConfig
from megassm.model import LanguageModel, build_model, initial_weights, losses_at, parameter_shapes
from megassm.parallel.mesh import Mesh
from megassm.parallel.sequence import split_sequence
from megassm.parallel.tensor import WeightSlice, build_split_model, weight_slices
from tests.ranks import run_on_ranks

BASE: dict[str, Any] = {
    "vocab_size": 51, "d_model": 24, "n_layers": 2, "pattern": "SA", "seq_len": 256, "num_channels": 8,
    "n_heads": 4, "n_kv_heads": 2, "d_ffn": 34,
}  # fmt: skip
ELASTIC: dict[str, Any] = {"d_ffn": 77, "ffn_elastic": {"knee_k": 3, "below": 16, "above": 8}}
"""Widths that no number of ranks divides."""


def gradients(config: ModelConfig, mesh: Mesh, budgets: list[int]) -> tuple[list[Any], dict[str, Any]]:
    """(losses (B, L) at each budget, whole gradients of their sum) computed by the ranks of `mesh`."""
    model, ids_BT, _, (tensor, sequence) = split(config, mesh)
    parts = [losses_at(model, ids_BT, k) for k in budgets]
    torch.stack(parts).sum().backward()  # type: ignore[no-untyped-call]
    losses = []
    for part in parts:
        pieces = [torch.empty_like(part) for _ in range(mesh.sequence)]
        dist.all_gather(pieces, part.detach(), group=sequence)
        losses.append(torch.cat(pieces, dim=1))
    parts, shapes = (
        [weight_slices(config, mesh.tensor, other) for other in range(mesh.tensor)],
        parameter_shapes(config),
    )
    whole = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        dist.all_reduce(parameter.grad, group=sequence)
        whole[name] = gathered(parameter.grad, [part[name] for part in parts], shapes[name], tensor)
    dist.destroy_process_group()
    # as arrays: a tensor in a queue needs its sender alive
    return [part.numpy() for part in losses], {name: value.numpy() for name, value in whole.items()}


def gathered(part: Tensor, of: list[WeightSlice], shape: torch.Size, group: dist.ProcessGroup) -> Tensor:
    """The whole of what each tensor rank has a part of."""
    if of[0].axis is None:
        return part
    pieces: list[Any] = [None] * len(of)
    dist.all_gather_object(pieces, part, group=group)
    whole = part.new_empty(shape)
    for piece, other in zip(pieces, of, strict=True):
        other.of(whole).copy_(piece)
    return whole


def split(config: ModelConfig, mesh: Mesh) -> tuple[LanguageModel, Tensor, int, list[dist.ProcessGroup]]:
    """This rank's part of a model and of its ids (B, T), the rank, its tensor and sequence group."""
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    groups = [dist.new_subgroups_by_enumeration(g)[0] for g in (mesh.tensor_groups(), mesh.sequence_groups())]
    model = build_split_model(config, initial_weights(config, seed=3), groups[0])
    split_sequence(model, groups[1])
    share = config.seq_len // mesh.sequence
    first = mesh.coordinates(rank).sequence * share
    return model, tokens(config)[:, first : first + share + 1], rank, groups


@torch.no_grad()
def copies(config: ModelConfig, mesh: Mesh) -> list[bool]:
    model, ids_BT, _, _ = split(config, mesh)
    before = losses_at(model, ids_BT, 3)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    same = [torch.equal(losses_at(other, ids_BT, 3), before) for other in (copied, pickled)]
    for parameter in copied.parameters():
        parameter.zero_()
    unknowing = torch.full_like(before, math.log(config.vocab_size))
    same += [torch.allclose(losses_at(copied, ids_BT, 3), unknowing), torch.equal(losses_at(model, ids_BT, 3), before)]
    dist.destroy_process_group()
    return same


@pytest.mark.ranks
@pytest.mark.parametrize("changes", [ELASTIC, {"n_kv_heads": 1, "n_heads": 4}], ids=["elastic", "mqa"])
def test_a_split_model_is_copied_and_pickled_with_its_weights(changes: dict[str, Any]) -> None:
    answers = run_on_ranks(4, copies, ModelConfig(**(BASE | changes)), Mesh(1, 2, 2))
    assert answers == [[True] * 4] * 4, "copy, pickle, a copy's own weights, the first one's untouched"


def tokens(config: ModelConfig) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, config.vocab_size, (2, config.seq_len + 1), generator=generator)


@pytest.mark.ranks
@pytest.mark.parametrize(
    "changes",
    [
        ELASTIC,
        {"n_kv_heads": 1, "window": 20, "tie_embeddings": False, "basis": "hankel_l", "num_channels": 9},
        {"mixer_heads": 4, "gate": "sigmoid", "input_taps": 4, "basis": "alternating"},
        {"mixer_heads": 4, "gate": "sigmoid", "selective": True},
    ],
    ids=["gqa", "mqa", "heads", "selective"],
)
@pytest.mark.parametrize("mesh", [Mesh(1, 1, 2), Mesh(1, 1, 4), Mesh(1, 2, 1), Mesh(1, 4, 1), Mesh(1, 2, 2)], ids=str)
def test_gradients_equal_those_of_one_process(mesh: Mesh, changes: dict[str, Any]) -> None:
    if changes.get("selective") and mesh.sequence > 1:
        pytest.skip("the configuration refuses it")
    config, budgets = ModelConfig(**(BASE | changes)), [8, 3]
    model = build_model(config, seed=3)
    ids_BT = tokens(config)
    truth = [losses_at(model, ids_BT, k) for k in budgets]
    torch.stack(truth).sum().backward()  # type: ignore[no-untyped-call]
    answers = run_on_ranks(mesh.size, gradients, config, mesh, budgets)
    for losses, whole in answers:
        for mine, true in zip(losses, truth, strict=True):
            assert torch.allclose(torch.from_numpy(mine), true, atol=1e-5)
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None
            error = (torch.from_numpy(whole[name]) - parameter.grad).norm() / parameter.grad.norm()
            assert error < 1e-5, (name, float(error))
    for _, whole in answers[1:]:
        for name, gradient in whole.items():
            if weight_slices(config, mesh.tensor, 0)[name].axis is None and mesh.sequence == 1:
                assert (gradient == answers[0][1][name]).all(), f"replicated {name} would drift apart"
