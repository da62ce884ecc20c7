"""The data set on disk: tar shards of token ids, and the index that makes them addressable.

    DIR/index.json              version, dtype, eod, tokenizer, totals, one entry a shard, sha256 of index.npz
    DIR/index.npz               the blocks: what a reader fetches at once (columns of BLOCK_DTYPE)
    DIR/shard-00000.tar ...     plain tar; members 00000000.u16 (or .u32), little-endian ids

A member is whole documents end to end, each closed by EOD. A block is a run of whole members. Stock
`webdataset.WebDataset` reads the shards; the index adds random access, counts and checksums. The sha256
of index.json is the data set's fingerprint: a run resumes only on the data it began with.
The index is written last, so a directory without one holds no data set.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from megassm.data.filecache import read_known
from megassm.data.stores import LocalStore, Store
from megassm.data.tokenizer import Tokenizer
from megassm.data.transport import read_file
from megassm.durable import TEMPORARY_SUFFIX, commit, open_temporary, write_atomically
from megassm.errors import UserError

INDEX_VERSION = 1
INDEX_NAME = "index.json"
BLOCKS_NAME = "index.npz"
BLOCK_DTYPE = np.dtype(
    [
        ("shard", "<u4"),  # which of the shards
        ("offset", "<u8"),  # first byte in the shard
        ("size", "<u8"),  # bytes, tar headers and padding included
        ("tokens", "<u8"),
        ("members", "<u4"),
        ("crc32", "<u4"),  # of the `size` raw bytes
    ]
)
TAR_RECORD_BYTES = 512
FACTS = ("dtype", "eod", "vocab_size", "tokenizer", "tokenizer_sha256", "tokens", "documents", "text_bytes")
PREPARE_AGAIN = "prepare the data again (tools/prepare_data.py)"

TokenDtype = Literal["u16", "u32"]
Blocks = npt.NDArray[np.void]


@dataclass(frozen=True)
class ShardFile:
    """One shard as the index describes it."""

    name: str
    bytes: int
    sha256: str
    tokens: int
    documents: int


@dataclass(frozen=True, eq=False)
class ShardSet:
    """A data set: its index, read and checked. Tokens include each document's EOD; `text_bytes` do not."""

    store: Store
    fingerprint: str  # sha256 of index.json, which holds the sha256 of index.npz and of every shard
    dtype: TokenDtype
    eod: int
    vocab_size: int
    tokenizer: str
    tokenizer_sha256: str
    tokens: int
    documents: int
    text_bytes: int  # UTF-8
    shards: tuple[ShardFile, ...]
    blocks: Blocks  # structured, one element of BLOCK_DTYPE a block, in the order written

    @property
    def directory(self) -> Path:
        """Of a data set on this machine."""
        assert isinstance(self.store, LocalStore), f"{self.store.place} is not a folder"
        return self.store.directory

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Of the ids in the members."""
        return stored_dtype(self.dtype)


def token_dtype(vocab_size: int) -> TokenDtype:
    """The narrowest dtype that holds every id."""
    return "u16" if vocab_size <= 1 << 16 else "u32"


def stored_dtype(dtype: TokenDtype) -> np.dtype[Any]:
    """The numpy dtype of ids on disk: little-endian."""
    return np.dtype("<u2" if dtype == "u16" else "<u4")


def load_index(place: Path | Store) -> ShardSet:
    """Reads and checks a data set's index and, in a folder, that every shard is there with its size.

    UserError naming the file, what is wrong and the way out. Contents are checked as they are read.
    """
    store = LocalStore(place) if isinstance(place, Path) else place
    raw, index = _read_index_json(store)
    blocks = _read_blocks(store, str(index.get("blocks_sha256")))
    try:
        shards = tuple(ShardFile(**shard) for shard in index["shards"])
        facts = {name: index[name] for name in FACTS}
        fingerprint = hashlib.sha256(raw).hexdigest()
        shard_set = ShardSet(store=store, fingerprint=fingerprint, shards=shards, blocks=blocks, **facts)
        consistent = _is_consistent(shard_set)
    except (KeyError, TypeError) as error:
        raise _damaged_index(store, INDEX_NAME, f"missing or malformed entry: {error}") from None
    if not consistent:
        raise _damaged_index(store, INDEX_NAME, "its blocks, shards and totals disagree")
    if isinstance(store, LocalStore):
        _check_sizes(shard_set)
    return shard_set


def _read_index_json(store: Store) -> tuple[bytes, dict[str, Any]]:
    path = f"{store.place}/{INDEX_NAME}"
    try:
        raw = read_file(store, INDEX_NAME)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; make the data set with tools/prepare_data.py") from None
    try:
        index = json.loads(raw)
    except ValueError as error:
        raise _damaged_index(store, INDEX_NAME, f"not JSON: {error}") from None
    if not isinstance(index, dict):
        raise _damaged_index(store, INDEX_NAME, "not a JSON object")
    version = index.get("version")
    if version != INDEX_VERSION:
        rule = f"this program reads {INDEX_VERSION}"
        raise UserError(f"{path}: index version is {version}, {rule}; {PREPARE_AGAIN}")
    return raw, index


def _read_blocks(store: Store, expected_sha256: str) -> Blocks:
    try:
        raw = read_known(store, BLOCKS_NAME, expected_sha256)
    except FileNotFoundError:
        raise _damaged_index(store, BLOCKS_NAME, "no such file") from None
    sha256 = hashlib.sha256(raw).hexdigest()
    if sha256 != expected_sha256:
        raise _damaged_index(store, BLOCKS_NAME, f"sha256 {sha256}, {INDEX_NAME} says {expected_sha256}")
    with np.load(io.BytesIO(raw), allow_pickle=False) as columns:
        blocks = np.empty(len(columns["shard"]), dtype=BLOCK_DTYPE)
        for name in BLOCK_DTYPE.names or ():
            blocks[name] = columns[name]
    return blocks


def _is_consistent(shard_set: ShardSet) -> bool:
    blocks, shards = shard_set.blocks, shard_set.shards
    tokens_per_shard = np.zeros(len(shards), dtype=np.uint64)
    if np.any(blocks["shard"] >= len(shards)):
        return False
    np.add.at(tokens_per_shard, blocks["shard"], blocks["tokens"])
    return (
        tokens_per_shard.tolist() == [shard.tokens for shard in shards]
        and shard_set.tokens == sum(shard.tokens for shard in shards)
        and shard_set.documents == sum(shard.documents for shard in shards)
        and shard_set.dtype == token_dtype(shard_set.vocab_size)
        and 0 <= shard_set.eod < shard_set.vocab_size
    )


def _check_sizes(shard_set: ShardSet) -> None:
    """A missing or cut shard shows at the start of a run, not on its third day."""
    for shard in shard_set.shards:
        path = shard_set.directory / shard.name
        got = path.stat().st_size if path.is_file() else None
        if got != shard.bytes:
            what = "no such file" if got is None else f"the file ends at offset {got}"
            raise UserError(f"{path}: {what}, expected {shard.bytes} bytes from offset 0; {PREPARE_AGAIN}")


def _damaged_index(store: Store, name: str, what: str) -> UserError:
    return UserError(f"{store.place}/{name}: damaged index: {what}; {PREPARE_AGAIN}")


@dataclass(frozen=True)
class ShardSizes:
    """Tokens a shard, block and member are filled to. Each is exceeded by less than one of the next
    smaller (a member: by less than one document), never kept below."""

    shard_tokens: int = 1 << 28
    block_tokens: int = 1 << 20
    member_tokens: int = 1 << 20

    def __post_init__(self) -> None:
        for name in ("shard_tokens", "block_tokens", "member_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, it must be at least 1")


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
        self._open: _OpenShard | None = None
        self._shards: list[ShardFile] = []
        self._blocks: list[tuple[int, ...]] = []  # in the order of BLOCK_DTYPE

    def add(self, ids: npt.NDArray[Any], text_bytes: int) -> None:
        """Adds one document: its ids without EOD, and the UTF-8 bytes they stand for."""
        if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < self._tokenizer.vocab_size:
            limit = f"[0, {self._tokenizer.vocab_size})"
            raise UserError(f"{self.directory}: ids {ids.min()} to {ids.max()} leave the vocabulary {limit}")
        if self._open is None:
            self._open = _OpenShard(self.directory, len(self._shards))
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
        self._write_index()
        return load_index(self.directory)

    def _close_member(self, shard: _OpenShard) -> None:
        shard.write_member(f"{self._members:08d}.{self._dtype}", np.concatenate(self._member))
        self._members += 1
        self._member, self._member_tokens = [], 0
        if shard.block_tokens >= self._sizes.block_tokens:
            self._blocks.append(shard.close_block())
            if shard.tokens >= self._sizes.shard_tokens:
                self._close_shard(shard)

    def _close_shard(self, shard: _OpenShard) -> None:
        if shard.block_members:
            self._blocks.append(shard.close_block())
        self._shards.append(shard.close())
        self._open = None

    def _write_index(self) -> None:
        columns = np.array(self._blocks, dtype=BLOCK_DTYPE)
        by_name: dict[str, Any] = {name: columns[name] for name in BLOCK_DTYPE.names or ()}
        with open_temporary(self.directory / BLOCKS_NAME) as file:
            np.savez(file, **by_name)
            commit(file, self.directory / BLOCKS_NAME)
        index = {
            "version": INDEX_VERSION,
            "dtype": self._dtype,
            "eod": self._tokenizer.eod,
            "vocab_size": self._tokenizer.vocab_size,
            "tokenizer": self._tokenizer.name,
            "tokenizer_sha256": self._tokenizer.sha256,
            "tokens": sum(shard.tokens for shard in self._shards),
            "documents": self.documents,
            "text_bytes": self._text_bytes,
            "blocks_sha256": hashlib.sha256((self.directory / BLOCKS_NAME).read_bytes()).hexdigest(),
            "shards": [asdict(shard) for shard in self._shards],
        }
        write_atomically(self.directory / INDEX_NAME, json.dumps(index, indent=1).encode() + b"\n")

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._open is not None:
            self._open.file.close()


class _OpenShard:
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
