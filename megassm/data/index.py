"""The data set on disk: tar shards of token ids, and the index that makes them addressable.

    DIR/index.json              version, dtype, eod, tokenizer, totals, one entry a shard, sha256 of index.npz, checksum
    DIR/index.npz               the blocks: what a reader fetches at once (columns of BLOCK_DTYPE)
    DIR/shard-00000.tar ...     plain tar; members 00000000.u16 (or .u32), little-endian ids

A member is whole documents end to end, each closed by EOD. A block is a run of whole members. Stock
`webdataset.WebDataset` reads the shards; the index adds random access, counts and checksums. The sha256
of index.json is the data set's fingerprint: a run resumes only on the data it began with.
The index is written last, so a directory without one holds no data set. `shard_writer` writes our own;
`foreign` indexes shards made elsewhere, whose members `members` reads.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from pydantic import Field

from megassm.data.cache import read_known
from megassm.data.request import Store
from megassm.data.stores import LocalStore
from megassm.data.transport import read_file
from megassm.errors import UserError
from megassm.guarded import MAX_VOCABULARY, Described, check_inside, confined, load_columns, parse_json, validated

INDEX_VERSION = 2
READ_VERSIONS = (1, 2)
"""Of version 1, index.json has no checksum of its own."""
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
FACTS = ("dtype", "eod", "vocab_size", "tokenizer", "tokenizer_sha256", "tokens", "documents", "text_bytes")
PREPARE_AGAIN = "prepare the data again (tools/prepare_data.py)"

TokenDtype = Literal["u16", "u32"]
MemberKind = Literal["documents", "chunks"]
"""What a member of a shard holds: whole documents, the last one closed by EOD, which is added in reading where it is
not there; or ids as they are, so that a document may go on in the next member."""
Blocks = npt.NDArray[np.void]


Count = Annotated[int, Field(ge=0, le=2**62)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


@dataclass(frozen=True)
class ShardFile:
    """One shard as the index describes it."""

    name: str
    bytes: Count
    sha256: Sha256
    tokens: Count
    documents: Count


@dataclass(frozen=True)
class MemberLayout:
    """How to read the members that hold ids."""

    suffix: str
    members: MemberKind
    dtype: TokenDtype  # of the ids as they are read; in our own shards also as they are stored
    eod: int
    vocab_size: int


class IndexFacts(Described):
    """What index.json says."""

    dtype: TokenDtype
    eod: Count
    vocab_size: Annotated[int, Field(ge=1, le=MAX_VOCABULARY)]
    tokenizer: str
    tokenizer_sha256: str
    tokens: Count
    documents: Count
    text_bytes: Count
    blocks_sha256: Sha256
    shards: tuple[ShardFile, ...]
    suffix: Annotated[str, Field(max_length=100)] | None = None
    members: MemberKind = "documents"


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
    suffix: str  # see MemberLayout
    members: MemberKind

    @property
    def directory(self) -> Path:
        """Of a data set on this machine."""
        assert isinstance(self.store, LocalStore), f"{self.store.place} is not a folder"
        return self.store.directory

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        """Of the ids as they are read."""
        return stored_dtype(self.dtype)

    @property
    def layout(self) -> MemberLayout:
        return MemberLayout(self.suffix, self.members, self.dtype, self.eod, self.vocab_size)


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
    shard_set = read_index(place)
    if isinstance(shard_set.store, LocalStore):
        _check_sizes(shard_set)
    return shard_set


def read_index(place: Path | Store) -> ShardSet:
    """`load_index` without a look at the shards."""
    store = LocalStore(place) if isinstance(place, Path) else place
    raw, index = _read_index_json(store)
    facts = validated(IndexFacts, index, f"{store.place}/{INDEX_NAME}: damaged index", PREPARE_AGAIN)
    for shard in facts.shards:
        confined(shard.name, f"{store.place}/{INDEX_NAME}")
    blocks = _read_blocks(store, facts.blocks_sha256)
    try:
        shard_set = ShardSet(
            store=store,
            fingerprint=hashlib.sha256(raw).hexdigest(),
            shards=facts.shards,
            blocks=blocks,
            suffix=facts.suffix or facts.dtype,
            members=facts.members,
            **{name: getattr(facts, name) for name in FACTS},
        )
        consistent = _is_consistent(shard_set)
    except (KeyError, TypeError) as error:
        raise _damaged_index(store, INDEX_NAME, f"missing or malformed entry: {error}") from None
    if not consistent:
        raise _damaged_index(store, INDEX_NAME, "its blocks, shards and totals disagree")
    return shard_set


def _read_index_json(store: Store) -> tuple[bytes, dict[str, Any]]:
    path = f"{store.place}/{INDEX_NAME}"
    try:
        raw = read_file(store, INDEX_NAME)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; make the data set with tools/prepare_data.py") from None
    index = parse_json(raw, f"{path}: damaged index", PREPARE_AGAIN)
    if not isinstance(index, dict):
        raise _damaged_index(store, INDEX_NAME, "not a JSON object")
    version = index.get("version")
    if version not in READ_VERSIONS or isinstance(version, bool):
        rule = f"this program reads {' and '.join(map(str, READ_VERSIONS))}"
        raise UserError(f"{path}: index version is {version}, {rule}; {PREPARE_AGAIN}")
    if (version > 1 or "checksum" in index) and index.get("checksum") != index_checksum(index):
        raise _damaged_index(store, INDEX_NAME, "its own checksum is another")
    return raw, index


def index_checksum(index: Mapping[str, Any]) -> str:
    """SHA-256 over all that index.json says, but for the checksum."""
    said = {name: value for name, value in index.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _read_blocks(store: Store, expected_sha256: str) -> Blocks:
    try:
        raw = read_known(store, BLOCKS_NAME, expected_sha256)
    except FileNotFoundError:
        raise _damaged_index(store, BLOCKS_NAME, "no such file") from None
    sha256 = hashlib.sha256(raw).hexdigest()
    if sha256 != expected_sha256:
        raise _damaged_index(store, BLOCKS_NAME, f"sha256 {sha256}, {INDEX_NAME} says {expected_sha256}")
    dtypes = {name: BLOCK_DTYPE[name] for name in BLOCK_DTYPE.names or ()}
    columns = load_columns(raw, dtypes, f"{store.place}/{BLOCKS_NAME}: damaged index")
    blocks = np.empty(len(columns["shard"]), dtype=BLOCK_DTYPE)
    for name, values in columns.items():
        blocks[name] = values
    return blocks


def _is_consistent(shard_set: ShardSet) -> bool:
    blocks, shards = shard_set.blocks, shard_set.shards
    tokens_per_shard = np.zeros(len(shards), dtype=np.uint64)
    if np.any(blocks["shard"] >= len(shards)):
        return False
    np.add.at(tokens_per_shard, blocks["shard"], blocks["tokens"])
    return (
        _blocks_lie_in_shards(shard_set)
        and tokens_per_shard.tolist() == [shard.tokens for shard in shards]
        and shard_set.tokens == sum(shard.tokens for shard in shards)
        and shard_set.documents == sum(shard.documents for shard in shards)
        and shard_set.dtype == token_dtype(shard_set.vocab_size)
        and shard_set.members in get_args(MemberKind)
        and 0 <= shard_set.eod < shard_set.vocab_size
    )


def _blocks_lie_in_shards(shard_set: ShardSet) -> bool:
    """Whether every block is within its shard, and large enough for its ids."""
    blocks, suffix = shard_set.blocks, shard_set.suffix
    shard_bytes = np.array([shard.bytes for shard in shard_set.shards], dtype=np.uint64)[blocks["shard"]]
    room = shard_bytes - np.minimum(blocks["offset"], shard_bytes)
    width = {"u16": 2, "u32": 4}.get(suffix.rpartition(".")[2], 1)  # .npy: at least a byte an id
    added = blocks["members"] if shard_set.members == "documents" else 0  # ends of documents, where they are missing
    stored = np.maximum(blocks["tokens"], added) - added
    return bool(np.all(blocks["size"] <= room) and np.all(stored <= blocks["size"] // np.uint64(width)))


def _check_sizes(shard_set: ShardSet) -> None:
    """A missing or cut shard shows at the start of a run, not on its third day."""
    for shard in shard_set.shards:
        path = shard_set.directory / shard.name
        check_inside(path, shard_set.directory)
        got = path.stat().st_size if path.is_file() else None
        if got != shard.bytes:
            what = "no such file" if got is None else f"the file ends at offset {got}"
            back = "mount its folder, put it back, or " if got is None else ""
            raise UserError(f"{path}: {what}, expected {shard.bytes} bytes from offset 0; {back}{PREPARE_AGAIN}")


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
