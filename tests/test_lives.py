"""Every start of a run and its end are in events.jsonl with a cause, whatever ended it; a full disk loses none."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from megassm.config.schema import Config
from megassm.errors import UserError
from megassm.run.directory import EVENTS, FAILURE, METRICS
from megassm.run.events import Events, read_events
from megassm.run.fence import take
from megassm.run.lives import life_of
from megassm.run.opening import clear_partial, open_run_directory
from tests.conftest import run_python
from tests.test_records import room_for

Make = Callable[..., Config]


def start(config: Config) -> list[str]:
    """A start under its lock; returns the run's events so far, in words."""
    lock = open_run_directory(config)
    assert lock is not None
    lock.close()
    return [f"{event['kind']}: {event['text']}" for event in read_events(Path(config.run.dir))]


def test_how_each_job_ended_is_noted_by_the_next(small_config: Make) -> None:
    config = small_config("parallel.zero_stage=2")
    run_dir = Path(config.run.dir)
    [first] = start(config)
    assert first.startswith("start: started on ")
    assert first.endswith(": 1 rank, ZeRO 2")
    *_, killed, _ = start(config)
    assert "failure: the job before, started 20" in killed
    assert killed.endswith("ended without a word before its first step was done")
    (run_dir / METRICS).write_text('{"step": 7}\n', encoding="utf-8")
    (run_dir / FAILURE).write_text("rank 3 hangs: in step 8\nmore", encoding="utf-8")
    assert [event["text"] for event in life_of(run_dir)][-1].endswith("ended after step 7: rank 3 hangs: in step 8")
    *_, failed, _ = start(config)
    assert failed.endswith("ended after step 7: rank 3 hangs: in step 8")
    assert not (run_dir / FAILURE).exists()
    events = Events(run_dir, True, take(run_dir))
    events.add("stop", 9, "stopped")
    events.close()
    assert [text.partition(":")[0] for text in start(config)[-3:]] == ["start", "stop", "start"], (
        "it has said so itself"
    )


def test_a_refused_start_tells_of_the_end_before_it_once(small_config: Make) -> None:
    config = small_config("health.max_failures=1")
    run_dir = Path(config.run.dir)
    start(config)
    (run_dir / "failures.jsonl").write_text('{"began": 1.0}\n', encoding="utf-8")
    (run_dir / FAILURE).write_text("rank 0: planted", encoding="utf-8")
    for _ in range(2):
        with pytest.raises(UserError, match="1 jobs in a row"):
            start(config)
    assert [event["kind"] for event in read_events(run_dir)] == ["start", "failure"] + ["repeated failure"] * 2


def test_a_full_disk_loses_no_event(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / EVENTS).write_bytes(b'{"kind": "stop", "te')
    events = Events(tmp_path, True, take(tmp_path))
    events.add("resume", 1, "one")
    with room_for((tmp_path / EVENTS).stat().st_size + 30):
        for step in range(2, 6):
            events.add("checkpoint", step, f"text {step}")
            events.retry()
        assert [event["step"] for event in read_events(tmp_path)] == [1]
    events.retry()
    events.close()
    assert [event["step"] for event in read_events(tmp_path)] == [1, 2, 3, 4, 5]
    said = capsys.readouterr().out
    assert said.count("File too large; training goes on") == 1
    assert "there is space again; every record is written" in said


def test_no_room_for_the_start_refuses_it(small_config: Make) -> None:
    config = small_config()
    with room_for(10), pytest.raises(UserError, match=r"run\.dir = .*: cannot be written .*(too large|No space)"):
        start(config)


def test_what_a_save_has_left_is_said(tmp_path: Path) -> None:
    for name in (".partial-step-00000010-0001", "step-00000005"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert clear_partial(tmp_path) == [".partial-step-00000010-0001"]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000005"]


def test_a_signal_in_the_set_up_leaves_its_name(tmp_path: Path) -> None:
    code = (
        "import os; from pathlib import Path; from megassm.run.events import append_event\n"
        "from megassm.run.stop import leave_when_told\n"
        f"leave_when_told(lambda text: append_event(Path({str(tmp_path)!r}), 'stop', 0, text, {{}}))\n"
        f"os.kill(os.getpid(), {int(signal.SIGTERM)})"
    )
    assert run_python("-c", code, check=False).returncode == 75
    assert [event["text"] for event in read_events(tmp_path)] == [
        "stopped by SIGTERM in its set-up; there was nothing to save"
    ]


def test_the_history_is_a_list_of_starts_and_ends(small_config: Make) -> None:
    config = small_config()
    run_dir = Path(config.run.dir)
    start(config)
    (run_dir / FAILURE).write_text("rank 1: \x1b[2J\u202e", encoding="utf-8")
    start(config)
    events = Events(run_dir, True, take(run_dir))
    events.add("checkpoint", 5, "not of interest here")
    events.add("end", 6, "done: 6 steps in\nthere")
    events.close()
    said = run_python("tools/watch.py", str(run_dir), "--history").stdout.splitlines()
    assert [line.split()[4] for line in said] == ["start", "failure", "start", "end"]
    assert said[1].endswith("ended before its first step was done: rank 1: \\x1b[2J\\u202e")
    assert said[3].endswith("done: 6 steps in there")
    missing = run_python("tools/watch.py", os.devnull, "--history", check=False)
    assert "no such run directory" in missing.stderr
