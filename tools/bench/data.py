"""How fast one process gets batches of token ids: our stream from a folder, HTTP and S3, beside other readers.

Every reader ends in the same thing, int64 ids of shape (B, L + 1) in batches. `memmap` is Megatron-LM's way: one
flat file, samples in an order shuffled beforehand. `webdataset` and `mosaic` are those packages as they come.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import numpy.typing as npt

from megassm.data.index import ShardSet, ShardSizes, load_index
from megassm.data.prepare.shard_writer import ShardWriter
from megassm.data.stores import open_store
from megassm.data.stream import StreamPlan, TokenStream
from megassm.data.tokenizer.base import BytesTokenizer
from megassm.errors import UserError
from tools.bench.servers import juicefs_s3, nginx, upload

Batches = Iterable[npt.NDArray[np.int64]]
DOCUMENT_TOKENS = 1000
MEMMAP_NAME = "flat.u16"


@dataclass(frozen=True)
class DataBenchPlan:
    """What to read."""

    tokens: int = 64 << 20
    block_tokens: int = 1 << 20
    seq_len: int = 2048
    batch_sequences: int = 8
    repeats: int = 3
    """Whole passes over the data; the fastest counts."""


@dataclass(frozen=True)
class DataRow:
    """One reader on one path. Rates are in million tokens."""

    reader: str
    path: str
    mtok_per_s: float | None
    mtok_per_cpu_s: float | None
    """Of this process, all threads; a server's time is its own."""
    of_memmap: float | None
    note: str = ""


def bench(plan: DataBenchPlan, work: Path) -> Iterator[DataRow]:
    """Writes a data set of random ids below `work`, and reads it in every way there is."""
    shards = _write(plan, work)
    memmap = _measure(plan, lambda: memmap_batches(shards.directory / MEMMAP_NAME, plan))
    with ExitStack() as stack:
        places = list(_places(shards, stack))
        for reader, path, make in _contestants(plan, shards, work, memmap, places):
            if isinstance(make, str):
                yield DataRow(reader, path, None, None, None, make)
                continue
            rates = memmap if reader == "memmap" else _measure(plan, make)
            yield DataRow(reader, path, *rates, of_memmap=rates[0] / memmap[0])


def _contestants(
    plan: DataBenchPlan, shards: ShardSet, work: Path, memmap: tuple[float, float], places: list[tuple[str, str, str]]
) -> Iterator[tuple[str, str, Callable[[], Batches] | str]]:
    """(reader, path, what makes its batches, or why it cannot)."""
    names = [shard.name for shard in shards.shards]
    yield "memmap", "local", lambda: memmap_batches(shards.directory / MEMMAP_NAME, plan)
    for path, url, why_not in places:
        yield "megassm", path, why_not or (lambda url=url: stream_batches(url, plan))  # type: ignore[misc]
    for path, url, why_not in places:
        if path == "s3":
            yield "webdataset", path, "it has no reader for s3"
        else:
            urls = [f"{url}/{name}" for name in names]
            yield "webdataset", path, why_not or (lambda urls=urls: webdataset_batches(urls, plan))  # type: ignore[misc]
    try:
        import streaming  # type: ignore[import-not-found,unused-ignore]
    except ImportError as error:
        yield "mosaic", "local", f"needs mosaicml-streaming: {type(error).__name__}"
        return
    folder = work / "mosaic"
    write_mosaic(streaming, shards, folder, plan)
    yield "mosaic", "local", lambda: mosaic_batches(streaming, folder, plan)


def _places(shards: ShardSet, stack: ExitStack) -> Iterator[tuple[str, str, str]]:
    """(path, URL, why it is not there)."""
    yield "local", str(shards.directory), ""
    work = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    try:
        server = stack.enter_context(nginx(shards.directory.parent, work))
        yield "http", f"{server.url}/{shards.directory.name}", ""
    except UserError as error:
        yield "http", "", str(error)
    try:
        import boto3

        server = stack.enter_context(juicefs_s3(work))
        stack.enter_context(patch.dict(os.environ, server.environment))
        yield "s3", upload(boto3.session.Session().client("s3"), shards.directory, "set"), ""
    except (UserError, ImportError) as error:
        yield "s3", "", str(error)


