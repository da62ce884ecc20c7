"""Finds input files and reads documents from them, one at a time, through the filters that were asked for.

Text is kept exactly as it is (no newline translation). What is left out or changed is counted: whitespace
only, shorter or longer than asked, not UTF-8. `formats` knows the file formats. Memory: one document.
"""

from __future__ import annotations

import argparse
import heapq
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, assert_never, get_args

from megassm.cli.arguments import path_argument
from megassm.data.prepare.formats import SUFFIXES, RawDocument, is_unreadable, reader_of
from megassm.errors import UserError

DEFAULT_PATTERNS = tuple(f"*{suffix}" for suffix in SUFFIXES)
BOM = "\ufeff"
SURROGATE = re.compile("[\ud800-\udfff]")  # alone in JSON: half of a character, written as \ud83d

BadUtf8 = Literal["error", "skip", "replace"]


@dataclass(frozen=True)
class TextSource:
    """What to read. A file is read whatever its suffix; a directory is searched, hidden files apart."""

    inputs: tuple[Path, ...]
    glob: str | None = None  # in directories; default: DEFAULT_PATTERNS
    text_field: str = "text"  # of a JSON object, or the column of a Parquet file
    on_bad_utf8: BadUtf8 = "error"
    min_document_bytes: int = 0  # UTF-8 bytes; shorter documents are left out
    max_document_bytes: int | None = None  # UTF-8 bytes; longer documents are left out

    def __post_init__(self) -> None:
        if self.on_bad_utf8 not in get_args(BadUtf8):
            choices = " or ".join(repr(choice) for choice in get_args(BadUtf8))
            raise UserError(f"on_bad_utf8 is {self.on_bad_utf8!r}; it is {choices}")
        if self.min_document_bytes < 0:
            raise UserError(f"min_document_bytes is {self.min_document_bytes}, it must be at least 0")
        if self.max_document_bytes is not None and self.max_document_bytes < max(1, self.min_document_bytes):
            rule = f"it must be at least 1 and at least min_document_bytes ({self.min_document_bytes})"
            raise UserError(f"max_document_bytes is {self.max_document_bytes}; {rule}")


@dataclass
class ReadCounts:
    """What `read_documents` has met so far."""

    documents: int = 0  # that passed
    repaired: int = 0  # of these, with U+FFFD in place of what was not UTF-8
    empty: int = 0  # the rest was left out
    bad_utf8: int = 0
    too_short: int = 0
    too_long: int = 0
    file_bytes: int = 0  # read from disk; compressed bytes where the file is


def list_files(source: TextSource) -> list[Path]:
    """The files to read: inputs in the order given, each directory sorted, none twice. UserError if none."""
    found: dict[Path, None] = {}
    for path in source.inputs:
        if path.is_dir():
            found.update(dict.fromkeys(_search(path, source.glob)))
        elif path.is_file():
            if is_unreadable(path):
                raise UserError(f"--input {path}: cannot read this format; give text or {', '.join(SUFFIXES)}")
            found[path] = None
        else:
            raise UserError(f"--input {path}: no such file or directory")
    return list(found)


def _search(directory: Path, glob: str | None) -> list[Path]:
    patterns = (glob,) if glob else DEFAULT_PATTERNS
    try:
        matches = {path for pattern in patterns for path in directory.rglob(pattern) if path.is_file()}
    except (NotImplementedError, ValueError) as error:
        raise UserError(f"--glob {glob!r}: {error}; give a pattern of file names, for example '*.py'") from None
    visible = [p for p in matches if not any(part.startswith(".") for part in p.relative_to(directory).parts)]
    if not visible:
        way_out = "give another --glob" if glob else "pass --glob, for example '*.py'"
        raise UserError(f"--input {directory}: holds no file named {' or '.join(patterns)}; {way_out}")
    return sorted(visible)


def read_documents(source: TextSource, files: list[Path], counts: ReadCounts) -> Iterator[str]:
    """The documents in order; updates `counts` as it goes. UserError naming file and line or byte."""
    for path in files:
        bytes_before = counts.file_bytes
        for raw in reader_of(path)(path, source.text_field):
            counts.file_bytes = bytes_before + raw.file_position
            text = _text_of(raw, source, counts)
            if text is not None and _passes(text, source, counts):
                counts.documents += 1
                yield text
        counts.file_bytes = bytes_before + path.stat().st_size


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


def _text_of(raw: RawDocument, source: TextSource, counts: ReadCounts) -> str | None:
    """None: not UTF-8, and left out."""
    bad = ""
    try:
        text = raw.content.decode()
    except UnicodeDecodeError as error:
        bad = f"byte {error.start}{raw.within}: 0x{raw.content[error.start]:02x}"
        text = raw.content.decode(errors="replace")
    if raw.is_json and (not bad or source.on_bad_utf8 == "replace"):
        text = _field_of(text, raw.place, source.text_field)
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


def _field_of(line: str, place: str, field: str) -> str:
    """The text in a JSON object."""
    try:
        record: Any = json.loads(line.removeprefix(BOM))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON: {error}; there must be one JSON object") from None
    if not isinstance(record, dict):
        raise UserError(f"{place}: {type(record).__name__}, there must be one JSON object")
    if field not in record:
        fields = ", ".join(sorted(record)) or "none"
        raise UserError(f"{place}: no field {field!r}; pass --text-field (fields here: {fields})")
    text = record[field]
    if not isinstance(text, str):
        raise UserError(f"{place}: field {field!r} is {type(text).__name__}, it must be a string")
    return text


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """The options of every tool that reads documents; `source_of` takes them from the parsed arguments.

    A word @FILE stands for the lines of FILE, so that a command can name any number of inputs.
    """
    parser.fromfile_prefix_chars = "@"
    add, default = parser.add_argument, "(default: %(default)s)"
    inputs_help = f"files or directories: {', '.join(DEFAULT_PATTERNS)} (WebDataset shards of text); @FILE: one a line"
    add("--input", type=path_argument, nargs="+", required=True, metavar="PATH", help=inputs_help)
    add("--glob", metavar="PATTERN", help="files to take from directories instead, for example '*.py'")
    add("--text-field", default="text", metavar="NAME", help=f"of a JSON object, or a Parquet column {default}")
    bad_help = f"refuse, or leave the document out, or put U+FFFD in place of it; counted {default}"
    add("--on-bad-utf8", choices=get_args(BadUtf8), default="error", help=bad_help)
    add("--min-document-bytes", type=int, default=0, metavar="N", help="leave shorter documents out (UTF-8 bytes)")
    add("--max-document-bytes", type=int, metavar="N", help="leave longer documents out (UTF-8 bytes)")


def source_of(arguments: argparse.Namespace) -> TextSource:
    """What `add_source_options` was given."""
    return TextSource(
        inputs=tuple(arguments.input),
        glob=arguments.glob,
        text_field=arguments.text_field,
        on_bad_utf8=arguments.on_bad_utf8,
        min_document_bytes=arguments.min_document_bytes,
        max_document_bytes=arguments.max_document_bytes,
    )
