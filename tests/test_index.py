"""Shards: what was written is read, stock webdataset reads it too, and no damage passes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megassm.data.blocks import local_fetch, read_block
from megassm.data.index import ShardSet, ShardSizes, load_index
from megassm.data.prepare.shard_writer import ShardWriter
from megassm.data.prepare.verify import verify
from megassm.data.tokenizer.base import BytesTokenizer
from megassm.data.tokenizer.ids import Ids
from megassm.errors import UserError
from tests.shard_sets import SMALL, WideTokenizer, edit_index, random_documents, write_documents, write_unique_ids


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    return write_documents(tmp_path / "set", random_documents(100))


def read_all(shards: ShardSet) -> list[int]:
    fetch = local_fetch(shards.directory)
    return [i for block in range(len(shards.blocks)) for i in read_block(shards, block, fetch).tolist()]


def stored(documents: list[Ids], eod: int = 256) -> list[int]:
    return [i for ids in documents for i in [*ids.tolist(), eod]]


def test_what_was_written_is_read(shards: ShardSet) -> None:
    documents = random_documents(100)
    assert read_all(shards) == stored(documents)
    assert shards.tokens == sum(ids.size + 1 for ids in documents)
    assert (shards.documents, shards.text_bytes) == (100, shards.tokens - 100)
    assert (shards.dtype, shards.eod, shards.vocab_size, shards.tokenizer) == ("u16", 256, 257, "bytes")
    assert len(shards.shards) > 2
    assert len(shards.blocks) > len(shards.shards)
    assert shards.blocks["members"].max() > 1
    assert verify(shards) == []


@settings(deadline=None, max_examples=25)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=30),
    sizes=st.builds(ShardSizes, st.integers(1, 300), st.integers(1, 200), st.integers(1, 100)),
)
def test_any_sizes_hold_any_documents(
    tmp_path_factory: pytest.TempPathFactory, lengths: list[int], sizes: ShardSizes
) -> None:
    documents = [np.full(length, row % 256) for row, length in enumerate(lengths)]
    shards = write_documents(tmp_path_factory.mktemp("any"), documents, sizes)
    assert read_all(shards) == stored(documents)
    assert verify(shards) == []


def test_stock_webdataset_reads_our_shards(shards: ShardSet) -> None:
    import webdataset

    urls = [str(shards.directory / shard.name) for shard in shards.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False))
    assert len(samples) == shards.blocks["members"].sum()
    ids = np.concatenate([np.frombuffer(sample["u16"], dtype="<u2") for sample in samples])
    assert ids.tolist() == stored(random_documents(100))


def test_a_large_vocabulary_is_stored_in_32_bits(tmp_path: Path) -> None:
    shards = write_unique_ids(tmp_path, 70_000, ShardSizes(30_000, 10_000, 5_000))
    assert shards.dtype == "u32"
    ids = np.array(read_all(shards))
    assert np.array_equal(ids[ids != shards.eod], [i for i in range(69_999) if i % 50 != 49])


def test_the_same_documents_give_the_same_bytes(tmp_path: Path) -> None:
    first, again = (write_documents(tmp_path / name, random_documents(40)) for name in "ab")
    assert first.fingerprint == again.fingerprint
    for path in first.directory.iterdir():
        assert path.read_bytes() == (again.directory / path.name).read_bytes()
    assert write_documents(tmp_path / "c", random_documents(41)).fingerprint != first.fingerprint


def shard_path(shards: ShardSet, block: int) -> Path:
    return shards.directory / shards.shards[int(shards.blocks[block]["shard"])].name


def flip_a_byte(shards: ShardSet, block: int, at: int) -> None:
    path = shard_path(shards, block)
    raw = bytearray(path.read_bytes())
    raw[int(shards.blocks[block]["offset"]) + at] ^= 0x10
    path.write_bytes(raw)


@pytest.mark.parametrize("at", [3, 130, 600])  # in the member's name, in its size, in its ids
def test_a_flipped_byte_is_refused(shards: ShardSet, at: int) -> None:
    flip_a_byte(shards, block=1, at=at)
    offset = int(shards.blocks[1]["offset"])
    with pytest.raises(UserError, match=rf"shard-00000\.tar, block at offset {offset}: .*CRC32 \w+, got \w+; prepare"):
        read_block(load_index(shards.directory), 1, local_fetch(shards.directory))
    damages = verify(shards)
    assert len(damages) == 2
    assert "expected sha256" in damages[1]


@pytest.mark.parametrize("cut_bytes", [100, 512, 1024 + 512])
def test_a_cut_shard_is_refused_at_the_start_and_while_reading(shards: ShardSet, cut_bytes: int) -> None:
    offset, size = int(shards.blocks[1]["offset"]), int(shards.blocks[1]["size"])
    path, kept = shard_path(shards, 1), offset + size - cut_bytes
    path.write_bytes(path.read_bytes()[:kept])
    at_the_start = rf"{path.name}: the file ends at offset {kept}, expected {shards.shards[0].bytes} bytes"
    with pytest.raises(UserError, match=at_the_start):
        load_index(shards.directory)
    while_reading = rf"{path.name}, block at offset {offset}: .*bytes {size}, got {size - cut_bytes}; prepare"
    with pytest.raises(UserError, match=while_reading):
        read_block(shards, 1, local_fetch(shards.directory))


def test_a_missing_shard_is_refused_at_the_start_and_while_reading(shards: ShardSet) -> None:
    shard_path(shards, 0).unlink()
    with pytest.raises(
        UserError, match=r"shard-00000\.tar: no such file, expected \d+ bytes from offset 0; mount its folder"
    ):
        load_index(shards.directory)
    with pytest.raises(
        UserError, match=r"shard-00000\.tar: no such file, expected \d+ bytes at offset 0; put the file back"
    ):
        read_block(shards, 0, local_fetch(shards.directory))
    assert "no such file" in verify(shards)[0]


def test_the_shards_of_another_set_of_the_same_sizes_are_refused(tmp_path: Path) -> None:
    """Nothing but the checksums can tell them apart."""
    ours, other = (
        write_documents(tmp_path / name, [np.full(50, number) for number in range(first, first + 40)])
        for name, first in (("ours", 0), ("other", 100))
    )
    assert np.array_equal(ours.blocks["size"], other.blocks["size"])
    for name in ("index.json", "index.npz"):
        shutil.copy(other.directory / name, ours.directory / name)
    mixed = load_index(ours.directory)
    for block, entry in enumerate(mixed.blocks):
        name = mixed.shards[int(entry["shard"])].name
        with pytest.raises(UserError, match=rf"{name}, block at offset {int(entry['offset'])}: .*expected CRC32"):
            read_block(mixed, block, local_fetch(mixed.directory))


@pytest.mark.parametrize("count", ["members", "tokens"])
def test_counts_are_checked(shards: ShardSet, count: str) -> None:
    shards.blocks[count][0] += 1
    with pytest.raises(UserError, match=rf"shard-00000\.tar, block at offset 0: .*expected {count} \d+, got \d+"):
        read_block(shards, 0, local_fetch(shards.directory))


def test_an_id_outside_the_vocabulary_is_refused(tmp_path: Path) -> None:
    shards = write_unique_ids(tmp_path / "set", 200)
    edit_index(shards.directory, lambda index: index.update(vocab_size=70_000, eod=69_999))
    with pytest.raises(UserError, match=r"like \*\.u32, got ids \d+ to 1048575 leave the vocabulary \[0, 70000\)"):
        read_block(load_index(shards.directory), 0, local_fetch(shards.directory))
    with ShardWriter(tmp_path / "other", BytesTokenizer()) as writer, pytest.raises(UserError, match="vocabulary"):
        writer.add(np.array([300]), 1)


def _edit(edit: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda directory: edit_index(directory, edit)


def _replace(old: str, new: str) -> Callable[[Path], None]:
    """As a disk, or a person in an editor, would: the checksum stays what it was."""

    def damage(directory: Path) -> None:
        text = (directory / "index.json").read_text()
        assert old in text
        (directory / "index.json").write_text(text.replace(old, new, 1))

    return damage


def _other_blocks(directory: Path) -> None:
    other = write_documents(directory.parent / "other", random_documents(50, seed=1))
    shutil.copy(other.directory / "index.npz", directory / "index.npz")


def _other_index(directory: Path) -> None:
    other = write_documents(directory.parent / "other", random_documents(50, seed=1))
    for name in ("index.npz", "index.json"):
        shutil.copy(other.directory / name, directory / name)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "index.json").unlink(), r"index\.json: no such file; make the data set with tools/prepare"),
        (lambda d: (d / "index.npz").unlink(), r"index\.npz: damaged index: no such file; prepare"),
        (lambda d: (d / "index.json").write_text("{"), r"index\.json: damaged index: not JSON"),
        (lambda d: (d / "index.json").write_text("[]"), r"index\.json: damaged index: not a JSON object"),
        (_edit(lambda i: i.update(version=9)), r"index version is 9, this program reads 1 and 2; prepare"),
        (_edit(lambda i: i.pop("eod")), r"index\.json: damaged index: eod: Field required; prepare"),
        (_edit(lambda i: i.update(tokens=5)), r"blocks, shards and totals disagree; prepare"),
        (_edit(lambda i: i["shards"][0].update(bytes=100)), r"blocks, shards and totals disagree; prepare"),
        (_edit(lambda i: i.update(text_bytes="x")), r"index\.json: damaged index: text_bytes: .*integer"),
        (_edit(lambda i: i.update(eod=1.5)), r"index\.json: damaged index: eod: .*integer"),
        (_edit(lambda i: i.update(shards=[{"name": 5}])), r"index\.json: damaged index: shards\.0\.name: .*string"),
        (_edit(lambda i: i.update(blocks_sha256="0")), r"index\.json: damaged index: blocks_sha256: "),
        (_replace('"text_bytes": ', '"text_bytes": 1'), r"index\.json: damaged index: its own checksum is another"),
        (_replace('"checksum"', '"checksun"'), r"index\.json: damaged index: its own checksum is another"),
        (_replace('"version": 2', '"version": 1'), r"index\.json: damaged index: its own checksum is another"),
        (_other_blocks, r"index\.npz: damaged index: sha256 \w+, index\.json says \w+; prepare"),
        (_other_index, r"shard-0000\d\.tar: the file ends at offset \d+, expected \d+ bytes"),
    ],
)
def test_a_damaged_index_is_refused(shards: ShardSet, damage: Callable[[Path], None], message: str) -> None:
    damage(shards.directory)
    with pytest.raises(UserError, match=message):
        load_index(shards.directory)


def test_an_index_of_before_checksums_is_read(shards: ShardSet) -> None:
    index = json.loads((shards.directory / "index.json").read_text())
    del index["checksum"]
    (shards.directory / "index.json").write_text(json.dumps(index | {"version": 1}))
    assert load_index(shards.directory).tokens == shards.tokens


def test_an_unfinished_writer_leaves_no_data_set(tmp_path: Path) -> None:
    documents = random_documents(60)
    with ShardWriter(tmp_path, BytesTokenizer(), SMALL) as writer:
        for ids in documents:
            writer.add(ids, ids.size)
    with pytest.raises(UserError, match="no such file"):
        load_index(tmp_path)
    assert read_all(write_documents(tmp_path, documents[:5])) == stored(documents[:5])
    with pytest.raises(UserError, match="holds a data set already"):
        ShardWriter(tmp_path, BytesTokenizer())


def test_a_data_set_without_documents_is_refused(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, WideTokenizer()) as writer, pytest.raises(UserError, match="no document"):
        writer.finish()
