"""What a sweep leaves: tables that agree, pictures, and one page that needs nothing else."""

from __future__ import annotations

import csv
import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megassm.eval.curve import shape
from megassm.eval.sweep import BudgetCurve, BudgetRow, Sweep
from megassm.report.figures import plot_over_steps, save_panels
from megassm.report.sweep_files import flat_rows, plot_steps, write_json_sweep, write_page, write_sweep
from megassm.report.sweep_plots import panels

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


def test_the_page_needs_nothing_else_and_has_every_plot_and_row(tmp_path: Path) -> None:
    sweeps = [a_sweep(), a_sweep("runs/second", 20, curve(), curve("own", 128))]
    write_page(sweeps, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.urls, "markers of the plots"
    assert all(url.startswith("#") and url[1:] in page.ids for url in page.urls)
    assert len(page.ids) == len(set(page.ids)), "ids of several plots do not clash"
    clips = set(re.findall(r"url\(([^)]*)\)", text))
    assert clips
    assert all(clip[1:] in page.ids for clip in clips)
    assert "@import" not in text
    assert page.tags.count("svg") == len(panels(sweeps)) == 6
    assert page.tags.count("tr") == 2 + 5 + 15
    assert "runs/a&lt;b&gt;&amp;c" in text
    assert "runs/a<b>" not in text
    assert text.count('class="text alarm"') == 1, "the one cliff"


def test_panels_draw_each_run_and_survive_missing_figures(tmp_path: Path) -> None:
    bare = curve(decode=None)
    no_interval = replace(bare, rows=[replace(r, gap_percent_low=None, gap_percent_high=None) for r in bare.rows])
    alone = panels([a_sweep("x", 1, no_interval)])
    assert [panel.title for panel in alone] == ["bits per byte of own (lower is better)", "prefill tokens/s"]
    for suffix in ("png", "svg", "pdf"):
        save_panels(alone, tmp_path / f"new/plot.{suffix}")
        assert (tmp_path / f"new/plot.{suffix}").stat().st_size > 1000
    save_panels(alone, tmp_path / "labels.svg")
    plot_over_steps({2: [(1, 3.0), (2, 2.0)]}, "bits", tmp_path / "steps.png")
    assert (tmp_path / "steps.png").stat().st_size > 1000


def test_a_task_shows_its_accuracy_and_its_bits_are_of_answers(tmp_path: Path) -> None:
    of_text = curve("notes")
    rows = [replace(row, accuracy=0.9, accuracy_low=0.8, accuracy_high=0.95) for row in of_text.rows]
    task = a_sweep("runs/task", 1, replace(of_text, data="task", rows=rows))
    assert [panel.title for panel in panels([task])][:2] == [
        "bits per answer of task (lower is better)",
        "accuracy on task",
    ]
    for sweeps, heading in (([task], "bits/answer"), ([task, a_sweep("x", 1, of_text)], "bits/byte/answer")):
        write_page(sweeps, tmp_path / "page.html")
        text = (tmp_path / "page.html").read_text(encoding="utf-8")
        assert f"<button>{heading}</button>" in text
        assert "0.9000" in text
        assert "0.8000 \u2026 0.9500" in text
        assert "share of right answers" in text


def test_steps_are_drawn_from_every_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}
    monkeypatch.setattr("megassm.report.sweep_files.plot_over_steps", lambda lines, label, path: drawn.update(lines))
    for step in (10, 20):
        longer = curve("own", 128, collapse=9.0)
        write_json_sweep(a_sweep("x", step, longer, curve()), tmp_path / f"step-{step:08d}.json")
    assert plot_steps(tmp_path) == tmp_path / "steps.png"
    assert drawn == {1: [(10, 2.06), (20, 2.06)], 2: [(10, 2.03), (20, 2.03)], 8: [(10, 2.0), (20, 2.0)]}


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_a_browser_draws_and_sorts_the_page(tmp_path: Path) -> None:
    write_page([a_sweep()], tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    probe = """<script>
      const table = document.querySelectorAll("table.sortable")[1], heads = [...table.tHead.rows[0].cells];
      const column = heads.findIndex(head => head.textContent === "bits/byte");
      const values = () => [...table.tBodies[0].rows].map(row => row.cells[column].textContent).join(",");
      heads[column].firstChild.click(); const up = values();
      heads[column].firstChild.click();
      const wide = [...document.querySelectorAll("figure svg")].every(svg => svg.getBoundingClientRect().width > 200);
      const loads = performance.getEntriesByType("resource").length;
      document.title = JSON.stringify({ up, down: values(), wide, loads, sorted: heads[column].ariaSort });
    </script></body>"""
    (tmp_path / "probe.html").write_text(text.replace("</body>", probe), encoding="utf-8")
    options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom")
    done = subprocess.run(
        [str(BROWSER), *options, f"file://{tmp_path}/probe.html"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title is not None
    seen = json.loads(title[1])
    values = sorted(f"{row['bits_per_byte']:.4f}" for row in flat_rows(a_sweep()))
    assert seen == {
        "up": ",".join(values), "down": ",".join(reversed(values)), "wide": True, "loads": 0, "sorted": "descending",
    }  # fmt: skip
