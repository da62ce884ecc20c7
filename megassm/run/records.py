"""metrics.jsonl and events.jsonl as files of rows: written so that a full disk costs nothing, read so that half a line
costs nothing. Needs no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Annotated, Any, Required

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from megassm.files import commit, open_own, open_temporary
from megassm.guarded import LINE_BYTES, parse_object
from megassm.run.directory import METRICS

WAITING_BYTES = 64 * 2**20
"""Rows kept in memory at most while they cannot be written; about 100,000."""

COPIED_BYTES = 2**24
BLOCK_BYTES = 2**18
"""What is read at a time of a file that is read from its end."""

Row = dict[str, Any]


Count = Annotated[int, Field(ge=0, le=2**62)]
Figure = Annotated[float, Field(ge=-1e30, le=1e30)] | None
ByBudget = dict[Annotated[str, Field(pattern="^[0-9]{1,6}$")], Figure]
Seconds = Annotated[
    dict[Annotated[str, Field(max_length=60)], Annotated[float, Field(ge=0, le=1e12)]], Field(max_length=50)
]


class KnownFigures(TypedDict, total=False):
    """Those of a row that views, `resume` and tools compute with."""

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
    phases_s: Seconds


_ROW = TypeAdapter(KnownFigures)


class RowFile:
    """Appends rows. While there is no room they wait in memory, and follow whole and in order when there is.

    A row that is cut by a full disk is completed first. Beyond `WAITING_BYTES` the oldest that wait are lost.
    """

    def __init__(self, path: Path, warn: Callable[[str], None]) -> None:
        self._file = open_own(path, "ab")
        self._path = path
        self._warn = warn
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._lost = 0
        self._failing = False

    def write(self, row: Row) -> None:
        line = (json.dumps(row) + "\n").encode()
        self._waiting.append(line)
        self._waiting_bytes += len(line)
        self._write_waiting()
        while self._waiting_bytes > WAITING_BYTES and len(self._waiting) > 1:
            self._waiting_bytes -= len(self._waiting[1])
            del self._waiting[1]  # the first may be half written
            self._lost += 1

    def close(self) -> None:
        """Tries once more; says what could not be written."""
        self._write_waiting()
        if self._waiting:
            self._warn(f"{self._path}: {len(self._waiting) + self._lost} rows could not be written before the end")
        try:
            self._file.close()
        except OSError as error:  # a network file system may tell late
            self._warn(f"{self._path}: {error.strerror}")

    def _write_waiting(self) -> None:
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
                self._warn(f"{self._path}: {error.strerror}; training goes on, rows wait in memory until there is room")
            return
        if self._failing:
            lost = f", but for {self._lost} that were too many to keep" if self._lost else ""
            self._warn(f"{self._path}: there is room again; every row is written{lost}")
            self._failing, self._lost = False, 0


def cut_after(path: Path, step: int) -> None:
    """Drops the rows of updates after `step`, and a last line that a kill cut in half.

    The file becomes a new one: what an older start of the run may still append to its own is seen by nobody. Only where
    a full disk has no room for both, it is cut in place.
    """
    if not path.exists():
        return
    end = next((end for row, end in rows_newest_first(path) if row["step"] <= step), 0)
    try:
        copy = open_temporary(path)
    except OSError:
        os.truncate(path, end)
        return
    try:
        with path.open("rb") as file, copy:
            while missing := end - copy.tell():
                copy.write(file.read(min(COPIED_BYTES, missing)))
            commit(copy, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(copy.name)
        os.truncate(path, end)


def parse_row(line: bytes) -> Row | None:
    """A row of the journal; None if the line is not one, or a figure of it has another type than the journal's."""
    row = parse_object(line)
    return row if row is not None and is_row(row) else None


def is_row(row: Row) -> bool:
    """Whether what a view computes with is there and of its type. Other figures may be anything."""
    try:
        _ROW.validate_python(row, strict=True)
    except ValidationError:
        return False
    return True


def newest_row(path: Path) -> Row | None:
    """The newest whole row; None if there is no row."""
    return next((row for row, _ in rows_newest_first(path)), None)


def rows_newest_first(path: Path) -> Iterator[tuple[Row, int]]:
    """(row, where its line ends in the file) of every whole row from the end on; no more is read than is asked for."""
    if not path.exists():
        return
    with path.open("rb") as file:
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
            for line in reversed(block[first:].splitlines(keepends=True)):
                row = parse_row(line) if line.endswith(b"\n") else None
                if row is not None:
                    yield row, end
                end -= len(line)


def read_rows(run_dir: Path) -> list[Row]:
    """A run's journal, oldest update first."""
    return list(iterate_rows(run_dir / METRICS))


def iterate_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, one at a time."""
    with path.open("rb") as file:
        yield from (row for row in map(parse_row, lines_of(file)) if row is not None)


def lines_of(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file, in pieces where one is longer than any record."""
    while line := file.readline(LINE_BYTES):
        yield line
