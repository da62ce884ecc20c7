"""Files of nothing but token ids: what nanoGPT, llm.c and Megatron-LM write.

    flat         ids end to end, 16, 32 or 64 bits wide, little-endian: nothing tells them from other bytes, so that
                 `--format u16`, `u32` or `i64` must
    llm.c        the same after 256 numbers of 32 bits: magic number, version, how many ids
    megatron     X.bin is flat, and X.idx says how wide, how long each sequence is, and which begin a document:
                 "MMIDIDX\\0\\0", version (8 bytes), kind of number (1), sequences (8), documents + 1 (8); then of each
                 sequence its ids (4) and its first byte in X.bin (8), and of each document its first sequence (8)

Memory: a run of ids, and of Megatron's index a run of its documents.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple, get_args

import numpy as np
import numpy.typing as npt

from megassm.data.prepare.ids import PIECE_IDS, IdRun
from megassm.errors import UserError

FlatKind = Literal["u16", "u32", "i64"]
FLAT_DTYPES: dict[str, np.dtype[Any]] = {"u16": np.dtype("<u2"), "u32": np.dtype("<u4"), "i64": np.dtype("<i8")}
LLM_C_HEADER_BYTES = 1024
LLM_C_DTYPES: dict[tuple[int, int], np.dtype[Any]] = {(20240520, 1): np.dtype("<u2"), (20240801, 7): np.dtype("<u4")}
MEGATRON_MARK, OLD_MEGATRON_MARK = b"MMIDIDX\0\0", b"TNTIDX\0\0"
MEGATRON_HEAD = struct.Struct("<9sQBQQ")
MEGATRON_DTYPES: dict[int, np.dtype[Any]] = {
    code: np.dtype(name) for code, name in {1: "u1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}.items()
}
DOCUMENTS_AT_ONCE = 1 << 16
AGAIN = "fetch or make the file again"


def token_kind(path: Path, forced: str) -> FlatKind | Literal["llm.c", "megatron"] | None:
    """Which of these a file is, by what it begins with and what lies beside it; None: none of them.

    Raises:
        UserError: an index of the old kind lies beside it.
        OSError: it cannot be read.
    """
    index = path.with_suffix(".idx")
    if path.suffix == ".bin" and index.is_file():
        with open(index, "rb") as file:
            head = file.read(len(MEGATRON_MARK))
        if head == MEGATRON_MARK:
            return "megatron"
        if head.startswith(OLD_MEGATRON_MARK):
            rule = "its index is of the kind that Megatron-LM called lazy or cached"
            raise UserError(f"{path}: {rule}; write it again with preprocess_data.py --dataset-impl mmap")
    with open(path, "rb") as file:
        head = file.read(8)
    if len(head) == 8 and struct.unpack("<ii", head) in LLM_C_DTYPES:
        return "llm.c"
    return next((kind for kind in get_args(FlatKind) if kind == forced), None)


def runs_of_file(path: Path, kind: str) -> Iterator[IdRun]:
    """The ids of a file. UserError where it is cut, or its index does not fit it."""
    with open(path, "rb") as file:
        match kind:
            case "megatron":
                with open(path.with_suffix(".idx"), "rb") as index:
                    yield from _Megatron(path, file, index).runs()
            case "llm.c":
                yield from _llm_c(path, file)
            case _:
                yield from _flat(path, file, FLAT_DTYPES[kind], path.stat().st_size)


def _flat(path: Path, file: IO[bytes], dtype: np.dtype[Any], size: int) -> Iterator[IdRun]:
    if size % dtype.itemsize:
        rule = f"{size} bytes are no whole number of ids of {dtype.itemsize} bytes"
        raise UserError(f"{path}: {rule}; give the --format it is in, or {AGAIN}")
    while raw := file.read(PIECE_IDS * dtype.itemsize):
        yield IdRun(np.frombuffer(raw, dtype=dtype), file.tell())


def _llm_c(path: Path, file: IO[bytes]) -> Iterator[IdRun]:
    head = file.read(LLM_C_HEADER_BYTES)
    magic, version, count = struct.unpack("<iiI", head[:12].ljust(12, b"\0"))
    dtype = LLM_C_DTYPES[magic, version]
    size = path.stat().st_size - LLM_C_HEADER_BYTES
    if size != count * dtype.itemsize:
        rule = f"its header says {count} ids of {dtype.itemsize} bytes, and {max(0, size)} bytes follow"
        raise UserError(f"{path}: {rule}; {AGAIN}")
    yield from _flat(path, file, dtype, size)


class _Sequences(NamedTuple):
    """Where things stand in an index of Megatron-LM."""

    dtype: np.dtype[Any]
    sequences: int
    documents: int  # and one more
    lengths: int  # the offset in the index of each list
    firsts: int
    begins: int


class _Megatron:
    def __init__(self, path: Path, file: IO[bytes], index: IO[bytes]) -> None:
        self._path, self._file, self._index = path, file, index
        self._place = path.with_suffix(".idx")
        self._facts = self._read_head()

    def runs(self) -> Iterator[IdRun]:
        """The ids, with the ends of their documents."""
        size, dtype = self._path.stat().st_size, self._facts.dtype
        ends, first = self._ends(), 0
        waiting = next(ends, None)
        for run in _flat(self._path, self._file, dtype, size):
            stop, found = first + run.ids.size, []
            while waiting is not None and waiting.size and waiting[0] <= stop:
                within = int(np.searchsorted(waiting, stop, side="right"))
                found.append(waiting[:within] - first)
                waiting = waiting[within:] if within < waiting.size else next(ends, None)
            yield run._replace(ends=np.concatenate(found)) if found else run
            first = stop

    def _read_head(self) -> _Sequences:
        head = self._index.read(MEGATRON_HEAD.size)
        if len(head) < MEGATRON_HEAD.size:
            raise self._damaged("is cut short")
        _, version, code, count, documents = MEGATRON_HEAD.unpack(head)
        if version != 1 or code not in MEGATRON_DTYPES or documents < 1:
            raise self._damaged(
                f"version {version}, numbers of kind {code} and {documents} places of documents, which is not read"
            )
        firsts = MEGATRON_HEAD.size + 4 * count
        begins = firsts + 8 * count
        needed, size = begins + 8 * documents, self._place.stat().st_size
        if size not in (needed, needed + count):  # a byte a sequence follows where it has a mode
            raise self._damaged(
                f"{size} bytes, {needed} are expected for {count} sequences in {documents - 1} documents"
            )
        facts = _Sequences(MEGATRON_DTYPES[code], count, documents, MEGATRON_HEAD.size, firsts, begins)
        self._check_sequences(facts)
        return facts

    def _check_sequences(self, facts: _Sequences) -> None:
        """That they stand end to end, and fill X.bin."""
        expected, width = 0, facts.dtype.itemsize
        for start in range(0, facts.sequences, DOCUMENTS_AT_ONCE):
            count = min(DOCUMENTS_AT_ONCE, facts.sequences - start)
            lengths = self._read(facts.lengths + 4 * start, "<i4", count).astype(np.int64)
            firsts = self._read(facts.firsts + 8 * start, "<i8", count)
            stops = expected + np.cumsum(lengths) * width
            if lengths.min() < 0 or not np.array_equal(firsts, stops - lengths * width):
                raise self._damaged(f"the sequences from {start} on do not stand end to end")
            expected = int(stops[-1])
        size = self._path.stat().st_size
        if size != expected:
            raise self._damaged(f"{expected} bytes of ids, and {self._path.name} holds {size}")

    def _ends(self) -> Iterator[npt.NDArray[np.int64]]:
        """Ids before the end of each document, in runs of documents."""
        facts, before = self._facts, 0
        if self._read(facts.begins, "<i8", 1)[0] != 0:
            raise self._damaged("the first document does not begin with the first sequence")
        for start in range(1, facts.documents, DOCUMENTS_AT_ONCE):
            count = min(DOCUMENTS_AT_ONCE, facts.documents - start)
            sequences = self._read(facts.begins + 8 * start, "<i8", count)
            if sequences[0] < before or np.any(np.diff(sequences) < 0) or sequences[-1] > facts.sequences:
                raise self._damaged(f"the documents from {start - 1} on are not in order")
            stop = int(sequences[-1])
            lengths = self._read(facts.lengths + 4 * before, "<i4", stop - before).astype(np.int64)
            offset = self._first(before)
            ends = offset + np.concatenate([[0], np.cumsum(lengths)])
            yield ends[sequences - before]
            before = stop
        if before != facts.sequences:
            raise self._damaged(f"{facts.sequences - before} sequences are in no document")

    def _first(self, sequence: int) -> int:
        """Ids before a sequence."""
        if sequence == self._facts.sequences:
            return self._path.stat().st_size // self._facts.dtype.itemsize
        [first] = self._read(self._facts.firsts + 8 * sequence, "<i8", 1).tolist()
        return int(first) // self._facts.dtype.itemsize

    def _read(self, offset: int, dtype: str, count: int) -> npt.NDArray[Any]:
        self._index.seek(offset)
        raw = self._index.read(np.dtype(dtype).itemsize * count)
        return np.frombuffer(raw, dtype=dtype, count=count)

    def _damaged(self, what: str) -> UserError:
        return UserError(f"{self._place}: damaged index: {what}; {AGAIN}")
