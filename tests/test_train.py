"""Runs through the real entry point: resume bit for bit, stop by a signal, journal, rotation."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from megassm.checkpoint.format import MANIFEST, find_checkpoint, newest_checkpoint
from megassm.cli.arguments import STOPPED
from megassm.config.load import load_config
from megassm.config.schema import Config
from megassm.run.journal import read_records
from megassm.run.opening import open_run_directory
from tests.conftest import ROOT, SMALL, run_python
from tests.jobs import Job

LONG = (*SMALL, "model.pattern=SA", "train.steps=40", "checkpoint.every_steps=5", "checkpoint.keep=2")
EXACT = ("step", "tokens", "loss", "bits_per_byte", "k", "k_micro", "lr", "grad_norm", "valid")


def command(run_dir: Path, data_path: Path, ranks: int, *overrides: str) -> list[str]:
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    own = (f"run.dir={run_dir}", f"data.path={data_path}")
    return [*launcher, "launch/pretrain.py", "--config", "configs/tiny.yaml", *own, *overrides]


def run_to_end(*arguments: object) -> str:
    return run_python(*command(*arguments)[1:]).stdout  # type: ignore[arg-type]


def exact(run_dir: Path) -> list[dict[str, object]]:
    """The journal without what depends on the clock."""
    return [{name: row[name] for name in EXACT if name in row} for row in read_records(run_dir)]


def kill_at(step: int, number: signal.Signals, arguments: list[str], run_dir: Path) -> int:
    """Starts a run, sends `number` to all its processes once `step` is in the journal; returns the exit code."""
    process = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (run_dir / "metrics.jsonl").exists() or len(read_records(run_dir)) < step:
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for member in [process, *psutil.Process(process.pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.send_signal(number)
    return process.wait(timeout=120)


@pytest.mark.long
@pytest.mark.ranks
@pytest.mark.parametrize(("ranks", "stage"), [(1, 0), (2, 2)])
def test_killed_run_continues_bit_for_bit(tmp_path: Path, data_path: Path, ranks: int, stage: int) -> None:
    overrides = (*LONG, f"parallel.zero_stage={stage}")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run_to_end(whole, data_path, ranks, *overrides)
    kill_at(13, signal.SIGKILL, command(broken, data_path, ranks, *overrides), broken)
    said = run_to_end(broken, data_path, ranks, *overrides)
    assert "continuing after step 1" in said
    assert exact(broken) == exact(whole)
    assert [row["step"] for row in read_records(broken)] == list(range(1, 41))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_saves_and_leaves_cleanly(tmp_path: Path, data_path: Path, number: signal.Signals) -> None:
    run_dir = tmp_path / "run"
    overrides = (*LONG, "checkpoint.every_steps=1000", "train.steps=200")
    code = kill_at(3, number, command(run_dir, data_path, 1, *overrides), run_dir)
    assert code == STOPPED
    checkpoint, skipped = newest_checkpoint(run_dir)
    assert checkpoint is not None
    assert not skipped
    assert checkpoint.manifest.step == read_records(run_dir)[-1]["step"] < 200


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, data_path: Path) -> Path:
    """A finished run of 12 steps, by one process."""
    run_dir = tmp_path_factory.mktemp("runs") / "finished"
    run_to_end(run_dir, data_path, 1, *LONG, "train.steps=12")
    return run_dir


def test_journal_rows(finished: Path) -> None:
    rows = read_records(finished)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert [row["tokens"] for row in rows] == [4 * 64 * step for step in range(1, 13)]
    for row in rows:
        assert 0 < row["loss"] < 7
        assert row["bits_per_byte"] == pytest.approx(row["loss"] / 0.6931, rel=0.05)  # a byte a token, but for EOD
        assert row["k"] == max(row["k_micro"])
        assert len(row["k_micro"]) == 2
        assert set(row["k_micro"]) <= {1, 2, 4, 8}
        for name in ("lr", "grad_norm", "tokens_per_s", "mfu", "step_s", "peak_memory_bytes"):
            assert row[name] > 0, name
        assert row["data_wait_s"] >= 0
    assert set(rows[-1]["valid"]) == set(rows[-1]["valid_error"]) == {"1", "2", "8"}
    assert all(0.001 < error < 0.5 for error in rows[-1]["valid_error"].values()), "of four sequences"
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_run_directory_and_rotation(finished: Path) -> None:
    assert sorted(path.name for path in (finished / "checkpoints").iterdir()) == ["step-00000010", "step-00000012"]
    resolved: Config = load_config(finished / "config.yaml")
    assert resolved.train.steps == 12
    environment = json.loads((finished / "environment.json").read_text(encoding="utf-8"))
    assert environment["peak_flops_per_rank"] == 1e11


def test_finished_run_is_left_alone_and_can_be_extended(finished: Path, data_path: Path) -> None:
    before = exact(finished)
    said = run_to_end(finished, data_path, 1, *LONG, "train.steps=12")
    assert "continuing after step 12" in said
    assert exact(finished) == before


def test_incomplete_checkpoint_is_passed_over(finished: Path) -> None:
    newest = find_checkpoint(finished).folder
    weights = newest / "weights-00001-of-00001.safetensors"
    content = weights.read_bytes()
    try:
        weights.write_bytes(content[:-1])
        checkpoint, skipped = newest_checkpoint(finished)
        assert checkpoint is not None
        assert checkpoint.manifest.step == 10
        assert f"weights-00001-of-00001.safetensors has {len(content) - 1} bytes" in skipped[0]
        weights.unlink()
        assert newest_checkpoint(finished)[0] == checkpoint
        (newest / MANIFEST).rename(newest / "hidden")
        assert newest_checkpoint(finished)[0] == checkpoint
    finally:
        (newest / "hidden").rename(newest / MANIFEST)
        weights.write_bytes(content)


def test_another_model_is_refused(finished: Path, data_path: Path) -> None:
    arguments = command(finished, data_path, 1, *LONG, "model.d_ffn=96", "run.seed=4")[1:]
    done = run_python(*arguments, check=False)
    assert done.returncode == 1
    assert "cannot be continued by this run: model.d_ffn is 96, the checkpoint has 64; run.seed is 4" in done.stderr
    assert "Traceback" not in done.stderr


def test_tools_on_a_finished_run(finished: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.json"
    done = run_python("tools/sweep_budgets.py", str(finished), "--budgets", "1,4", "--json", str(table))
    rows = json.loads(table.read_text(encoding="utf-8"))
    assert [row["k"] for row in rows] == [1, 4, 8], "full K is added"
    (curve,) = json.loads((finished / "sweep.json").read_text(encoding="utf-8"))["curves"]
    assert rows == [{name: row[name] for name in ("run", "step", "data", "seq_len")} | kept
                    for row, kept in zip(rows, curve["rows"], strict=True)]  # fmt: skip
    assert rows[-1]["gap_percent"] == 0
    assert [row["parameters"] for row in rows] == sorted(row["parameters"] for row in rows)
    assert rows[-1]["bits_per_byte"] == pytest.approx(read_records(finished)[-1]["valid"]["8"], rel=1e-5)
    assert (finished / "sweep.csv").read_text(encoding="utf-8").count("\n") == 4
    assert (finished / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "uPlot" in (finished / "sweep.html").read_text(encoding="utf-8")
    assert len([*(finished / "sweeps").glob("*-64-step-00000012.*")]) == 4
    assert "unigram" in done.stdout

    samples = tmp_path / "samples.json"
    options = ("--prompt", "def ", "--budgets", "2,8", "--tokens", "5", "--json", str(samples))
    run_python("tools/generate.py", str(finished), *options)
    texts = json.loads(samples.read_text(encoding="utf-8"))
    assert [row["k"] for row in texts] == [2, 8]
    assert all(row["text"].startswith("def ") for row in texts)
    run_python("tools/generate.py", str(finished), *options)
    assert json.loads(samples.read_text(encoding="utf-8")) == texts, "the same seed must draw the same text"


def test_divergence_stops_the_run_before_it_reaches_a_checkpoint(tmp_path: Path, data_path: Path) -> None:
    overrides = (*LONG, "optim.lr=1e30", "optim.grad_clip=null", "optim.warmup_steps=0", "checkpoint.every_steps=1")
    done = run_python(*command(tmp_path / "run", data_path, 1, *overrides)[1:], check=False)
    assert done.returncode == 1
    assert "the last of train.max_skipped = 10 in a row: training diverged. Lower optim.lr, or" in done.stderr
    assert "Traceback" not in done.stderr
    checkpoint, _ = newest_checkpoint(tmp_path / "run")
    rows = read_records(tmp_path / "run")
    healthy = [row["step"] for row in rows if not row["skipped"]]
    assert [row["skipped"] for row in rows[len(healthy) :]] == [True] * 9
    assert checkpoint is None or checkpoint.manifest.step <= max(healthy)


@pytest.fixture
def copied(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, to damage: checkpoints at steps 10 and 12."""
    return Path(shutil.copytree(finished, tmp_path / "copied"))


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 0xFF
    path.write_bytes(raw)


