"""The middle of data preparation: tokenized parts on disk, so that a killed run loses little.

A part is a run of documents, and its name is a hash of their texts: whatever became of the input files or of the
options, a part that is made of the same texts is the same part, and is kept. Its rows are sorted by content, so that
copies of a text are neighbours; a copy's number among those of its part stands in `again`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megassm.data.index import stored_dtype, token_dtype
from megassm.data.prepare.ids import ID_DTYPE
from megassm.data.prepare.split import SidedPiece
from megassm.data.tokenizer.base import BytesTokenizer, Tokenizer, TokenizerSpec, load_tokenizer
from megassm.errors import UserError
from megassm.files import commit, open_temporary

Rows = npt.NDArray[np.void]
StoredIds = npt.NDArray[np.unsignedinteger[Any]]

MOST_PART_BYTES, LEAST_PART_BYTES = 16 << 20, 1 << 20
PARTS_AIMED_AT = 64  # of a small input: work for every process, and a killed run loses little
ENCODE_BYTES = 1 << 20  # tokenized at once: bounds the memory of a worker
GOES_ON = 0x9E3779B97F4A7C15
TRAIN_HASH, VALID_HASH = 2**64 - 1, 0  # in place of the split's hash where it is given
ROW_DTYPE = np.dtype(
    [
        ("high", "<u8"),  # 128 bits of the content; of a piece, of its document up to the piece's end
        ("low", "<u8"),
        ("split", "<u8"),  # hashed from the content alone, of a piece from its document's first
        ("tokens", "<u4"),  # with EOD
        ("text_bytes", "<u4"),
        ("again", "<u4"),  # rows of the same content before it in the part
        ("ends", "u1"),  # whether EOD follows; 0: the document goes on
    ]
)
ROW_BYTES = ROW_DTYPE.itemsize


class Part(NamedTuple):
    """Documents and pieces to be tokenized together. `rows` has neither `tokens` nor `again` yet."""

    rows: Rows
    contents: list[bytes]
    are_ids: bool  # the contents, not text; a part holds one or the other
    read_bytes: int  # of the input, up to the part's end

    @property
    def name(self) -> str:
        """Known by what is in it."""
        return blake2b(self.rows.tobytes(), digest_size=16).hexdigest()


def default_part_bytes(input_bytes: int) -> int:
    """A part's size for an input of this size."""
    return min(MOST_PART_BYTES, max(LEAST_PART_BYTES, input_bytes // PARTS_AIMED_AT))


def cut_parts(pieces: Iterable[SidedPiece], part_bytes: int, read_bytes: Callable[[], int]) -> Iterator[Part]:
    """Runs of pieces, each run with at least `part_bytes` of text but the last."""
    rows: list[tuple[int, ...]] = []
    contents: list[bytes] = []
    size, are_ids = 0, False
    hasher = blake2b(digest_size=16)
    first_low = 0

    def part() -> Part:
        return Part(np.array(rows, dtype=ROW_DTYPE), contents, are_ids, read_bytes())

    for (content, starts, ends, is_ids), side in pieces:
        if rows and is_ids != are_ids:
            yield part()
            rows, contents, size = [], [], 0
        are_ids = is_ids
        if starts:
            hasher = blake2b(digest_size=16, person=b"ids" if is_ids else b"")
        hasher.update(content)
        digest = (hasher if ends else hasher.copy()).digest()
        high, low = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
        high ^= 0 if ends else GOES_ON  # a document is not the beginning of a longer one
        first_low = low if starts else first_low
        split = {"train": TRAIN_HASH, "valid": VALID_HASH}.get(side, first_low)
        rows.append((high, low, split, 0, len(content), 0, ends))
        contents.append(content)
        size += len(content)
        if size >= part_bytes:
            yield part()
            rows, contents, size = [], [], 0
    if rows:
        yield part()


@dataclass(frozen=True)
class PartStore:
    """Parts in a directory, all of one tokenizer. A part exists once its rows' file does."""

    directory: Path
    tokenizer: TokenizerSpec
    tokenizer_sha256: str

    def has(self, name: str) -> bool:
        return self._rows_path(name).exists()

    def rows(self, name: str) -> Rows:
        """(rows,) of ROW_DTYPE, sorted by content; mapped from disk."""
        rows: Rows = np.load(self._rows_path(name), mmap_mode="r")
        return rows

    def ids(self, name: str) -> StoredIds:
        """Their ids end to end, EOD with them; mapped from disk."""
        ids: StoredIds = np.load(self._ids_path(name), mmap_mode="r")
        return ids

    def make(self, part: Part) -> None:
        """Tokenizes a part and stores it."""
        tokenizer = _tokenizer(self.tokenizer, self.tokenizer_sha256)
        rows, ids = tokenized(part, tokenizer)
        save_durably(self._ids_path(part.name), ids)
        save_durably(self._rows_path(part.name), rows)

    def remove(self, name: str) -> None:
        self._rows_path(name).unlink(missing_ok=True)
        self._ids_path(name).unlink(missing_ok=True)

    def _rows_path(self, name: str) -> Path:
        return self.directory / f"part-{name}.rows.npy"

    def _ids_path(self, name: str) -> Path:
        return self.directory / f"part-{name}.ids.npy"


@lru_cache(maxsize=1)
def _tokenizer(spec: TokenizerSpec, sha256: str) -> Tokenizer:
    """Of this process, loaded once. UserError where the file is another by now."""
    tokenizer = load_tokenizer(spec)
    if tokenizer.sha256 != sha256:
        raise UserError(f"tokenizer {spec.name}: was changed while it was in use; run the command again")
    return tokenizer


def tokenized(part: Part, tokenizer: Tokenizer) -> tuple[Rows, StoredIds]:
    """(rows, ids) of a part, sorted by content; copies in the order in which they were read."""
    stored = stored_dtype(token_dtype(tokenizer.vocab_size))
    rows = part.rows.copy()
    if part.are_ids:
        flat, lengths = _given_ids(part, tokenizer)
        rows["text_bytes"] = _bytes_in(flat, lengths, tokenizer)
    else:
        batches = [_encoded(batch, tokenizer) for batch in _batches(part.contents)]
        flat = np.concatenate([ids for ids, _ in batches])
        lengths = np.concatenate([lengths for _, lengths in batches])
    flat = flat.astype(stored, copy=False)
    rows["tokens"] = lengths + rows["ends"]
    order = np.lexsort((rows["low"], rows["high"]))
    starts = np.cumsum(lengths) - lengths
    eod = np.array([tokenizer.eod], dtype=stored)
    ends, slices = rows["ends"].astype(bool).tolist(), list(zip(starts.tolist(), lengths.tolist(), strict=True))
    pieces: list[StoredIds] = []
    for row in order.tolist():
        start, length = slices[row]
        pieces.append(flat[start : start + length])
        if ends[row]:
            pieces.append(eod)
    rows = rows[order]
    rows["again"] = numbers_in_runs(same_as_before(rows))
    return rows, np.concatenate(pieces)


Encoded = tuple[StoredIds, npt.NDArray[np.int64]]
"""(ids end to end, how many each text has)."""


def _encoded(batch: list[bytes], tokenizer: Tokenizer) -> Encoded:
    if isinstance(tokenizer, BytesTokenizer):  # its ids are there already
        return np.frombuffer(b"".join(batch), dtype=np.uint8), np.fromiter(map(len, batch), np.int64, len(batch))
    encoded = tokenizer.encode([content.decode() for content in batch])
    ids = np.concatenate(encoded)
    _check_vocabulary(ids, tokenizer)
    stored: StoredIds = ids.astype(stored_dtype(token_dtype(tokenizer.vocab_size)))
    return stored, np.array([one.size for one in encoded], dtype=np.int64)


def _given_ids(part: Part, tokenizer: Tokenizer) -> Encoded:
    ids = np.frombuffer(b"".join(part.contents), dtype=ID_DTYPE)
    _check_vocabulary(ids, tokenizer)
    return ids, np.fromiter(map(len, part.contents), np.int64, len(part.contents)) // ID_DTYPE.itemsize


def _check_vocabulary(ids: npt.NDArray[Any], tokenizer: Tokenizer) -> None:
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < tokenizer.vocab_size:
        limit = f"[0, {tokenizer.vocab_size})"
        raise UserError(f"tokenizer {tokenizer.name}: ids {ids.min()} to {ids.max()} leave its vocabulary {limit}")


def _bytes_in(ids: StoredIds, lengths: npt.NDArray[np.int64], tokenizer: Tokenizer) -> npt.NDArray[np.int64]:
    """(texts,) the UTF-8 bytes that the ids of each stand for."""
    sums = np.concatenate([[0], np.cumsum(tokenizer.token_bytes()[ids])])
    stops = np.cumsum(lengths)
    found: npt.NDArray[np.int64] = sums[stops] - sums[stops - lengths]
    return found


def _batches(contents: list[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for content in contents:
        batch.append(content)
        size += len(content)
        if size >= ENCODE_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def same_as_before(rows: Rows) -> npt.NDArray[np.bool_]:
    """(rows,) whether a row has the content of the row before it."""
    same = np.zeros(len(rows), dtype=bool)
    same[1:] = (rows["high"][1:] == rows["high"][:-1]) & (rows["low"][1:] == rows["low"][:-1])
    return same


def numbers_in_runs(same: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """0, 1, 2 ... within each run that begins where `same` is False."""
    places = np.arange(len(same))
    begins = np.maximum.accumulate(np.where(same, 0, places)) if len(same) else places
    return places - begins


def save_durably(path: Path, array: npt.NDArray[Any]) -> None:
    """An .npy file that is whole or not there, also where two processes make the same."""
    with open_temporary(path.with_name(f"{path.name}.{os.getpid()}")) as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(np.ascontiguousarray(array).data if array.size else b"")
        commit(file, path)
