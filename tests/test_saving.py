"""Checkpoints that are written while training goes on: the same ones, whatever happens meanwhile."""

from __future__ import annotations

import errno
import os
import signal
import threading
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from megassm.checkpoint import tensor_file
from megassm.checkpoint.format import newest_checkpoint, read_checkpoint
from megassm.checkpoint.space import PIN
from megassm.checkpoint.tensor_file import write_tensors
from megassm.config.schema import Config
from megassm.data.dataset import open_dataset
from megassm.errors import UserError
from megassm.parallel import waiting
from megassm.parallel.world import join_world, leave_world
from megassm.run.directory import step_name
from megassm.run.events import read_events
from megassm.run.journal import read_records
from megassm.train.loop import train
from megassm.train.saving import finish_save
from megassm.train.saving import save as save_run
from megassm.train.setup import set_up
from tests.jobs import Job
from tests.ranks import run_on_ranks
from tests.test_train import LONG, exact, run_to_end

Make = Callable[..., Config]
STEPS = 20
RUN = (*LONG, f"train.steps={STEPS}", "checkpoint.keep=9")
SHAPES = st.lists(st.integers(1, 5), max_size=3)


@given(
    shapes=st.dictionaries(st.text(min_size=1, max_size=9), SHAPES, min_size=1, max_size=4), block=st.integers(1, 99)
)
@settings(max_examples=50, deadline=None)
def test_what_is_written_is_what_the_package_reads(
    tmp_path_factory: pytest.TempPathFactory, shapes: dict[str, list[int]], block: int
) -> None:
    path = tmp_path_factory.mktemp("file") / "tensors"
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    tensors = {name: tensor.mT if tensor.dim() > 1 else tensor for name, tensor in tensors.items()}
    wrote: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_file, "BLOCK_BYTES", block)
        patch.setattr(tensor_file, "SYNC_BYTES", 50)
        size, crc = write_tensors(path, tensors, wrote.append)
    raw = path.read_bytes()
    assert (size, crc, sum(wrote)) == (len(raw), zlib.crc32(raw), len(raw))
    found = load_file(path)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].shape == tensor.shape
        assert torch.equal(found[name], tensor)
    with pytest.raises(FileExistsError):
        write_tensors(path, tensors, wrote.append)


def train_with_a_disk(configs: list[Config]) -> None:
    """Trains each; the disk takes rank 1's file of step 10 only when rank 0 is in step 14, and none of its step 15."""
    whole, go_on = tensor_file.write_tensors, threading.Event()

    def write(path: Path, tensors: Mapping[str, Tensor], wrote: Callable[[int], None]) -> tuple[int, int]:
        if step_name(10) in path.parent.name and os.environ["RANK"] == "1":
            assert go_on.wait(60)
        if step_name(15) in path.parent.name and os.environ["RANK"] == "1":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return whole(path, tensors, wrote)

    try:
        for config in configs:
            run = set_up(config, open_dataset(config), join_world(config))
            if config.checkpoint.asynchronous:
                tensor_file.write_tensors, losses = write, run.engine.training_losses

                def watched(ids_BT: Tensor, k: int, losses: Any = losses, run: Any = run) -> tuple[Tensor, Tensor]:
                    if run.world.progress.mark.step == 14:
                        go_on.set()
                    return losses(ids_BT, k)  # type: ignore[no-any-return]

                run.engine.training_losses = watched  # type: ignore[method-assign]
            train(run)
            run.close()
    finally:
        leave_world()


@pytest.mark.ranks
def test_a_slow_and_a_full_disk_change_no_number(small_config: Make, tmp_path: Path) -> None:
    knobs = ("model.pattern=SA", f"train.steps={STEPS}", "checkpoint.every_steps=5", "checkpoint.keep=9",
             "parallel.zero_stage=2")  # fmt: skip
    waits = small_config(*knobs, "checkpoint.asynchronous=false", f"run.dir={tmp_path / 'waits'}", world_size=2)
    goes_on = small_config(*knobs, f"run.dir={tmp_path / 'goes on'}", world_size=2)
    for config in (waits, goes_on):
        Path(config.run.dir).mkdir()
    run_on_ranks(2, train_with_a_disk, [waits, goes_on])
    true, mine = Path(waits.run.dir), Path(goes_on.run.dir)
    assert exact(mine) == exact(true)
    published = [event for event in read_events(mine) if event["kind"] in ("checkpoint", "disk")]
    assert [(event["kind"], event["step"]) for event in published] == [
        ("checkpoint", 5), ("checkpoint", 10), ("disk", 15), ("checkpoint", 20)
    ]  # fmt: skip
    slow, full = published[1:3]
    assert 0 < slow["figures"]["waited_s"] < slow["figures"]["took_s"]
    assert full["text"].startswith("no checkpoint after step 15: rank 1: ")
    assert "No space left on device" in full["text"]
    assert full["text"].endswith("older ones are untouched")
    assert {path.name for path in mine.glob("checkpoints/*")} == {step_name(step) for step in (5, 10, 20)}
    for step in (5, 10, 20):
        files = [
            read_checkpoint(folder / "checkpoints" / step_name(step), "").manifest.files for folder in (mine, true)
        ]
        assert files[0] == files[1], "the same bytes"
    assert all(row["save_s"] >= 0 for row in read_records(mine))
    assert read_records(mine)[5]["save_s"] > 0


