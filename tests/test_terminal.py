"""A live run in the terminal: files followed as they grow and are cut, long journals in bounded memory, frames."""

from __future__ import annotations

import fcntl
import io
import json
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from megassm.commands import watch as watch_command
from megassm.commands.watch import next_page
from megassm.report import follow, history
from megassm.report.braille import bar, curve, sparkline
from megassm.report.follow import FollowedFile
from megassm.report.history import History
from megassm.report.live import LiveRun
from megassm.report.run_page import load_run, summary
from megassm.report.terminal import OVERVIEW, PAGES, frame
from megassm.run.records import cut_after, is_record
from tests.conftest import ROOT, run_python

KNOBS = {"train": {"steps": 100}, "optim": {"lr": 0.001}, "run": {"dir": "x"}}
PHASES = {"data": 0.01, "forward": 0.05, "backward": 0.1, "update": 0.03, "communication": 0.01}


def row(step: int, **more: object) -> dict[str, Any]:
    return {
        "step": step, "tokens": step * 256, "loss": 1 + 8 / step, "bits_per_byte": 2.0, "k": 4, "k_micro": [4],
        "lr": 1e-3, "grad_norm": 0.5, "tokens_per_s": 1000.0, "mfu": 0.4, "step_s": 0.2, "data_wait_s": 0.02,
        "peak_memory_bytes": 2**30, "skipped": False, **more,
    }  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]], mode: str = "w") -> None:
    with path.open(mode, encoding="utf-8") as file:
        file.writelines(json.dumps(one) + "\n" for one in rows)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A run of 40 of 100 updates, with phases, events and validations."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(json.dumps(KNOBS), encoding="utf-8")  # JSON is YAML
    facts = {"peak_flops_per_rank": 2e11, "device": "x86_64"}
    (folder / "environment.json").write_text(json.dumps(facts), encoding="utf-8")
    rows = [row(step, phases_s=PHASES) for step in range(1, 41)]
    rows[19]["valid"], rows[39]["valid"] = {"2": 2.5, "8": 2.25}, {"2": 2.4, "8": 2.3}
    rows[39]["valid_error"] = {"2": 0.02, "8": 0.01}
    rows[29] |= {"skipped": True, "loss": None, "bits_per_byte": None, "grad_norm": None}
    write(folder / "metrics.jsonl", rows)
    events = [{"time": 1.7e9, "step": 30, "kind": "skipped", "text": "an update <b>[bold]</b> is skipped"}]
    write(folder / "events.jsonl", events)
    return folder


def drawn(run: LiveRun, width: int = 120, height: int = 40, page: str = OVERVIEW, keys: bool = False) -> str:
    console = Console(width=width, file=io.StringIO(), highlight=False)
    console.print(frame(run, width, height, page, keys))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert max(cell_len(line) for line in text.splitlines()) <= width
    assert len(text.splitlines()) <= height
    return str(text)


def steps(objects: list[dict[str, Any]]) -> list[int]:
    return [one["step"] for one in objects]


def test_a_tail_reads_what_is_new_and_notices_a_cut(tmp_path: Path) -> None:
    path = tmp_path / "m"
    tail = FollowedFile(path, is_record)
    assert tail.read() == (False, []), "no file yet"
    write(path, [row(1), row(2)])
    assert steps(tail.read()[1]) == [1, 2]
    assert tail.read() == (False, [])
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 3, "lo')
    assert tail.read() == (False, []), "half a line waits"
    with path.open("a", encoding="utf-8") as file:
        file.write('ss": 1}\nnonsense\n')
    assert steps(tail.read()[1]) == [3]
    cut_after(path, 1)
    write(path, [row(2, loss=7.0), row(3), row(4)], "a")  # longer than before, by another job
    restarted, rows = tail.read()
    assert (restarted, steps(rows)) == (True, [1, 2, 3, 4])
    path.unlink()
    assert tail.read() == (True, [])


def test_a_long_file_is_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(follow, "READ_BYTES", 1000)
    write(tmp_path / "m", [row(step) for step in range(1, 31)])
    tail = FollowedFile(tmp_path / "m", is_record)
    seen = steps(tail.read()[1])
    assert 0 < tail.share < 1
    while tail.share < 1:
        restarted, rows = tail.read()
        assert not restarted
        seen += steps(rows)
    assert seen == list(range(1, 31))


