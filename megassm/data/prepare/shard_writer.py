"""Writes data sets: shards as `shards` describes them, and the index that makes them one.

The bytes are a function of the documents, their order and the sizes.
"""

from __future__ import annotations

import hashlib
import json
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from megassm.data.index import (
    BLOCK_DTYPE,
    BLOCKS_NAME,
    INDEX_NAME,
    INDEX_VERSION,
    ShardFile,
    ShardSet,
    ShardSizes,
    index_checksum,
    load_index,
    stored_dtype,
    token_dtype,
)
from megassm.data.prepare.tar import TAR_RECORD_BYTES
from megassm.data.tokenizer.base import Tokenizer
from megassm.errors import UserError
from megassm.files import TEMPORARY_SUFFIX, commit, open_temporary, write_atomically


def write_index(
    directory: Path,
    tokenizer: Tokenizer,
    text_bytes: int,
    shards: Sequence[ShardFile],
    blocks: Sequence[tuple[int, ...]],
    layout: Mapping[str, str],
) -> None:
    """Writes index.npz and then index.json, with which the data set is there.

    `blocks` are rows of BLOCK_DTYPE; `layout` has `suffix` and `members` where they are not as in our own shards.
    """
    columns = np.array(blocks, dtype=BLOCK_DTYPE)
    by_name: dict[str, Any] = {name: columns[name] for name in BLOCK_DTYPE.names or ()}
    with open_temporary(directory / BLOCKS_NAME) as file:
        np.savez(file, **by_name)
        commit(file, directory / BLOCKS_NAME)
    index: dict[str, Any] = {
        "version": INDEX_VERSION,
        "dtype": token_dtype(tokenizer.vocab_size),
        "eod": tokenizer.eod,
        "vocab_size": tokenizer.vocab_size,
        "tokenizer": tokenizer.name,
        "tokenizer_sha256": tokenizer.sha256,
        "tokens": sum(shard.tokens for shard in shards),
        "documents": sum(shard.documents for shard in shards),
        "text_bytes": text_bytes,
        **layout,
        "blocks_sha256": hashlib.sha256((directory / BLOCKS_NAME).read_bytes()).hexdigest(),
        "shards": [asdict(shard) for shard in shards],
    }
    index["checksum"] = index_checksum(index)
    write_atomically(directory / INDEX_NAME, json.dumps(index, indent=1).encode() + b"\n")


class ShardWriter:
    """Writes one data set: `add` documents, then `finish`. A context manager.

    The bytes are a function of the documents, their order and the sizes. Leaving the `with` block
    without `finish`, or being killed, leaves no index; the next writer clears what was left.
    """

    def __init__(self, directory: Path, tokenizer: Tokenizer, sizes: ShardSizes | None = None) -> None:
        """UserError where `directory` holds a data set already."""
        if (directory / INDEX_NAME).exists():
            raise UserError(f"{directory}: holds a data set already; choose another directory or remove it")
        directory.mkdir(parents=True, exist_ok=True)
        for pattern in ("shard-*.tar", f"*{TEMPORARY_SUFFIX}", BLOCKS_NAME):
            for leftover in directory.glob(pattern):
                leftover.unlink()
        self.directory = directory
        self.documents = 0
        self._text_bytes = 0
        self._tokenizer = tokenizer
        self._sizes = sizes or ShardSizes()
        self._dtype = token_dtype(tokenizer.vocab_size)
        self._eod_ids = np.array([tokenizer.eod], dtype=stored_dtype(self._dtype))
        self._member: list[npt.NDArray[Any]] = []  # documents gathered for the next member
        self._member_tokens = 0
        self._members = 0
        self._open: OpenShard | None = None
        self._shards: list[ShardFile] = []
        self._blocks: list[tuple[int, ...]] = []  # in the order of BLOCK_DTYPE

    def add(self, ids: npt.NDArray[Any], text_bytes: int) -> None:
        """Adds one document: its ids without EOD, and the UTF-8 bytes they stand for."""
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self._tokenizer.vocab_size:
            limit = f"[0, {self._tokenizer.vocab_size})"
            raise UserError(f"{self.directory}: ids {ids.min()} to {ids.max()} leave the vocabulary {limit}")
        if self._open is None:
            self._open = OpenShard(self.directory, len(self._shards))
        self._member += [ids.astype(self._eod_ids.dtype, copy=False), self._eod_ids]
        self._member_tokens += ids.size + 1
        self._open.documents += 1
        self.documents += 1
        self._text_bytes += text_bytes
        if self._member_tokens >= self._sizes.member_tokens:
            self._close_member(self._open)

    def finish(self) -> ShardSet:
        """Writes what is pending and then the index; UserError where no document was added."""
        if self._open is not None:
            if self._member:
                self._close_member(self._open)
            if self._open is not None:
                self._close_shard(self._open)
        if not self._shards:
            raise UserError(f"{self.directory}: no document to write; give text that is not empty")
        write_index(self.directory, self._tokenizer, self._text_bytes, self._shards, self._blocks, {})
        return load_index(self.directory)

    def _close_member(self, shard: OpenShard) -> None:
        shard.write_member(f"{self._members:08d}.{self._dtype}", np.concatenate(self._member))
        self._members += 1
        self._member, self._member_tokens = [], 0
        if shard.block_tokens >= self._sizes.block_tokens:
            self._blocks.append(shard.close_block())
            if shard.tokens >= self._sizes.shard_tokens:
                self._close_shard(shard)

    def _close_shard(self, shard: OpenShard) -> None:
        if shard.block_members:
            self._blocks.append(shard.close_block())
        self._shards.append(shard.close())
        self._open = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open is not None:
            self._open.file.close()


class OpenShard:
    """A shard being written: its file and the running counts of it and of its last block."""

    def __init__(self, directory: Path, number: int) -> None:
        self.number = number
        self.path = directory / f"shard-{number:05d}.tar"
        self.file = open_temporary(self.path)
        self.sha256 = hashlib.sha256()
        self.bytes = self.tokens = self.documents = 0
        self.block_offset = self.block_tokens = self.block_members = self.block_crc32 = 0

    def write_member(self, name: str, ids: npt.NDArray[Any]) -> None:
        data = ids.tobytes()
        header = tarfile.TarInfo(name)  # times, owners: all zero or empty
        header.size = len(data)
        self._write(header.tobuf(tarfile.GNU_FORMAT))
        self._write(data)
        self._write(bytes(-len(data) % TAR_RECORD_BYTES))
        self.tokens += ids.size
        self.block_tokens += ids.size
        self.block_members += 1

    def close_block(self) -> tuple[int, ...]:
        """The block's row of the index; the next begins here."""
        size = self.bytes - self.block_offset
        counts = (self.block_tokens, self.block_members, self.block_crc32)
        row = (self.number, self.block_offset, size, *counts)
        self.block_offset = self.bytes
        self.block_tokens = self.block_members = self.block_crc32 = 0
        return row

    def close(self) -> ShardFile:
        self._write(bytes(2 * TAR_RECORD_BYTES))  # the end-of-archive mark, in no block
        commit(self.file, self.path)
        return ShardFile(self.path.name, self.bytes, self.sha256.hexdigest(), self.tokens, self.documents)

    def _write(self, data: bytes) -> None:
        self.file.write(data)
        self.sha256.update(data)
        self.block_crc32 = zlib.crc32(data, self.block_crc32)
        self.bytes += len(data)
