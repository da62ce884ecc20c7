"""The page that compares runs: whole, alone in the world, and small however long the journals are."""

from __future__ import annotations

import html
import json
import re
import subprocess
import tracemalloc
from pathlib import Path

import pytest

from megassm.report import history
from megassm.report.run_page import load_run, render, write_run_page
from tests.conftest import run_python
from tests.test_report import BROWSER, drawn, in_browser, loads_nothing
from tests.test_terminal import KNOBS, row, run_dir, write

__all__ = ["run_dir"]


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A run without phases and events, at another learning rate, that failed."""
    folder = tmp_path / "other"
    folder.mkdir()
    knobs = KNOBS | {"optim": {"lr": 0.002}, "run": {"dir": "y"}}
    (folder / "config.yaml").write_text(json.dumps(knobs), encoding="utf-8")
    (folder / "failure.txt").write_text("rank 1 hangs\n", encoding="utf-8")
    write(folder / "metrics.jsonl", [row(step, loss=9.0) for step in range(1, 7)])
    return folder


def table_after(text: str, heading: str) -> list[list[str]]:
    part = text.split(f"<h2>{heading}</h2>")[1].split("<h2>")[0]
    rows = re.findall("<tr>(.*?)</tr>", part, re.DOTALL)
    return [[re.sub("<.*?>", "", cell) for cell in re.findall("<t[dh].*?</t[dh]>", one, re.DOTALL)] for one in rows]


def test_the_page_compares_runs_and_asks_nothing_of_a_network(run_dir: Path, other: Path, tmp_path: Path) -> None:
    figures = write_run_page([run_dir, other], tmp_path / "new/page.html")
    text = (tmp_path / "new/page.html").read_text(encoding="utf-8")
    loads_nothing(text)
    shown = {chart["words"].partition(":")[0]: chart for chart in drawn(text)}
    assert [*shown] == [
        "newest validation over K, bits per byte (lower is better)", "validation by K, bits per byte (run)",
        "training, bits per byte (at the K drawn)", "training loss, nats a token", "tokens/s",
        "model FLOPs utilisation", "where an update's time goes (run)", "wait for data", "peak memory",
        "learning rate", "gradient norm before clipping", "budget K (largest of the update)",
    ]  # fmt: skip
    newest = shown["newest validation over K, bits per byte (lower is better)"]["lines"][0]
    assert (newest["low"], newest["high"]) == (pytest.approx([2.3608, 2.2804]), pytest.approx([2.4392, 2.3196]))
    assert "Validation after step 40: 2.3000 \u00b1 0.0100 bits per byte at K=8" in text
    assert table_after(text, "Quality")[1] == ["run", "40", "2.4000 \u00b1 0.0200", "2.3000 \u00b1 0.0100"]
    losses = shown["training loss, nats a token"]["lines"]
    assert [line["label"] for line in losses] == ["run", "other"]
    assert {axis: values[-1] for axis, values in losses[0]["x"].items()} == {
        "updates": 40, "tokens": 10240, "hours": pytest.approx(40 * 0.2 / 3600, rel=1e-4),
    }  # fmt: skip
    assert [(one["run"], one["steps"], one["skipped"]) for one in figures] == [("run", 40, 1), ("other", 6, 0)]
    assert (figures[0]["valid at full K"], figures[0]["valid at smallest K"]) == (2.3, 2.4)
    assert table_after(text, "Configuration") == [["knob", "run", "other"], ["optim.lr", "0.001", "0.002"]]
    assert ["peak_flops_per_rank", "2e+11", "\u2013"] in table_after(text, "Environment")
    assert 'class="text alarm"' in text, "the failure stands out"
    assert "failed: rank 1 hangs" in text
    events = table_after(text, "Events")
    assert events[1][0] == "run"
    assert events[1][2:] == ["30", "skipped", "an update &lt;b&gt;[bold]&lt;/b&gt; is skipped"]


def test_equal_runs_without_an_update_and_one_that_shows_its_whole_configuration(run_dir: Path) -> None:
    (run_dir / "metrics.jsonl").unlink()
    (run_dir / "events.jsonl").unlink()
    (run_dir / "environment.json").unlink()
    first, second = load_run(run_dir, "a"), load_run(run_dir, "b")
    assert "The runs have the same configuration." in render([first, second])
    empty = render([first])
    assert ["optim.lr", "0.001"] in table_after(empty, "Configuration")
    assert empty.count("No update yet.") == 3
    assert "Not recorded." in empty


def test_a_long_journal_gives_few_points_in_bounded_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "SPANS", 50)
    (tmp_path / "config.yaml").write_text(json.dumps(KNOBS), encoding="utf-8")
    sizes, peaks = [], []
    for rows in (500, 10_000):
        write(tmp_path / "metrics.jsonl", [row(step, valid={"2": 2.0}) for step in range(1, rows + 1)])
        tracemalloc.start()
        run = load_run(tmp_path, "long")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        sizes.append(len(run.history.spans))
    assert run.history.records == 10_000
    assert peaks[1] < 1.5 * peaks[0]
    assert 50 <= min(sizes) <= max(sizes) <= 100, "the points of the page's curves"


def test_the_tool_refuses_what_is_no_run(tmp_path: Path, run_dir: Path) -> None:
    refused = run_python("tools/report.py", str(tmp_path), "--output", str(tmp_path / "page.html"), check=False)
    assert refused.returncode == 1
    assert "is not a run directory" in refused.stderr
    assert not (tmp_path / "page.html").exists()
    said = run_python("tools/report.py", str(run_dir), "--output", str(tmp_path / "page.html"), "--json",
                      str(tmp_path / "page.json")).stdout  # fmt: skip
    assert said.strip().endswith("page.html")
    assert json.loads((tmp_path / "page.json").read_text(encoding="utf-8"))[0]["steps"] == 40


def test_what_the_figures_say_stands_first(run_dir: Path, other: Path, tmp_path: Path) -> None:
    write(other / "metrics.jsonl", [row(step, valid={"2": 2.6, "8": 2.0 + step / 100}) for step in range(1, 7)])
    text = html.unescape(render([load_run(run_dir, "run"), load_run(other, "other")]))
    findings = text.split("<h2>Findings</h2>")[1].split("<h2>")[0]
    for sentence in (
        "40% done, 0m12s of updates left, 10,240 tokens, 0.00 hours inside updates.",
        "Validation after step 40: 2.3000 \u00b1 0.0100 bits per byte at K=8, 2.4000 at K=2 (+4.3%).",
        '<span class="alarm">At K=8 it was best after step 20: 2.2500; it has risen since.</span>',
        "1,000 tokens/s (90%: 1,000 to 1,000; median of the newest 40 updates), 40.0% of the peak rate.",
        "It waits: 5% of its time on data and 5% of its time on communication.",
        '<span class="alarm">1 of 40 updates were skipped: not finite.</span>',
        '<span class="alarm">failed: rank 1 hangs, 1,536 tokens',
        '<span class="alarm">Cliff at K=2: 0.540 bits per byte above K=8: do not cut below K=8.</span>',
        "Best at K=8: other, by 0.2400 bits per byte, on each run's own validation text.",
        "Best at K=2: run, by 0.2000 bits per byte, on each run's own validation text.",
    ):
        assert sentence in findings, sentence
    assert "loss, median of newest 40" in text
    newest = table_after(text, "Quality")
    assert newest == [
        ["bits per byte, newest validation", "step", "K=2", "K=8"],
        ["run", "40", "2.4000 \u00b1 0.0200", "2.3000 \u00b1 0.0100"],
        ["other", "6", "2.6000", "2.0600"],
    ]
    at_8 = next(chart for chart in drawn(render([load_run(run_dir, "run"), load_run(other, "other")]))
                if chart["words"].startswith("validation at K=8"))  # fmt: skip
    assert [line["y"] for line in at_8["lines"]] == [[2.25, 2.3], [2.01, 2.02, 2.03, 2.04, 2.05, 2.06]]


def test_nats_of_two_tokenizers_are_not_drawn_together(run_dir: Path, other: Path) -> None:
    for folder, model in ((run_dir, b"one"), (other, b"another")):
        (folder / "tokenizer").mkdir()
        (folder / "tokenizer/tokenizer.model").write_bytes(model)
    titles = [
        chart["words"].partition(":")[0] for chart in drawn(render([load_run(run_dir, "a"), load_run(other, "b")]))
    ]
    assert [title for title in titles if "nats" in title] == [
        "training loss, nats a token (a)", "training loss, nats a token (b)",
    ]  # fmt: skip
    assert "training, bits per byte (at the K drawn)" in titles


def test_training_is_told_apart_by_the_k_drawn(run_dir: Path) -> None:
    rows = [row(step, k=k, k_micro=[k, k], bits_per_byte=2.0 + k / 10) for step, k in enumerate((8, 2, 8, 2, 2), 1)]
    rows += [row(6, k_micro=[2, 8]), row(7, k_micro="x"), row(8, k_micro=[[8]]), row(9, k_micro=[])]
    write(run_dir / "metrics.jsonl", rows)
    (chart,) = (chart for chart in drawn(render([load_run(run_dir, "a")])) if "by the K drawn" in chart["words"])
    assert [(line["label"], line["x"]["updates"], line["y"]) for line in chart["lines"]] == [
        ("K=2", [2, 4, 5], [2.2, 2.2, 2.2]), ("K=8", [1, 3], [2.8, 2.8]),
    ]  # fmt: skip


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [1280, 500])  # the narrowest window that a headless chromium opens
def test_a_browser_draws_the_page_and_fetches_nothing(run_dir: Path, other: Path, tmp_path: Path, width: int) -> None:
    write_run_page([run_dir, other], tmp_path / "page.html")
    probe = """
      seen.wide = [...document.querySelectorAll(".plot canvas")].every(canvas => canvas.offsetWidth > 200);
      seen.overflow = document.documentElement.scrollWidth > innerWidth;
      seen.cut = [...document.querySelectorAll(".scroll")].filter(box => box.scrollWidth > box.clientWidth).length;
      const phases = charts.find(figure => figure.chart.kind === "stack").plot;
      phases.setCursor({ idx: 3, left: phases.valToPos(phases.data[0][3], "x"), top: 5 });
      seen.shares = [...phases.root.querySelectorAll(".u-value")].slice(1).map(value => value.textContent);
      const losses = charts.find(figure => figure.chart.y_label === "nats a token");
      seen.x = [Math.max(...losses.plot.data[0])];
      for (const name of ["tokens", "hours"]) {
        document.querySelector(`.choose [value=${name}]`).click(); seen.x.push(Math.max(...losses.plot.data[0]));
      }
      document.querySelector(".choose [name=log]").click(); seen.log = losses.plot.scales.x.distr;"""
    seen = in_browser(tmp_path / "page.html", probe, f"--window-size={width},900")
    cut = seen.pop("cut")
    assert cut == 0 or width < 1280, "tables fit"
    assert seen.pop("x") == pytest.approx([40, 10240, 40 * 0.2 / 3600], rel=1e-4)
    assert seen == {"wide": True, "loads": 0, "overflow": False, "log": 3, "shares": ["5", "25", "50", "15", "5"]}


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_a_page_is_printed_on_few_sheets(run_dir: Path, other: Path, tmp_path: Path) -> None:
    write_run_page([run_dir, other], tmp_path / "page.html")
    command = (str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}",
               f"--print-to-pdf={tmp_path / 'page.pdf'}", f"file://{tmp_path}/page.html")  # fmt: skip
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    assert 1 <= len(re.findall(rb"/Type /Page\b", (tmp_path / "page.pdf").read_bytes())) <= 4
