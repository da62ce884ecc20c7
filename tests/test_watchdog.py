"""A rank that is killed, stopped or stuck ends the job: in time, with one message that names it, and stacks."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import HashStore, TCPStore

from megassm.errors import UserError
from megassm.parallel.job_store import SignedStore, meet
from megassm.parallel.watchdog import BEAT_S, OTHERS_LEAVE_S, Beat, RankProgress, verdict
from megassm.run.directory import FAILURE
from megassm.run.journal import read_records
from tests.conftest import ROOT, SMALL
from tests.jobs import Job

TIMEOUT_S = 15
MARGIN_S = 30  # two readings of the store and a slow machine
JOB = (
    *SMALL, "model.pattern=SA", "train.steps=100000", "train.batch_sequences=6", "eval.sequences=6",
    "checkpoint.every_steps=5", f"parallel.timeout_s={TIMEOUT_S}",
)  # fmt: skip


def beats(*counts: int, number: int = 1, waits: tuple[int, ...] = ()) -> list[Beat | None]:
    return [
        Beat(number, count, 7, f"step 7, phase {count}", stuck_s=12.0, where="a.py:3 in f", waits=rank in waits)
        for rank, count in enumerate(counts)
    ]


def test_who_is_silent_is_named_before_who_is_behind() -> None:
    before, after = beats(5, 4, 6, 6), beats(5, 4, 6, 6, number=2)
    after[2] = before[2]
    assert verdict(before, after).startswith("rank 2 no longer answers: ended, stopped, or cut off; last heard of in s")
    after[3] = None
    assert verdict(before, after).startswith("ranks 2, 3 no longer answer: ")


def test_a_rank_that_ends_before_its_next_beat_is_placed_by_the_others() -> None:
    """Its last word may be of its set-up, where the others have trained for a second since."""
    last = Beat(5, 9, 0, "its set-up")
    after = [last, *(Beat(6, 40, 12, "step 12, backward pass") for _ in range(2))]
    found = verdict([last, *(Beat(5, 9, 0, "its set-up") for _ in range(2))], after)
    assert found.endswith("last heard of in its set-up; the others are in step 12, backward pass")


def test_who_is_behind_hangs() -> None:
    found = verdict(beats(9, 4, 9, 9), beats(9, 4, 9, 9, number=2))
    assert found == "rank 1 hangs: in step 7, phase 4 for 12 s, at a.py:3 in f; the others wait in step 7, phase 9"


def test_in_the_same_phase_it_is_who_waits_for_nobody() -> None:
    after = beats(4, 4, 4, number=2, waits=(0, 2))
    assert verdict(beats(4, 4, 4), after).startswith("rank 1 hangs: in step 7, phase 4")
    after = beats(*[4] * 12, number=2, waits=tuple(range(12)))
    assert verdict(beats(*[4] * 12), after).startswith("ranks 0, 1, 2, 3, 4, 5, 6, 7 and 4 more hang: ")


def test_progress_is_numbered_and_knows_its_step() -> None:
    progress = RankProgress()
    for phase in ("reading", "forward"):
        progress.note(phase, 3 if phase == "reading" else None)
    assert progress.mark[:3] == (2, 3, "forward")


def check(job: Job, guilty: int, writers: set[int], *expected: str) -> None:
    said = job.said
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, said
    assert errors[0].startswith(f"error: rank {guilty} "), errors[0]
    for part in ("The same command continues from the last checkpoint", *expected):
        assert part in errors[0]
    for rank in range(3):
        assert (f"--- rank {rank}: stacks of all threads" in said) == (rank in writers), said
    assert (job.run_dir / FAILURE).read_text(encoding="utf-8") in errors[0] + "\n"


@pytest.mark.long
@pytest.mark.ranks
def test_lost_ranks_are_named_and_the_same_command_continues(tmp_path: Path, data_path: Path) -> None:
    run_dir, overrides = tmp_path / "run", (*JOB, f"data.path={data_path}")
    for guilty, number in ((1, signal.SIGSTOP), (2, signal.SIGKILL), (0, signal.SIGSTOP)):
        with Job(run_dir, 3, overrides) as job:
            done = job.rows
            job.wait_until(lambda job=job, done=done: "continuing after" in job.said or not done)  # type: ignore[misc]
            start = job.rows
            job.wait_until(lambda job=job, start=start: job.rows > start + 7)  # type: ignore[misc]
            assert not (run_dir / FAILURE).exists()
            job.send(guilty, number)
            stopped = guilty if number == signal.SIGSTOP else None
            assert job.wait_for_ranks(but=stopped, within_s=TIMEOUT_S + MARGIN_S) != 0
            check(job, guilty, {0, 1, 2} - {guilty}, "no longer answers: ended, stopped, or cut off; last heard of in")
    assert [row["step"] for row in read_records(run_dir)] == list(range(1, job.rows + 1))


@pytest.mark.long
@pytest.mark.ranks
def test_a_rank_that_waits_for_its_data_is_named(tmp_path: Path, data_path: Path) -> None:
    with Job(tmp_path / "run", 3, (*JOB, f"data.path={data_path}"), "tests/faulty.py", FAULT="sleep:1:5") as job:
        job.wait_until(lambda: job.rows == 4)
        assert job.wait_for_ranks(but=None, within_s=TIMEOUT_S + MARGIN_S) == 1
        check(job, 1, {0, 1, 2}, "hangs: in step 5, reading data", "megassm/train/loop.py", "the others wait in step 5")
        assert "in batches" in job.said, "where it hangs is in the stacks"


@pytest.mark.ranks
def test_an_error_of_one_rank_is_the_only_message(tmp_path: Path, data_path: Path) -> None:
    with Job(tmp_path / "run", 3, (*JOB, f"data.path={data_path}"), "tests/faulty.py", FAULT="raise:2:3") as job:
        job.wait_until(lambda: job.rows == 2)
        assert job.wait_for_ranks(but=None, within_s=MARGIN_S) == 1
        assert job.said.count("error: ") == 1
        assert "error: rank 2 ended with KeyError('planted'); its traceback follows" in job.said
        assert "stacks of all threads" not in job.said


def meddle(port: int) -> int:
    """Writes over everything of ours in a job's store, as whoever reaches its port may; returns how much there was."""
    store = TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    ours = [key for key in store.list_keys() if "megassm" in key]
    for key in [*ours, *{f"{key.rpartition('/beat/')[0]}/{name}" for key in ours for name in ("spoken", "hang")}]:
        store.set(key, json.dumps({"number": 1}))
    store.set("megassm/watchdog/0/spoken", "1")
    return len(ours)