def test_a_flipped_byte_falls_back_to_the_checkpoint_before_and_rotation_keeps_what_is_good(
    copied: Path, data_path: Path
) -> None:
    newest, before = (copied / "checkpoints" / f"step-{step:08d}" for step in (12, 10))
    flip(next(newest.glob("moments-*")))
    said = run_to_end(copied, data_path, 1, *LONG, "train.steps=11", "checkpoint.keep=1")
    assert "damaged: the checksum of moments-00001-of-00001.safetensors" in said
    assert "continuing after step 10" in said
    assert newest.exists(), "what is damaged is left to a person"
    assert not before.exists(), "the good one before was rotated out by the good one after"
    assert newest_checkpoint(copied)[0] == find_checkpoint(copied / "checkpoints/step-00000011")


def test_a_run_whose_checkpoints_are_all_unreadable_does_not_start_over(copied: Path, data_path: Path) -> None:
    rows = exact(copied)
    for manifest in copied.glob("checkpoints/*/manifest.json"):
        manifest.write_text("[]", encoding="utf-8")
    done = run_python(*command(copied, data_path, 1, *LONG, "train.steps=20")[1:], check=False)
    assert done.returncode == 1
    assert "has checkpoints, but none that can be continued; move them away" in done.stderr
    assert "Traceback" not in done.stderr
    assert exact(copied) == rows


