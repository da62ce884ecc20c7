"""Runs on a task: they learn it, on every mesh the same, and its accuracy is measured at every budget."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megassm.config.schema import Config
from megassm.config.source import ConfigError
from megassm.data.dataset import open_dataset
from megassm.data.tasks.synthetic import HighFrequency, drawn
from megassm.data.tasks.write import write_task
from megassm.errors import UserError
from megassm.eval.session import open_session
from megassm.eval.watch import SweepRequest, sweep_path
from megassm.export.write import ExportPlan, export_models
from megassm.parallel.world import join_peers, join_world, leave_world
from megassm.run.journal import read_records
from megassm.train.loop import train
from megassm.train.setup import set_up
from tests.ranks import run_on_ranks

Make = Callable[..., Config]
SIZES = (
    "model.vocab_size=16", "model.seq_len=128", "train.batch_sequences=8", "eval.sequences=64",
    "optim.lr=0.01", "eval.every_steps=null",
)  # fmt: skip
EXACT = ("loss", "grad_norm", "valid_loss", "valid_accuracy", "valid_error", "k")


@pytest.fixture(scope="module")
def task_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Period 2 or 3? Little noise, 8 levels."""
    folder = tmp_path_factory.mktemp("tasks") / "periods"
    made = HighFrequency(noise=0.2, levels=8, first=2, last=3)
    task = made.task(128)
    splits = {split: drawn(made.draw(task), count, 0, count) for split, count in (("train", 400), ("valid", 64))}
    write_task(folder, task, splits)
    return folder


def trained(configs: list[Config]) -> None:
    """Trains each in turn, on every rank."""
    try:
        for config in configs:
            world = join_world(config)
            os.makedirs(config.run.dir, exist_ok=True)
            run = set_up(config, open_dataset(config), world)
            train(run)
            if run.journal is not None:
                run.journal.close()
    finally:
        leave_world()


def exact(config: Config) -> list[dict[str, Any]]:
    return [{name: row[name] for name in EXACT if name in row} for row in read_records(Path(config.run.dir))]


@pytest.mark.ranks
def test_a_tiny_run_learns_is_swept_and_exported(small_config: Make, task_path: Path, tmp_path: Path) -> None:
    config = small_config(*SIZES, f"data.path={task_path}", "model.classes=2", "train.steps=40", "model.pattern=S")
    run_on_ranks(1, trained, [config])
    last = read_records(Path(config.run.dir))[-1]
    assert last["bits_per_byte"] is None
    assert set(last["valid_accuracy"]) == {"1", "2", "8"}
    assert last["valid_accuracy"]["8"] > 0.9, "chance is one half"
    peers = join_peers("cpu")
    try:
        sweep, _ = sweep_path(Path(config.run.dir), SweepRequest(budgets=[1, 2]), peers)
        with pytest.raises(UserError, match="--seq-lens: the examples of task-high_frequency are 128 long"):
            sweep_path(Path(config.run.dir), SweepRequest(seq_lens=[256]), peers)
    finally:
        leave_world()
    (curve,) = sweep.curves
    assert (curve.sequences, curve.predicted_tokens) == (64, 64)
    assert curve.best_unigram_bits_per_byte == pytest.approx(1.0, abs=0.1), "two classes, equally often"
    for row in curve.rows:
        assert row.accuracy == pytest.approx(last["valid_accuracy"][str(row.k)])
        assert row.accuracy_low is not None
        assert row.accuracy_high is not None
        assert row.accuracy_low <= row.accuracy <= row.accuracy_high
        assert row.bits_per_byte == pytest.approx(last["valid_loss"][str(row.k)] / 0.693147, rel=1e-4)
        assert row.decode_tokens_per_s is None
    session = open_session(Path(config.run.dir), None, "cpu")
    (exported,) = export_models(session, {2: tmp_path / "k-2"}, ExportPlan())
    (row,) = (row for row in curve.rows if row.k == 2)
    assert (exported.accuracy, exported.bits_per_byte) == pytest.approx((row.accuracy, row.bits_per_byte))
    card = (tmp_path / "k-2/README.md").read_text()
    assert f"| {exported.accuracy:.4f} | {exported.bits_per_byte:.4f} |" in card
    assert "pipeline_tag: text-classification" in card
    with pytest.raises(UserError, match="--seq-len 256: the examples of task-high_frequency are 128 long"):
        export_models(session, {2: tmp_path / "other"}, ExportPlan(seq_len=256))


@pytest.mark.ranks
def test_every_mesh_is_the_same(small_config: Make, task_path: Path, tmp_path: Path) -> None:
    def make(name: str, world_size: int, *overrides: str) -> Config:
        own = (f"run.dir={tmp_path / name}", f"data.path={task_path}", "train.steps=4", "budget.draws=1")
        return small_config(*SIZES, *own, *overrides, world_size=world_size)

    classes = ("model.classes=2", "budget.strategy=uniform", "budget.distill_weight=0.5")
    answers = ("model.pattern=SA", "train.micro_batch_sequences=4")
    alone = {"classes": make("classes", 1, *classes), "answers": make("answers", 1, *answers)}
    run_on_ranks(1, trained, list(alone.values()))
    pairs = [
        ("classes", make("classes-data", 2, *classes, "parallel.zero_stage=3")),
        ("classes", make("classes-tensor", 2, *classes, "parallel.tensor=2", "parallel.zero_stage=0")),
        ("answers", make("answers-tensor", 2, *answers, "parallel.tensor=2")),
        ("answers", make("answers-sequence", 2, *answers, "parallel.sequence=2", "parallel.zero_stage=2")),
    ]
    run_on_ranks(2, trained, [config for _, config in pairs])
    for kind, config in pairs:
        for row, expected in zip(exact(config), exact(alone[kind]), strict=True):
            assert row.keys() == expected.keys()
            assert row["loss"] == pytest.approx(expected["loss"], abs=1e-5), config.run.dir
            assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4), config.run.dir
            if "valid_loss" in row:
                assert row["valid_loss"] == pytest.approx(expected["valid_loss"], abs=1e-5)
                assert row["valid_error"] == pytest.approx(expected["valid_error"], rel=1e-3)
                assert row["valid_accuracy"] == pytest.approx(expected["valid_accuracy"], abs=1e-6)


@pytest.mark.parametrize(
    ("override", "message"),
    [("parallel.sequence=2", "model.classes"), ("parallel.tensor=2", "model.classes = 1: must be at least parallel")],
)
def test_splits_that_a_head_cannot_have_are_refused(small_config: Make, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        small_config(*SIZES, "model.classes=1", override, world_size=2)
