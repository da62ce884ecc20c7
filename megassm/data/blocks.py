"""Reading shards: fetch a block's bytes, check them, unpack them; and a bounded memory of blocks.

Everything is checked before an id is used: length and CRC32 of the raw bytes, then members, tokens and
ids. The tar stage is webdataset's own; it alone would not do, because a shard cut between two members
or with one flipped header byte gives it part of the samples and no error. Nothing is ever skipped.
"""

from __future__ import annotations

import io
import threading
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megassm.data.members import member_ids
from megassm.data.shards import PREPARE_AGAIN, ShardSet
from megassm.errors import UserError

StoredIds = npt.NDArray[np.unsignedinteger[Any]]
Fetch = Callable[[str, int, int], bytes]
"""(shard name, offset, size) -> the bytes there; fewer where the shard ends early. Other transports
(http, s3) are other functions of this type."""

DEFAULT_CACHE_BYTES = 256 << 20


def local_fetch(directory: Path) -> Fetch:
    """Fetches from files in `directory`."""

    def fetch(shard: str, offset: int, size: int) -> bytes:
        with open(directory / shard, "rb") as file:
            file.seek(offset)
            return file.read(size)

    return fetch


def read_block(shard_set: ShardSet, block: int, fetch: Fetch) -> StoredIds:
    """The ids of one block, in the stored dtype. UserError naming shard, offset, expected and got."""
    entry = shard_set.blocks[block]
    name = shard_set.shards[int(entry["shard"])].name
    offset, size = int(entry["offset"]), int(entry["size"])

    def refuse(what: str, expected: object, got: object) -> UserError:
        place = f"{shard_set.directory / name}, block at offset {offset}"
        return UserError(f"{place}: damaged: expected {what} {expected}, got {got}; {PREPARE_AGAIN}")

    try:
        raw = fetch(name, offset, size)
    except FileNotFoundError:
        raise refuse("bytes", size, "no such file") from None
    if len(raw) != size:
        raise refuse("bytes", size, len(raw))
    crc32 = zlib.crc32(raw)
    if crc32 != entry["crc32"]:
        raise refuse("CRC32", f"{int(entry['crc32']):08x}", f"{crc32:08x}")
    members = _unpack(raw, name, shard_set.suffix)
    if len(members) != entry["members"]:
        raise refuse("members", entry["members"], len(members))
    try:
        ids: StoredIds = np.concatenate([member_ids(member, shard_set.layout) for member in members])
    except ValueError as error:
        raise refuse("members of ids", f"like *.{shard_set.suffix}", error) from None
    if ids.size != entry["tokens"]:
        raise refuse("tokens", entry["tokens"], ids.size)
    return ids


def _unpack(raw: bytes, shard: str, suffix: str) -> list[bytes]:
    """The members of a run of tar records, through webdataset's tar stage."""
    # Here, because webdataset imports torch where it is installed and preparing data must not wait for it.
    from webdataset.tariterators import group_by_keys, tar_file_expander

    files = tar_file_expander([{"url": shard, "stream": io.BytesIO(raw)}])
    return [sample[suffix] for sample in group_by_keys(files) if suffix in sample]


class BlockCache:
    """Blocks as ids, the recently used ones kept: at most `max_bytes` of them, or one larger block."""

    def __init__(self, shard_set: ShardSet, fetch: Fetch, max_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self._shard_set, self._fetch, self._max_bytes = shard_set, fetch, max_bytes
        self._blocks: OrderedDict[int, StoredIds] = OrderedDict()
        self._lock = threading.Lock()  # the prefetching thread and a direct caller may both read
        self.resident_bytes = 0
        self.fetches = 0

    def get(self, block: int) -> StoredIds:
        """The ids of a block; see `read_block`."""
        with self._lock:
            if block not in self._blocks:
                self._keep(block, read_block(self._shard_set, block, self._fetch))
            self._blocks.move_to_end(block)
            return self._blocks[block]

    def _keep(self, block: int, ids: StoredIds) -> None:
        self.fetches += 1
        while self._blocks and self.resident_bytes + ids.nbytes > self._max_bytes:
            _, dropped = self._blocks.popitem(last=False)
            self.resident_bytes -= dropped.nbytes
        self._blocks[block] = ids
        self.resident_bytes += ids.nbytes
