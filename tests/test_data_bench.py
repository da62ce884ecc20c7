"""tools/bench_data.py in small: each reader there is reads it all, and what is not there is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from megassm.data.index import load_index
from tests.conftest import run_python
from tools.bench.data import DataBenchPlan, _write, memmap_batches, stream_batches, webdataset_batches


def test_all_readers_hand_over_the_same_tokens(tmp_path: Path) -> None:
    plan = DataBenchPlan(tokens=64_000, block_tokens=4_000, seq_len=99, batch_sequences=4)
    shards = _write(plan, tmp_path)
    stored = np.fromfile(shards.directory / "flat.u16", dtype="<u2")
    assert stored.size == load_index(shards.directory).tokens == 64_000
    urls = [str(shards.directory / shard.name) for shard in shards.shards]
    readers = {
        "memmap": memmap_batches(shards.directory / "flat.u16", plan),
        "megassm": stream_batches(str(shards.directory), plan),
        "webdataset": webdataset_batches(urls, plan),
    }
    for name, batches in readers.items():
        arrays = list(batches)
        assert all(ids_BT.shape == (4, 100) and ids_BT.dtype == np.int64 for ids_BT in arrays), name
        read = np.concatenate([ids_BT[:, :-1].ravel() for ids_BT in arrays])
        assert 0.9 * stored.size < read.size <= stored.size, name
        counts = np.bincount(read, minlength=257) - np.bincount(stored, minlength=257)
        assert counts[:256].max() <= 0, f"{name}: a token twice"  # 256, EOD, fills a last short sequence


def test_the_tool(tmp_path: Path) -> None:
    table = tmp_path / "rates.json"
    options = ("--tokens", "200000", "--block-tokens", "20000", "--seq-len", "128", "--repeats", "1")
    run_python("tools/bench_data.py", *options, "--json", str(table))
    rows = json.loads(table.read_text(encoding="utf-8"))
    found = [(row["reader"], row["path"]) for row in rows]
    ours = [("megassm", path) for path in ("local", "http", "s3")]
    stock = [("webdataset", path) for path in ("local", "http", "s3")]
    assert found == [("memmap", "local"), *ours, *stock, ("mosaic", "local")]
    for row in rows:
        assert bool(row["note"]) is (row["mtok_per_s"] is None)
    assert rows[0]["of_memmap"] == 1
    assert rows[1]["mtok_per_s"] > 0
