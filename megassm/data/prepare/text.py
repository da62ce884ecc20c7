"""Text files: a document is the whole file, or what stands between its separators; a long one comes in pieces.

Memory: a few times PIECE_BYTES, whatever the file. Bytes that are not UTF-8 pass through, and are checked later.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from megassm.data.prepare.records import BOM, RawDocument

PIECE_BYTES = 1 << 20  # of UTF-8; a longer document is divided, and its pieces are shuffled one by one
LONGEST_SEPARATOR = 1 << 16  # characters of one match
NEAR_BYTES = PIECE_BYTES // 2  # so much of a piece is given up for a cut after a line's end
NAMED_SEPARATORS = {"LINE": r"\r?\n", "BLANK": r"\r?\n(?:[ \t\r]*\n)+"}
AS_BYTES = "surrogateescape"


def separator_pattern(separator: str) -> re.Pattern[str]:
    """What divides documents: LINE, BLANK, or a regular expression, whose ^ and $ are a line's. re.error if none."""
    return re.compile(NAMED_SEPARATORS.get(separator, separator), re.MULTILINE)


def documents_of_text(
    path: Path, stream: io.BufferedReader, raw: IO[bytes], separator: str | None
) -> Iterator[RawDocument]:
    """The documents of a text file, in its order; `raw` tells how far into the file reading has come."""
    pattern = separator_pattern(separator) if separator is not None else None
    number = offset = 0
    starts = True
    for span in _spans(stream, pattern):
        number += starts
        document = f"{path}: document {number}" if pattern else str(path)
        pieces = cut_pieces(span.text.encode(errors=AS_BYTES))
        for index, content in enumerate(pieces):
            ends = span.ends and index == len(pieces) - 1
            within = " of the document" if pattern else ""
            yield RawDocument(document, content, raw.tell(), False, within, offset, starts, ends)
            starts, offset = ends, 0 if ends else offset + len(content)


class _Span(NamedTuple):
    text: str
    ends: bool  # its document ends here


def _spans(stream: io.BufferedReader, pattern: re.Pattern[str] | None) -> Iterator[_Span]:
    """The text between separators; of a long document a run at a time. A file that ends with one has none after it."""
    decode = codecs.getincrementaldecoder("utf-8")(AS_BYTES).decode
    text, start = "", 0  # what is before `start` was given out: kept for what a pattern looks back at
    first, matched = True, False
    while True:
        raw = stream.read(PIECE_BYTES)
        text += decode(raw, not raw)
        if first:
            text, first = text.removeprefix(BOM), False
        limit = len(text) - (LONGEST_SEPARATOR if raw and pattern else 0)
        for match in pattern.finditer(text, start) if pattern and limit > start else ():
            if match.end() > limit:
                break
            if match.end() > match.start() or match.start() > start:  # nothing, where a document begins, is no end
                yield _Span(text[start : match.start()], True)
                start, matched = match.end(), True
        if not raw:
            if start < len(text) or not matched:
                yield _Span(text[start:], True)
            return
        if limit - start > 2 * PIECE_BYTES:
            newline = text.rfind("\n", start + NEAR_BYTES, start + PIECE_BYTES)
            stop = newline + 1 if newline >= 0 else start + PIECE_BYTES
            yield _Span(text[start:stop], False)
            start = stop
        kept = max(0, start - LONGEST_SEPARATOR) if pattern else start
        text, start = text[kept:], start - kept


def cut_pieces(content: bytes) -> list[bytes]:
    """A text in pieces of at most PIECE_BYTES, cut after a line's end where there is one near, else between characters.

    It may hold bytes that are not UTF-8.
    """
    pieces, start = [], 0
    while len(content) - start > PIECE_BYTES:
        stop = start + PIECE_BYTES
        newline = content.rfind(b"\n", start + NEAR_BYTES, stop)
        stop = newline + 1 if newline >= 0 else boundary_before(content, stop)
        pieces.append(content[start:stop])
        start = stop
    return [*pieces, content[start:]]


def boundary_before(content: bytes, position: int) -> int:
    """The last place at or before `position` where a character of UTF-8 begins."""
    for start in range(position, max(0, position - 4), -1):
        if start == len(content) or content[start] & 0xC0 != 0x80:
            return start
    return position
