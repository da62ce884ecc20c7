"""What a sweep leaves: tables that agree, pictures, and one page that needs nothing else."""

from __future__ import annotations

import csv
import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from megassm.eval.curve import shape
from megassm.eval.swept import BudgetCurve, BudgetRow, Sweep
from megassm.report.figures import plot_over_steps, save_charts
from megassm.report.sweep_files import flat_rows, plot_steps, write_json_sweep, write_page, write_sweep
from megassm.report.sweep_plots import charts

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def curve(data: str = "own", seq_len: int = 64, collapse: float = 0.0, decode: float | None = 50.0) -> BudgetCurve:
    bits = {1: 2.06 + collapse, 2: 2.03, 8: 2.0}
    rows = [
        BudgetRow(k, 1000 * k, b, b - 0.1, b + 0.1, 3 * b, 2 ** (3 * b), 5.0, 9.0, 100 * (b / 2 - 1), -1.0, 1.0,
                  2e6 * k, 900.0 / k, decode, 1.5 * k)
        for k, b in bits.items()
    ]  # fmt: skip
    return BudgetCurve(data, seq_len, 12, 768, 3.1, shape(bits), rows)


def a_sweep(run: str = "runs/a<b>&c", step: int = 10, *curves: BudgetCurve) -> Sweep:
    return Sweep(run, step, 64, list(curves or (curve(), curve("other", 64, 1.0), curve("own", 128))))


class Page(HTMLParser):
    """What a browser would load, and how elements nest."""

    VOID = ("meta", "br", "hr", "img", "link", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.urls: list[str] = []
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "action", "srcset", "data"):
                self.urls.append(value or "")
            if name == "id":
                self.ids.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_files_agree(tmp_path: Path) -> None:
    sweep = a_sweep()
    paths = write_sweep(sweep, tmp_path / "run")
    assert [path.name for path in paths] == ["sweep.json", "sweep.csv", "sweep.png", "sweep.html"]
    record = json.loads(paths[0].read_text(encoding="utf-8"))
    assert (record["run"], record["step"], record["trained_seq_len"]) == (sweep.run, 10, 64)
    assert record["curves"][1]["shape"]["cliffs"][0]["k"] == 1
    with paths[1].open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["data"], row["seq_len"], row["k"]) for row in rows] == [
        (c.data, str(c.seq_len), str(r.k)) for c in sweep.curves for r in c.rows
    ]
    assert [float(row["bits_per_byte"]) for row in rows] == [row["bits_per_byte"] for row in flat_rows(sweep)]
    assert paths[2].read_bytes().startswith(b"\x89PNG")


def drawn(text: str) -> list[dict[str, Any]]:
    """What the charts of a page are drawn from, x included, each with its words."""
    found = []
    for group in re.findall(r'<div class="plots" data-charts.*?</script>', text, re.DOTALL):
        data = json.loads(re.findall(r'<script type="application/json">(.*?)</script>', group, re.DOTALL)[0])
        said = [html.unescape(words) for words in re.findall('aria-label="(.*?)"', group)]
        for chart, words in zip(data["charts"], said, strict=True):
            for line in chart["lines"]:
                line["x"] = data["xs"][line["x"]]
                lengths = {len(values) for values in (*line["x"].values(), line["y"])}
                assert len(lengths) == 1, "a value for each x"
            found.append(chart | {"words": words})
    return found


def loads_nothing(text: str) -> Page:
    """Asserts that the page is whole, and asks nothing of a network."""
    page = Page(text)
    assert page.open == []
    assert not page.urls
    assert "@import" not in text
    assert "url(" not in text
    assert "Copyright (c) 2022 Leon Sorokin" in text, "who uses a copy of uPlot keeps its licence"
    return page


