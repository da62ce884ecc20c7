"""A job's state put together for a save: whole, once, and with as few messages as the ranks' shares allow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from megassm.config.schema import Config
from megassm.model import initial_weights, parameter_shapes
from megassm.optim import parameter_groups
from megassm.parallel import collect
from megassm.parallel.collect import Home, Piece, choose_homes
from megassm.parallel.engine import Engine
from megassm.parallel.state import KINDS
from megassm.parallel.world import join_world, leave_world
from megassm.plan.dryrun import zero_shares
from tests.ranks import run_on_ranks

Make = Callable[..., Config]


def test_a_parameter_is_at_home_where_most_of_it_lies() -> None:
    row = {"a": [[Piece(0, 9), Piece(9, 1)]], "b": [[Piece(0, 0), Piece(0, 3)]], "c": [[Piece(0, 2), Piece(2, 2)]]}
    assert choose_homes(row, {"a": 10, "b": 3, "c": 4}) == {"a": Home(0, 0), "b": Home(1, 0), "c": Home(1, 0)}


def test_what_all_hold_is_shared_out() -> None:
    sizes = {"a": 9, "b": 5, "c": 4, "d": 1}
    all_of_it = {name: [[Piece(0, size)] * 2] * 2 for name, size in sizes.items()}
    homes = choose_homes(all_of_it, sizes)
    assert sorted(homes.values()) == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert homes["a"] != homes["b"]


def collected(configs: list[Config]) -> list[tuple[dict[str, Any], dict[str, float], int]]:
    """By configuration, (weights at home here before an update, moments' sums after it, numbers sent away)."""
    found, sent, send = [], [0], collect.dist.send

    def counted(tensor: Tensor, **where: Any) -> None:
        sent[0] += tensor.numel()
        send(tensor, **where)

    collect.dist.send = counted
    try:
        for config in configs:
            engine = Engine(config, join_world(config))
            length = config.model.seq_len // engine.world.mesh.sequence
            ids = torch.arange(length + 1).repeat(config.train.micro_batch_sequences, 1)
            for _ in range(engine.micro_steps):
                nll_BL = engine.losses(ids, 8)
                engine.backward(nll_BL, torch.ones_like(nll_BL, dtype=torch.bool))
            before = engine.read_state(KINDS)
            weights = {name: state["weight"].clone().numpy() for name, state in before.items()}
            engine.update(1e-2)
            sent[0] = 0
            after = engine.read_state(KINDS, before)
            assert all(after[name][kind] is state[kind] for name, state in before.items() for kind in KINDS)
            changed = {name: state["exp_avg"].abs().sum().item() for name, state in after.items()}
            found.append((weights, changed, sent[0]))
    finally:
        collect.dist.send = send
        leave_world()
    return found


@pytest.mark.ranks
def test_every_number_comes_home_once(small_config: Make) -> None:
    common = ("model.pattern=SA", "model.mixer_heads=4", "model.d_ffn=99", "train.micro_batch_sequences=1",
              "model.ffn_elastic={knee_k: 3, below: 16, above: 8}")  # fmt: skip
    cases = [
        ("parallel.zero_stage=0",),
        ("parallel.zero_stage=1",),
        ("parallel.zero_stage=1", "train.precision=bf16"),
        ("parallel.zero_stage=2", "parallel.sequence=2", "model.seq_len=128"),
        ("parallel.zero_stage=3",),
        ("parallel.zero_stage=1", "parallel.tensor=2", "train.precision=bf16"),
        ("parallel.zero_stage=3", "parallel.tensor=2"),
        ("parallel.zero_stage=0", "parallel.tensor=4"),
    ]
    configs = [small_config(*common, *knobs, world_size=4) for knobs in cases]
    ranks = run_on_ranks(4, collected, configs)
    for number, config in enumerate(configs):
        truth = dict(initial_weights(config.model, config.run.seed))
        homes = [rank[number][0] for rank in ranks]
        assert sorted(name for home in homes for name in home) == sorted(truth)
        for home in homes:
            for name, weight in home.items():
                own = truth[name].bfloat16().float() if config.train.precision == "bf16" else truth[name]
                assert torch.equal(torch.from_numpy(weight), own), (config.parallel, name)
        assert all(moved > 0 for rank in ranks for moved in rank[number][1].values())
        if config.parallel.tensor == 1:
            assert sum(rank[number][2] for rank in ranks) == len(KINDS) * away(config), config.parallel


def away(config: Config) -> int:
    """Numbers that do not lie where most of their parameter does."""
    shapes = parameter_shapes(config.model)
    total = 0
    for group in parameter_groups(shapes, config.model.width_factor, config.optim.weight_decay):
        for name, shares in zero_shares(config.parallel.zero_stage, [(n, shapes[n].numel()) for n in group.names], 4):
            total += shapes[name].numel() - max(stop - start for start, stop in shares)
    return total
