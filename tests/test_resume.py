"""A checkpoint taken on one mesh and ZeRO stage continues on any other, as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megassm.checkpoint.format import find_checkpoint, load_model
from megassm.config.schema import Config
from megassm.data.dataset import open_dataset
from megassm.parallel.mesh import Mesh
from megassm.parallel.world import join_world, leave_world
from megassm.run.journal import read_records
from megassm.train.loop import train
from megassm.train.setup import Run, set_up
from tests.ranks import run_on_ranks

Make = Callable[..., Config]
BASE = (
    "model.vocab_size=259", "model.seq_len=128", "model.pattern=SA", "model.n_kv_heads=2", "budget.strategy=uniform",
    "budget.draws=2", "train.batch_sequences=8", "optim.grad_clip=0.3", "eval.budgets=[8]", "checkpoint.keep=99",
    "model.base_width=16", "optim.eps=1e-6",  # 1e-8 makes much of how gradients near 0 are rounded
)  # fmt: skip

STEPS = 12

Leg = tuple[Mesh, int, int]
"""A mesh, a ZeRO stage, and the step after which to leave it."""


def configured(make: Make, leg: Leg, *overrides: str) -> Config:
    mesh, stage, _ = leg
    own = [f"parallel.{axis}={size}" for axis, size in mesh._asdict().items()]
    own += [f"parallel.zero_stage={stage}", f"train.micro_batch_sequences={4 // mesh.data}", f"train.steps={STEPS}"]
    return make(*BASE, *own, "checkpoint.every_steps=1000", "eval.every_steps=null", *overrides, world_size=mesh.size)


class StopAfter:
    """A signal that comes while the ranks agree on update `step`."""

    def __init__(self, run: Run, step: int) -> None:
        self.progress, self.step = run.world.progress, step

    @property
    def received(self) -> bool:
        mark = self.progress.mark
        return mark.step == self.step and mark.place == "agreement of all ranks"

    def told(self, step: int) -> str:
        return f"stopped after step {step}"


def train_legs(legs: list[tuple[Config, int]]) -> None:
    """Trains each run up to the step given, on this number of ranks."""
    try:
        for config, step in legs:
            world = join_world(config)
            Path(config.run.dir).mkdir(exist_ok=True, parents=True)
            run = set_up(config, open_dataset(config), world)
            run.stop = StopAfter(run, step)  # type: ignore[assignment]
            train(run)
            if run.journal is not None:
                run.journal.close()
    finally:
        leave_world()


JOURNEYS: list[list[Leg]] = [
    # data ranks and stages up and down, among them 1 <-> 3 and 1 -> 0, which DeepSpeed's own formats refuse
    [(Mesh(2, 1, 1), 1, 3), (Mesh(1, 1, 1), 3, 6), (Mesh(2, 1, 1), 3, 9), (Mesh(1, 1, 1), 1, STEPS)],
    [(Mesh(1, 1, 2), 2, 4), (Mesh(1, 2, 1), 0, 8), (Mesh(1, 1, 1), 2, STEPS)],
    [(Mesh(2, 1, 2), 1, 3), (Mesh(1, 1, 4), 3, 6), (Mesh(1, 2, 2), 2, 9), (Mesh(2, 2, 1), 3, STEPS)],
]


@pytest.mark.long
@pytest.mark.ranks
def test_a_run_continues_on_any_mesh_and_stage(small_config: Make, tmp_path: Path) -> None:
    truth = tmp_path / "truth"
    run_on_ranks(1, train_legs, [(configured(small_config, (Mesh(1, 1, 1), 0, 0), f"run.dir={truth}"), STEPS)])
    expected = read_records(truth)
    assert expected[-1]["loss"] < expected[0]["loss"] - 0.2
    for number, journey in enumerate(JOURNEYS):
        run_dir = tmp_path / str(number)
        for leg in journey:
            run_on_ranks(leg[0].size, train_legs, [(configured(small_config, leg, f"run.dir={run_dir}"), leg[2])])
        rows = read_records(run_dir)
        assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
        for name in ("loss", "bits_per_byte"):
            assert [row[name] for row in rows] == pytest.approx([row[name] for row in expected], abs=1e-5), journey
        assert [row["k_micro"] for row in rows] == [row["k_micro"] for row in expected]
        # AdamW divides gradients near 0 by their own size, and with them how a processor rounds
        assert [row["grad_norm"] for row in rows] == pytest.approx([row["grad_norm"] for row in expected], rel=1e-3)
        assert rows[-1]["valid"]["8"] == pytest.approx(expected[-1]["valid"]["8"], abs=1e-5)
        mine, true = (load_model(find_checkpoint(folder)).state_dict() for folder in (run_dir, truth))
        for name, weight in true.items():
            assert torch.allclose(mine[name], weight, atol=1e-5), name


def test_draws_that_do_not_fit_the_mesh_are_refused_with_the_way_out(small_config: Make) -> None:
    first = configured(small_config, (Mesh(1, 1, 1), 1, 2), "budget.draws=null", "train.micro_batch_sequences=2")
    run_on_ranks(1, train_legs, [(first, 2)])
    second = configured(small_config, (Mesh(1, 1, 1), 1, 4), "budget.draws=null", "train.micro_batch_sequences=4")
    with pytest.raises(AssertionError, match=r"draws 4 budgets a step.*make 2\s+micro-steps.*a multiple of 4"):
        run_on_ranks(1, train_legs, [(second, 4)])