def test_a_tasks_validation_is_shown_in_its_own_unit(run_dir: Path) -> None:
    tasks = [row(step, bits_per_byte=None, valid_loss={"2": 1.5, "8": 1.25}, valid_accuracy={"2": 0.4, "8": 0.6})
             for step in (1, 2)]  # fmt: skip
    write(run_dir / "metrics.jsonl", tasks)
    text = drawn(LiveRun(run_dir).look())
    assert "nats/answer" in text
    assert "1.250" in text
    assert "bits/byte" not in text
    figures = summary(load_run(run_dir, "a"))
    assert (figures["valid at full K"], figures["in"]) == (1.25, "nats an answer")


def test_a_history_is_bounded_and_keeps_the_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(history, "SPANS", 8)
    monkeypatch.setattr(history, "VALIDATIONS", 10)
    rows = [row(step, loss=float(step), valid={"2": float(step)}) for step in range(1, 1001)]
    seen = History().extend(rows)
    assert 8 <= len(seen.spans) <= 16
    assert sum(span.records for span in seen.spans) == 1000
    assert seen.spans[-1].step == 1000
    assert sum(mean * span.counts["loss"] for span, mean in seen.series("loss")) == pytest.approx(1000 * 1001 / 2)
    assert (seen.spans[0].low, seen.spans[-1].high) == (1, 1000)
    assert len(seen.validations) <= 10
    assert seen.validations[-1][0] == 1000
    assert [step for step, *_ in seen.validations] == sorted({step for step, *_ in seen.validations})
    assert seen.seconds == pytest.approx(200)


def test_strokes() -> None:
    assert curve([], 3, 2) == ["   ", "   "]
    rising = curve([(x, x) for x in range(8)], 4, 2)
    assert [len(line) for line in rising] == [4, 4]
    assert rising[0][0] == " "
    assert rising[1][3] == " ", "from the lower left to the upper right"
    assert curve([(0, 1), (1, float("nan")), (2, 1)], 3, 1)[0].strip()
    assert sparkline([1, float("inf"), 2, 3], 2) == "▁█"
    assert (bar(0.5, 4), bar(2, 3), bar(-1, 2), bar(1 / 16, 2)) == ("██  ", "███", "  ", "▏ ")


FIGURES = (
    "step 40/100", "40%", "1.2", "2.000 bits/byte", "nats/token", "1,000", "40.0%", "1.00 GiB", "backward 50%", "2.300",
    "+0.050", "2.400", "-0.100", "bits/byte", "1 of 40 updates", "grad norm 0.5", "is skipped", "step 30",
)  # fmt: skip
SIZES = [(80, 24), (120, 40), (200, 50)]


@pytest.mark.parametrize(("width", "height"), SIZES)
def test_every_subject_is_always_visible_with_its_figures(run_dir: Path, width: int, height: int) -> None:
    text = drawn(LiveRun(run_dir).look(), width, height)
    assert len(text.splitlines()) == height, "all of the terminal is used"
    assert max(cell_len(line) for line in text.splitlines()) == width
    for title in (
        "loss, median of newest 40",
        "validation, step 40",
        "speed, medians of newest 40",
        "health",
        "events",
    ):
        assert f"─ {title}" in text
    spaced = " ".join(text.replace("backward         50%", "backward 50%").split())
    for figure in FIGURES:
        assert figure in spaced, figure
    assert "an update <b>[bold]</b> is skipped" in text


def test_a_wide_frame_says_more(run_dir: Path) -> None:
    text = drawn(LiveRun(run_dir).look(), 200, 50)
    for part in ("running, last record 0m0", "eta 0m12s", "10.2/25.6 k tokens", "of 0.2 TFLOP/s a rank", "2023-11-14",
                 "largest of all ranks", "at K=8 since the first:", "update 1 ", "communication     5%"):  # fmt: skip
        assert part in text, part


def test_utilisation_that_is_not_known_is_not_shown(run_dir: Path) -> None:
    write(run_dir / "metrics.jsonl", [row(step, mfu=None) for step in (1, 2)])
    run = LiveRun(run_dir).look()
    for width, height in SIZES:
        assert "MFU" not in drawn(run, width, height)


