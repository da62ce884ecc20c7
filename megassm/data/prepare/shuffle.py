"""The global shuffle on disk: every row of every part in the order of a key, by several processes, in little memory.

    1. repeats   rows of one content are counted over all parts, a range of hashes at a time, rows alone
    2. runs      groups of neighbouring parts become runs: sorted by key, with the place of every bucket in them
    3. buckets   a bucket is a range of keys: its pieces of all runs, sorted, as the stream that shards are cut from

The key of a row hashes its content, its number among the copies of that content, and the seed: copies stand anywhere,
and what comes out depends on the texts alone, in any order, in any parts, by any number of processes. Each byte is
read and written twice. Only the places of buckets in runs grow faster than the data: 32 bytes a pair.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megassm.data.order import splitmix64
from megassm.data.prepare.parts import PartStore, Rows, StoredIds, numbers_in_runs, same_as_before, save_durably
from megassm.files import commit, open_temporary

RUN_BYTES = 128 << 20  # of rows and ids: held once or twice while it is sorted
BUCKET_BYTES = 32 << 20
RANGE_ROWS = 1 << 20  # compared at once in looking for copies
REPEAT_DTYPE = np.dtype([("part", "<u4"), ("row", "<u4"), ("before", "<u4")])
KEYED_DTYPE = np.dtype(
    [
        ("key", "<u8"),
        ("high", "<u8"),
        ("low", "<u8"),
        ("tokens", "<u4"),
        ("text_bytes", "<u4"),
        ("ends", "u1"),
        ("valid", "u1"),
    ]
)
STREAM_DTYPE = np.dtype([("tokens", "<u4"), ("text_bytes", "<u4"), ("ends", "u1")])
SPLITS = ("train", "valid")


@dataclass(frozen=True)
class Shuffle:
    """What is shuffled, and where. Small: it goes to every worker with every item."""

    store: PartStore
    directory: Path
    seed: int
    deduplicate: bool
    id_bytes: int  # of one id
    ranges: int  # of hashes; a power of two
    buckets: int  # a power of two

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the parts, in the order of the input."""
        return _names(self.directory / "parts.json")

    def run_path(self, run: int) -> Path:
        return self.directory / f"run-{run:05d}"

    def repeats_path(self, number: int) -> Path:
        return self.directory / f"repeats-{number:05d}.npy"

    def stream_path(self, split: str, bucket: int) -> Path:
        """(rows,) of STREAM_DTYPE; beside it the ids, end to end."""
        return self.directory / f"bucket-{bucket:06d}.{split}.npy"

    def stream_ids_path(self, split: str, bucket: int) -> Path:
        return self.directory / f"bucket-{bucket:06d}.{split}.ids"

    def has_bucket(self, bucket: int) -> bool:
        return all(self.stream_path(split, bucket).exists() for split in SPLITS)


@lru_cache(maxsize=1)
def _names(path: Path) -> tuple[str, ...]:
    return tuple(json.loads(path.read_bytes()))


class RangeFacts(NamedTuple):
    """What a range of hashes holds."""

    duplicates: int  # documents with the text of one before them
    smallest_split: int


@dataclass(frozen=True)
class CountRepeats:
    """Finds, for one range of hashes, how many copies of a row's content stand in the parts before it."""

    shuffle: Shuffle

    def __call__(self, number: int) -> RangeFacts:
        width = 2**64 // self.shuffle.ranges
        found: list[npt.NDArray[np.void]] = []
        distinct: list[Rows] = []
        duplicates, smallest = 0, 2**64
        for part, name in enumerate(self.shuffle.parts):
            rows = _in_range(self.shuffle.store.rows(name), number * width, (number + 1) * width)
            if not len(rows.rows):
                continue
            smallest = min(smallest, int(rows.rows["split"].min()))
            first = np.flatnonzero(rows.rows["again"] == 0)
            entry = np.zeros(len(first), dtype=REPEAT_DTYPE)
            entry["part"], entry["row"] = part, first + rows.first
            entry["before"] = np.diff(first, append=len(rows.rows))  # how many here; of those before it, below
            duplicates += int(rows.rows["ends"].sum()) - int(rows.rows["ends"][first].sum())
            found.append(entry)
            distinct.append(rows.rows[first][["high", "low", "ends"]])
        if not found:
            save_durably(self.shuffle.repeats_path(number), np.empty(0, dtype=REPEAT_DTYPE))
            return RangeFacts(0, smallest)
        contents, entries = np.concatenate(distinct), np.concatenate(found)
        order = np.lexsort((contents["low"], contents["high"]))  # stable: copies stay in the order of the parts
        contents, entries = contents[order], entries[order]
        same = same_as_before(contents)
        duplicates += int(contents["ends"][same].sum())
        running = np.cumsum(entries["before"].astype(np.int64)) - entries["before"]
        entries["before"] = running - running[np.arange(len(same)) - numbers_in_runs(same)]
        entries = entries[same]
        save_durably(self.shuffle.repeats_path(number), entries[np.argsort(entries["part"], kind="stable")])
        return RangeFacts(duplicates, smallest)


