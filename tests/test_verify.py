"""Verification: no damage passes, each is named with its shard and offset, and a sound set shows its text."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from megassm.data.index import ShardSet, load_index, read_index
from megassm.data.prepare import workers as workers_module
from megassm.data.prepare.verify import sample_texts, verify
from megassm.data.tokenizer.base import BytesTokenizer
from tests.conftest import run_python
from tests.shard_sets import edit_index, random_documents, write_documents


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    return write_documents(tmp_path / "set", random_documents(200))


def flip(shards: ShardSet, shard: int, at: int) -> None:
    path = shards.directory / shards.shards[shard].name
    raw = bytearray(path.read_bytes())
    raw[at] ^= 1
    path.write_bytes(raw)


@pytest.mark.parametrize("workers", [1, 2])
def test_every_damaged_shard_is_named_with_its_offset(
    shards: ShardSet, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers_module, "WORTH_A_PROCESS_BYTES", 1)
    names = [shard.name for shard in shards.shards]
    first_of_shard = {int(block["shard"]): block for block in reversed(shards.blocks)}
    offset = int(shards.blocks[1]["offset"])
    assert shards.blocks[1]["shard"] == 0
    flip(shards, 0, offset + 600)  # inside a block
    flip(shards, 1, shards.shards[1].bytes - 3)  # in the end of the archive, which no block holds
    (shards.directory / names[2]).unlink()
    last = int(first_of_shard[3]["offset"] + first_of_shard[3]["size"]) - 512
    path = shards.directory / names[3]
    path.write_bytes(path.read_bytes()[:last])
    damages = verify(read_index(shards.directory), workers)
    starts = [
        f"{shards.directory / names[0]}, block at offset {offset}: damaged: expected CRC32",
        f"{shards.directory / names[0]}: expected sha256",
        f"{shards.directory / names[1]}: outside its blocks, at offsets [{shards.shards[1].bytes - 1024}, ",
        f"{shards.directory / names[2]}: offset 0: no such file",
        f"{shards.directory / names[3]}, block at offset 0: damaged: expected bytes",
    ]
    assert [damage[: len(start)] for damage, start in zip(damages, starts, strict=False)] == starts
    assert all(names[3] in damage for damage in damages[len(starts) :])


def test_counts_of_documents_are_checked(shards: ShardSet) -> None:
    def one_more(described: dict[str, Any]) -> None:
        described["shards"][1]["documents"] += 1
        described["documents"] += 1

    edit_index(shards.directory, one_more)
    [damage] = verify(load_index(shards.directory))
    assert f"{shards.shards[1].name}: expected {shards.shards[1].documents + 1} documents, got" in damage


def test_progress_reaches_the_sum_of_the_shards(shards: ShardSet) -> None:
    seen: list[int] = []
    assert verify(shards, on_done=seen.append) == []
    assert seen == sorted(seen)
    assert seen[-1] == sum(shard.bytes for shard in shards.shards)
    assert len(seen) == len(shards.shards)


def test_samples_are_beginnings_of_documents(shards: ShardSet) -> None:
    beginnings = [BytesTokenizer().decode(ids[:300].tolist()) for ids in random_documents(200)]
    for count in (1, 3, 10_000):
        samples = list(sample_texts(shards, BytesTokenizer(), count))
        assert len(samples) == min(count, len(shards.blocks))
        assert {sample.text for sample in samples} <= set(beginnings)
        assert len({sample.place for sample in samples}) == len(samples)


def test_the_tool(data_path: Path, tmp_path: Path) -> None:
    copy, table = tmp_path / "set", tmp_path / "table.json"
    shutil.copytree(data_path, copy)
    command = ("tools/verify_data.py", str(copy), "--json", str(table))
    sound = run_python(*command)
    assert sound.stderr == ""
    assert "-- train/shard-00000.tar, block at offset 0:" in sound.stdout
    rows = json.loads(table.read_text())
    assert [row["damages"] for row in rows] == [0, 0]

    shard = load_index(copy / "train").directory / "shard-00000.tar"
    raw = bytearray(shard.read_bytes())
    raw[1000] ^= 1
    shard.write_bytes(raw)
    (copy / "valid" / "index.json").write_text("{")
    damaged = run_python(*command, check=False)
    assert damaged.returncode == 1
    lines = damaged.stderr.splitlines()
    assert lines[0].startswith(f"{shard}, block at offset 0: damaged: expected CRC32")
    assert lines[2].startswith(f"{copy / 'valid' / 'index.json'}: damaged index: not JSON")
    assert lines[-1] == f"error: {copy}: 3 damages, named above"

    other = run_python("tools/verify_data.py", str(data_path), "--tokenizer", "no.model", check=False)
    assert other.returncode == 1
    assert "tokenizer no.model: No such file" in other.stderr
    assert "\nexample:\n  python tools/verify_data.py" in run_python(command[0], "--help").stdout
