"""The page that compares runs: whole, alone in the world, and small however long the journals are."""

from __future__ import annotations

import json
import re
import subprocess
import tracemalloc
from pathlib import Path

import pytest

from megassm.report import history
from megassm.report.run_page import load_run, render, write_run_page
from tests.conftest import run_python
from tests.test_report import BROWSER, Page
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
    page = Page(text)
    assert page.open == []
    assert page.urls
    assert all(url.startswith("#") and url[1:] in page.ids for url in page.urls)
    assert len(page.ids) == len(set(page.ids)), "ids of several plots do not clash"
    assert "@import" not in text
    assert set(re.findall(r"https?://[^\s\"'<)]+", text)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert page.tags.count("svg") == 12
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


@pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")
def test_a_browser_draws_the_page_and_fetches_nothing(run_dir: Path, other: Path, tmp_path: Path) -> None:
    write_run_page([run_dir, other], tmp_path / "page.html")
    probe = """<script>
      const wide = [...document.querySelectorAll("figure svg")].every(svg => svg.getBoundingClientRect().width > 200);
      const loads = performance.getEntriesByType("resource").length;
      const overflow = document.documentElement.scrollWidth > innerWidth;
      document.title = JSON.stringify({ wide, loads, overflow });
    </script></body>"""
    page = tmp_path / "page.html"
    page.write_text(page.read_text(encoding="utf-8").replace("</body>", probe), encoding="utf-8")
    options = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom")
    done = subprocess.run(
        [str(BROWSER), *options, f"file://{page}"], capture_output=True, text=True, timeout=120, check=True
    )
    title = re.search("<title>(.*?)</title>", done.stdout)
    assert title is not None
    assert json.loads(title[1]) == {"wide": True, "loads": 0, "overflow": False}
