"""Sweeps have names of their own, may be written beside a run, and draw speeds that differ."""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path

import pytest

from megassm.commands.sweep import widest_spread
from megassm.eval.swept import BudgetCurve, Sweep
from megassm.report.sweep_files import plot_steps, sweep_stem, write_json_sweep, write_sweep
from megassm.report.sweep_page import render_page
from megassm.report.sweep_plots import charts
from tests.conftest import run_python
from tests.test_report import a_sweep, curve


def timed(own: BudgetCurve, spread: float) -> BudgetCurve:
    """With the slowest and the fastest run of each speed so far from its median, as a share."""

    def ends(median: float | None) -> tuple[float, float] | tuple[None, None]:
        return (None, None) if median is None else (median * (1 - spread), median * (1 + spread))

    rows = []
    for row in own.rows:
        (low, high), (decode_low, decode_high) = ends(row.prefill_tokens_per_s), ends(row.decode_tokens_per_s)
        rows.append(replace(row, prefill_tokens_per_s_low=low, prefill_tokens_per_s_high=high,
                            decode_tokens_per_s_low=decode_low, decode_tokens_per_s_high=decode_high))  # fmt: skip
    return replace(own, rows=rows)


def test_no_two_sweeps_meet(tmp_path: Path) -> None:
    own = curve("data/mine")
    sweeps = [
        a_sweep("runs/a", 10, own),
        a_sweep("runs/a", 20, own),
        a_sweep("runs/a", 20, curve("data/mine", 128)),
        a_sweep("runs/a", 20, own, curve("data/mine", 128)),
        a_sweep("runs/a", 20, curve("data-mine")),
        a_sweep("runs/a", 20, curve("data mine")),
        a_sweep("runs/a", 20, curve("data:mine")),
        a_sweep("runs/a", 20, curve("/far/" + "x" * 200 + "/mine")),
        a_sweep("runs/a", 20, curve("/far/" + "y" * 200 + "/mine")),
        a_sweep("runs/a", 20, replace(own, rows=own.rows[1:])),
        a_sweep("runs/a", 20, replace(own, sequences=99)),
    ]
    stems = []
    for sweep in sweeps:
        stems.append(sweep_stem(sweep, tmp_path))
        write_json_sweep(sweep, tmp_path / f"{stems[-1]}.json")
    assert stems[:4] == ["data-mine-64-step-00000010", "data-mine-64-step-00000020", "data-mine-128-step-00000020",
                         "data-mine-64+128-step-00000020"]  # fmt: skip
    assert len(set(stems)) == len(sweeps)
    assert max(map(len, stems)) < 200
    assert [sweep_stem(sweep, tmp_path) for sweep in sweeps] == stems, "the same, measured again, takes its place"
    (tmp_path / "data-mine-64-step-00000010.json").write_text("{", encoding="utf-8")
    assert sweep_stem(sweeps[0], tmp_path) == "data-mine-64-step-00000010-2"
    assert plot_steps(tmp_path) is None, "none of these is of --watch"


def test_one_checkpoint_is_no_curve_over_steps(tmp_path: Path) -> None:
    write_json_sweep(a_sweep("x", 10), tmp_path / "step-00000010.json")
    assert plot_steps(tmp_path) is None
    assert not (tmp_path / "steps.png").exists()


@pytest.mark.parametrize(("spread", "titles"), [(0.1, ["prefill tokens/s"]), (0.9, [])])
def test_speeds_are_drawn_where_they_differ_by_more_than_their_runs(spread: float, titles: list[str]) -> None:
    """Prefill is 8 times faster at K=1 than at 8; decoding is as fast at every K."""
    sweep = a_sweep("runs/a", 10, timed(curve(), spread))
    found = {chart.title: chart for chart in charts([sweep]) if "tokens/s" in chart.title}
    assert list(found) == titles
    for chart in found.values():
        low, high = chart.lines[0].low, chart.lines[0].high
        assert [low[0], high[0]] == pytest.approx([900 * (1 - spread), 900 * (1 + spread)])
    assert widest_spread(sweep.curves[0].rows) == pytest.approx(2 * spread)
    assert "slowest \u2026 fastest" in render_page([sweep])


def test_an_older_sweep_has_no_spread() -> None:
    assert widest_spread(curve().rows) is None
    assert any("decode" in chart.title for chart in charts([a_sweep("runs/a", 10, curve())]))


def test_a_sweep_beside_a_run_leaves_the_run_alone(trained: Path, tmp_path: Path) -> None:
    before = sorted(str(path) for path in trained.rglob("*"))
    notes, output = tmp_path / "notes.txt", tmp_path / "out"
    notes.write_text("to be or not to be, that is the question\n" * 40, encoding="utf-8")
    options = ("--data", str(notes), "--budgets", "2", "--sequences", "4", "--output", str(output))
    done = run_python("tools/sweep_budgets.py", str(trained), *options)
    assert sorted(str(path) for path in trained.rglob("*")) == before
    written = sorted(path.suffix for path in output.iterdir())
    assert written == [".csv", ".html", ".json", ".png"]
    (name,) = {path.stem for path in output.iterdir()}
    assert name.endswith("-64-step-00000012")
    (found,) = json.loads((output / f"{name}.json").read_text(encoding="utf-8"))["curves"]
    for row in found["rows"]:
        assert row["prefill_tokens_per_s_low"] <= row["prefill_tokens_per_s"] <= row["prefill_tokens_per_s_high"]
        assert row["decode_tokens_per_s_low"] <= row["decode_tokens_per_s"] <= row["decode_tokens_per_s_high"]
    assert "speeds are medians, whose runs differ by up to " in done.stdout


def test_sweep_of_a_step_is_named_by_it(tmp_path: Path) -> None:
    sweep: Sweep = a_sweep("runs/a", 10, curve())
    paths = write_sweep(sweep, tmp_path, sweep_stem(sweep, tmp_path))
    assert [path.name for path in paths] == [f"own-64-step-00000010.{end}" for end in ("json", "csv", "png", "html")]


def test_a_name_in_letters_that_the_font_has_not_is_drawn_without_a_word(tmp_path: Path) -> None:
    with warnings.catch_warnings(action="error"):
        (_, _, picture, _) = write_sweep(a_sweep("runs/\u4f60\u597d", 10, curve("\u6570\u636e")), tmp_path, "x")
    assert picture.stat().st_size > 1000
