"""How much a Parquet or Arrow file unpacks to, seen before it is unpacked: a few hundred bytes may say gigabytes.

What a Parquet file's footer says of its sizes is believed.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import IO, Any

from megassm.data.prepare.records import MOST_RECORD_BYTES, too_long
from megassm.errors import UserError

BATCH_ROWS = 64
BATCH_BYTES = 1 << 24
"""Of texts that are unpacked together, about."""
LEAST_BYTES, EXPANSION = 1 << 28, 100
"""What unpacks to more than so many bytes and so many times its size is refused; texts shrink to a third, tables of
numbers to a tenth."""
NESTED_ROWS = 4
"""Where it cannot be told how long a text of a dictionary is."""
CONTINUES = b"\xff\xff\xff\xff"
DICTIONARY_BATCH, RECORD_BATCH = 2, 3
"""Messages of Arrow with a body."""


def parquet_rows(path: Path, metadata: Any, group: int, field: str) -> int:
    """How many texts of a row group may be unpacked together.

    A row group is asked for its own figures only: pyarrow ends the process where those of a column are damaged.

    Raises:
        UserError: it is too large for what it takes in the file.
    """
    found = metadata.row_group(group)
    unpacked = int(found.total_byte_size)  # of all columns
    _check(f"{path}: row group {group}", unpacked, path.stat().st_size)
    rows = _together(unpacked // max(1, int(found.num_rows)))
    if rows * unpacked <= BATCH_BYTES:
        return rows
    longest = _longest_known(path, group, field)
    return NESTED_ROWS if longest is None else min(rows, _together(longest))


def _together(text_bytes: int) -> int:
    return max(1, min(BATCH_ROWS, BATCH_BYTES // max(1, text_bytes)))


def check_lengths(column: Any, place: str) -> None:
    """UserError if a text of an unpacked column is longer than a record may be."""
    from pyarrow import compute

    if len(column) and (compute.max(compute.binary_length(column)).as_py() or 0) > MOST_RECORD_BYTES:
        raise too_long(place)


def check_arrow(path: Path, file: IO[bytes]) -> None:
    """Walks the messages of an Arrow file or stream; the file is at its beginning afterwards.

    Raises:
        UserError: a batch is packed, and unpacks to too much.
    """
    place, size = 0 if file.read(4) == CONTINUES else 8, path.stat().st_size
    while place + 8 <= size:
        file.seek(place)
        head = file.read(8)
        long = head.startswith(CONTINUES)
        length = struct.unpack("<i", head[4:] if long else head[:4])[0]
        start = place + (8 if long else 4)
        if not 0 < length <= size - start:
            break  # the end, or nothing that Arrow would read
        file.seek(start)
        message = file.read(length)
        try:
            unpacked, body = _unpacked_bytes(message, file, start + length)
        except (struct.error, IndexError):
            break
        _check(f"{path}: the batch at byte {place}", unpacked, body)
        place = start + length + max(0, body)
    file.seek(0)


def _check(place: str, unpacked: int, packed: int) -> None:
    if unpacked > LEAST_BYTES and unpacked > EXPANSION * packed:
        rule = f"unpacks to {unpacked:,} bytes, more than {EXPANSION} times its {packed:,}"
        raise UserError(f"{place}: {rule}; give its texts as JSON lines")


def _longest_known(path: Path, group: int, field: str) -> int | None:
    """Bytes of the longest text in a row group's dictionary, or of the first where there is no dictionary; None where
    it is not given as one."""
    import pyarrow
    from pyarrow import compute, parquet

    with open(path, "rb") as raw, parquet.ParquetFile(raw, pre_buffer=False, read_dictionary=[field]) as opened:
        for batch in opened.iter_batches(1, row_groups=[group], columns=[field]):
            column = batch.column(0)
            if not isinstance(column, pyarrow.DictionaryArray):
                return None
            return int(compute.max(compute.binary_length(column.dictionary)).as_py() or 0)
    return 0


def _unpacked_bytes(message: bytes, file: IO[bytes], body_at: int) -> tuple[int, int]:
    """(bytes of a message's body once unpacked, and in the file), by the flatbuffers of Arrow's Message.fbs."""
    root = _Table(message, struct.unpack_from("<I", message)[0])
    body = root.number(3, "<q")
    kind = root.number(1, "<B")
    if kind not in (DICTIONARY_BATCH, RECORD_BATCH):
        return 0, body
    batch = root.table(2) if kind == RECORD_BATCH else root.table(2).table(1)
    if not batch.place(3):  # not packed
        return 0, body
    buffers = batch.reference(2)
    unpacked = 0
    for number in range(struct.unpack_from("<I", message, buffers)[0]):
        offset, length = struct.unpack_from("<qq", message, buffers + 4 + 16 * number)
        if length >= 8:
            file.seek(body_at + max(0, offset))
            unpacked += max(length, struct.unpack("<q", file.read(8))[0])
    return unpacked, body


class _Table:
    """A table of flatbuffers: where its fields are is told by another, before it."""

    def __init__(self, raw: bytes, start: int) -> None:
        self._raw, self._start = raw, start
        self._fields = start - struct.unpack_from("<i", raw, start)[0]

    def place(self, field: int) -> int:
        """Where a field is; 0 where it has its default."""
        entry = 4 + 2 * field
        if self._fields < 0 or entry >= struct.unpack_from("<H", self._raw, self._fields)[0]:
            return 0
        offset: int = struct.unpack_from("<H", self._raw, self._fields + entry)[0]
        return self._start + offset if offset else 0

    def number(self, field: int, form: str) -> int:
        place = self.place(field)
        return int(struct.unpack_from(form, self._raw, place)[0]) if place else 0

    def reference(self, field: int) -> int:
        place = self.place(field)
        if not place:
            raise IndexError(field)
        return place + int(struct.unpack_from("<I", self._raw, place)[0])

    def table(self, field: int) -> _Table:
        return _Table(self._raw, self.reference(field))
