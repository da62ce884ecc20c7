"""Learning rate schedules and parameter groups."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from megassm.config import Config
from megassm.model import build_model
from megassm.optim import build_optimizer, learning_rate

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


def test_only_matrices_decay(small_config: Make) -> None:
    config = small_config("optim.weight_decay=0.3")
    model = build_model(config.model, 0)
    decayed, plain = build_optimizer(model, config.optim).param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert all(p.ndim >= 2 for p in decayed["params"])
    assert all(p.ndim < 2 for p in plain["params"])
    assert len(decayed["params"]) + len(plain["params"]) == len(list(model.parameters()))
