"""Jobs that fail at the same step are counted; those that get on, end in order or never trained are not."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megassm.config.schema import Config
from megassm.data.dataset import open_dataset
from megassm.errors import UserError
from megassm.run.directory import FAILURES
from megassm.run.events import read_events
from megassm.run.failures import check_failures, job_begins, job_ends
from megassm.train import loop
from tests.conftest import SMALL, run_python

HANGS = "rank 1 hangs: in step 8, forward pass"
LOST = "rank 2 no longer answers: ended, stopped, or cut off; last heard of in step 8"


def start(run_dir: Path, limit: int | None = 3) -> None:
    check_failures(run_dir, run_dir / "metrics.jsonl", run_dir / "failure.txt", limit)
    (run_dir / "failure.txt").unlink(missing_ok=True)
    job_begins(run_dir)


def fail(run_dir: Path, step: int, reason: str = "") -> None:
    """A job that trains up to `step`, and no further."""
    start(run_dir)
    rows = "".join(json.dumps({"step": done + 1, "loss": 1.0}) + "\n" for done in range(step - 1))
    (run_dir / "metrics.jsonl").write_text(rows + '{"step": 9', encoding="utf-8")
    if reason:
        (run_dir / "failure.txt").write_text(f"{reason}\n", encoding="utf-8")


def test_the_same_step_three_times_is_refused_with_the_way_out(tmp_path: Path) -> None:
    for _ in range(3):
        fail(tmp_path, 8, HANGS)
    for _ in range(2):  # it stays refused
        with pytest.raises(
            UserError, match="3 jobs in a row have ended at step 8, the last because: rank 1 hangs"
        ) as no:
            start(tmp_path)
    assert f"tools/inspect_data.py {tmp_path} --step 8" in str(no.value)
    event = list(read_events(tmp_path))[-1]
    assert (event["kind"], event["figures"]) == ("repeated failure", {"failed_step": 8, "jobs": 3})
    start(tmp_path, limit=None)
    (tmp_path / FAILURES).unlink()
    start(tmp_path)


def test_progress_and_an_orderly_end_forget(tmp_path: Path) -> None:
    for step in (8, 8, 9, 8, 8):
        fail(tmp_path, step, HANGS)
    start(tmp_path)
    job_ends(tmp_path)
    for _ in range(2):
        fail(tmp_path, 8, HANGS)
    start(tmp_path)


@pytest.mark.parametrize("reason", ["", LOST])
def test_jobs_that_were_killed_count_half(tmp_path: Path, reason: str) -> None:
    for _ in range(6):
        fail(tmp_path, 8, reason)
    with pytest.raises(UserError, match="6 jobs in a row have ended at step 8"):
        start(tmp_path)


def test_jobs_that_never_trained_do_not_count(tmp_path: Path) -> None:
    fail(tmp_path, 8, HANGS)
    for _ in range(9):
        check_failures(tmp_path, tmp_path / "metrics.jsonl", tmp_path / "failure.txt", 2)


def test_a_real_job_is_refused_at_its_second_start_and_trains_once_the_file_is_gone(
    tmp_path: Path, data_path: Path
) -> None:
    run_dir = tmp_path / "run"
    arguments = ("--config", "configs/tiny.yaml", *SMALL, f"run.dir={run_dir}", f"data.path={data_path}",
                 "train.steps=4", "health.max_failures=1")  # fmt: skip
    done = run_python("tests/faulty.py", *arguments, check=False, FAULT="raise:0:3", RANK="0")
    assert "ended with KeyError('planted')" in done.stderr
    refused = run_python("launch/pretrain.py", *arguments, check=False)
    assert refused.returncode == 1
    assert "1 jobs in a row have ended at step 3, the last because: rank 0 ended with KeyError" in refused.stderr
    (run_dir / FAILURES).unlink()
    run_python("launch/pretrain.py", *arguments)
    assert not (run_dir / FAILURES).exists()
    kinds = [event["kind"] for event in read_events(run_dir)]
    assert kinds == ["start", "failure", "repeated failure", "start", "checkpoint", "end"]


@pytest.mark.parametrize("error", [UserError("no"), ValueError("no")])
def test_a_process_outlives_the_watchdog_of_a_run_that_failed(
    error: Exception, small_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A notebook goes on: nothing may watch it, and end it for making no progress."""

    def fails(*_: object) -> None:
        assert len(watched()) == 2
        raise error

    def watched() -> list[threading.Thread]:
        return [thread for thread in threading.enumerate() if thread.name.startswith("watchdog")]

    monkeypatch.setattr(loop, "set_up", fails)
    config = small_config()
    Path(config.run.dir).mkdir()
    with pytest.raises(SystemExit if isinstance(error, UserError) else ValueError):
        loop.pretrain(config, open_dataset(config))
    deadline = time.monotonic() + 10
    while watched() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not watched()
