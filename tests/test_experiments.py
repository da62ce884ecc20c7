"""The experiments' machinery, small: every experiment runs end to end, and its figures are what they should be."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megassm.config.load import load_config
from megassm.config.schema import Config
from megassm.cost import parameters
from megassm.eval.session import open_session
from tests.conftest import ROOT, SMALL, run_python
from tools.experiments.definitions import EXPERIMENTS, TEXT, Arm, Experiment, equal_width
from tools.experiments.measure import Point
from tools.experiments.online import HIGH, LOW, POLICIES, Reading, read
from tools.experiments.results import CONCLUSION, Results, curves, half_width, table, write
from tools.experiments.runner import Options, run_experiment, workers

SMALL_TASK = (
    "model.d_model=16", "model.num_channels=8", "model.d_ffn=32", "budget.budgets=[2,8]", "eval.budgets=[2,8]",
    "eval.sequences=4", "optim.warmup_steps=1", "train.batch_sequences=4", "train.micro_batch_sequences=4",
    "log.wandb=disabled", "log.peak_tflops=0.1",
)  # fmt: skip


def results(**points: list[list[float]]) -> Results:
    """Figures over K = 1, 2 by arm and seed."""
    by_arm = {
        arm: [[Point("loss", "", k, y) for k, y in zip((1, 2), values, strict=True)] for values in seeds]
        for arm, seeds in points.items()
    }
    return Results("x", "q", "c", "command", "K", {arm: [] for arm in points}, [0, 1, 2], {}, by_arm, "2026-01-01", {})


def test_intervals_are_students() -> None:
    found = results(a=[[1.0, 4.0], [2.0, 4.0], [3.0, 4.0]])
    (curve,) = curves(found, "loss")
    assert curve.mean == [2.0, 4.0]
    half = half_width(curve.y_SN)
    assert half is not None
    assert half[0] == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)  # t of 97.5% with 2 degrees of freedom
    assert half[1] == 0.0


def test_differences_are_taken_seed_by_seed() -> None:
    text = table(results(a=[[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]], b=[[1.5, 1.0], [2.5, 2.0], [3.5, 3.0]]), "loss")
    assert "| b | +0.5 ± 0 | +0 ± 0 |" in text  # though each mean is known to 2.5 only
    assert "| b | 2.5 ± 2.4841 | 2 ± 2.4841 |" in text


def test_a_conclusion_survives_the_next_run(tmp_path: Path) -> None:
    page, as_json, plot = write(results(a=[[1.0, 2.0]] * 3), tmp_path)
    assert page.read_text().endswith(f"{CONCLUSION}\nNot written yet.\n")
    page.write_text(page.read_text().replace("Not written yet.", "It falls."))
    write(results(a=[[5.0, 2.0]] * 3), tmp_path)
    assert "| a | 5 ± 0 | 2 ± 0 |" in page.read_text()
    assert page.read_text().endswith(f"{CONCLUSION}\nIt falls.\n")
    assert json.loads(as_json.read_text())["points"]["a"][0][0] == ["loss", "", 1, 5.0]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_hybrids_have_equal_parameters() -> None:
    config = load_config(ROOT / "configs/experiment.yaml")
    counts = []
    for arm in EXPERIMENTS["hybrids"].arms(config):
        model = load_config(ROOT / "configs/experiment.yaml", arm.overrides).model
        counts.append(parameters(model, model.num_channels))
    assert max(counts) / min(counts) < 1.002
    assert equal_width(config, "SSSS") == config.model.d_ffn


def test_a_token_by_token_budget_reads_what_the_model_reads(trained: Path) -> None:
    """At one K for all tokens it is the parallel form; with a choice, each row has its own."""
    session = open_session(trained, None, "cpu")
    model = session.model.eval()
    ids_BT = torch.from_numpy(session.validation(2)[0].ids_BT)

    def nll(k: int) -> torch.Tensor:
        with torch.no_grad():
            return model(ids_BT[:, :-1], k, ids_BT[:, 1:])

    same = read(model, ids_BT, lambda entropy_B, _: entropy_B < 0, (2, 2))
    torch.testing.assert_close(same.nll_BL, nll(2), atol=2e-5, rtol=1e-4)
    assert same.mean_k == 2.0
    first_row = torch.arange(len(ids_BT)) == 0
    mixed = read(model, ids_BT, lambda entropy_B, _: first_row[: len(entropy_B)], (1, 8))
    torch.testing.assert_close(mixed.nll_BL[0], nll(8)[0], atol=2e-5, rtol=1e-4)
    positions = ids_BT.shape[1] - 1
    assert mixed.mean_k == pytest.approx((8 * positions + (8 + (positions - 1)) * (len(ids_BT) - 1)) / positions / 2)


def test_a_policy_takes_its_share() -> None:
    generator = torch.Generator().manual_seed(0)
    seen = Reading(torch.rand(8, 500, generator=generator), torch.rand(8, 500, generator=generator), 2.0)
    for policy in POLICIES:
        choose = policy.choice(seen, 0.25, generator)
        share = torch.cat([choose(seen.entropy_BL[:, t], seen.nll_BL[:, t]) for t in range(500)]).float().mean()
        assert share == pytest.approx(0.25, abs=0.03)
    assert LOW < HIGH


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_experiment_has_arms_that_are_configurations(name: str) -> None:
    experiment = EXPERIMENTS[name]
    base = load_config(ROOT / experiment.config)
    arms = experiment.arms(base)
    configs = {load_config(ROOT / experiment.config, arm.overrides).model_dump_json() for arm in arms}
    assert len(configs) == len(arms) >= 1
    assert experiment.question.endswith("?")


def ends_of(experiment: Experiment) -> Callable[[Config], list[Arm]]:
    """The first arm and the last."""
    return lambda config: list(dict.fromkeys((experiment.arms(config)[0], experiment.arms(config)[-1])))


@pytest.mark.ranks
def test_experiments_run(tmp_path: Path, data_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them with their first arm and their last, in one worker; trainings in common are made once."""
    runs = 0
    with workers(1) as pool:
        for name, experiment in EXPERIMENTS.items():
            monkeypatch.setitem(EXPERIMENTS, name, replace(experiment, arms=ends_of(experiment)))
            own = SMALL if experiment.config == TEXT else SMALL_TASK
            data = data_path if experiment.config == TEXT else small_task(Path(experiment.config).stem, tmp_path)
            options = Options([0], tmp_path / "runs", overrides=(*own, f"data.path={data}", "train.steps=3"))
            found = run_experiment(name, options, "command", pool)
            runs += len(found.arms)
            for path in write(found, tmp_path):
                assert path.stat().st_size > 0
            values = [point.y for by_seed in found.points.values() for points in by_seed for point in points]
            assert values
            assert all(math.isfinite(value) and value >= 0 for value in values)
    assert len(list((tmp_path / "runs").iterdir())) == runs - 3, "static_elastic, ablations, sampling, online share one"


def small_task(name: str, folder: Path) -> Path:
    size = ("--examples", "40", "--valid-examples", "8")
    run_python("tools/make_task.py", name, "--output", str(folder / name), *size)
    return folder / name
