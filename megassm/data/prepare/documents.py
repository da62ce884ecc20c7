"""Documents, one at a time, out of the files that `inputs` found and through the filters that were asked for.

Text is kept exactly as it is (no newline translation; a byte order mark at a file's start is not text). What is left
out or changed is counted. `formats` reads the files. A long document comes in pieces. Memory: one record, or one
piece of a text file, or as much of a document as it takes to know that a filter leaves it in.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import NamedTuple, assert_never

from megassm.data.prepare.formats import read_file
from megassm.data.prepare.kinds import InputFile
from megassm.data.prepare.records import BadRecordError, RawDocument, text_of_record
from megassm.data.prepare.samples import LeftOutMembers
from megassm.data.prepare.source import TextSource
from megassm.data.prepare.text import cut_pieces
from megassm.errors import UserError

SURROGATE = re.compile("[\ud800-\udfff]")  # alone in JSON: half of a character, written as \ud83d


@dataclass
class ReadCounts:
    """What `read_pieces` has met so far."""

    documents: int = 0  # that passed
    repaired: int = 0  # of these, with U+FFFD in place of what was not UTF-8
    empty: int = 0  # the rest was left out
    bad_utf8: int = 0
    bad_record: int = 0
    too_short: int = 0
    too_long: int = 0
    members: LeftOutMembers = field(default_factory=LeftOutMembers)
    file_bytes: int = 0  # read from disk; compressed bytes where the file is


class Piece(NamedTuple):
    """UTF-8 of a document, or of a run of it where it is longer than `text.PIECE_BYTES`; or its `ids`."""

    content: bytes
    starts: bool = True
    ends: bool = True
    are_ids: bool = False  # of ids.ID_DTYPE


def read_documents(source: TextSource, files: Iterable[InputFile], counts: ReadCounts) -> Iterator[str]:
    """Whole documents in order; updates `counts` as it goes. UserError naming file and line or byte."""
    held: list[bytes] = []
    for piece in read_pieces(source, files, counts):
        held.append(piece.content)
        if piece.ends:
            yield b"".join(held).decode()
            held = []


def read_pieces(source: TextSource, files: Iterable[InputFile], counts: ReadCounts) -> Iterator[Piece]:
    """The documents in order, long ones in pieces; updates `counts` as it goes. UserError naming file and place."""
    for file in files:
        bytes_before = counts.file_bytes
        filters = _Filters(source, counts)
        for raw in read_file(file, source, counts.members):
            counts.file_bytes = bytes_before + min(raw.file_position, file.size)
            yield from filters.passed(raw)
        counts.file_bytes = bytes_before + file.size


def check_first_document(source: TextSource, file: InputFile) -> None:
    """Reads the first record of a file as `read_documents` would: what is wrong with all of them shows at once."""
    if file.kind == "text":
        return  # its beginning was looked at to find its kind
    for raw in read_file(file, source, LeftOutMembers()):
        _Filters(source, ReadCounts()).passed(raw)
        return


class _Filters:
    """Decides over documents that come whole or in pieces."""

    def __init__(self, source: TextSource, counts: ReadCounts) -> None:
        self._source, self._counts = source, counts
        self._held: list[bytes] = []  # of a document that may still be left out
        self._size, self._given = 0, False  # of the document: bytes so far; whether any of it was given out
        self._left_out = self._repaired = False

    def passed(self, raw: RawDocument) -> list[Piece]:
        """What of the text so far is in, for sure."""
        if raw.starts:
            self._held, self._size = [], 0
            self._given = self._left_out = self._repaired = False
        if self._left_out:
            return []
        content = self._ids_of(raw) if raw.are_ids else self._utf8_of(raw)
        if content is None:
            self._left_out = True
            return []
        self._size += len(content)
        most = self._source.max_document_bytes
        if raw.starts and raw.ends and (not content if raw.are_ids else _is_blank(content)):
            self._counts.empty += 1
            return []
        if most is not None and self._size > most:
            self._counts.too_long += 1
            self._left_out = True
            return []
        self._held += cut_pieces(content) if raw.starts and raw.ends and not raw.are_ids else [content]
        if raw.ends:
            return self._last(raw.are_ids)
        if most is not None or self._size < self._source.min_document_bytes:
            return []  # the rest decides
        return self._out(False, raw.are_ids)

    def _last(self, are_ids: bool) -> list[Piece]:
        if self._size < self._source.min_document_bytes:
            self._counts.too_short += 1
            return []
        self._counts.documents += 1
        self._counts.repaired += self._repaired
        return self._out(True, are_ids)

    def _out(self, ends: bool, are_ids: bool) -> list[Piece]:
        last = len(self._held) - 1
        pieces = [
            Piece(content, not self._given and n == 0, ends and n == last, are_ids)
            for n, content in enumerate(self._held)
        ]
        self._held, self._given = [], True
        return pieces

    def _ids_of(self, raw: RawDocument) -> bytes:
        if self._source.min_document_bytes or self._source.max_document_bytes is not None:
            rule = "holds token ids, and --min-document-bytes and --max-document-bytes count bytes of text"
            raise UserError(f"{raw.place}: {rule}; leave these out")
        return raw.content

    def _utf8_of(self, raw: RawDocument) -> bytes | None:
        """None: not UTF-8 or no record, and left out."""
        policy = self._source.on_bad_utf8
        content, bad = raw.content, ""
        try:
            text = content.decode()
        except UnicodeDecodeError as error:
            bad = f"byte {raw.offset + error.start}{raw.within}: 0x{content[error.start]:02x}"
            text = content.decode(errors="replace")
            content = text.encode()
        if raw.is_json and (not bad or policy == "replace"):
            found = _text_of_json(text, raw.place, self._source, self._counts)
            if found is None:
                return None
            try:
                content = found.encode()
            except UnicodeEncodeError as error:  # half of a character, written as \ud83d
                bad = bad or f"character {error.start} of the text: U+{ord(found[error.start]):04X}"
                content = SURROGATE.sub("\ufffd", found).encode()
        if not bad:
            return content
        match policy:
            case "error":
                raise UserError(f"{raw.place}: {bad} is not UTF-8; repair it, or pass --on-bad-utf8 skip or replace")
            case "skip":
                if self._given:
                    rule = "is not UTF-8, and the document is too long to be left out once it has begun"
                    raise UserError(f"{raw.place}: {bad} {rule}; repair it, or pass --on-bad-utf8 replace")
                self._counts.bad_utf8 += 1
                return None
            case "replace":
                self._repaired = True
                return content
            case _:
                assert_never(policy)


def _is_blank(content: bytes) -> bool:
    return not content or (not 0x20 < content[0] < 0x80 and content.decode().isspace())


def _text_of_json(content: str, place: str, source: TextSource, counts: ReadCounts) -> str | None:
    try:
        return text_of_record(content, place, source.text_field)
    except BadRecordError as error:
        match source.on_bad_record:
            case "raise":
                raise BadRecordError(f"{error}, or --on-bad-record skip") from None
            case "skip":
                counts.bad_record += 1
                return None
            case "empty":
                return ""
            case _:
                assert_never(source.on_bad_record)


def sample_documents(texts: Iterable[str], max_bytes: int, seed: int) -> list[str]:
    """A sample of at most `max_bytes` of UTF-8: the documents with the smallest hashes of (content, seed).

    The same for the same documents in any order. Holds the sample and one document; of a document larger
    than `max_bytes` the beginning stands for it.
    """
    if max_bytes < 1:
        raise UserError(f"a sample of {max_bytes} bytes: it must be at least 1")
    key = (seed % 2**64).to_bytes(8, "little")
    kept: list[tuple[int, str]] = []  # a heap; hashes negated, so that the largest is on top
    kept_bytes, limit = 0, 1 << 64  # of what lies above a document once dropped, nothing is kept
    for text in texts:
        beginning = text.encode()[:max_bytes].decode(errors="ignore")  # no half character at its end
        content = beginning.encode()
        digest = int.from_bytes(blake2b(content, digest_size=8, key=key).digest(), "little")
        if digest >= limit:
            continue
        heapq.heappush(kept, (-digest, beginning))
        kept_bytes += len(content)
        while kept_bytes > max_bytes:
            dropped, dropped_text = heapq.heappop(kept)
            kept_bytes -= len(dropped_text.encode())
            limit = -dropped
    return [text for _, text in sorted(kept)]
