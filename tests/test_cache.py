"""The node's disk cache: hits, its bound, damage, several processes at once, a disk that fails."""

from __future__ import annotations

import multiprocessing
import os
import random
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from megassm.data.cache import DiskCache
from megassm.data.index import ShardSet
from megassm.data.mixture import DataSource, Mixture, MixturePhase, ReadOptions
from megassm.data.request import BrokenFetchError
from megassm.data.stores import LocalStore
from megassm.data.stream import StreamPlan, TokenStream
from megassm.errors import UserError
from tests.shard_sets import random_documents, write_documents


def kept_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("??/*"))


def content(block: int, size: int = 1000) -> bytes:
    return bytes([block % 256]) * size


def get(cache: DiskCache, block: int, size: int = 1000) -> bytes | None:
    return cache.get("print", block, size, zlib.crc32(content(block, size)))


def test_what_was_put_is_got_by_another_process_too(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path / "cache", 10_000)
    assert get(cache, 1) is None
    cache.put("print", 1, content(1))
    again = DiskCache(tmp_path / "cache", 10_000)
    assert get(again, 1) == content(1)
    assert again.get("other print", 1, 1000, zlib.crc32(content(1))) is None


def test_the_bound_holds_and_the_least_recently_used_go(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10_000)
    for block in range(30):
        cache.put("print", block, content(block))
        for path in tmp_path.glob("??/*"):  # as if time had passed: files of one millisecond have one time
            stat = path.stat()
            os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns - 10**9))
        assert get(cache, 0) == content(0), "used all along"
        assert kept_bytes(tmp_path) <= 10_000
        assert int((tmp_path / "bytes").read_text()) == kept_bytes(tmp_path)
    assert get(cache, 29) == content(29)
    assert get(cache, 1) is None
    cache.put("print", 99, content(99, 20_000))
    assert get(cache, 99, 20_000) is None, "larger than the bound"


def test_a_smaller_bound_or_a_killed_process_is_put_right_at_the_start(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10_000)
    for block in range(8):
        cache.put("print", block, content(block))
    next(tmp_path.glob("??/")).joinpath("half.block.tmp").write_bytes(b"x" * 500)
    (tmp_path / "bytes").write_text("7")
    DiskCache(tmp_path, 3_000)
    assert kept_bytes(tmp_path) <= 3_000
    assert int((tmp_path / "bytes").read_text()) == kept_bytes(tmp_path)
    assert not list(tmp_path.glob("??/*.tmp"))


@pytest.mark.parametrize("damage", [b"", content(1)[:-1], content(2)])
def test_a_damaged_file_is_no_hit_and_is_put_right(tmp_path: Path, damage: bytes) -> None:
    cache = DiskCache(tmp_path, 10_000)
    cache.put("print", 1, content(1))
    [path] = tmp_path.glob("??/*.block")
    path.write_bytes(damage)
    assert get(cache, 1) is None
    cache.put("print", 1, content(1))
    assert get(cache, 1) == content(1)
    assert int((tmp_path / "bytes").read_text()) == kept_bytes(tmp_path)


def _use(folder: Path, seed: int) -> int:
    cache, draw, hits = DiskCache(folder, 20_000), random.Random(seed), 0
    for _ in range(150):
        block = draw.randrange(40)
        found = get(cache, block)
        assert found in (None, content(block))
        hits += found is not None
        cache.put("print", block, content(block))
        with cache._locked():
            assert kept_bytes(folder) <= 20_000
    return hits


def test_several_processes_share_it(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        hits = pool.starmap(_use, [(tmp_path, seed) for seed in range(4)])
    assert all(hits)
    assert kept_bytes(tmp_path) == int((tmp_path / "bytes").read_text()) <= 20_000


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"data\.cache_dir = '.*/file/cache': cannot be written"):
        DiskCache(tmp_path / "file" / "cache", 1000)


def test_a_disk_that_fails_ends_the_cache_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = DiskCache(tmp_path, 10_000)

    def full(path: Path, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megassm.data.cache._write_new", full)
    for block in range(3):
        cache.put("print", block, content(block))
    assert capsys.readouterr().err.count("No space left on device") == 1


def test_a_block_is_written_while_another_process_has_the_lock(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, 10_000)
    with ThreadPoolExecutor(1) as thread, cache._locked():
        put = thread.submit(cache.put, "print", 1, content(1))
        while not any(path.stat().st_size == 1000 for path in tmp_path.glob("writing/*")):
            assert not put.done()
        assert get(cache, 1) is None, "not there before it is counted"
    assert get(cache, 1) == content(1)
    assert not list(tmp_path.glob("writing/*"))


def test_what_a_killed_process_was_writing_goes_after_an_hour(tmp_path: Path) -> None:
    DiskCache(tmp_path, 10_000).put("print", 1, content(1))
    old, fresh = tmp_path / "writing/old", tmp_path / "writing/fresh"
    for path in (old, fresh):
        path.write_bytes(b"x")
    os.utime(old, (0, 0))
    DiskCache(tmp_path, 10_000)
    assert fresh.exists()
    assert not old.exists()


@pytest.fixture
def shards(tmp_path: Path) -> ShardSet:
    return write_documents(tmp_path / "set", random_documents(200))


def test_a_stream_goes_on_from_the_cache_alone(
    shards: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = ReadOptions(cache_dir=tmp_path / "cache", cache_bytes=10**7)
    mixture = Mixture((DataSource("data", shards),), (MixturePhase(0, {"data": 1.0}),), reading)
    plan = StreamPlan(seq_len=10, batch_sequences=48, micro_batch_sequences=48, seed=7)
    steps = shards.tokens // 480 + 1
    first = TokenStream(mixture, plan)
    batches = list(first.batches(0, steps))
    assert first.meter.take().data_cache_hits == 0

    def gone(*arguments: object) -> None:
        raise BrokenFetchError("the server is gone")

    monkeypatch.setattr(LocalStore, "request", gone)
    again = TokenStream(mixture, plan)
    for got, expected in zip(again.batches(0, steps), batches, strict=True):
        assert np.array_equal(got.ids_BT, expected.ids_BT)
    counted = again.meter.take()
    assert counted.data_cache_hits >= len(shards.blocks)
    assert counted.data_fetched_bytes == counted.data_reconnects == 0


def test_a_folder_that_others_write_to_leads_nowhere(tmp_path: Path) -> None:
    """Links in place of a block, of its temporary file and of the lock; a number that is none; a pipe."""
    victim = tmp_path / "victim"
    victim.write_bytes(b"mine")
    cache = DiskCache(tmp_path / "cache", 10_000)
    cache.put("print", 1, content(1))
    (block,) = (tmp_path / "cache").glob("??/*")
    own = tmp_path / "cache/writing" / f"{block.name}.{os.getpid()}.{threading.get_ident()}"
    block.unlink()
    block.symlink_to(victim)
    own.symlink_to(victim)
    assert get(cache, 1) is None
    cache.put("print", 1, content(1))
    assert get(cache, 1) == content(1)
    assert not block.is_symlink()
    (tmp_path / "cache/bytes").write_text("9" * 5000)
    cache.put("print", 2, content(2))
    assert get(cache, 2) == content(2)
    block.unlink()
    os.mkfifo(block)
    assert get(cache, 1) is None
    (tmp_path / "cache/bytes").unlink()
    (tmp_path / "cache/bytes").symlink_to(victim)
    with pytest.raises(UserError, match=r"data\.cache_dir = .*: cannot be written"):
        DiskCache(tmp_path / "cache", 10_000)
    assert victim.read_bytes() == b"mine"
