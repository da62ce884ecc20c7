"""Documents, one at a time, out of the files that `inputs` found and through the filters that were asked for.

Text is kept exactly as it is (no newline translation; a byte order mark at a file's start is no text). What is left
out or changed is counted. `formats` reads the files. Memory: one document.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import assert_never

from megassm.data.prepare.formats import read_file
from megassm.data.prepare.kinds import InputFile
from megassm.data.prepare.records import BOM, BadRecordError, RawDocument, text_of_record
from megassm.data.prepare.samples import LeftOutMembers
from megassm.data.prepare.source import TextSource
from megassm.errors import UserError

SURROGATE = re.compile("[\ud800-\udfff]")  # alone in JSON: half of a character, written as \ud83d


@dataclass
class ReadCounts:
    """What `read_documents` has met so far."""

    documents: int = 0  # that passed
    repaired: int = 0  # of these, with U+FFFD in place of what was not UTF-8
    empty: int = 0  # the rest was left out
    bad_utf8: int = 0
    bad_record: int = 0
    too_short: int = 0
    too_long: int = 0
    members: LeftOutMembers = field(default_factory=LeftOutMembers)
    file_bytes: int = 0  # read from disk; compressed bytes where the file is


def read_documents(source: TextSource, files: Iterable[InputFile], counts: ReadCounts) -> Iterator[str]:
    """The documents in order; updates `counts` as it goes. UserError naming file and line or byte."""
    for file in files:
        bytes_before = counts.file_bytes
        for raw in read_file(file, source.text_field, counts.members):
            counts.file_bytes = bytes_before + min(raw.file_position, file.size)
            text = _text_of(raw, source, counts)
            if text is not None and _passes(text, source, counts):
                counts.documents += 1
                yield text
        counts.file_bytes = bytes_before + file.size


def check_first_document(source: TextSource, file: InputFile) -> None:
    """Reads the first record of a file as `read_documents` would: what is wrong with all of them shows at once."""
    if file.kind == "text":
        return  # its beginning was looked at to find its kind
    for raw in read_file(file, source.text_field, LeftOutMembers()):
        _text_of(raw, source, ReadCounts())
        return


def _passes(text: str, source: TextSource, counts: ReadCounts) -> bool:
    size = len(text.encode())
    if not text.strip():
        counts.empty += 1
    elif size < source.min_document_bytes:
        counts.too_short += 1
    elif source.max_document_bytes is not None and size > source.max_document_bytes:
        counts.too_long += 1
    else:
        return True
    return False


def _text_of(raw: RawDocument, source: TextSource, counts: ReadCounts) -> str | None:
    """None: not UTF-8 or no record, and left out."""
    bad = ""
    try:
        text = raw.content.decode()
    except UnicodeDecodeError as error:
        bad = f"byte {error.start}{raw.within}: 0x{raw.content[error.start]:02x}"
        text = raw.content.decode(errors="replace")
    if not raw.is_json:
        text = text.removeprefix(BOM) if not raw.within else text
    elif not bad or source.on_bad_utf8 == "replace":
        found = _text_of_json(text, raw.place, source, counts)
        if found is None:
            return None
        text = found
        if half := SURROGATE.search(text):
            bad = bad or f"character {half.start()} of the text: U+{ord(half[0]):04X}"
            text = SURROGATE.sub("\ufffd", text)
    if bad:
        match source.on_bad_utf8:
            case "error":
                rule = "repair it, or pass --on-bad-utf8 skip or replace"
                raise UserError(f"{raw.place}: {bad} is not UTF-8; {rule}")
            case "skip":
                counts.bad_utf8 += 1
                return None
            case "replace":
                counts.repaired += 1
            case _:
                assert_never(source.on_bad_utf8)
    return text


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
