"""The sweep of learning rates over widths: its arms, what it finds, and the tool end to end."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from megassm.config.load import load_config
from tests.conftest import ROOT, run_python
from tools.experiments.measure import Point
from tools.experiments.results import Results
from tools.experiments.sweep_lr import rate_list, width_list
from tools.experiments.transfer import SMALL, best_rates, sweep_arms


def test_arms_widen_by_heads_and_mup_starts_from_the_smallest() -> None:
    models = {
        arm.name: load_config(ROOT / "configs/experiment.yaml", (*SMALL, *arm.overrides)).model
        for arm in sweep_arms([32, 64])
    }
    assert list(models) == ["d=32", "d=64, one rate", "d=64, muP"]
    assert {model.d_model / model.n_heads for model in models.values()} == {16}
    assert {model.d_ffn / model.d_model for model in models.values()} == {3}
    assert [model.width_factor for model in models.values()] == [1, 1, 0.5]


def test_the_best_rate_is_of_the_mean_over_seeds() -> None:
    by_seed = [[Point("loss", "", lr, y) for lr, y in seed.items()] for seed in ({1: 2.0, 2: 1.0}, {1: 2.0, 2: 4.0})]
    results = Results("x", "q", "c", "command", "lr", {"a": []}, [0, 1], {}, {"a": by_seed}, "2026-01-01", {})
    assert best_rates(results) == {"a": 1}


@pytest.mark.parametrize("text", ["", "20", "32,x", "0", "-16"])
def test_widths_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be multiples of 16"):
        width_list(text)


@pytest.mark.parametrize("text", ["", "0", "-1", "inf", "nan", "a"])
def test_rates_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="must be numbers above 0"):
        rate_list(text)


def test_the_tool(data_path: Path, tmp_path: Path) -> None:
    smaller = (
        f"data.path={data_path}", "model.vocab_size=257", "model.seq_len=32", "train.steps=2", "optim.warmup_steps=1",
        "eval.sequences=2", "train.batch_sequences=2", "train.micro_batch_sequences=2",
    )  # fmt: skip
    said = run_python(
        "tools/experiments/sweep_lr.py", "--widths", "16,32", "--lrs", "0.001,0.03", "--set", *smaller,
        "--runs", str(tmp_path / "runs"), "--output", str(tmp_path),
    ).stdout  # fmt: skip
    assert "best learning rate, d=32, muP: " in said
    found = json.loads((tmp_path / "lr_transfer.json").read_text(encoding="utf-8"))
    losses = {arm: [point[3] for point in seeds[0]] for arm, seeds in found["points"].items()}
    assert list(losses) == ["d=16", "d=32, one rate", "d=32, muP"]
    assert len({loss for arm in losses.values() for loss in arm}) == 6
    assert all(arm[1] < arm[0] for arm in losses.values())  # two updates at 0.03 do more than at 0.001
    assert "muP: arXiv 2203.03466" in (tmp_path / "lr_transfer.md").read_text(encoding="utf-8")
