"""Learning rate schedules and parameter groups."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import nn

from megassm.config.model import ModelConfig
from megassm.config.schema import Config, OptimConfig
from megassm.model import build_model, parameter_shapes
from megassm.optim import build_optimizer, learning_rate, parameter_groups
from megassm.parallel.engine import Engine
from megassm.parallel.world import join_world, leave_world
from tests.ranks import run_on_ranks, whole_state

Make = Callable[..., Config]


def rates(config: Config) -> list[float]:
    return [learning_rate(config.optim, config.train, step) for step in range(config.train.steps)]


def test_cosine(small_config: Make) -> None:
    values = rates(small_config("train.steps=100", "optim.warmup_steps=10", "optim.lr=1.0", "optim.min_lr_ratio=0.1"))
    assert values[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert values[10] == pytest.approx(1.0)
    assert values[55] == pytest.approx(0.55)
    assert values[-1] == pytest.approx(0.1, abs=0.01)
    assert values[10:] == sorted(values[10:], reverse=True)


def test_warmup_stable_decay(small_config: Make) -> None:
    values = rates(
        small_config("train.steps=100", "optim.warmup_steps=10", "optim.lr=1.0", "optim.min_lr_ratio=0.0",
                     "optim.schedule=wsd", "optim.decay_steps=20")
    )  # fmt: skip
    assert values[10:81] == pytest.approx([1.0] * 71)
    assert values[80:] == pytest.approx([1 - i / 20 for i in range(20)])


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (2, 1), (5, 2), (40, 20), (41, 40), (100, 40)])
def test_a_trial_shorter_than_the_warm_up_warms_up_for_half_of_it(small_config: Make, steps: int, warmup: int) -> None:
    config = small_config(f"train.steps={steps}", "optim.warmup_steps=40", "optim.lr=1.0")
    assert rates(config)[:warmup] == pytest.approx([(i + 1) / warmup for i in range(warmup)])
    assert rates(config)[warmup] == pytest.approx(1.0)
    assert config.full_budget_steps() == warmup


def test_only_matrices_decay(small_config: Make) -> None:
    config = small_config("optim.weight_decay=0.3")
    model = build_model(config.model, 0)
    decayed, plain = build_optimizer(model, config.model.width_factor, config.optim).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert all(p.ndim < 2 for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))


def wide(d_model: int, base_width: int | None, **changes: object) -> ModelConfig:
    base: dict[str, object] = {
        "vocab_size": 50, "d_model": d_model, "n_layers": 2, "pattern": "SA", "seq_len": 32, "num_channels": 4,
        "n_heads": d_model // 8, "d_ffn": 3 * d_model, "base_width": base_width,
    }  # fmt: skip
    return ModelConfig(**(base | changes))  # type: ignore[arg-type]


def test_mup_groups_hold_every_parameter_once_and_decay_alike() -> None:
    config = wide(64, 16, tie_embeddings=False)
    shapes = parameter_shapes(config)
    groups = parameter_groups(shapes, config.width_factor, 0.2)
    assert sorted(itertools.chain(*(group.names for group in groups))) == sorted(shapes)
    factors = {name: group.lr_factor for group in groups for name in group.names}
    scaled = {name for name, factor in factors.items() if factor == 0.25}
    assert "head_norm.weight" in scaled
    assert {"embedding_VD", "head_VD"}.isdisjoint(scaled)
    assert all((len(shape) == 1) != (name in scaled) for name, shape in shapes.items()
               if name not in ("embedding_VD", "head_VD", "head_norm.weight"))  # fmt: skip
    for group in groups:
        matrices = all(len(shapes[name]) >= 2 for name in group.names)
        assert group.lr_factor * group.weight_decay == pytest.approx(0.2 if matrices else 0.0)


def test_mup_widens_by_heads_of_equal_width() -> None:
    """M_k of several heads has inputs of one head, however wide the model: its rate is that of the embedding."""
    config = wide(64, 16, mixer_heads=8)
    groups = parameter_groups(parameter_shapes(config), config.width_factor, 0.2)
    factors = {name: group.lr_factor for group in groups for name in group.names}
    assert factors["blocks.0.mixer.channels_KDD"] == 1
    assert factors["blocks.0.mixer.out_DD"] == factors["blocks.0.mixer.direct_DD"] == 0.25


def train_alone(config: ModelConfig, steps: int, lr: float, scaled_outside: float | None = None) -> list[float]:
    """Losses on one batch, before each update and after the last. With `scaled_outside`, muP as its paper has it: the
    gain is as any other vector, and the logits are multiplied."""
    model, optim = build_model(config, 0), OptimConfig(lr=lr)
    optimizer = build_optimizer(model, config.width_factor, optim)
    if scaled_outside is not None:
        nn.init.ones_(model.head_norm.weight)
        optimizer.param_groups[-1]["lr"] = lr
    ids_BT = torch.randint(0, 50, (4, 33), generator=torch.Generator().manual_seed(1))
    losses = []
    for _ in range(steps + 1):
        logits_BLV = model(ids_BT[:, :-1], 4) * (scaled_outside or 1.0)
        loss = nn.functional.cross_entropy(logits_BLV.flatten(0, 1), ids_BT[:, 1:].flatten())
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def test_a_small_gain_is_a_multiplier_of_the_logits() -> None:
    config = wide(32, 8)
    assert config.width_factor == 0.25
    ours, theirs = train_alone(config, 12, 1e-2), train_alone(config, 12, 1e-2, scaled_outside=0.25)
    assert ours[-1] < ours[0] - 0.3
    assert ours == pytest.approx(theirs, abs=1e-4)
    assert train_alone(wide(32, None), 12, 1e-2) != pytest.approx(ours, abs=1e-2)


@pytest.mark.parametrize("mup", [True, False])
def test_the_first_updates_learn_the_same_at_every_width_with_mup_alone(mup: bool) -> None:
    """The coordinate check of arXiv 2203.03466, on the loss: without muP a wide model overshoots."""
    for width in (None, 8):
        narrow, wider = (
            train_alone(wide(d, 32 if mup else None, mixer_heads=d // width if width else 1), 4, 1e-2)
            for d in (32, 256)
        )
        distance = max(abs(a - b) for a, b in zip(narrow, wider, strict=True))
        assert distance < 0.1 if mup else distance > 1.0


def largest_first_updates(configs: list[Config]) -> list[dict[str, float]]:
    """For each configuration: how far the first update of its engine moves a number of each parameter at most."""
    found = []
    try:
        for config in configs:
            engine = Engine(config, join_world(config))
            before = whole_state(engine, ["weight"])
            ids = torch.randint(0, config.model.vocab_size, (config.train.micro_batch_sequences, 65))
            for _ in range(engine.micro_steps):
                nll_BL = engine.losses(ids, config.model.num_channels)
                engine.backward(nll_BL, torch.ones_like(nll_BL, dtype=torch.bool))
            engine.update(1e-2)
            after = whole_state(engine, ["weight"])
            found.append({n: float((after[n]["weight"] - s["weight"]).abs().max()) for n, s in before.items()})
    finally:
        leave_world()
    return found


@pytest.mark.ranks
def test_every_stage_updates_by_the_groups_rates(small_config: Make) -> None:
    """Adam's first update moves a number by the learning rate, whatever the gradient."""
    base = ("model.base_width=8", "optim.weight_decay=0.0")
    configs = [small_config(*base, f"parallel.zero_stage={stage}") for stage in (0, 3)]
    for moved in run_on_ranks(1, largest_first_updates, configs)[0]:
        for group in parameter_groups(parameter_shapes(configs[0].model), 0.25, 0.0):
            assert [moved[name] for name in group.names] == pytest.approx([1e-2 * group.lr_factor] * len(group.names),
                                                                          rel=1e-2)  # fmt: skip