def test_the_longest_bar_is_the_best_budget(run_dir: Path) -> None:
    for height in (24, 40):
        text = drawn(LiveRun(run_dir).look(), 120, height)
        (header,) = (line for line in text.splitlines() if "better →" in line)
        bars = {k: next(line for line in text.splitlines() if f" {k}       {bits} " in line).count("█")
                for k, bits in ((2, "2.400"), (8, "2.300"))}  # fmt: skip
        assert "bits/byte" in header
        assert bars[8] > 5 * bars[2] > 0


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize(("width", "height"), [(40, 24), (71, 30), *SIZES])
def test_a_page_fits_any_terminal(run_dir: Path, width: int, height: int, page: str) -> None:
    text = drawn(LiveRun(run_dir).look(), width, height, page, keys=True)
    assert "step 40/100" in text
    assert "1 overview" in text.splitlines()[-1]
    shown = [name for name in PAGES[1:] if f"─ {name}" in text]
    assert shown == ([page] if page != OVERVIEW else list(PAGES[1:]))


def test_keys_lead_to_pages() -> None:
    assert watch_command.PAGES == PAGES, "the parser names them without rich"
    assert [next_page(OVERVIEW, key) for key in ("3", "6", "\t", "\x1b[Z", "x", "", "7")] == [
        "validation", "events", "loss", "events", OVERVIEW, OVERVIEW, OVERVIEW,
    ]  # fmt: skip
    assert next_page("events", "\x1b[C") == OVERVIEW


def test_a_person_turns_pages_and_leaves(run_dir: Path) -> None:
    terminal, other_end = pty.openpty()
    fcntl.ioctl(other_end, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [sys.executable, "tools/watch.py", str(run_dir), "--every", "30"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=other_end, stdout=other_end, stderr=other_end,
                               env=os.environ | {"TERM": "xterm"})  # fmt: skip
    os.close(other_end)
    seen = b""

    def until(part: str) -> None:
        nonlocal seen
        while part.encode() not in seen:
            assert select.select([terminal], [], [], 60)[0], seen.decode(errors="replace")
            seen += os.read(terminal, 65536)
        seen = seen[seen.rindex(part.encode()) :]

    until("q quit")
    os.write(terminal, b"4")
    until("\x1b[7m4 speed")
    os.write(terminal, b"\t")
    until("\x1b[7m5 health")
    os.write(terminal, b"q")
    until("step 40/100")
    assert process.wait(60) == 0
    os.close(terminal)


def test_states_are_told_by_the_files(run_dir: Path) -> None:
    run = LiveRun(run_dir)
    journal = run_dir / "metrics.jsonl"
    assert run.look().state == "running"
    os.utime(journal, (0, time.time() - 200))
    assert run.look().state == "stalled"
    assert "stalled for 3m2" in drawn(run)
    (run_dir / "failure.txt").write_text("rank 3 hangs\nstacks\n", encoding="utf-8")
    assert "failed: rank 3 hangs" in drawn(run.look())
    (run_dir / "failure.txt").unlink()
    write(journal, [row(100)], "a")
    assert run.look().state == "finished"
    cut_after(journal, 20)
    write(journal, [row(21, loss=5.5)], "a")
    assert run.look().state == "running"
    assert run.history.records == 21, "a resumed run is one curve"


def test_a_frame_without_rows_or_with_little(tmp_path: Path) -> None:
    nothing = tmp_path / "not/yet"
    assert "not started" in drawn(LiveRun(nothing).look())
    (tmp_path / "config.yaml").write_text("train: [", encoding="utf-8")
    assert "starting" in drawn(LiveRun(tmp_path).look())
    write(tmp_path / "metrics.jsonl", [{"step": 1}, {"step": 2, "loss": None, "skipped": True}])
    write(tmp_path / "events.jsonl", [{"kind": "odd", "value": 3}, {"time": "noon", "text": "x\ny"}])
    text = drawn(LiveRun(tmp_path).look())
    assert "no finite loss yet" in text
    assert '{"value": 3}' in text
    assert "noon" in text


def test_the_tool_prints_one_frame_into_a_pipe(run_dir: Path, tmp_path: Path) -> None:
    said = run_python("tools/watch.py", str(run_dir), "--once", COLUMNS="60").stdout
    assert "step 40/100" in said
    assert "\x1b" not in said
    refused = run_python("tools/watch.py", str(tmp_path / "none"), "--once", check=False)
    assert refused.returncode == 1
    assert "no such run directory" in refused.stderr
