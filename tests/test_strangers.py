"""A folder that another has made does not act for whoever opens it: no file is written through a link, none is read
outside of it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megassm.checkpoint.format import FORMAT, MANIFEST, Manifest, read_checkpoint
from megassm.errors import UserError
from megassm.files import open_own, write_atomically
from megassm.run.events import append_event
from megassm.run.records import RowFile


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_text("mine", encoding="utf-8")
    return path


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def test_a_temporary_file_is_no_link(run_dir: Path, victim: Path) -> None:
    (run_dir / "config.yaml.tmp").symlink_to(victim)
    write_atomically(run_dir / "config.yaml", b"ours")
    assert (run_dir / "config.yaml").read_text(encoding="utf-8") == "ours"
    assert victim.read_text(encoding="utf-8") == "mine"
    (run_dir / "config.yaml").unlink()
    (run_dir / "config.yaml").symlink_to(victim)
    write_atomically(run_dir / "config.yaml", b"ours")
    assert victim.read_text(encoding="utf-8") == "mine", "a link at the final name is replaced"


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.jsonl", ".lock"])
def test_what_is_appended_to_is_no_link(name: str, run_dir: Path, victim: Path) -> None:
    (run_dir / name).symlink_to(victim)
    with pytest.raises(OSError, match="symbolic link"):
        open_own(run_dir / name, "a+")
    append_event(run_dir, "stop", 1, "text", {})
    if name == "metrics.jsonl":
        with pytest.raises(OSError, match="symbolic link"):
            RowFile(run_dir / name, print)
    assert victim.read_text(encoding="utf-8") == "mine"


def write_manifest(folder: Path, files: object) -> None:
    folder.mkdir(exist_ok=True)
    facts = {"format": FORMAT, "step": 1, "tokens": 1, "updates": 1, "mesh": {}, "identity": {}, "config": {}}
    unsigned = Manifest(**facts, files=files)  # type: ignore[arg-type]
    text = json.dumps({**facts, "files": files, "checksum": unsigned.own_checksum()})
    (folder / MANIFEST).write_text(text, encoding="utf-8")


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../../victim", "a/../../victim", "x", "weights-00001-of-00001.safetensors\n"]
)
def test_a_manifest_names_files_of_its_checkpoint_only(name: str, tmp_path: Path) -> None:
    write_manifest(tmp_path / "step", {name: [4, 0]})
    with pytest.raises(UserError, match="is none of a checkpoint's; it is not opened"):
        read_checkpoint(tmp_path / "step")


def test_a_checkpoint_is_not_read_through_a_link(tmp_path: Path, victim: Path) -> None:
    name = "weights-00001-of-00001.safetensors"
    write_manifest(tmp_path / "step", {name: [4, 0]})
    (tmp_path / "step" / name).symlink_to(victim)
    with pytest.raises(UserError, match="is a link that leads out of"):
        read_checkpoint(tmp_path / "step")
    os.rename(tmp_path / "step", tmp_path / "real")
    (tmp_path / "real" / name).unlink()
    (tmp_path / "real" / name).write_text("mine", encoding="utf-8")
    (tmp_path / "step").symlink_to(tmp_path / "real")
    assert read_checkpoint(tmp_path / "step").manifest.step == 1, "the folder itself may be one"


@pytest.mark.parametrize(
    "text", ["{}", "[]", "[" * 5000, '{"files": 1e999}', "\xff", json.dumps({"format": FORMAT, "files": {"a": [1]}})]
)
def test_a_manifest_is_what_it_should_be(text: str, tmp_path: Path) -> None:
    (tmp_path / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="use another checkpoint"):
        read_checkpoint(tmp_path)