def test_the_page_needs_nothing_else_and_has_every_plot_and_row(tmp_path: Path) -> None:
    sweeps = [a_sweep(), a_sweep("runs/second", 20, curve(), curve("own", 128))]
    write_page(sweeps, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = loads_nothing(text)
    assert page.tags.count("tr") == 2 + 5 + 15
    assert "runs/a&lt;b&gt;&amp;c" in text
    assert "runs/a<b>" not in text
    assert text.count('class="text alarm"') == 1, "the one cliff"
    shown = drawn(text)
    assert page.tags.count("figure") == len(shown) == len(charts(sweeps)) == 6
    own = shown[0]
    assert own["lines"][0]["label"] == "runs/a<b>&c, step 10, 64 tokens"
    assert own["lines"][0]["x"] == {"budget K (spectral channels)": [1, 2, 8]}
    assert (own["lines"][0]["y"], own["ticks"]) == ([2.06, 2.03, 2.0], [1, 2, 8])
    assert own["lines"][0]["low"] == [1.98, 1.98, 1.98], "95% of the gap, around the bits at full K"
    assert "runs/a<b>&c, step 10, 64 tokens: 2.06 at budget K (spectral channels) 1, 2 at 8" in own["words"]


def test_findings_stand_above_the_plots_as_sentences(tmp_path: Path) -> None:
    sweeps = [a_sweep("a", 1, curve("own", 64, 1.0)), a_sweep("b", 2, curve("own", 64, 0.0))]
    write_page(sweeps, tmp_path / "page.html")
    text = html.unescape((tmp_path / "page.html").read_text(encoding="utf-8"))
    findings = text.split("<h2>Findings</h2>")[1].split("<h2>")[0]
    for sentence in (
        "a, step 1 on own, 64 tokens:</strong>",
        "2.0000 (95%: 1.9000 \u2026 2.1000) bits per byte at K=8; within 1% of that from K=8 on.",
        "Cut to K=1: +53.00% (95%: -1.00 to 1.00) bits per byte, with 12% of the parameters, 8.0 times the prefill "
        "tokens/s, 1.0 times the decoded tokens/s, 12% of the memory.",
        '<span class="alarm">Cliff at K=1: 1.030 bits per byte above K=2, 97% of what the whole cut loses: do not cut '
        "below K=2.</span>",
        "Best at full K on own, 64 tokens: a, step 1, by 0.0000 bits per byte; their intervals overlap.",
        "Best at the smallest K on own, 64 tokens: b, step 2, by 1.0000 bits per byte.",
    ):
        assert sentence in findings, sentence
    assert findings.index("Best at") < text.index("data-charts")


def test_charts_of_each_run_survive_missing_figures(tmp_path: Path) -> None:
    bare = curve(decode=None)
    no_interval = replace(bare, rows=[replace(r, gap_percent_low=None, gap_percent_high=None) for r in bare.rows])
    alone = charts([a_sweep("x", 1, no_interval)])
    assert [chart.title for chart in alone] == ["bits per byte of own (lower is better)", "prefill tokens/s"]
    for suffix in ("png", "svg", "pdf"):
        save_charts(alone, tmp_path / f"new/plot.{suffix}")
        assert (tmp_path / f"new/plot.{suffix}").stat().st_size > 1000
    save_charts(charts([a_sweep()]), tmp_path / "bands.svg")
    assert "(band: 95% of the gap to full K)" in (tmp_path / "bands.svg").read_text(encoding="utf-8")
    plot_over_steps({2: [(1, 3.0), (2, 2.0)]}, "bits of $x_{ and no formula", tmp_path / "steps.png")
    assert (tmp_path / "steps.png").stat().st_size > 1000


def test_a_task_shows_its_accuracy_and_its_bits_are_of_answers(tmp_path: Path) -> None:
    of_text = curve("notes")
    rows = [replace(row, accuracy=0.9, accuracy_low=0.8, accuracy_high=0.95) for row in of_text.rows]
    task = a_sweep("runs/task", 1, replace(of_text, data="task", rows=rows))
    assert [chart.title for chart in charts([task])][:2] == [
        "bits per answer of task (lower is better)",
        "accuracy on task",
    ]
    for sweeps, heading in (([task], "bits/answer"), ([task, a_sweep("x", 1, of_text)], "bits/byte/answer")):
        write_page(sweeps, tmp_path / "page.html")
        text = (tmp_path / "page.html").read_text(encoding="utf-8")
        assert f"<button>{heading}</button>" in text
        assert "0.9000" in text
        assert "0.8000 \u2026 0.9500" in text
        (accuracy,) = (chart for chart in drawn(text) if chart["y_label"] == "share of right answers")
        assert accuracy["lines"][0]["high"] == [0.95, 0.95, 0.95]


def test_steps_are_drawn_from_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}
    monkeypatch.setattr("megassm.report.sweep_files.plot_over_steps", lambda lines, label, path: drawn.update(lines))
    for step in (10, 20):
        longer = curve("own", 128, collapse=9.0)
        write_json_sweep(a_sweep("x", step, longer, curve()), tmp_path / f"step-{step:08d}.json")
    assert plot_steps(tmp_path) == tmp_path / "steps.png"
    assert drawn == {1: [(10, 2.06), (20, 2.06)], 2: [(10, 2.03), (20, 2.03)], 8: [(10, 2.0), (20, 2.0)]}


