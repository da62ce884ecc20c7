"""Progress: lines with rate and time left where there is no terminal, a bar where there is one."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time

import pytest

from megassm.cli.progress import LineProgress, shown_progress, tracked
from tests.conftest import ROOT


def test_lines_come_when_due_and_say_rate_and_time_left(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    lines = LineProgress(every_s=10)
    lines.start("tokenize", 8_000_000)
    for now in (101.0, 109.9, 110.0, 111.0, 120.0):
        lines.update(int((now - 100) * 200_000))
    lines.note("done")
    assert capsys.readouterr().err.splitlines() == [
        "tokenize: 2.0 of 8.0 MB, 0.20 MB/s, 30 s left",
        "tokenize: 4.0 of 8.0 MB, 0.20 MB/s, 20 s left",
        "done",
    ]


def test_other_units_and_phases_that_cannot_say_how_far_they_are(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    for _ in tracked("abcd", LineProgress(every_s=10), "sweep", 4, "batches"):
        clock[0] += 10
    assert capsys.readouterr().err.splitlines() == [
        "sweep: 1 of 4 batches, 0.1 batches/s, 30 s left",
        "sweep: 2 of 4 batches, 0.1 batches/s, 20 s left",
        "sweep: 3 of 4 batches, 0.1 batches/s, 10 s left",
        "sweep: 4 of 4 batches, 0.1 batches/s, 0 s left",
    ]
    monkeypatch.undo()
    with LineProgress(every_s=0.01).busy("train"):
        time.sleep(0.2)
    assert "train: 0 s so far" in capsys.readouterr().err


def test_without_a_terminal_short_work_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with shown_progress() as shown:
        shown.start("write", 10)
        shown.update(10)
    assert isinstance(shown, LineProgress)
    assert capsys.readouterr() == ("", "")


BAR = """
from megassm.cli.progress import shown_progress
with shown_progress() as shown:
    shown.start("tokenize", 2_000_000)
    shown.note("going [on]")
    shown.update(1_000_000)
    shown.update(2_000_000)
    with shown.busy("wait"):
        pass
    shown.start("sweep", 4, "batches")
    shown.update(4)
"""


def test_on_a_terminal_there_is_a_bar() -> None:
    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", BAR], stderr=slave, stdout=subprocess.PIPE, env=environment)
    os.close(slave)
    shown = os.read(master, 1 << 16).decode()
    os.close(master)
    assert (done.returncode, done.stdout) == (0, b"")
    for part in ("tokenize", "2.0 of 2.0 MB", "4 of 4 batches", "wait", "going [on]", "\u2501\u2501"):
        assert part in shown
