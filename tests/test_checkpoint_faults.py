"""A disk that is full, a save that is killed, files that are damaged, missing or foreign: the old state stays good."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megassm.checkpoint.format import (
    MANIFEST,
    Checkpoint,
    newest_checkpoint,
    read_checkpoint,
)
from megassm.checkpoint.identity import check_identity, run_identity
from megassm.config.schema import Config
from megassm.errors import UserError
from megassm.run.journal import read_records
from tests.conftest import run_python
from tests.jobs import Job
from tests.test_train import LONG, command, exact, flip, run_to_end

STEPS = 20
RUN = (*LONG, f"train.steps={STEPS}")
CHECKPOINT_BYTES = 36_000 * 3 * 4


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, data_path: Path) -> Path:
    """An undisturbed run by two ranks; checkpoints at steps 15 and 20."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    run_to_end(run_dir, data_path, 2, *RUN)
    return run_dir


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A run directory whose checkpoints are on a disk that holds two and a half of them."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    size = f"size={CHECKPOINT_BYTES * 5 // 2}"
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("mounting a small tmpfs takes Linux and root")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    try:
        yield folder.parent
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.ranks
def test_a_full_disk_is_a_warning_but_for_the_last_save(small_disk: Path, whole: Path, data_path: Path) -> None:
    arguments = command(small_disk, data_path, 2, *RUN)[1:]
    done = run_python(*arguments, check=False)
    assert done.returncode == 1
    assert done.stdout.count("warning: no checkpoint after step 15: ") == 1, done.stdout
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert "bytes free, and a checkpoint needs" in errors[0]
    assert "Make room, and start again: the same command continues from the last one" in done.stderr
    assert [path.name for path in sorted((small_disk / "checkpoints").iterdir())] == ["step-00000005", "step-00000010"]
    assert [row["step"] for row in read_records(small_disk)] == list(range(1, STEPS + 1))

    room = f"remount,size={CHECKPOINT_BYTES * 4}"
    subprocess.run(["mount", "-o", room, small_disk / "checkpoints"], check=True)
    assert "continuing after step 10" in run_python(*arguments).stdout
    assert exact(small_disk) == exact(whole)


@pytest.mark.ranks
def test_a_save_that_is_killed_leaves_the_checkpoint_before(tmp_path: Path, whole: Path, data_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = (*RUN, f"data.path={data_path}", "checkpoint.every_steps=1")

    def partial() -> bool:
        return any(run_dir.glob("checkpoints/.partial-*"))

    with Job(run_dir, 2, overrides) as job:
        job.wait_until(lambda: job.rows >= 3 and partial(), poll_s=0.0)
        while True:
            job.send(0, signal.SIGSTOP)
            job.send(1, signal.SIGSTOP)
            if partial() or job.process.poll() is not None:
                break
            job.send(0, signal.SIGCONT)
            job.send(1, signal.SIGCONT)
            job.wait_until(partial, poll_s=0.0)
        job.send(0, signal.SIGKILL)
        job.send(1, signal.SIGKILL)
        assert job.wait_for_ranks(but=None, within_s=30) != 0
    assert partial()
    checkpoint, skipped = newest_checkpoint(run_dir)
    assert checkpoint is not None
    assert not skipped
    said = run_to_end(run_dir, data_path, 2, *RUN)
    assert f"continuing after step {checkpoint.manifest.step}" in said
    assert exact(run_dir) == exact(whole)
    assert not partial(), "what the killed save left is removed"


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "copied"))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("damage", [flip, truncate, empty, Path.unlink])
@pytest.mark.parametrize("kind", ["weights-00001*", "weights-00002*", "moments-00001*", "moments-00002*", MANIFEST])
def test_damage_of_any_kind_is_passed_over(copied: Path, kind: str, damage: Callable[[Path], None]) -> None:
    newest = copied / "checkpoints" / "step-00000020"
    damage(next(newest.glob(kind)))
    checkpoint, skipped = newest_checkpoint(copied)
    assert checkpoint is not None
    assert checkpoint.manifest.step == 15
    assert len(skipped) == 1
    assert str(newest) in skipped[0]


def test_a_damaged_checkpoint_is_continued_from_the_one_before(copied: Path, whole: Path, data_path: Path) -> None:
    truncate(next((copied / "checkpoints" / "step-00000020").glob("weights-00002*")))
    said = run_to_end(copied, data_path, 2, *RUN)
    assert said.count("passed over a checkpoint: ") == 1
    assert "continuing after step 15" in said
    assert exact(copied) == exact(whole)
    checkpoint, skipped = newest_checkpoint(copied)
    assert checkpoint is not None
    assert checkpoint.manifest.step == STEPS, "the damaged one was replaced by a good one of its name"
    assert not skipped


@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_flipped_bit_of_a_manifest_goes_unseen(whole: Path, tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "step-00000020"
    if not folder.exists():
        shutil.copytree(whole / "checkpoints" / folder.name, folder)
    original = (whole / "checkpoints" / folder.name / MANIFEST).read_bytes()
    bit = data.draw(st.integers(0, 8 * len(original) - 1))
    raw = bytearray(original)
    raw[bit // 8] ^= 1 << bit % 8
    (folder / MANIFEST).write_bytes(raw)
    try:
        manifest = read_checkpoint(folder).manifest
    except UserError:
        return
    assert manifest == read_checkpoint(whole / "checkpoints" / folder.name).manifest, "only white space may differ"


def test_a_renamed_checkpoint_is_not_taken_for_the_newest(copied: Path) -> None:
    folder = copied / "checkpoints"
    (folder / "step-00000015").rename(folder / "step-00000099")
    checkpoint, skipped = newest_checkpoint(copied)
    assert checkpoint is not None
    assert checkpoint.folder.name == "step-00000020"
    assert skipped == [f"{folder / 'step-00000099'}: holds step 15: not this run's, or renamed by hand"]


def test_another_runs_checkpoint_is_refused_with_the_way_out(copied: Path, tmp_path: Path, data_path: Path) -> None:
    before = exact(copied)
    foreign = tmp_path / "foreign"
    run_to_end(foreign, data_path, 1, *RUN, "run.seed=4", "train.steps=22")
    place = copied / "checkpoints" / "step-00000022"
    shutil.copytree(foreign / "checkpoints" / place.name, place)
    longer = ("train.steps=24", "train.micro_batch_sequences=1", "budget.draws=1")
    done = run_python(*command(copied, data_path, 1, *RUN, *longer)[1:], check=False)
    assert done.returncode == 1
    assert f"{place}: cannot be continued by this run: run.seed is 0, the checkpoint has 4" in done.stderr
    assert "move that folder away if it is another run's" in done.stderr
    assert exact(copied) == before
    shutil.rmtree(place)
    assert "continuing after step 20" in run_to_end(copied, data_path, 1, *RUN, *longer)


def test_a_checkpoint_that_is_older_than_a_knob_continues(small_config: Callable[..., Config]) -> None:
    config = small_config()
    written, identity = config.model_dump(mode="json"), run_identity(config, "data")
    assert (written["model"].pop("mixer_heads"), written["model"].pop("gate")) == (1, "softmax")
    written["model"]["gate"] = True  # as it was spelt
    older = {name: value for name, value in identity.items() if name != "model.mixer_heads"} | {"model.gate": True}
    checkpoint = Checkpoint(Path("step-1"), SimpleNamespace(identity=older, config=written))  # type: ignore[arg-type]
    check_identity(checkpoint, identity)
    with pytest.raises(UserError, match=r"model\.mixer_heads is 2, the checkpoint has 1"):
        check_identity(checkpoint, identity | {"model.mixer_heads": 2})
