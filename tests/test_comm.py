"""What a step sends, counted: every collective of a forward and backward pass, with its size."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megassm.config.model import ModelConfig
from megassm.model import LanguageModel, initial_weights, losses_at
from megassm.parallel.mesh import Mesh
from megassm.parallel.sequence import split_sequence
from megassm.parallel.tensor import build_split_model
from tests.ranks import run_on_ranks

B, L, D, K, V = 2, 256, 24, 5, 51
ONE_LAYER: dict[str, Any] = {
    "vocab_size": V, "d_model": D, "n_layers": 1, "seq_len": L, "num_channels": 8, "n_heads": 4, "d_ffn": 34,
}  # fmt: skip

Sent = list[tuple[str, int]]
"""(collective, elements that this rank contributes), in order."""


@contextmanager
def recorded() -> Iterator[Sent]:
    """What this process hands to torch.distributed meanwhile."""
    sent: Sent = []
    contributions: dict[str, Callable[..., Tensor]] = {
        "all_reduce": lambda tensor, *_: tensor,
        "all_gather": lambda _, tensor, *__: tensor,
        "all_gather_into_tensor": lambda _, tensor, *__: tensor,
        "all_to_all_single": lambda _, tensor, *__: tensor,
        "all_to_all": lambda _, tensors, *__: torch.cat([tensor.flatten() for tensor in tensors]),
        "reduce_scatter": lambda _, tensors, *__: torch.cat([tensor.flatten() for tensor in tensors]),
        "reduce_scatter_tensor": lambda _, tensor, *__: tensor,
        "broadcast": lambda tensor, *_: tensor,
        "send": lambda tensor, *_: tensor,
        "isend": lambda tensor, *_: tensor,
        "batch_isend_irecv": lambda operations: torch.cat([operation.tensor.flatten() for operation in operations]),
    }
    whole = {name: getattr(dist, name) for name in contributions}

    def recorder(name: str) -> Callable[..., Any]:
        def collective(*arguments: Any, **options: Any) -> Any:
            sent.append((name, contributions[name](*arguments).numel()))
            return whole[name](*arguments, **options)

        return collective

    try:
        for name in contributions:
            setattr(dist, name, recorder(name))
        yield sent
    finally:
        for name, function in whole.items():
            setattr(dist, name, function)


def steps(cases: list[tuple[str, Mesh]]) -> list[dict[str, Sent]]:
    """For each (pattern, mesh), what one rank sends."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    try:
        return [step(*case) for case in cases]
    finally:
        dist.destroy_process_group()


def step(pattern: str, mesh: Mesh) -> dict[str, Sent]:
    """What one rank sends forward and backward: in the whole model, in its mixer, in its loss."""
    config = ModelConfig(**ONE_LAYER, pattern=pattern)
    tensor, sequence = (
        dist.new_subgroups_by_enumeration(groups)[0] for groups in (mesh.tensor_groups(), mesh.sequence_groups())
    )
    model = build_split_model(config, initial_weights(config, seed=3), tensor)
    split_sequence(model, sequence)
    length = L // mesh.sequence
    ids_BT = torch.randint(0, V, (B, length + 1), generator=torch.Generator().manual_seed(int(os.environ["RANK"])))
    with recorded() as sent:
        found = parts(model, ids_BT, sent)
    return found | {"states": [("size", model.filterbank.state_size if model.filterbank else 0)]}


def parts(model: LanguageModel, ids_BT: Tensor, sent: Sent) -> dict[str, Sent]:
    found: dict[str, Sent] = {}

    def take(name: str) -> None:
        found[name] = sent.copy()
        sent.clear()

    loss = losses_at(model, ids_BT, K).sum()
    take("forward")
    loss.backward()
    take("backward")
    x_BLD = torch.randn(*ids_BT[:, 1:].shape, D, requires_grad=True)
    y_BLD = model.blocks[0].mixer(x_BLD, model.context(0, x_BLD.shape[1], K))  # type: ignore[operator, union-attr]
    take("mixer forward")
    y_BLD.sum().backward()
    take("mixer backward")
    losses = model.token_losses(model.logits(x_BLD), ids_BT[:, 1:])
    take("loss forward")
    losses.sum().backward()
    take("loss backward")
    return found


Pairs = dict[tuple[str, str], list[dict[str, Sent]]]
PAIR = {"tensor": Mesh(1, 1, 2), "sequence": Mesh(1, 2, 1)}


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    """By pattern and axis, what each of two ranks sends."""
    cases = [(pattern, axis) for pattern in "SA" for axis in PAIR]
    answers = run_on_ranks(2, steps, [(pattern, PAIR[axis]) for pattern, axis in cases])
    return {case: list(ranks) for case, *ranks in zip(cases, *answers, strict=True)}


@pytest.mark.ranks
def test_tensor_ranks_send_one_sum_a_layer_each_way(pairs: Pairs) -> None:
    for sent in pairs["S", "tensor"]:
        assert sent["mixer forward"] == [("all_reduce", B * L * D)]
        assert sent["mixer backward"] == [("all_reduce", B * L * (D + K))], "the gate's K gradients ride along"
        # the loss: greatest logit; sum of exponentials and the target's; backward, the gradient of its input
        assert sent["loss forward"] == [("all_reduce", B * L), ("all_reduce", 2 * B * L)]
        assert sent["loss backward"] == [("all_reduce", B * L * D)]
        # embedding, mixer, feed-forward, loss
        assert sent["forward"] == [("all_reduce", B * L * D)] * 3 + sent["loss forward"]
        assert sent["backward"] == [("all_reduce", n) for n in (B * L * D, B * L * D, B * L * (D + K))]


@pytest.mark.ranks
def test_tensor_ranks_with_attention(pairs: Pairs) -> None:
    for sent in pairs["A", "tensor"]:
        assert sent["mixer forward"] == sent["mixer backward"] == [("all_reduce", B * L * D)]


@pytest.mark.ranks
def test_sequence_ranks_send_one_state_a_spectral_layer_each_way(pairs: Pairs) -> None:
    for sent in pairs["S", "sequence"]:
        state = B * sent["states"][0][1] * D
        assert 0 < state < B * (L // 2) * D
        for part in ("forward", "backward", "mixer forward", "mixer backward"):
            assert sent[part] == [("all_gather", state)], part
        assert sent["loss forward"] == sent["loss backward"] == []


@pytest.mark.ranks
def test_sequence_ranks_with_attention_exchange_heads_only(pairs: Pairs) -> None:
    for sent in pairs["A", "sequence"]:
        for part in ("forward", "backward", "mixer forward", "mixer backward"):
            # query, key and value one way, the result the other
            assert sent[part] == [("all_to_all_single", B * (L // 2) * D)] * 4, part


@pytest.mark.ranks
def test_on_a_mesh_of_both_each_axis_sends_what_it_sends_alone() -> None:
    half, own = L // 2, D // 2
    for (sent,) in run_on_ranks(4, steps, [("S", Mesh(1, 2, 2))]):
        state = B * sent["states"][0][1] * own
        assert sent["mixer forward"] == [("all_gather", state), ("all_reduce", B * half * D)]
        assert sorted(sent["mixer backward"]) == [("all_gather", state), ("all_reduce", B * half * (D + K))]
