"""Cuts the streams that `shuffle` made into shards: where each begins is counted first, then many write at once.

The bytes are those that one `ShardWriter` would write of the same documents in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megassm.data.index import ShardFile, ShardSizes, TokenDtype, stored_dtype
from megassm.data.prepare.shard_writer import OpenShard
from megassm.data.prepare.shuffle import Shuffle
from megassm.files import write_atomically


class ShardPlan(NamedTuple):
    """Which stretch of a split's stream is a shard."""

    number: int
    first_member: int
    bounds: list[int]  # tokens of the stream: where its first member begins, and where each ends
    documents: int
    text_bytes: int

    @property
    def tokens(self) -> int:
        return self.bounds[-1] - self.bounds[0]


@dataclass(frozen=True)
class StreamPlan:
    """A split: where its buckets begin, and its shards."""

    split: str
    starts: list[int]  # tokens before each bucket, and in all
    shards: list[ShardPlan]
    has_pieces: bool  # whether a document goes on in the next row, and perhaps the next member

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def text_bytes(self) -> int:
        return sum(shard.text_bytes for shard in self.shards)


def plan_stream(shuffle: Shuffle, split: str, sizes: ShardSizes) -> StreamPlan:
    """Where the members and shards of a split begin and end."""
    cutter, starts, has_pieces = _Cutter(sizes), [0], False
    for bucket in range(shuffle.buckets):
        rows = np.load(shuffle.stream_path(split, bucket))
        has_pieces = has_pieces or not rows["ends"].all()
        cutter.add(rows)
        starts.append(cutter.offset)
    return StreamPlan(split, starts, cutter.finish(), has_pieces)


class _Cutter:
    """Cuts members, blocks and shards at the first row that fills them."""

    def __init__(self, sizes: ShardSizes) -> None:
        self._sizes = sizes
        self.offset = 0  # tokens so far
        self._shards: list[ShardPlan] = []
        self._members = self._block = 0  # members so far; tokens in the open block
        self._bounds, self._documents, self._text_bytes = [0], 0, 0  # of the open shard
        self._pending = 0  # tokens of the open member

    def add(self, rows: npt.NDArray[np.void]) -> None:
        """The next stretch of the stream."""
        sums = {name: np.cumsum(rows[name], dtype=np.int64) for name in ("tokens", "ends", "text_bytes")}
        row, tokens = 0, sums["tokens"]
        while row < len(rows):
            before = int(tokens[row - 1]) if row else 0
            last = int(np.searchsorted(tokens, before + self._sizes.member_tokens - self._pending))
            stop = min(last, len(rows) - 1)
            done = int(tokens[stop]) - before
            self.offset += done
            self._pending += done
            self._documents += int(sums["ends"][stop] - (sums["ends"][row - 1] if row else 0))
            self._text_bytes += int(sums["text_bytes"][stop] - (sums["text_bytes"][row - 1] if row else 0))
            if last < len(rows):
                self._close_member()
            row = stop + 1

    def finish(self) -> list[ShardPlan]:
        """All shards, the last one with what is left."""
        if self._pending:
            self._close_member()
        if len(self._bounds) > 1:
            self._close_shard()
        return self._shards

    def _close_member(self) -> None:
        self._bounds.append(self.offset)
        self._block += self._pending
        self._pending = 0
        self._members += 1
        if self._block >= self._sizes.block_tokens:
            self._block = 0
            if self.offset - self._bounds[0] >= self._sizes.shard_tokens:
                self._close_shard()

    def _close_shard(self) -> None:
        first = self._members - (len(self._bounds) - 1)
        plan = ShardPlan(len(self._shards), first, self._bounds, self._documents, self._text_bytes)
        self._shards.append(plan)
        self._bounds, self._documents, self._text_bytes, self._block = [self.offset], 0, 0, 0


@dataclass(frozen=True)
class WriteShard:
    """Writes one shard of a split, and beside it, until there is an index, a record of it."""

    shuffle: Shuffle
    directory: Path
    split: str
    starts: list[int]
    block_tokens: int
    dtype: TokenDtype

    def record_path(self, number: int) -> Path:
        return self.directory / f"shard-{number:05d}.json"

    def __call__(self, plan: ShardPlan) -> None:
        record = self.record_path(plan.number)
        if record.exists():
            return
        shard = OpenShard(self.directory, plan.number)
        with shard.file:
            shard.documents = plan.documents
            blocks: list[Sequence[int]] = []
            for index, (start, stop) in enumerate(zip(plan.bounds, plan.bounds[1:], strict=False)):
                shard.write_member(f"{plan.first_member + index:08d}.{self.dtype}", self._ids(start, stop))
                if shard.block_tokens >= self.block_tokens:
                    blocks.append(shard.close_block())
            if shard.block_members:
                blocks.append(shard.close_block())
            closed = shard.close()
        write_atomically(record, json.dumps({"shard": asdict(closed), "blocks": blocks}).encode())

    def read_record(self, number: int) -> tuple[ShardFile, list[tuple[int, ...]]]:
        """(the shard, its blocks' rows of the index)."""
        found: dict[str, Any] = json.loads(self.record_path(number).read_bytes())
        return ShardFile(**found["shard"]), [tuple(row) for row in found["blocks"]]

    def _ids(self, start: int, stop: int) -> npt.NDArray[Any]:
        """Tokens [start, stop) of the stream."""
        dtype = stored_dtype(self.dtype)
        bucket = int(np.searchsorted(self.starts, start, side="right")) - 1
        found = []
        while start < stop:
            count = min(stop, self.starts[bucket + 1]) - start
            if count:
                path = self.shuffle.stream_ids_path(self.split, bucket)
                offset = (start - self.starts[bucket]) * dtype.itemsize
                found.append(np.fromfile(path, dtype=dtype, count=count, offset=offset))
            start += count
            bucket += 1
        return np.concatenate(found)