def test_what_a_stranger_writes_in_the_store_is_not_there() -> None:
    store = HashStore()
    ours, theirs = SignedStore(store, b"job"), SignedStore(store, b"another job")
    assert ours.get("spoken") is None
    ours.set("spoken", "rank 1 \u2603")
    assert ours.get("spoken") == "rank 1 \u2603"
    assert theirs.get("spoken") is None
    [key] = store.list_keys()
    signed = store.get(key)
    for forged in (b"", b"1", b"\xff" * 200, signed[:-1], signed + b"2", signed[64:]):
        store.set(key, forged)
        assert ours.get("spoken") is None
    store.set(key.replace("spoken", "hang"), signed)
    assert ours.get("hang") is None, "what is signed for one place says nothing in another"


def test_the_store_listens_where_the_ranks_are_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(taken))
        with pytest.raises(UserError, match=rf"MASTER_PORT = {taken}: cannot be listened at on 127.0.0.1 \(Address al"):
            meet(0, 1, one_machine=True, timeout=timedelta(seconds=5))
        other.listen()
        with pytest.raises(UserError, match=rf"MASTER_PORT = {taken}: cannot be listened at.*--master-port"):
            meet(0, 2, one_machine=False, timeout=timedelta(seconds=5))
    with pytest.raises(UserError, match=r"rank 1 does not meet the others there \(.*Every rank must be started with"):
        meet(1, 2, one_machine=True, timeout=timedelta(seconds=1))
    store = meet(0, 1, one_machine=True, timeout=timedelta(seconds=5))
    assert store is not None
    socket.create_connection(("127.0.0.1", taken)).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", taken))
    for name, value in (("MASTER_PORT", "x"), ("MASTER_ADDR", "no.such.host.invalid")):
        with monkeypatch.context() as wrong:
            wrong.setenv(name, value)
            with pytest.raises(UserError, match=f"{name} = '{value}'"):
                meet(0, 1, one_machine=True, timeout=timedelta(seconds=5))


@pytest.mark.long
@pytest.mark.ranks
def test_the_rank_that_holds_the_store_is_named_too(tmp_path: Path, data_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = ["launch/pretrain.py", "--config", "configs/tiny.yaml", *JOB, f"run.dir={run_dir}",
                 f"data.path={data_path}"]  # fmt: skip
    places = {"WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29547"}
    ranks = [
        subprocess.Popen([sys.executable, *arguments], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                         text=True, env=os.environ | places | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(3)
    ]  # fmt: skip
    try:
        deadline = time.monotonic() + 120
        while not (run_dir / "metrics.jsonl").exists() or len(read_records(run_dir)) < 5:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        done = read_records(run_dir)[-1]["step"]
        written = meddle(29547)
        time.sleep(OTHERS_LEAVE_S + 2 * BEAT_S)
        assert [rank.poll() for rank in ranks] == [None] * 3, "a stranger ends no job"
        assert read_records(run_dir)[-1]["step"] > done
        assert written >= 3, "it did find what the ranks tell each other"
        ranks[0].send_signal(signal.SIGSTOP)
        said = "".join(rank.communicate(timeout=TIMEOUT_S + MARGIN_S)[1] for rank in ranks[1:])
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    assert [rank.returncode for rank in ranks[1:]] == [1, 1]
    assert said.count("error: ") == 1
    assert "error: rank 0, which holds the job's store at 127.0.0.1:29547, no longer answers" in said
    assert "rank 1: stacks of all threads" in said
