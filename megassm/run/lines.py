"""The lines of metrics.jsonl and events.jsonl, for all who read them: what is whole is read, what is not is named.

A crash or a full disk leaves half an object, and what is written next may stand behind it on the same line; a file
system that has lost a write joins lines, or leaves zeros. Needs no torch.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from megassm.cli.arguments import print_line
from megassm.files import open_given
from megassm.guarded import LINE_BYTES, parse_object

JOINED_BYTES = 2**18
"""A line that is no object and longer than this is not searched for any."""
MOST_FAILURES = 4
"""Beginnings of objects on a line that lead to none; no more are looked at."""
MOST_NAMED = 4
"""Lines by their number; of others, how many there are."""
COUNTED_BYTES = 2**20
_BEGINNING = re.compile(rb'\{\s*"(?:step|time)"\s*:')
"""Of a record or an event, as they have always been written."""
_DECODER = json.JSONDecoder()

Record = dict[str, Any]
Known = Callable[[Record], bool]
"""Whether an object is one of those that the file is made of."""


class Line(NamedTuple):
    """What stands on a line."""

    found: list[tuple[Record, int]]
    """Each object, and where it ends in the line, in bytes; the last one with the line, where nothing follows."""
    whole: bool
    """Whether nothing on it is lost."""


class Unread:
    """Lines of a file on which something is no whole object."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.numbers: set[int] = set()

    def add(self, number: int) -> None:
        self.numbers.add(number)

    @property
    def short(self) -> str:
        """In a few words."""
        named, more = sorted(self.numbers)[:MOST_NAMED], len(self.numbers) - MOST_NAMED
        which = f"{', '.join(map(str, named))}{f' and {more:,} more' if more > 0 else ''}"
        are = f"line {which} is" if len(self.numbers) == 1 else f"lines {which} are"
        return f"{self.path.name}: {are} not whole"

    @property
    def told(self) -> str:
        """What that means; empty where there is none."""
        where = f"{self.path.parent}/{self.short}"
        why = "cut by a crash or a full disk, or written by another program"
        return f"{where} ({why}); what is whole there is read, the rest is missing" if self.numbers else ""

    def warn(self) -> None:
        if self.numbers:
            print_line(f"warning: {self.told}", sys.stderr)


def read_line(line: bytes, is_known: Known) -> Line:
    """The objects of a line that `is_known` takes; almost always one, and nothing else."""
    if (value := parse_object(line)) is not None:
        known = is_known(value)
        return Line([(value, len(line))] * known, known)
    if len(line) > JOINED_BYTES or not line.strip():
        return Line([], not line.strip())
    found: list[tuple[Record, int]] = []
    place, failures, whole = 0, 0, True
    while failures < MOST_FAILURES and (beginning := _BEGINNING.search(line, place)):
        start = beginning.start()
        whole = whole and not line[place:start].strip()
        end = _end_of_object(line, start)
        value = parse_object(line[start:end])
        if value is not None and is_known(value):
            found.append((value, end))
            place = end
        else:
            place, failures, whole = start + 1, failures + 1, False
    if line[place:].strip():
        return Line(found, False)
    return Line([*found[:-1], *((value, len(line)) for value, _ in found[-1:])], whole)


def read_lines(path: Path, is_known: Known, unread: Unread | None = None) -> Iterator[Record]:
    """The objects of a file, oldest first, one at a time.

    Args:
        unread: gets the lines on which something is lost; without it that is told on stderr at the end.

    Raises:
        OSError: the file cannot be read.
    """
    lost = Unread(path) if unread is None else unread
    with open_given(path) as file:
        number = 1
        for piece in _pieces(file):
            line = read_line(piece, is_known)
            if not line.whole:
                lost.add(number)
            for record, _ in line.found:
                yield record
            number += piece.endswith(b"\n")
    if unread is None:
        lost.warn()


def line_number(file: IO[bytes], offset: int) -> int:
    """Of the line that begins at `offset`, from 1."""
    file.seek(0)
    number, left = 1, offset
    while left and (block := file.read(min(COUNTED_BYTES, left))):
        number += block.count(b"\n")
        left -= len(block)
    return number


def _pieces(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file, in pieces where one is longer than any record."""
    while line := file.readline(LINE_BYTES):
        yield line


def _end_of_object(line: bytes, start: int) -> int:
    """Where the JSON value ends that begins at `start`; `start` itself where none does."""
    text = line[start:].decode(errors="surrogateescape")
    try:
        _, end = _DECODER.raw_decode(text)
    except (ValueError, RecursionError):
        return start
    return start + (end if text.isascii() else len(text[:end].encode(errors="surrogateescape")))