def save_one(config: Config) -> None:
    """One save at a time, a pin for one that is under way, and a disk that takes nothing."""
    whole, go_on = tensor_file.write_tensors, threading.Event()

    def write(path: Path, tensors: Mapping[str, Tensor], wrote: Callable[[int], None]) -> tuple[int, int]:
        assert go_on.wait(60)
        return whole(path, tensors, wrote)

    tensor_file.write_tensors, waiting.POLL_S = write, 0.05
    folder = Path(config.run.dir)
    folder.mkdir()
    try:
        run = set_up(config, open_dataset(config), join_world(config))
        save_run(run, 1, must=False)
        assert run.saver.busy
        assert not run.saver.ready
        assert run.saver.pin("because") == folder / "checkpoints" / step_name(1)
        assert newest_checkpoint(folder)[0] is None
        threading.Timer(0.3, go_on.set).start()
        save_run(run, 2, must=True)
        assert {path.name for path in folder.glob("checkpoints/*")} == {step_name(1), step_name(2)}
        assert (folder / "checkpoints" / step_name(1) / PIN).read_text() == "because\n"
        go_on.clear()
        save_run(run, 3, must=False)
        with pytest.raises(UserError, match="step-00000003-0001: the disk has taken nothing from rank 0 for"):
            finish_save(run)
        go_on.set()
    finally:
        leave_world()


def test_one_save_is_under_way_and_a_disk_that_hangs_is_named(small_config: Make) -> None:
    run_on_ranks(1, save_one, small_config("parallel.timeout_s=1"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data_path: Path) -> Path:
    """An undisturbed run by two ranks."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    run_to_end(run_dir, data_path, 2, *RUN)
    return run_dir


def held(run_dir: Path, data_path: Path, release: Path) -> Job:
    """A job whose save after step 10 hangs in the middle of rank 1's file."""
    overrides = (*RUN, f"data.path={data_path}")
    return Job(run_dir, 2, overrides, "tests/faulty.py", FAULT="hold:1:10", RELEASE=str(release))


def under_way(job: Job) -> bool:
    return job.rows >= 13 and any(job.run_dir.glob(f"checkpoints/.partial-{step_name(10)}*/half"))


@pytest.mark.ranks
def test_killed_in_the_middle_of_a_write_it_continues_from_the_checkpoint_before(
    tmp_path: Path, whole: Path, data_path: Path
) -> None:
    run_dir = tmp_path / "run"
    with held(run_dir, data_path, tmp_path / "never") as job:
        job.wait_until(lambda: under_way(job))
        job.end(signal.SIGKILL, whole=True)
        assert job.wait_for_ranks(but=None, within_s=30) != 0
    checkpoint, skipped = newest_checkpoint(run_dir)
    assert checkpoint is not None
    assert (checkpoint.manifest.step, skipped) == (5, [])
    said = run_to_end(run_dir, data_path, 2, *RUN)
    assert f"removed what saves that did not end have left: .partial-{step_name(10)}-0001" in said
    assert "continuing after step 5" in said
    assert exact(run_dir) == exact(whole)
    assert not list(run_dir.glob("checkpoints/.*"))


@pytest.mark.ranks
def test_a_signal_waits_for_the_save_that_is_under_way(tmp_path: Path, whole: Path, data_path: Path) -> None:
    run_dir, release = tmp_path / "run", tmp_path / "release"
    with held(run_dir, data_path, release) as job:
        job.wait_until(lambda: under_way(job))
        for rank in (0, 1):
            job.send(rank, signal.SIGTERM)
        with pytest.raises(AssertionError, match="ranks live on after 2 s"):
            job.wait_for_ranks(but=None, within_s=2)
        release.touch()
        job.wait_for_ranks(but=None, within_s=60)
    done = len(read_records(run_dir))
    assert 13 <= done <= 16  # the save at 15 waits for that at 10: a signal in that time is heard with the next update
    saved = {5, 10, done} | ({15} if done > 15 else set())
    assert {path.name for path in run_dir.glob("checkpoints/*")} == {step_name(step) for step in saved}
    assert f"continuing after step {done}" in run_to_end(run_dir, data_path, 2, *RUN)
    assert exact(run_dir) == exact(whole)
