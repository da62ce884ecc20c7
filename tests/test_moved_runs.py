"""A run that was copied, moved, made read-only, or is another user's: what then happens is in docs/resuming.md."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megassm.checkpoint.format import find_checkpoint
from megassm.config.schema import Config
from megassm.errors import UserError
from megassm.run.events import read_events
from megassm.run.opening import load_run_config, open_run_directory
from megassm.run.records import read_records
from tests.conftest import ROOT, run_python

Make = Callable[..., Config]


def place_of(capsys: pytest.CaptureFixture[str], path: Path, *overrides: str) -> tuple[str, str]:
    """The run directory that a configuration means, and what is said of it."""
    config = load_run_config(path, overrides, 1)
    return config.run.dir, capsys.readouterr().err


def test_a_runs_configuration_means_that_run(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    copied, alone = tmp_path / "copied: one", tmp_path / "alone" / "config.yaml"
    shutil.copytree(trained, copied)
    alone.parent.mkdir()
    shutil.copy(trained / "config.yaml", alone)
    assert place_of(capsys, trained / "config.yaml") == (str(trained), "")
    place, said = place_of(capsys, copied / "config.yaml")
    assert place == str(copied)
    assert f"this run was in {trained}, and has been copied or moved; it goes on where it lies, in {copied}" in said
    assert place_of(capsys, copied / "config.yaml", f"run.dir={tmp_path}/new") == (f"{tmp_path}/new", "")
    assert place_of(capsys, alone) == (str(trained), ""), "a file by itself is a configuration as any other"
    monkeypatch.chdir(tmp_path / "alone")
    assert place_of(capsys, Path("../copied: one/config.yaml"))[0] == "../copied: one"
    monkeypatch.chdir(trained)
    assert place_of(capsys, Path("config.yaml"))[0] in (".", str(trained))


def test_a_copy_trains_itself_from_any_folder(trained: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(trained, moved)
    before = read_records(trained)
    command = [sys.executable, str(ROOT / "launch/pretrain.py"), "--config", "moved/config.yaml", "train.steps=14"]
    done = subprocess.run(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True, timeout=300, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "it goes on where it lies, in moved" in done.stderr
    assert len(read_records(moved)) == 14
    assert read_records(trained) == before
    assert find_checkpoint(trained).manifest.step == 12
    (change,) = [event for event in read_events(moved) if event["kind"] == "change"]
    assert f"run.dir '{trained}' -> 'moved'" in change["text"]
    elsewhere = run_python(
        "launch/pretrain.py", "--config", str(trained / "config.yaml"), "data.path=some/set", check=False
    )
    assert elsewhere.returncode == 1
    assert f"data.path = 'some/set': no such directory in {ROOT}" in elsewhere.stderr


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def refusal_of_another_user(config: Config) -> str:
    """What a user without rights is told who would train there."""
    reading, writing = os.pipe()
    if (child := os.fork()) == 0:
        os.setgid(65534)
        os.setuid(65534)
        try:
            open_run_directory(config)
            text = "it may"
        except UserError as error:
            text = str(error)
        os.write(writing, text.encode())
        os._exit(0)
    os.waitpid(child, 0)
    return os.read(reading, 2**16).decode()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes another user")
def test_another_user_is_told_where_it_cannot_be_written(small_config: Make, open_folder: Path) -> None:
    run_dir = open_folder / "run"
    config = small_config(f"run.dir={run_dir}")
    lock = open_run_directory(config)
    assert lock is not None
    lock.close()
    assert "cannot be written (" in (said := refusal_of_another_user(config))
    assert "Permission denied); choose another directory with run.dir=DIR" in said
    for path in (run_dir, *run_dir.rglob("*")):  # as in a group's folder with umask 002
        path.chmod(path.stat().st_mode | 0o222)
    assert refusal_of_another_user(config) == "it may"


def test_a_read_only_run_is_refused_before_it_is_touched(small_config: Make, tmp_path: Path) -> None:
    place = tmp_path / "read-only"
    place.mkdir()
    mount = ("mount", "-t", "tmpfs", "-o", "ro,size=1m", "none", str(place))
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs root, and the right to mount")
    try:
        with pytest.raises(UserError, match=r"cannot be written \(.*Read-only file system\); choose another directory"):
            open_run_directory(small_config(f"run.dir={place}/run"))
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_every_file_of_a_run_follows_the_umask(trained: Path) -> None:
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in trained.rglob("*") if path.is_file()}
    expected = stat.S_IMODE(trained.stat().st_mode) & 0o666
    own = {name for name in modes if name.endswith(".patch")}  # there where this checkout differs from its commit
    assert {name: oct(mode) for name, mode in modes.items() if mode != (0o600 if name in own else expected)} == {}