class _Slice(NamedTuple):
    rows: Rows
    first: int  # of them in the part


def _in_range(rows: Rows, low: int, high: int) -> _Slice:
    """The rows whose hash is in [low, high): a part's are sorted by it."""
    hashes = rows["high"]
    first = bisect_left(range(len(rows)), low, key=lambda row: int(hashes[row]))
    stop = len(rows) if high >= 2**64 else bisect_left(range(len(rows)), high, key=lambda row: int(hashes[row]))
    return _Slice(np.array(rows[first:stop]), first)


class RunGroup(NamedTuple):
    """Neighbouring parts that become a run."""

    run: int
    first_part: int
    parts: int
    bytes: int


def run_groups(sizes: Sequence[int]) -> list[RunGroup]:
    """Parts of these sizes in groups of about RUN_BYTES."""
    groups: list[RunGroup] = []
    for part, size in enumerate(sizes):
        if not groups or groups[-1].bytes + size > RUN_BYTES:
            groups.append(RunGroup(len(groups), part, 0, 0))
        group = groups[-1]
        groups[-1] = group._replace(parts=group.parts + 1, bytes=group.bytes + size)
    return groups


@dataclass(frozen=True)
class MakeRun:
    """Sorts the rows of a group of parts by key. File: (buckets + 1, 2) places of rows and ids, the rows, the ids."""

    shuffle: Shuffle
    last_valid: int  # a document is for validation where its hash for the split is at most this

    def __call__(self, group: RunGroup) -> None:
        shuffle = self.shuffle
        path = shuffle.run_path(group.run)
        if path.exists():
            return
        chosen = [self._part(part) for part in range(group.first_part, group.first_part + group.parts)]
        rows = np.concatenate([rows for rows, _ in chosen])
        pieces = [piece for _, ids in chosen for piece in ids]
        order = np.lexsort((rows["low"], rows["high"], rows["key"]))
        rows = rows[order]
        width = 2**64 // shuffle.buckets
        bounds = np.array([bucket * width for bucket in range(1, shuffle.buckets)], dtype=np.uint64)
        ends = np.concatenate([[0], np.cumsum(rows["tokens"], dtype=np.int64)])
        places = np.concatenate([[0], np.searchsorted(rows["key"], bounds), [len(rows)]]).astype(np.int64)
        with open_temporary(path) as file:
            file.write(np.stack([places, ends[places]], axis=1).astype("<u8").tobytes())
            file.write(rows.data if len(rows) else b"")
            write_pieces(file, [pieces[row] for row in order.tolist()])
            commit(file, path)

    def _part(self, part: int) -> tuple[npt.NDArray[np.void], list[StoredIds]]:
        shuffle = self.shuffle
        name = shuffle.parts[part]
        rows, ids = np.array(shuffle.store.rows(name)), np.asarray(shuffle.store.ids(name))
        stops = np.cumsum(rows["tokens"], dtype=np.int64)
        copies = rows["again"].astype(np.uint64)
        for number in range(shuffle.ranges):
            repeats = _repeats(shuffle.repeats_path(number), part)
            before = np.zeros(len(rows), dtype=np.uint64)
            before[repeats["row"]] = repeats["before"]
            first = np.arange(len(rows)) - rows["again"]
            copies += before[first]
        keyed = np.empty(len(rows), dtype=KEYED_DTYPE)
        for field in ("high", "low", "tokens", "text_bytes", "ends"):
            keyed[field] = rows[field]
        keyed["valid"] = rows["split"] <= np.uint64(self.last_valid)
        keyed["key"] = keys(rows["high"], copies, shuffle.seed)
        kept = np.flatnonzero(copies == 0) if shuffle.deduplicate else np.arange(len(rows))
        starts = stops - rows["tokens"]
        pieces = [ids[start:stop] for start, stop in zip(starts[kept].tolist(), stops[kept].tolist(), strict=True)]
        return keyed[kept], pieces


