"""metrics.jsonl and events.jsonl, one record a line: a full disk loses none of them. `megassm.run.lines` reads them.

Needs no torch.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Annotated, Required

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from megassm.files import commit, open_given, open_own, open_temporary
from megassm.guarded import LINE_BYTES
from megassm.run.directory import METRICS
from megassm.run.lines import Record, Unread, line_number, read_line, read_lines

WAITING_BYTES = 64 * 2**20
"""Records kept in memory at most while they cannot be written; about 100,000."""

COPIED_BYTES = 2**24
BLOCK_BYTES = 2**18
"""What is read at a time of a file that is read from its end."""

Count = Annotated[int, Field(ge=0, le=2**62)]
Figure = Annotated[float, Field(ge=-1e30, le=1e30)] | None
ByBudget = dict[Annotated[str, Field(pattern="^[0-9]{1,6}$")], Figure]
Seconds = Annotated[
    dict[Annotated[str, Field(max_length=60)], Annotated[float, Field(ge=0, le=1e12)]], Field(max_length=50)
]


class KnownFigures(TypedDict, total=False):
    """Those of a record that views, `resume` and tools compute with."""

    step: Required[Annotated[int, Field(ge=1, le=2**53)]]
    tokens: Count
    loss: Figure
    bits_per_byte: Figure
    grad_norm: Figure
    lr: Figure
    tokens_per_s: Figure
    mfu: Figure
    step_s: Annotated[float, Field(ge=0, le=1e12)] | None
    data_wait_s: Figure
    k: Count
    skipped: bool
    peak_memory_bytes: Count | None
    data_reconnects: Count
    data_refetches: Count
    data_masked_samples: Count
    valid: Annotated[ByBudget, Field(max_length=1000)]
    valid_loss: Annotated[ByBudget, Field(max_length=1000)]
    valid_accuracy: Annotated[ByBudget, Field(max_length=1000)]
    valid_error: Annotated[ByBudget, Field(max_length=1000)]
    phases_s: Seconds


_RECORD = TypeAdapter(KnownFigures)


class RecordFile:
    """Appends records. While there is no space they wait in memory, and follow whole and in order when there is.

    A record that is cut by a full disk is completed first. Beyond `WAITING_BYTES` the oldest that wait are lost.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._file = open_own(path, "a+b")
        self._path = path
        self._warn = warn
        self._waiting: deque[bytes] = deque([b"\n"] * ends_amid_a_line(self._file))
        self._waiting_bytes = len(self._waiting)
        self._lost = 0
        self._failing = False

    def write(self, record: Record) -> None:
        line = (json.dumps(record) + "\n").encode()
        self._waiting.append(line)
        self._waiting_bytes += len(line)
        self.retry()
        while self._waiting_bytes > WAITING_BYTES and len(self._waiting) > 1:
            self._waiting_bytes -= len(self._waiting[1])
            del self._waiting[1]  # the first may be half written
            self._lost += 1

    def close(self) -> None:
        """Tries once more; says what could not be written."""
        self.retry()
        if self._waiting:
            self._warn(f"{self._path}: {len(self._waiting) + self._lost} records could not be written before the end")
        try:
            self._file.close()
        except OSError as error:  # a network file system may tell late
            self._warn(f"{self._path}: {error.strerror}")

    @property
    def waits(self) -> bool:
        return bool(self._waiting)

    def retry(self) -> None:
        """Writes what waits, as far as there is room."""
        try:
            while self._waiting:
                written = self._file.write(self._waiting[0]) or 0
                self._waiting_bytes -= written
                self._waiting[0] = self._waiting[0][written:]
                if not self._waiting[0]:
                    self._waiting.popleft()
        except OSError as error:
            if not self._failing:
                self._failing = True
                self._warn(
                    f"{self._path}: {error.strerror}; training goes on, records wait in memory until there is space"
                )
            return
        if self._failing:
            lost = f", but for {self._lost} that were too many to keep" if self._lost else ""
            self._warn(f"{self._path}: there is space again; every record is written{lost}")
            self._failing, self._lost = False, 0


def ends_amid_a_line(file: IO[bytes]) -> bool:
    """Whether a full disk, or a kill, has cut the last line of a file that is open for appending."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    return size > 0 and file.read(1) != b"\n"


def cut_after(path: Path, step: int) -> None:
    """Drops the records of updates after `step`, and a last line that a kill cut in half.

    The file becomes a new one: what an older start of the run may still append to its own is not seen. Only where
    a full disk has no space for both, it is cut in place.
    """
    if not path.exists():
        return
    end = next((end for record, end in records_newest_first(path) if record["step"] <= step), 0)
    try:
        copy = open_temporary(path)
    except OSError:
        os.truncate(path, end)
        return
    try:
        with open_given(path) as file, copy:
            while missing := end - copy.tell():
                block = file.read(min(COPIED_BYTES, missing))
                copy.write(block)
            if end and not block.endswith(b"\n"):  # the rest of its line is dropped
                copy.write(b"\n")
            commit(copy, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(copy.name)
        os.truncate(path, end)


def is_record(record: Record) -> bool:
    """Whether what a view computes with is there and of its type. Other figures may be anything."""
    try:
        _RECORD.validate_python(record, strict=True)
    except ValidationError:
        return False
    return True


def newest_record(path: Path) -> Record | None:
    """The newest whole record; None if there is no record."""
    return next((record for record, _ in records_newest_first(path)), None)


def records_newest_first(path: Path, unread: Unread | None = None) -> Iterator[tuple[Record, int]]:
    """(record, where it or its line ends in the file) of every whole record, from the end on; reads no more than is
    asked. `unread` gets the lines on which something is lost."""
    if not path.exists():
        return
    with open_given(path) as file:
        start = file.seek(0, os.SEEK_END)
        rest = b""  # the end of a line whose beginning is further up
        while start:
            size = min(BLOCK_BYTES, start)
            start = file.seek(start - size)
            block = file.read(size) + rest
            first = block.find(b"\n") + 1 or len(block) if start else 0
            rest, end = block[:first], start + len(block)
            if len(rest) > LINE_BYTES:
                rest = b""  # no record is so long
            for raw in reversed(io.BytesIO(block[first:]).readlines()):
                end -= len(raw)
                line = read_line(raw, is_record) if raw.endswith(b"\n") else None
                if line is not None and not line.whole and unread is not None:
                    unread.add(line_number(file, end))
                for record, place in reversed(line.found if line is not None else ()):
                    yield record, end + place


def read_records(run_dir: Path, unread: Unread | None = None) -> list[Record]:
    """A run's journal, oldest update first; `unread` as in `read_lines`."""
    return list(iterate_records(run_dir / METRICS, unread))


def iterate_records(path: Path, unread: Unread | None = None) -> Iterator[Record]:
    """The records of a file, one at a time; `unread` as in `read_lines`."""
    return read_lines(path, is_record, unread)
