"""Reading blocks: fetch the bytes, check them, unpack them.

Everything is checked before an id is used: length and CRC32 of the raw bytes, then members, tokens and
ids. The tar stage is webdataset's own; it alone would not do, because a shard cut between two members
or with one flipped header byte gives it part of the samples and no error. Nothing is ever skipped.
"""

from __future__ import annotations

import io
import os
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from megassm.data.cache import DiskCache
from megassm.data.index import PREPARE_AGAIN, MemberLayout, ShardSet, stored_dtype
from megassm.data.transport import Meter
from megassm.errors import UserError
from megassm.files import open_given
from megassm.guarded import check_tar, load_npy

StoredIds = npt.NDArray[np.unsignedinteger[Any]]
Fetch = Callable[[str, int, int], bytes]
"""(shard name, offset, size) -> the bytes there, fewer where the shard ends early; FileNotFoundError where there is
no such shard. `megassm.data.transport` has the one that training uses."""

FETCHES = 3  # of a block whose bytes are not what the index says: a link may damage what a disk holds well


class DamagedBlockError(UserError):
    """A block whose bytes are not what the index says. Other errors (no server, no access) are not about the data."""


def local_fetch(directory: Path) -> Fetch:
    """Fetches from files in `directory`."""

    def fetch(shard: str, offset: int, size: int) -> bytes:
        with open_given(directory / shard) as file:
            most = max(0, os.fstat(file.fileno()).st_size - offset)  # room is made for what is asked for
            file.seek(offset)
            return file.read(min(size, most))

    return fetch


def read_block(shard_set: ShardSet, block: int, fetch: Fetch) -> StoredIds:
    """The ids of one block, in the stored dtype. DamagedBlockError naming shard, offset, expected and got."""
    return BlockReader(shard_set, fetch).read(block)


@dataclass(frozen=True)
class BlockReader:
    """Reads the blocks of one data set, from the disk cache where it has them."""

    shard_set: ShardSet
    fetch: Fetch
    disk: DiskCache | None = None
    meter: Meter | None = None

    def read(self, block: int) -> StoredIds:
        """See `read_block`."""
        shard_set, entry = self.shard_set, self.shard_set.blocks[block]
        name = shard_set.shards[int(entry["shard"])].name
        try:
            members = _unpack(self._raw(block), name, shard_set.suffix)
        except (ValueError, OSError, tarfile.TarError) as error:
            if isinstance(error, UserError):
                raise
            raise self._damaged(block, "members of a tar file", "sound headers", error) from None
        if len(members) != entry["members"]:
            raise self._damaged(block, "members", entry["members"], len(members))
        try:
            ids: StoredIds = np.concatenate([member_ids(member, shard_set.layout) for member in members])
        except ValueError as error:
            raise self._damaged(block, "members of ids", f"like *.{shard_set.suffix}", error) from None
        if ids.size != entry["tokens"]:
            raise self._damaged(block, "tokens", entry["tokens"], ids.size)
        return ids

    def _raw(self, block: int) -> bytes:
        entry = self.shard_set.blocks[block]
        size, crc32 = int(entry["size"]), int(entry["crc32"])
        cached = self.disk.get(self.shard_set.fingerprint, block, size, crc32) if self.disk else None
        if cached is not None:
            self._count("data_cache_hits")
            return cached
        raw = self._fetched(block)
        for _ in range(FETCHES - 1):
            if len(raw) == size and zlib.crc32(raw) == crc32:
                break
            self._count("data_refetches")
            raw = self._fetched(block)
        if len(raw) != size:
            raise self._damaged(block, "bytes", size, len(raw))
        if (got := zlib.crc32(raw)) != crc32:
            raise self._damaged(block, "CRC32", f"{crc32:08x}", f"{got:08x}")
        if self.disk:
            self.disk.put(self.shard_set.fingerprint, block, raw)
        return raw

    def _fetched(self, block: int) -> bytes:
        entry = self.shard_set.blocks[block]
        name = self.shard_set.shards[int(entry["shard"])].name
        try:
            return self.fetch(name, int(entry["offset"]), int(entry["size"]))
        except FileNotFoundError:  # missing is not damaged: it is not passed over, and may be back
            rule = f"expected {int(entry['size'])} bytes at offset {int(entry['offset'])}; put the file back"
            raise UserError(f"{self.shard_set.store.place}/{name}: no such file, {rule}, or {PREPARE_AGAIN}") from None

    def _damaged(self, block: int, what: str, expected: object, got: object) -> DamagedBlockError:
        entry = self.shard_set.blocks[block]
        name = self.shard_set.shards[int(entry["shard"])].name
        place = f"{self.shard_set.store.place}/{name}, block at offset {int(entry['offset'])}"
        return DamagedBlockError(f"{place}: damaged: expected {what} {expected}, got {got}; {PREPARE_AGAIN}")

    def _count(self, name: str) -> None:
        if self.meter is not None:
            self.meter.add(name)


def _unpack(raw: bytes, shard: str, suffix: str) -> list[bytes]:
    """The members of a run of tar records, through webdataset's tar stage."""
    # Here, because webdataset imports torch where it is installed and preparing data must not wait for it.
    from webdataset.tariterators import group_by_keys, tar_file_expander

    check_tar(io.BytesIO(raw), len(raw))
    files = tar_file_expander([{"url": shard, "stream": io.BytesIO(raw)}])
    return [sample[suffix] for sample in group_by_keys(files) if suffix in sample]


Ids = npt.NDArray[np.unsignedinteger[Any]]

ID_FORMATS = ("u16", "u32", "npy")


def id_format(suffix: str) -> str:
    """Which of ID_FORMATS a member's suffix means (`tokens.npy` is npy); "" for none."""
    last = suffix.rpartition(".")[2]
    return last if last in ID_FORMATS else ""


def member_ids(content: bytes, layout: MemberLayout) -> Ids:
    """A member's ids; where it holds documents, with the EOD that closes the last.

    Raises:
        ValueError: not the format that the suffix says, or an id outside the vocabulary.
    """
    ids = stored_ids(content, layout)
    if layout.members == "documents" and (ids.size == 0 or ids[-1] != layout.eod):
        ids = np.append(ids, ids.dtype.type(layout.eod))
    return ids


def stored_ids(content: bytes, layout: MemberLayout) -> Ids:
    """The ids that are there; raises as `member_ids`."""
    match id_format(layout.suffix):
        case "npy":
            ids = _npy_ids(content)
        case name:
            ids = np.frombuffer(content, dtype=stored_dtype("u16" if name == "u16" else "u32"))
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < layout.vocab_size:
        raise ValueError(f"ids {ids.min()} to {ids.max()} leave the vocabulary [0, {layout.vocab_size})")
    return ids.astype(stored_dtype(layout.dtype), copy=False)


def _npy_ids(content: bytes) -> npt.NDArray[Any]:
    loaded = load_npy(content)
    if loaded.ndim != 1 or loaded.dtype.kind not in "iu":
        raise ValueError(f"{loaded.dtype} of shape {loaded.shape}; it must be integers in one dimension")
    return loaded
