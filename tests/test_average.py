"""The running average of the weights at every ZeRO stage, saved, resumed, exported; milestones, whose weights stay."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megassm.checkpoint.branch import branch
from megassm.checkpoint.format import Checkpoint, find_checkpoint, newest_checkpoint, read_checkpoint
from megassm.checkpoint.open import open_model
from megassm.config.schema import Config
from megassm.data.dataset import open_dataset
from megassm.errors import UserError
from megassm.model import initial_weights
from megassm.parallel.world import join_world, leave_world
from megassm.run.directory import checkpoint_folders, step_name
from megassm.run.events import read_events
from megassm.train.loop import train
from megassm.train.setup import Run, set_up
from tests.conftest import run_python
from tests.ranks import run_on_ranks

Make = Callable[..., Config]
DECAY, STEPS = 0.4, 6
KNOBS = ("model.pattern=SA", f"train.steps={STEPS}", "eval.every_steps=null", "checkpoint.every_steps=1",
         "checkpoint.keep=99", f"optim.ema={DECAY}", "optim.lr=1e-2")  # fmt: skip


def train_all(configs: list[Config]) -> None:
    """Trains each to its train.steps; the loss of update 4 is not a number."""
    try:
        for config in configs:
            Path(config.run.dir).mkdir(parents=True, exist_ok=True)
            run = set_up(config, open_dataset(config), join_world(config))
            spoil(run, 4)
            train(run)
            run.close()
    finally:
        leave_world()


def spoil(run: Run, step: int) -> None:
    whole = run.engine.backward

    def backward(losses_BL: torch.Tensor, mask_BL: torch.Tensor) -> None:
        at = run.world.progress.mark.step
        whole(losses_BL * float("nan") if at == step else losses_BL, mask_BL)

    run.engine.backward = backward  # type: ignore[method-assign]


def state_of(checkpoint: Checkpoint, averaged: bool) -> dict[str, torch.Tensor]:
    found = Checkpoint(checkpoint.folder, checkpoint.manifest, averaged)
    return {name: value.double() for name, value in found.weights()}


def check_average(config: Config) -> None:
    """Against the recursion over the weights of every update, in float64."""
    expected = {name: value.double() for name, value in initial_weights(config.model, config.run.seed)}
    if config.train.precision == "bf16":
        expected = {name: value.bfloat16().double() for name, value in expected.items()}
    folders = checkpoint_folders(Path(config.run.dir) / "checkpoints")
    assert [folder.name for folder in folders] == [step_name(step) for step in (1, 2, 3, 5, 6)], (
        "none after the skipped"
    )
    for updates, folder in enumerate(folders, start=1):
        checkpoint = read_checkpoint(folder, check="")
        assert checkpoint.manifest.updates == updates
        weights, averages = state_of(checkpoint, averaged=False), state_of(checkpoint, averaged=True)
        decay = min(DECAY, (1 + updates) / (10 + updates))
        for name, value in weights.items():
            expected[name] = decay * expected[name] + (1 - decay) * value
            assert torch.allclose(averages[name], expected[name], rtol=1e-6, atol=1e-7), (folder, name)
            assert not torch.equal(averages[name], value), name


@pytest.mark.ranks
def test_the_average_is_that_of_the_weights_at_every_stage_and_resumes_bit_for_bit(
    small_config: Make, tmp_path: Path
) -> None:
    stages = {"0": "fp32", "1": "bf16", "2": "fp32", "3": "fp32"}
    whole = [
        small_config(*KNOBS, f"parallel.zero_stage={stage}", f"train.precision={precision}",
                     f"run.dir={tmp_path / stage}", world_size=2)
        for stage, precision in stages.items()
    ]  # fmt: skip
    halves = [
        small_config(*KNOBS, "parallel.zero_stage=2", f"run.dir={tmp_path / 'halves'}", "budget.strategy=fixed",
                     *more, world_size=2)
        for more in (["train.steps=3", "optim.schedule=wsd", "optim.warmup_steps=0"],
                     ["optim.schedule=wsd", "optim.warmup_steps=0"])
    ]  # fmt: skip
    one = halves[1].model_copy(update={"run": halves[1].run.model_copy(update={"dir": str(tmp_path / "one")})})
    run_on_ranks(2, train_all, [*whole, *halves, one])
    for config in whole:
        check_average(config)
    mine, true = (
        read_checkpoint(Path(config.run.dir) / "checkpoints" / step_name(6), "") for config in (halves[1], one)
    )
    assert any(name.startswith("average-00002") for name in mine.manifest.files)
    assert mine.manifest.files == true.manifest.files, "the same bytes"
    resumed = small_config(*KNOBS, f"run.dir={tmp_path / '3'}", "train.steps=8", "optim.ema=null")
    again = small_config(*KNOBS, f"run.dir={tmp_path / '3'}", "train.steps=9", "parallel.zero_stage=0")
    run_on_ranks(1, train_all, [resumed, again])
    told = [event["text"] for event in read_events(tmp_path / "3") if event["kind"] == "resume"]
    assert "begins here" not in told[0]
    assert told[1].endswith("the running average of the weights begins here")
    assert not read_checkpoint(tmp_path / "3" / "checkpoints" / step_name(8)).has_average


def test_an_average_is_exported_and_opened_by_choice(small_config: Make, tmp_path: Path) -> None:
    config = small_config(*KNOBS, "train.steps=3")
    run_on_ranks(1, train_all, [config])
    run_dir = Path(config.run.dir)
    averaged = open_model(run_dir, averaged=True).state_dict()
    assert any(not torch.equal(value, averaged[name]) for name, value in open_model(run_dir).state_dict().items())
    for name, value in find_checkpoint(run_dir, averaged=True).weights():
        assert torch.equal(averaged[name], value)
    folder = tmp_path / "exported"
    said = run_python("tools/export.py", str(run_dir), "--k", "8", "--output", str(folder), "--ema").stdout
    assert "step 3, running average" in said
    for name, value in open_model(folder).state_dict().items():
        assert torch.equal(averaged[name], value), name
    with pytest.raises(UserError, match="an exported model has no running average beside its weights; leave out --ema"):
        open_model(folder, averaged=True)
    run_python("tools/sweep_budgets.py", str(run_dir), "--budgets", "8", "--sequences", "2", "--ema")
    assert (run_dir / "ema" / "sweep.json").exists()
    assert not (run_dir / "sweep.json").exists()


def test_milestones_keep_their_weights_and_no_run_goes_on_from_them(small_config: Make, tmp_path: Path) -> None:
    knobs = ("checkpoint.every_steps=2", "checkpoint.keep=1", "checkpoint.keep_weights_every=5",
             "eval.every_steps=null", "checkpoint.keep_weights_at=[2,3]", "checkpoint.asynchronous=false")  # fmt: skip
    config = small_config(*knobs, "train.steps=8")
    run_on_ranks(1, train_all, [config])
    run_dir = Path(config.run.dir)
    found = [read_checkpoint(folder, check="") for folder in checkpoint_folders(run_dir / "checkpoints")]
    assert [(one.manifest.step, one.has_moments) for one in found] == [(2, False), (3, False), (5, False), (8, True)]
    assert not list(run_dir.glob("checkpoints/step-00000002/moments-*"))
    assert sum(value.numel() for _, value in found[0].weights()) > 0
    with pytest.raises(UserError, match="has no running average of the weights; leave out --ema"):
        find_checkpoint(run_dir, averaged=True)
    with pytest.raises(UserError, match="a milestone: it has the weights alone, and no run can go on from it"):
        branch(run_dir, 5, tmp_path / "new")
    (found[-1].folder / "manifest.json").unlink()
    checkpoint, skipped = newest_checkpoint(run_dir, to_continue=True)
    assert checkpoint is None
    assert sum("a milestone: it has the weights alone" in why for why in skipped) == 3
    assert find_checkpoint(run_dir).manifest.step == 5, "of use to whoever wants weights"
