"""A batch without a finite loss on one rank changes nothing on any rank, at every ZeRO stage, and training goes on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megassm.config.schema import Config
from megassm.data.dataset import open_dataset
from megassm.parallel.engine import Engine
from megassm.parallel.state import KINDS
from megassm.parallel.world import join_world, leave_world
from megassm.run.journal import read_records
from megassm.train.loop import train
from megassm.train.setup import Run, set_up
from tests.ranks import run_on_ranks, whole_state

SICK_STEP = 3
CASES = [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (1, "bf16")]


def snapshot(engine: Engine) -> list[Tensor]:
    kept = whole_state(engine, KINDS)
    return [kept[name][kind] for name in sorted(kept) for kind in KINDS]


def train_with_a_sick_batch(configs: list[Config]) -> list[dict[str, Any]]:
    """Each run with a loss that is not a number, on rank 1, in one micro-step of `SICK_STEP`."""
    seen = []
    try:
        for config in configs:
            world = join_world(config)
            Path(config.run.dir).mkdir(parents=True, exist_ok=True)
            run = set_up(config, open_dataset(config), world)
            seen.append(plant(run))
            train(run)
            seen[-1]["updates"] = run.engine.applied_updates
            if run.journal is not None:
                run.journal.close()
    finally:
        leave_world()
    return seen


def plant(run: Run) -> dict[str, Any]:
    engine, found = run.engine, {"kept": [], "changed": []}  # type: ignore[var-annotated]
    losses, update, calls = engine.losses, engine.update, [0]

    def sick_losses(ids_BT: Tensor, k: int) -> Tensor:
        calls[0] += torch.is_grad_enabled()
        sick = run.world.rank == 1 and calls[0] == (SICK_STEP - 1) * engine.micro_steps + 1
        nll_BL = losses(ids_BT, k)
        return nll_BL * float("nan") if sick else nll_BL

    def watched_update(rate: float) -> float:
        before, step = snapshot(engine), run.world.progress.mark.step
        norm = update(rate)
        same = all(torch.equal(*pair) for pair in zip(before, snapshot(engine), strict=True))
        found["kept" if same else "changed"].append(step)
        return norm

    engine.losses, engine.update = sick_losses, watched_update  # type: ignore[method-assign]
    return found


@pytest.mark.ranks
def test_a_sick_batch_changes_nothing_at_any_stage(small_config: Callable[..., Config], tmp_path: Path) -> None:
    configs = [
        small_config(
            "model.pattern=SA", "train.steps=5", "checkpoint.every_steps=1", "checkpoint.keep=9",
            "train.batch_sequences=8", f"parallel.zero_stage={stage}", f"train.precision={precision}",
            f"run.dir={tmp_path / f'{stage}-{precision}'}", world_size=2,
        )
        for stage, precision in CASES
    ]  # fmt: skip
    for rank in run_on_ranks(2, train_with_a_sick_batch, configs):
        for found, case in zip(rank, CASES, strict=True):
            assert found == {"kept": [SICK_STEP], "changed": [1, 2, 4, 5], "updates": 4}, case
    for config in configs:
        rows = read_records(Path(config.run.dir))
        assert [row["step"] for row in rows if row["skipped"]] == [SICK_STEP]
        sick = rows[SICK_STEP - 1]
        assert sick["loss"] is None
        assert sick["bits_per_byte"] is None
        assert sick["grad_norm"] is None
        assert rows[-1]["loss"] < rows[0]["loss"]
        saved = sorted(path.name for path in Path(config.run.dir, "checkpoints").iterdir())
        assert saved == [f"step-{step:08d}" for step in (1, 2, 4, 5)], "a sick run replaces no good checkpoint"