def in_browser(page: Path, probe: str, *options: str) -> dict[str, Any]:
    """What a script that runs after the page's own puts into `seen`, and what the page has loaded."""
    end = "seen.loads = performance.getEntriesByType('resource').length; document.title = JSON.stringify(seen);"
    text = page.read_text(encoding="utf-8").replace(
        "</body>", f"<script>const seen = {{}}; {probe}; {end}</script></body>"
    )
    (page.parent / "probe.html").write_text(text, encoding="utf-8")
    own = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={page.parent / 'profile'}", "--dump-dom")
    command = [str(BROWSER), *own, *options, f"file://{page.parent}/probe.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title is not None
    seen: dict[str, Any] = json.loads(html.unescape(title[1]))
    return seen


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_a_browser_draws_and_sorts_the_page(tmp_path: Path) -> None:
    write_page([a_sweep()], tmp_path / "page.html")
    probe = """
      const table = document.querySelectorAll("table.sortable")[1], heads = [...table.tHead.rows[0].cells];
      const column = heads.findIndex(head => head.textContent === "bits/byte");
      const column_values = () => [...table.tBodies[0].rows].map(row => row.cells[column].textContent).join(",");
      heads[column].firstChild.click(); seen.up = column_values();
      heads[column].firstChild.click(); seen.down = column_values(); seen.sorted = heads[column].ariaSort;
      const hidden = () => heads.filter(head => head.offsetWidth === 0).length;
      seen.hidden = hidden(); table.closest(".table").querySelector("input").click(); seen.shown = hidden() === 0;
      seen.wide = [...document.querySelectorAll(".plot")].every(plot => plot.querySelector("canvas").offsetWidth > 200);
      const plot = charts[0].plot;
      plot.setCursor({ left: plot.valToPos(2, "x"), top: 20 });
      const values = plot.root.querySelectorAll(".u-series:not(.helper) .u-value");
      seen.hover = [...values].map(value => value.textContent);
      document.querySelector("figcaption button").click(); seen.log = charts[0].plot.scales.y.distr"""
    seen = in_browser(tmp_path / "page.html", probe, "--window-size=1280,900")
    values = sorted(f"{row['bits_per_byte']:.4f}" for row in flat_rows(a_sweep()))
    assert seen == {
        "up": ",".join(values), "down": ",".join(reversed(values)), "sorted": "descending", "wide": True, "loads": 0,
        "hidden": 4, "shown": True, "hover": ["2", "2.03 (1.98 \u2026 2.02)", "2.03 (1.98 \u2026 2.02)"], "log": 3,
    }  # fmt: skip
