"""The script of the first hour on a GPU, tried on a processor: sections pass, fail and hang without the others."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, run_python
from tools.bench import first_hour
from tools.bench.gpu.plan import Plan, Section, sections


def test_sections_leave_their_results(tmp_path: Path) -> None:
    done = run_python("tools/bench/first_hour.py", "--device", "cpu", "--quick", "--out", str(tmp_path), "--jobs", "2",
                      "--only", "kernels,elementwise,data,train_zero1")  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / first_hour.RESULTS).read_text().splitlines()]
    assert {row["section"]: row["ok"] for row in rows} == {
        "kernels": True,
        "elementwise": True,
        "data": True,
        "train_zero1": True,
    }
    (trained,) = (row for row in rows if row["section"] == "train_zero1")
    assert trained["resumed_off"] == 0
    assert len(trained["loss"]) == 12
    assert "4 sections, 0 failed" in done.stdout


@pytest.mark.parametrize(
    ("function", "limit_s", "expected"),
    [("_fails", 60.0, "ZeroDivisionError"), ("_hangs", 1.0, "killed after 1 s"), ("_dies", 60.0, "exit code 3")],
)
def test_a_section_fails_alone(tmp_path: Path, function: str, limit_s: float, expected: str) -> None:
    import tools.bench.gpu.checks as checks

    runner = first_hour.Runner(Plan("cpu", True, tmp_path, tmp_path), tmp_path, tmp_path)
    for name, place in {"_fails": _fails, "_hangs": _hangs, "_dies": _dies}.items():
        setattr(checks, name, place)
    try:
        runner.start(Section("odd", "checks", function, limit_s=limit_s))
        runner.wait(1)
    finally:
        for name in ("_fails", "_hangs", "_dies"):
            delattr(checks, name)
    row = json.loads((tmp_path / first_hour.RESULTS).read_text())
    assert row["ok"] is False
    assert expected in row["error"]
    assert row["first"] == 1
    assert runner.failed == 1


def _fails(_plan: Plan, _folder: Path):  # type: ignore[no-untyped-def]
    yield {"first": 1}
    raise ZeroDivisionError


def _hangs(_plan: Plan, _folder: Path):  # type: ignore[no-untyped-def]
    import time

    yield {"first": 1}
    time.sleep(60)


def _dies(_plan: Plan, _folder: Path):  # type: ignore[no-untyped-def]
    import os

    yield {"first": 1}
    os._exit(3)


def test_names_are_unique_and_the_shell_script_takes_options() -> None:
    names = [section.name for section in sections(quick=False)]
    assert len(set(names)) == len(names)
    done = subprocess.run(["tools/bench/first_hour.sh", "--help"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--quick" in done.stdout