def keys(high: npt.NDArray[np.uint64], copies: npt.NDArray[np.uint64], seed: int) -> npt.NDArray[np.uint64]:
    """Places in the shuffle. The first copy's is that of a text which stands there once."""
    plain = splitmix64(high ^ splitmix64(np.array([seed % 2**64], dtype=np.uint64)))
    mixed: npt.NDArray[np.uint64] = np.where(copies > 0, splitmix64(plain ^ splitmix64(copies)), plain)
    return mixed


def _repeats(path: Path, part: int) -> npt.NDArray[Any]:
    found = np.load(path, mmap_mode="r") if path.stat().st_size > 256 else np.load(path)
    parts = found["part"]
    first, stop = (bisect_left(range(len(found)), part + n, key=lambda row: int(parts[row])) for n in (0, 1))
    return np.array(found[first:stop])


@dataclass(frozen=True)
class SortBucket:
    """Gathers a bucket from all runs and sorts it: the next stretch of both splits' streams."""

    shuffle: Shuffle
    runs: int

    def __call__(self, bucket: int) -> None:
        shuffle = self.shuffle
        if shuffle.has_bucket(bucket):
            return
        found = [_run_slice(shuffle, run, bucket) for run in range(self.runs)]
        rows, ids = np.concatenate([rows for rows, _ in found]), np.concatenate([ids for _, ids in found])
        order = np.lexsort((rows["low"], rows["high"], rows["key"]))
        stops = np.cumsum(rows["tokens"], dtype=np.int64)
        starts = (stops - rows["tokens"]).tolist()
        ends = stops.tolist()
        for split in SPLITS:
            chosen = order[rows["valid"][order] == (split == "valid")]
            path = shuffle.stream_ids_path(split, bucket)
            with open_temporary(path) as file:
                write_pieces(file, [ids[starts[row] : ends[row]] for row in chosen.tolist()])
                commit(file, path)
            described = np.empty(len(chosen), dtype=STREAM_DTYPE)
            for field in STREAM_DTYPE.names or ():
                described[field] = rows[field][chosen]
            save_durably(shuffle.stream_path(split, bucket), described)


def _run_slice(shuffle: Shuffle, run: int, bucket: int) -> tuple[npt.NDArray[np.void], StoredIds]:
    """(rows, ids) of a bucket in a run."""
    dtype = np.dtype(f"<u{shuffle.id_bytes}")
    handle = os.open(shuffle.run_path(run), os.O_RDONLY)
    try:
        head = 16 * (shuffle.buckets + 1)
        places = np.frombuffer(os.pread(handle, 32, 16 * bucket), dtype="<u8").tolist()
        [all_rows, _] = np.frombuffer(os.pread(handle, 16, 16 * shuffle.buckets), dtype="<u8").tolist()
        row, id_, last_row, last_id = places
        width = KEYED_DTYPE.itemsize
        rows = np.frombuffer(os.pread(handle, (last_row - row) * width, head + row * width), dtype=KEYED_DTYPE)
        start = head + all_rows * width + id_ * dtype.itemsize
        ids = np.frombuffer(os.pread(handle, (last_id - id_) * dtype.itemsize, start), dtype=dtype)
    finally:
        os.close(handle)
    return rows, ids


def write_pieces(file: Any, pieces: list[StoredIds], at_once: int = 1 << 22) -> None:
    """Ids end to end, gathered into few writes."""
    held: list[StoredIds] = []
    size = 0
    for piece in pieces:
        held.append(piece)
        size += piece.size
        if size >= at_once:
            file.write(np.concatenate(held).data)
            held, size = [], 0
    if held:
        file.write(np.concatenate(held).data)