def test_a_second_job_in_the_run_directory_is_refused(copied: Path, data_path: Path) -> None:
    config = load_config(copied / "config.yaml")
    lock = open_run_directory(config.model_copy(update={"run": config.run.model_copy(update={"dir": str(copied)})}))
    assert lock is not None
    with lock:
        done = run_python(*command(copied, data_path, 1, *LONG)[1:], check=False)
    assert done.returncode == 1
    assert f"another job is training there (process {os.getpid()})" in done.stderr


def test_a_refused_start_changes_nothing(copied: Path, data_path: Path) -> None:
    before = (copied / "config.yaml").read_bytes()
    assert run_python(*command(copied, data_path, 1, *LONG, "model.d_ffn=96")[1:], check=False).returncode == 1
    said = run_to_end(copied, data_path, 1, *LONG, "train.steps=7")
    assert "nothing to do" in said
    assert "has done 12 of 7 steps" in said
    assert (copied / "config.yaml").read_bytes() == before


@pytest.mark.ranks
@pytest.mark.end_to_end
def test_ctrl_c_twice_under_deepspeed_saves(tmp_path: Path, data_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = [*LONG, f"data.path={data_path}", "train.steps=100000", "checkpoint.every_steps=100000"]
    with Job(run_dir, 1, overrides, launcher="deepspeed") as job:
        job.wait_until(lambda: job.rows >= 3)
        for _ in range(2):  # a terminal sends it to all of its foreground
            job.end(signal.SIGINT, whole=True)
            time.sleep(0.2)
        job.wait_for_ranks(but=None, within_s=60)
    checkpoint, _ = newest_checkpoint(run_dir)
    assert checkpoint is not None, job.said
    assert checkpoint.manifest.step == read_records(run_dir)[-1]["step"] < 100000
    assert "stopped by a signal" in job.said or "its launcher ended" in job.said


@pytest.mark.end_to_end
def test_ranks_save_and_end_when_their_launcher_is_told_to_end(tmp_path: Path, data_path: Path) -> None:
    run_dir = tmp_path / "run"
    arguments = command(run_dir, data_path, 1, *LONG, "train.steps=100000", "checkpoint.every_steps=100000")
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2", "--master_port", "29533"]
    process = subprocess.Popen(
        [*launcher, *arguments[1:]], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (run_dir / "metrics.jsonl").exists() or len(read_records(run_dir)) < 3:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.05)
    family = psutil.Process(process.pid).children(recursive=True)
    process.terminate()
    process.wait(timeout=60)
    _, alive = psutil.wait_procs(family, timeout=60)
    for survivor in alive:
        survivor.kill()
    assert not alive, "orphans train on"
    checkpoint, _ = newest_checkpoint(run_dir)
    assert checkpoint is not None
    assert checkpoint.manifest.step == read_records(run_dir)[-1]["step"]