def _measure(plan: DataBenchPlan, make: Callable[[], Batches]) -> tuple[float, float]:
    """(million tokens a second, a CPU-second) of the fastest pass."""
    best = (0.0, 0.0)
    for _ in range(plan.repeats):
        started, cpu_started = time.perf_counter(), time.process_time()
        tokens = sum(ids_BT.shape[0] * plan.seq_len for ids_BT in make()) / 1e6
        seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
        best = max(best, (tokens / seconds, tokens / cpu_seconds))
    return best


def _write(plan: DataBenchPlan, work: Path) -> ShardSet:
    random = np.random.default_rng(0)
    sizes = ShardSizes(16 * plan.block_tokens, plan.block_tokens, plan.block_tokens)
    with ShardWriter(work / "set", BytesTokenizer(), sizes) as writer:
        for _ in range(plan.tokens // DOCUMENT_TOKENS):
            writer.add(random.integers(0, 256, DOCUMENT_TOKENS - 1), text_bytes=DOCUMENT_TOKENS - 1)
        shards = writer.finish()
    flat = np.concatenate([_ids(raw) for raw in _members([str(work / "set" / s.name) for s in shards.shards])])
    flat.tofile(work / "set" / MEMMAP_NAME)
    return shards


def stream_batches(url: str, plan: DataBenchPlan) -> Batches:
    """Ours: one epoch."""
    shards = load_index(open_store(url))
    stream = TokenStream(shards, StreamPlan(plan.seq_len, plan.batch_sequences, plan.batch_sequences, seed=0))
    steps = shards.tokens // plan.seq_len // plan.batch_sequences
    return (batch.ids_BT for batch in stream.batches(0, steps))


def memmap_batches(path: Path, plan: DataBenchPlan) -> Batches:
    """As Megatron-LM: samples of one flat file in an order shuffled beforehand."""
    ids = np.memmap(path, dtype="<u2", mode="r")
    samples = np.random.default_rng(0).permutation((ids.size - 1) // plan.seq_len)
    for rows in _groups(samples.tolist(), plan.batch_sequences):
        starts = [row * plan.seq_len for row in rows]
        yield np.stack([ids[start : start + plan.seq_len + 1].astype(np.int64) for start in starts])


def webdataset_batches(urls: list[str], plan: DataBenchPlan) -> Batches:
    """Stock `wds.WebDataset`: its members in the order stored, cut into samples."""
    cut = (
        ids[start : start + plan.seq_len + 1].astype(np.int64)
        for ids in map(_ids, _members(urls))
        for start in range(0, ids.size - plan.seq_len, plan.seq_len)
    )
    return (np.stack(rows) for rows in _groups(cut, plan.batch_sequences))


def _members(urls: list[str]) -> Iterator[bytes]:
    import webdataset

    for sample in webdataset.WebDataset(urls, shardshuffle=False):
        yield sample["u16"]


def _ids(raw: bytes) -> npt.NDArray[np.uint16]:
    return np.frombuffer(raw, dtype="<u2")


def write_mosaic(streaming: Any, shards: ShardSet, folder: Path, plan: DataBenchPlan) -> None:
    """The same samples in MDS, one array each, as its examples for pretraining have them."""
    ids = np.memmap(shards.directory / MEMMAP_NAME, dtype="<u2", mode="r")
    with streaming.MDSWriter(out=str(folder), columns={"ids": "bytes"}) as writer:
        for start in range(0, ids.size - plan.seq_len, plan.seq_len):
            writer.write({"ids": ids[start : start + plan.seq_len + 1].tobytes()})


def mosaic_batches(streaming: Any, folder: Path, plan: DataBenchPlan) -> Batches:
    """Stock `StreamingDataset`, shuffled."""
    streaming.base.util.clean_stale_shared_memory()
    samples = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=plan.batch_sequences)
    arrays = (_ids(sample["ids"]).astype(np.int64) for sample in samples)
    return (np.stack(rows) for rows in _groups(arrays, plan.batch_sequences))


def _groups(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Whole groups only."""
    group = []
    for item in items:
        group.append(item)
        if len(group) == size:
            yield group
            group = []
