"""JSON records: objects with a text in one of their fields, one a line, in one array, or one after the other."""

from __future__ import annotations

import codecs
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from megassm.errors import UserError

BOM = "\ufeff"
MOST_RECORD_BYTES = 64 << 20  # a line, an element, a tar member: held whole, several times over
BLANK = " \t\r\n"
_SCANNER = json.JSONDecoder()


class RawDocument(NamedTuple):
    """Bytes that should be UTF-8, where they stand, and how far into the file reading has come.

    A document of a text file that is too long to be held comes as several: the first starts it, the last ends it.
    """

    place: str
    content: bytes
    file_position: int  # bytes of the file read so far
    is_json: bool = False  # else it is the text itself
    within: str = ""  # what offsets count from, where that is not the file
    offset: int = 0  # of this content in its document
    starts: bool = True
    ends: bool = True
    are_ids: bool = False  # the content is token ids, of `ids.ID_DTYPE`


class BadRecordError(UserError):
    """A record without a text: `--on-bad-record` may leave it out."""


def text_of_record(content: str, place: str, field: str) -> str:
    """The text in a JSON object; "" for null, as an empty cell of a Parquet file is read.

    Raises:
        BadRecordError: not JSON, no object, no such field, or no string in it; names the place and the fields there.
    """
    try:
        record: Any = json.loads(content.removeprefix(BOM))
    except (ValueError, RecursionError) as error:
        raise BadRecordError(f"{place}: not JSON: {error}; there must be one JSON object") from None
    if not isinstance(record, dict):
        raise BadRecordError(f"{place}: {type(record).__name__}, there must be one JSON object")
    if not has_field(record, field):
        fields = ", ".join(sorted(record)) or "none"
        raise BadRecordError(f"{place}: no field {field!r}; pass --text-field (fields here: {fields})")
    text = _value_of(record, field)
    if text is not None and not isinstance(text, str):
        rule = "it must be a string; pass another --text-field (a nested one is written outer.inner)"
        raise BadRecordError(f"{place}: field {field!r} is {type(text).__name__}, {rule}")
    return text or ""


def has_field(record: Any, field: str) -> bool:
    """Whether an object has a field of this name, or of this path: `meta.text` is `text` in `meta`."""
    if not isinstance(record, dict):
        return False
    outer, dot, inner = field.partition(".")
    return field in record or (bool(dot) and has_field(record.get(outer), inner))


def _value_of(record: Mapping[str, Any], field: str) -> Any:
    if field in record:
        return record[field]
    outer, _, inner = field.partition(".")
    return _value_of(record[outer], inner)


def is_object(line: bytes) -> dict[str, Any] | None:
    """The JSON object that a whole line is; None where it is anything else."""
    try:
        value = json.loads(line.removeprefix(codecs.BOM_UTF8).decode(errors="replace"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def first_object(start: bytes) -> Any:
    """The first value of JSON at a file's beginning, or the first in its array; None where there is none."""
    text = start.decode("latin-1").removeprefix("[").lstrip(BLANK)
    try:
        return _SCANNER.raw_decode(text)[0] if text.startswith("{") else None
    except (ValueError, RecursionError):
        return None


def lines_of(path: Path, stream: io.BufferedReader, most_bytes: int = MOST_RECORD_BYTES) -> Iterator[tuple[int, bytes]]:
    """(number, line) of a file, from 1. UserError for a line that is too long to hold."""
    number = 0
    while line := stream.readline(most_bytes):
        number += 1
        if len(line) == most_bytes and not line.endswith(b"\n"):
            raise too_long(f"{path}:{number}", most_bytes)
        yield number, line


def too_long(place: str, most_bytes: int = MOST_RECORD_BYTES) -> UserError:
    rule = f"longer than the {most_bytes >> 20} MiB of one record"
    return UserError(f"{place}: {rule}; divide it, or give its text as a file of its own")


def json_values(path: Path, stream: io.BufferedReader) -> Iterator[bytes]:
    """The elements of a file's one array, or its objects one after the other, as they stand there.

    Raises:
        UserError: not JSON, cut short, or more after the array; names the record.
    """
    text = _Scanned(path, stream)
    in_array = text.peek() == "["
    if in_array:
        text.skip(1)
    while (mark := text.peek()) and mark != "]":
        yield text.value()
        if in_array and text.peek() == ",":
            text.skip(1)
            if text.peek() in ("]", ""):
                raise text.refusal("no value after a comma")
        elif in_array and text.peek() != "]":
            raise text.refusal("no ',' or ']' after a value; is the file cut short?")
    if in_array:
        if not mark:
            raise text.refusal("the array does not end; is the file cut short?")
        text.skip(1)
    if text.peek():
        raise text.refusal("something follows the JSON")


class _Scanned:
    """A file as characters of Latin-1, one a byte: JSON's marks are ASCII, and UTF-8 is checked later."""

    def __init__(self, path: Path, stream: io.BufferedReader) -> None:
        self._path, self._stream = path, stream
        self._text, self._position, self._records = "", 0, 0
        self._more()
        self._text = self._text.removeprefix(codecs.BOM_UTF8.decode("latin-1"))

    def peek(self) -> str:
        """The next character that is not blank; "" at the end of the file."""
        while True:
            while self._position < len(self._text) and self._text[self._position] in BLANK:
                self._position += 1
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._more():
                return ""

    def skip(self, characters: int) -> None:
        self._position += characters

    def value(self) -> bytes:
        self._records += 1
        while True:
            error = ""
            end = len(self._text)
            try:
                _, end = _SCANNER.raw_decode(self._text, self._position)
            except (ValueError, RecursionError) as failure:
                error = str(failure)
            if not error and end < len(self._text):
                break
            if not self._more():
                if error:
                    raise self.refusal(f"not JSON: {error}")
                break
            if len(self._text) > MOST_RECORD_BYTES:
                raise too_long(f"{self._path}: record {self._records}")
        start, self._position = self._position, end
        return self._text[start:end].encode("latin-1")

    def refusal(self, what: str) -> UserError:
        way_out = "mend it, or pass --format text to train on the file as it is"
        return UserError(f"{self._path}: record {self._records}: {what}; {way_out}")

    def _more(self) -> bool:
        """Drops what was read and doubles the rest, so that a long value costs no more than a few looks at it."""
        rest = self._text[self._position :]
        new = self._stream.read(max(1 << 16, len(rest)))
        self._text, self._position = rest + new.decode("latin-1"), 0
        return bool(new)
