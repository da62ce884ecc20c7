"""Channels seen from inside, and the two failures on made-up journals: seen where they are, not where they are not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megassm.commands.diagnose import layer_row
from megassm.model import build_model
from megassm.train.channels import (
    OSCILLATION_MIN_RECORDS,
    channel_norms,
    cliff_collapse,
    gate_masses,
    loss_explained_by_budget,
    oscillating_loss,
    spectral_mixers,
    update_counts,
    warnings_of,
)
from tests.conftest import SMALL, run_python
from tests.test_model import K_MAX, config, ids


def test_gate_mass_is_the_mean_of_alpha() -> None:
    model = build_model(config(pattern="SSA"), 0)
    with gate_masses(model) as masses:
        model(ids(), K_MAX)
        model(ids(10, 3), K_MAX)
    assert masses.mean().shape == (3, K_MAX), "of four layers one is attention"
    assert masses.mean().sum(1) == pytest.approx(np.ones(3))
    assert masses.positions == [2 * 24 + 3 * 10] * 3
    _, first = spectral_mixers(model)[0]
    assert first.gate is not None
    inputs = [model.blocks[0].mixer_norm(model.embed(text)) for text in (ids(), ids(10, 3))]
    alpha = torch.cat([first.gate(u, K_MAX).flatten(0, 2) for u in inputs])
    assert masses.mean()[0] == pytest.approx(alpha.mean(0).detach().numpy(), rel=1e-5)
    before = masses.mean().copy()
    model(ids(), K_MAX)
    assert np.array_equal(masses.mean(), before), "nothing is counted outside the block"


def test_gate_mass_at_a_budget_and_without_a_gate() -> None:
    for gate in ("softmax", "equal"):
        model = build_model(config(pattern="S", gate=gate), 0)
        with gate_masses(model) as masses:
            model(ids(), 2)
        assert (masses.mean()[:, 2:] == 0).all()
        assert masses.mean().sum(1) == pytest.approx(np.ones(4))
        if gate == "equal":
            assert masses.mean()[:, :2] == pytest.approx(0.5)
    with gate_masses(build_model(config(pattern="A"), 0)) as masses:
        pass
    assert masses.mean().size == 0


def test_gate_mass_of_heads_that_are_not_normalised() -> None:
    model = build_model(config(pattern="S", gate="sigmoid", mixer_heads=2, gate_bias_init=1.0), 0)
    with gate_masses(model) as masses:
        model(ids(), 3)
    _, first = spectral_mixers(model)[0]
    assert first.gate is not None
    alpha_BLHK = first.gate(model.blocks[0].mixer_norm(model.embed(ids())), 3)
    assert masses.mean()[0, :3] == pytest.approx(alpha_BLHK.mean((0, 1, 2)).detach().numpy(), rel=1e-5)
    assert masses.mean()[:, :3].sum(1) == pytest.approx(6 / (1 + np.exp(-1)), rel=0.1)
    with gate_masses(build_model(config(pattern="S", gate="none", mixer_heads=2), 0)) as masses:
        pass
    assert masses.mean().shape == (4, K_MAX)


def test_memory_is_over_how_many_positions_the_past_fades_by_e() -> None:
    model = build_model(config(pattern="SA", mixer_heads=2, selective=True), 0)
    _, first = spectral_mixers(model)[0]
    assert first.decay is not None
    torch.nn.init.zeros_(first.decay.weight)
    first.decay.bias.data = torch.tensor([0.0, -5.0])
    with gate_masses(model) as masses:
        model(ids(), 3)
        model(ids(10, 3), 3)
    memory = masses.memory(0)
    assert memory is not None
    assert memory == pytest.approx([2.0, 1 + np.exp(5)], rel=1e-5)
    rows = [{"gate mass": 1.0, "norm of M": 1.0, "updates": 1, "shortest memory": 2.0, "longest memory": 149.4}]
    assert layer_row(0, rows, 1.0)["memory of heads"] == "2 to 149 positions"
    assert "memory of heads" not in layer_row(0, [{"gate mass": 1.0, "norm of M": 1.0, "updates": 1}], 1.0)
    with gate_masses(build_model(config(), 0)) as masses:
        pass
    assert masses.memory(0) is None


def test_norms_of_the_channels() -> None:
    model = build_model(config(pattern="SA"), 0)
    (name, mixer), *_ = spectral_mixers(model)
    assert name == "blocks.0.mixer"
    with torch.no_grad():
        mixer.channels_KDD[2] = 2.0
    assert channel_norms(model).shape == (2, K_MAX)
    assert channel_norms(model)[0, 2] == pytest.approx(2.0 * 16)


def test_a_channel_takes_part_where_the_largest_budget_reaches_it() -> None:
    assert update_counts([[4, 2], [1], [2], [2, 2]], 4).tolist() == [4, 3, 1, 1]
    assert update_counts([], 3).tolist() == [0, 0, 0]


def journal(effect: float, steps: int = 200, draws: int = 1, trend: float = 0.0, noise: float = 0.05) -> list[Any]:
    generator = np.random.default_rng(0)
    rows = []
    for step in range(steps):
        budgets = generator.choice([2, 4, 8, 16], draws).tolist()
        loss = 3.0 + effect * np.mean([1 / k for k in budgets]) - trend * step + generator.normal(0, noise)
        rows.append({"step": step + 1, "loss": loss, "k_micro": budgets})
    return rows


@pytest.mark.parametrize("draws", [1, 4])
@pytest.mark.parametrize("trend", [0.0, 0.01])
def test_oscillation_is_what_the_budget_explains(draws: int, trend: float) -> None:
    calm = journal(0.0, draws=draws, trend=trend)
    assert loss_explained_by_budget(calm)[0] < 0.1
    assert oscillating_loss(calm) is None
    jumping = journal(3.0, draws=draws, trend=trend)
    found = oscillating_loss(jumping)
    assert found is not None
    assert found.name == "oscillating loss"
    shares = np.array([np.mean([1 / k for k in row["k_micro"]]) for row in jumping])
    variance = (3.0 * shares).var()
    assert found.figures["explained"] == pytest.approx(variance / (variance + 0.05**2), abs=0.03)
    losses = np.array([row["loss"] for row in jumping])
    assert found.figures["swing"] == pytest.approx(3.0 * shares.std() / losses.mean(), rel=0.1)


def test_oscillation_needs_rows_an_amplitude_and_more_than_one_budget() -> None:
    jumping = journal(3.0)
    assert oscillating_loss(jumping[: OSCILLATION_MIN_RECORDS - 1]) is None
    assert oscillating_loss(jumping, last=10) is None
    assert loss_explained_by_budget(journal(0.1, noise=0.001))[0] > 0.9
    assert oscillating_loss(journal(0.1, noise=0.001)) is None, "explained, but too small to matter"
    assert loss_explained_by_budget([row | {"k_micro": [4]} for row in jumping]) == (0.0, 0.0)
    assert loss_explained_by_budget([row | {"loss": 3.0} for row in jumping]) == pytest.approx((0.0, 0.0))
    holes = [row | {"loss": None} if row["step"] % 9 == 0 else row for row in jumping]
    assert oscillating_loss(holes) is not None, "updates without a finite loss are left out"


def test_cliff_of_the_newest_validation() -> None:
    found = cliff_collapse({2: 4.0, 4: 2.1, 8: 2.0})
    assert found is not None
    assert found.figures == pytest.approx({"k": 2, "next_k": 4, "bits_per_byte": 1.9, "share_of_gap": 0.95})
    assert "do not cut below K=4" in found.text
    assert cliff_collapse({2: 2.03, 4: 2.01, 8: 2.0}) is None
    assert cliff_collapse({8: 2.0}) is None
    rows = journal(0.0)
    rows[10]["valid"] = {"2": 4.0, "4": 2.1, "8": 2.0}
    assert [finding.name for finding in warnings_of(rows)] == ["cliff collapse"]
    rows[20]["valid"] = {"2": 2.1, "4": 2.05, "8": 2.0}
    assert warnings_of(rows) == []
    assert [finding.name for finding in warnings_of(journal(3.0))] == ["oscillating loss"]


def test_the_tool(tmp_path: Path, data_path: Path) -> None:
    run, table = tmp_path / "run", tmp_path / "table.json"
    run_python("launch/pretrain.py", "--config", "configs/tiny.yaml", *SMALL, f"run.dir={run}",
               f"data.path={data_path}", "train.steps=4", "model.pattern=AS")  # fmt: skip
    journal_file = run / "metrics.jsonl"
    rows = [json.loads(line) for line in journal_file.read_text(encoding="utf-8").splitlines()]
    rows[-1]["valid"] = {"1": 9.0, "2": 2.1, "8": 2.0}
    journal_file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    done = run_python("tools/diagnose.py", str(run), "--json", str(table), "--plot", str(tmp_path / "mass.png"))
    first, second = done.stdout.splitlines()[:2]
    assert first == f"{run}, step 4"
    assert second.startswith("warning: cliff collapse: K=1: 6.900 bits per byte above K=2"), "what matters comes first"
    assert "--all prints the 8 channels one by one" in done.stdout
    assert "every channel" not in done.stdout
    assert (tmp_path / "mass.png").read_bytes().startswith(b"\x89PNG")
    channels = json.loads(table.read_text(encoding="utf-8"))
    assert [(row["layer"], row["channel"]) for row in channels] == [(1, k) for k in range(1, 9)]
    assert sum(row["gate mass"] for row in channels) == pytest.approx(1)
    assert channels[0]["updates"] == 4
    assert [row["updates"] for row in channels] == update_counts([row["k_micro"] for row in rows], 8).tolist()
    said = run_python("tools/diagnose.py", str(run), "--all").stdout
    assert said.index("by spectral layer, at K=8") < said.index("every channel")
    journal_file.unlink()
    done = run_python("tools/diagnose.py", str(run), check=False)
    assert done.returncode == 1
    assert "has no metrics.jsonl" in done.stderr


def test_a_layer_in_one_line() -> None:
    rows = [{"layer": 3, "channel": k + 1, "gate mass": mass, "updates": 9 - k, "norm of M": 1.0 + k}
            for k, mass in enumerate((0.1, 0.5, 0.35, 0.05))]  # fmt: skip
    assert layer_row(3, rows, 1.0) == {
        "layer": 3, "gate mass by channel": "▁▄▃ ", "90% of it in": "3 channels", "heaviest": 2,
        "norm of M": "1 to 4", "updates": "6 to 9",
    }  # fmt: skip
