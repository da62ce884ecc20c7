"""Shards of samples with columns: what MosaicML's streaming (MDS) and Lightning's litdata write.

Both begin with how many samples there are and where each begins and the last ends, 32 bits each. Of MDS a JSON text
follows that names the columns; of litdata that stands in the index.json beside the shards, which `shard_lists` reads.
A sample is the sizes of its columns that have no fixed one, 32 bits each, and then the columns. Where litdata wrote
for its TokensLoader, it is ids and nothing else.

A column of text is a document a sample. One of ids is that too, or, with `--samples chunks`, the next stretch of a
stream in which documents end where the tokenizer's end of document stands. Memory: one sample, and the list of all.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from megassm.data.prepare.ids import IdFacts, IdRun, Ids, documents_of_ids, id_facts, runs_of
from megassm.data.prepare.records import MOST_RECORD_BYTES, RawDocument, too_long
from megassm.data.prepare.token_files import AGAIN, FLAT_DTYPES
from megassm.errors import UserError
from megassm.guarded import parse_json

MOST_SAMPLES = 1 << 24  # of one shard
MDS_DTYPES = {8: "u1", 9: "i1", 16: "<u2", 17: "<i2", 32: "<u4", 33: "<i4", 64: "<u8", 65: "<i8"}
TORCH_DTYPES = {11: "u1", 12: "i1", 13: "<i2", 14: "<i2", 15: "<i4", 16: "<i4", 17: "<i8", 18: "<i8", 20: "<u2"}
NO_NAMES = ("",)  # of the one column of samples that are no dict
NUMPY_DTYPES = {0: "i1", 1: "<i2", 2: "<i4", 3: "<i8", 4: "u1", 5: "<u2", 6: "<u4", 7: "<u8"}


class Column(NamedTuple):
    """How a column is read: as ids, or, where there is nothing to read them with, as UTF-8."""

    ids: Callable[[bytes], Ids] | None = None  # ValueError where they are none


class Columns(NamedTuple):
    """What a sample holds, in its order."""

    names: tuple[str, ...]
    encodings: tuple[str, ...]
    sizes: tuple[int | None, ...]  # None: of each sample its own
    has_sizes: bool = True  # False: a sample is its one column

    def cut(self, sample: bytes, column: int) -> bytes:
        """One column of a sample. ValueError where the sizes do not fit it."""
        if not self.has_sizes:
            return sample
        own = sum(size is None for size in self.sizes)
        if len(sample) < 4 * own:
            raise ValueError(f"{len(sample)} bytes, which do not hold the sizes of its columns")
        given = iter(struct.unpack_from(f"<{own}I", sample))
        sizes = [next(given) if size is None else size for size in self.sizes]
        if 4 * own + sum(sizes) != len(sample):
            raise ValueError(f"{len(sample)} bytes, and its columns have {4 * own + sum(sizes)}")
        start = 4 * own + sum(sizes[:column])
        return sample[start : start + sizes[column]]


class Wanted(NamedTuple):
    """What is asked of a shard."""

    field: str
    bytes_are: str  # a key of FLAT_DTYPES: what bytes hold; else they are text
    chunks: bool  # whether documents of ids go on in the next sample
    facts: IdFacts | None


def documents_of_mds(path: Path, stream: io.BufferedReader, raw: IO[bytes], wanted: Wanted) -> Iterator[RawDocument]:
    """The documents of a shard of MDS. UserError where it is damaged, or has no such column."""
    offsets = _offsets(path, stream)
    size = offsets[0] - 4 * (len(offsets) + 1)
    if not 0 < size <= MOST_RECORD_BYTES:
        raise _damaged(path, "its first sample is not where its columns end")
    head = parse_json(_exactly(path, stream, size), f"{path}: damaged shard", AGAIN)
    try:
        names, encodings = (tuple(map(str, head[f"column_{name}"])) for name in ("names", "encodings"))
        sizes = tuple(None if size is None else int(size) for size in head["column_sizes"])
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(path, f"its list of columns: {error!r}") from None
    if not len(names) == len(encodings) == len(sizes) or any(size is not None and size < 1 for size in sizes):
        raise _damaged(path, "its list of columns is not one")
    columns = Columns(names, encodings, sizes)
    number = _place_of(path, columns, wanted.field)
    column = _mds_column(encodings[number], wanted.bytes_are)
    yield from _documents(path, raw, _contents(path, stream, offsets, columns, number), column, wanted)


def documents_of_litdata(
    path: Path, stream: io.BufferedReader, raw: IO[bytes], columns: Columns, samples: int, wanted: Wanted
) -> Iterator[RawDocument]:
    """The same of a chunk of litdata, whose index says what its columns and how many its samples are."""
    offsets = _offsets(path, stream)
    if len(offsets) != samples + 1:
        raise _damaged(path, f"{len(offsets) - 1} samples, and the index.json beside it says {samples}")
    if offsets[0] != 4 * (len(offsets) + 1):
        raise _damaged(path, "its first sample does not follow its head")
    number = _place_of(path, columns, wanted.field)
    column = _litdata_column(columns.encodings[number], wanted.bytes_are)
    yield from _documents(path, raw, _contents(path, stream, offsets, columns, number), column, wanted)


def _documents(
    path: Path, raw: IO[bytes], contents: Iterator[tuple[int, bytes]], column: Column | None, wanted: Wanted
) -> Iterator[RawDocument]:
    if column is None:
        rule = f"column {wanted.field!r} must hold text or whole numbers, and holds something else"
        raise UserError(f"{path}: {rule}; pass another --text-field")
    if column.ids is None:
        for sample, content in contents:
            yield RawDocument(f"{path}: sample {sample}", content, raw.tell(), within=" of the text")
        return
    read, facts = column.ids, id_facts(path, wanted.facts)

    def runs() -> Iterator[IdRun]:
        for sample, content in contents:
            try:
                ids = read(content)
            except ValueError as error:
                raise _damaged(path, f"sample {sample}: {error}") from None
            if not wanted.chunks and ids.size and ids[-1] != facts.eod and np.any(ids == facts.eod):
                rule = "holds an end of document, and does not end with one"
                way_out = "pass --samples chunks if documents go on in the next sample"
                raise UserError(f"{path}: sample {sample}: {rule}; {way_out}")
            yield from runs_of(ids, raw.tell(), not wanted.chunks)

    yield from documents_of_ids(path, runs(), facts)


def _contents(
    path: Path, stream: io.BufferedReader, offsets: list[int], columns: Columns, column: int
) -> Iterator[tuple[int, bytes]]:
    """(number, the column) of every sample."""
    for number, (start, stop) in enumerate(pairwise(offsets), start=1):
        if stop - start > MOST_RECORD_BYTES:
            raise too_long(f"{path}: sample {number}")
        try:
            yield number, columns.cut(_exactly(path, stream, stop - start), column)
        except ValueError as error:
            raise _damaged(path, f"sample {number}: {error}") from None
    if stream.read(1):
        raise _damaged(path, "something follows its last sample")


def _offsets(path: Path, stream: io.BufferedReader) -> list[int]:
    """Where each sample begins, and where the last ends."""
    [samples] = struct.unpack("<I", _exactly(path, stream, 4))
    if not 0 < samples <= MOST_SAMPLES:
        raise _damaged(path, f"{samples} samples; a shard holds 1 to {MOST_SAMPLES}")
    offsets = np.frombuffer(_exactly(path, stream, 4 * (samples + 1)), dtype="<u4").astype(np.int64)
    if np.any(np.diff(offsets) < 0):
        raise _damaged(path, "its samples are not in order")
    found: list[int] = offsets.tolist()
    return found


def _exactly(path: Path, stream: io.BufferedReader, size: int) -> bytes:
    content = stream.read(size)
    if len(content) != size:
        raise _damaged(path, "it is cut short")
    return content


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: damaged shard: {what}; {AGAIN}")


def _place_of(path: Path, columns: Columns, field: str) -> int:
    if columns.names == NO_NAMES:
        return 0
    if columns.names.count(field) != 1:
        found = ", ".join(columns.names)
        raise UserError(f"{path}: no column {field!r}; pass --text-field (columns here: {found})")
    return columns.names.index(field)


def _mds_column(encoding: str, bytes_are: str) -> Column | None:
    kind, _, rest = encoding.partition(":")
    if kind in ("str", "bytes"):
        return Column() if kind == "str" else _bytes_column(bytes_are)
    if kind != "ndarray":
        return None
    name, _, shape = rest.partition(":")
    if name and not name.removeprefix("u").startswith("int"):
        return None

    def ids(content: bytes) -> Ids:
        try:
            dtype = np.dtype(name or MDS_DTYPES[content[0]]).newbyteorder("<")
            start = 0 if name else 1
            if not shape:
                count, width = divmod(content[start], 4)
                start += 1 + count * (1 << width)
        except (KeyError, IndexError, TypeError):
            raise ValueError("no array of whole numbers") from None
        return np.frombuffer(content[start:], dtype=dtype)

    return Column(ids)


def _litdata_column(encoding: str, bytes_are: str) -> Column | None:
    kind, _, code = encoding.partition(":")
    if kind in ("str", "text", "bytes"):
        return _bytes_column(bytes_are) if kind == "bytes" else Column()
    codes: dict[int, str] | None = {"tensor": TORCH_DTYPES, "numpy": NUMPY_DTYPES}.get(kind.removeprefix("no_header_"))
    if codes is None:
        return None
    if kind.startswith("no_header_"):
        plain = codes.get(int(code)) if code.isdecimal() else None
        return None if plain is None else Column(lambda content: np.frombuffer(content, dtype=np.dtype(plain)))
    head = struct.Struct(">II" if kind == "tensor" else "<II")

    def ids(content: bytes) -> Ids:
        try:
            number, axes = head.unpack_from(content)
            return np.frombuffer(content[head.size + 4 * axes :], dtype=codes[number])
        except (KeyError, struct.error):
            raise ValueError("no array of whole numbers") from None

    return Column(ids)


def _bytes_column(bytes_are: str) -> Column:
    dtype = FLAT_DTYPES.get(bytes_are)
    return Column() if dtype is None else Column(lambda content: np.frombuffer(content, dtype=dtype))
