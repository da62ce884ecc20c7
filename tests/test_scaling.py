"""The scaling law: the constants that made figures are found again, and the largest model is predicted from others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megassm.config.load import load_config
from megassm.config.schema import Config
from megassm.cost import parameters
from megassm.errors import UserError
from tests.conftest import ROOT, run_python
from tools.experiments.definitions import EXPERIMENTS
from tools.experiments.measure import BITS, BY_SIZE, Point
from tools.experiments.results import Results, write
from tools.experiments.scaling import (
    Law,
    Observed,
    compared,
    expected,
    fit,
    is_largest,
    observed,
    predict,
    scaling_arms,
)

TRUE = Law(0.9, 0.25, 0.45, 0.2, 0.35, 0.3, 0.9, 0.01, 0.6)
BASE = load_config(ROOT / EXPERIMENTS["scaling"].config)


def trainings(law: Law, noise: float, largest: bool = True) -> Results:
    """What the experiment would have measured, were the law true; a training is off by a factor of its own."""
    random = np.random.default_rng(3)
    points = {}
    arms = [arm for arm in scaling_arms(BASE) if largest or not is_largest(arm.name)]
    for arm in arms:
        config = load_config(ROOT / EXPERIMENTS["scaling"].config, arm.overrides)
        rows = [row_of(config, arm.name, k) for k in config.eval_budgets()]
        found = law.losses(rows) * (1 + noise * random.standard_normal())
        points[arm.name] = [
            [Point(BITS, "", row.k, loss) for row, loss in zip(rows, found, strict=True)]
            + [Point(BITS + BY_SIZE, "", row.parameters, loss) for row, loss in zip(rows, found, strict=True)]
        ]
    overrides = {arm.name: list(arm.overrides) for arm in arms}
    return Results("scaling", "q", "c", "command", "K", overrides, [0], BASE.model_dump(mode="json"), points)


def row_of(config: Config, name: str, k: int) -> Observed:
    model, data = config.model, config.train.steps * config.train.batch_sequences * config.model.seq_len
    return Observed(name, parameters(model, k), k, model.num_channels, data, name.startswith("elastic"))


def as_read(results: Results, folder: Path) -> dict[str, Any]:
    write(results, folder)
    found: dict[str, Any] = json.loads((folder / "scaling.json").read_text(encoding="utf-8"))
    return found


def test_there_are_forty_trainings_from_a_tenth_of_a_million_to_ten() -> None:
    arms = scaling_arms(BASE)
    sizes = []
    for arm in arms:
        model = load_config(ROOT / EXPERIMENTS["scaling"].config, arm.overrides).model
        sizes.append(parameters(model, model.num_channels))
    assert len(arms) >= 40
    assert min(sizes) < 0.1e6
    assert 9e6 < max(sizes) < 12e6
    largest = [is_largest(arm.name) for arm in arms]
    assert largest[-4:] == [True] * 4
    assert sum(largest) == 4
    assert max(row.parameters for row in expected(BASE, [0])) == max(sizes)


def test_the_law_is_found_again_and_says_what_the_largest_will_be(tmp_path: Path) -> None:
    """From figures that are off by 0.1% a training, within 0.5% at every K; the tax is told from the rest."""
    rows = observed(as_read(trainings(TRUE, 1e-3), tmp_path))
    said = predict([row for row in rows if not is_largest(row.training)], expected(BASE, [0]))
    table = compared(said, rows)
    assert len(table) == 4 * len(BASE.eval_budgets())
    assert max(abs(row["error %"]) for row in table) < 0.5
    for row in said["said"]:
        low, high = row["interval"]
        assert low < row["loss"] * 1.001
        assert high > row["loss"] * 0.999
    value, low, high = said["law"]["tax"]
    assert value == pytest.approx(TRUE.tax, rel=0.3)
    assert low <= TRUE.tax <= high
    for name in ("size_exponent", "data_exponent", "channel_exponent"):
        assert said["law"][name][0] == pytest.approx(getattr(TRUE, name), rel=0.3), name


def test_without_a_tax_none_is_found(tmp_path: Path) -> None:
    free = Law(0.9, 0.25, 0.45, 0.2, 0.35, 0.3, 0.9, 0.0, 0.0)
    found = fit(observed(as_read(trainings(free, 0.0), tmp_path)))
    assert found.tax * 8**found.tax_exponent < 1e-3


def test_how_many_channels_are_worth_it() -> None:
    law = Law(1.0, 0.0, 1.0, 0.0, 1.0, 0.4, 1.0, 0.5, 1.0)
    worth = law.channels_worth(1e6, 1e7, 1e-3)
    gain = (0.4 / worth - 0.2 / worth) / (1 + 0.4 / worth)
    assert gain < 1e-3 < 1.1 * gain, "the tax, which no model of one K pays, is not in it"


def test_a_prediction_of_what_was_seen_is_none(tmp_path: Path) -> None:
    rows = observed(as_read(trainings(TRUE, 0.0), tmp_path))
    said: dict[str, Any] = {"seen": [rows[-1].training], "said": [rows[-1]._asdict()]}
    with pytest.raises(UserError, match=r"prediction: elastic d=416 x .*is among the runs that it was fitted on"):
        compared(said, rows)
    with pytest.raises(UserError, match="none of the runs that it is about"):
        compared({"seen": [], "said": [rows[-1]._asdict()]}, rows[:3])
    with pytest.raises(UserError, match="3 observations; the law has 9 constants"):
        fit(rows[:3])


def test_the_tool_predicts_and_compares(tmp_path: Path) -> None:
    write(trainings(TRUE, 1e-3, largest=False), tmp_path)
    tool = ("-m", "tools.experiments.scaling", str(tmp_path / "scaling.json"))
    said = tmp_path / "said.json"
    assert "tax_exponent" in run_python(*tool, "--predict", str(said)).stdout
    early = run_python(*tool, "--compare", str(said), check=False)
    assert early.returncode == 1
    assert "none of the runs" in early.stderr
    write(trainings(TRUE, 1e-3), tmp_path)
    assert "elastic d=416 x 5, seed 0" in run_python(*tool, "--compare", str(said)).stdout
