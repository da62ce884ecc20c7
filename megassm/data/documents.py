"""Finds input files and reads documents from them, one at a time: text files, .jsonl, .jsonl.gz.

A text file is one document, a line of JSON is one document. Text is kept exactly as it is (no newline
translation); documents of whitespace only are dropped and counted. Memory: one document.
"""

from __future__ import annotations

import argparse
import gzip
import heapq
import json
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal, get_args

from megassm.errors import UserError

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz")
DEFAULT_PATTERNS = ("*.txt", *(f"*{suffix}" for suffix in JSONL_SUFFIXES))
UNREADABLE_SUFFIXES = (".gz", ".zst", ".bz2", ".xz", ".zip", ".tar", ".parquet", ".arrow")

BadUtf8 = Literal["error", "skip"]


@dataclass(frozen=True)
class TextSource:
    """What to read. A file is read whatever its suffix; a directory is searched, hidden files apart."""

    inputs: tuple[Path, ...]
    glob: str | None = None  # in directories; default: *.txt, *.jsonl, *.jsonl.gz
    text_field: str = "text"  # of a line of JSON
    on_bad_utf8: BadUtf8 = "error"

    def __post_init__(self) -> None:
        if self.on_bad_utf8 not in get_args(BadUtf8):
            raise UserError(f"on_bad_utf8 is {self.on_bad_utf8!r}; it is 'error' or 'skip'")


@dataclass
class ReadCounts:
    """What `read_documents` has met so far."""

    documents: int = 0
    empty: int = 0
    bad_utf8: int = 0
    file_bytes: int = 0  # read from disk; compressed bytes where the file is


def list_files(source: TextSource) -> list[Path]:
    """The files to read: inputs in the order given, each directory sorted, none twice. UserError if none."""
    found: dict[Path, None] = {}
    for path in source.inputs:
        if path.is_dir():
            found.update(dict.fromkeys(_search(path, source.glob)))
        elif path.is_file():
            if not path.name.endswith(JSONL_SUFFIXES) and path.name.endswith(UNREADABLE_SUFFIXES):
                raise UserError(f"--input {path}: cannot read this format; give text, .jsonl or .jsonl.gz")
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
        texts = _read_jsonl if path.name.endswith(JSONL_SUFFIXES) else _read_whole
        for text in texts(path, source, counts):
            if text is None:
                counts.bad_utf8 += 1
            elif not text.strip():
                counts.empty += 1
            else:
                counts.documents += 1
                yield text
        counts.file_bytes = bytes_before + path.stat().st_size


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


def _read_whole(path: Path, source: TextSource, counts: ReadCounts) -> Iterator[str | None]:
    raw = path.read_bytes()
    try:
        yield raw.decode()
    except UnicodeDecodeError as error:
        _check_may_skip(f"{path}: byte {error.start}: 0x{raw[error.start]:02x}", source)
        yield None


def _read_jsonl(path: Path, source: TextSource, counts: ReadCounts) -> Iterator[str | None]:
    bytes_before = counts.file_bytes
    with open(path, "rb") as file:
        lines = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file
        number = 0
        try:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield _text_of_line(line, f"{path}:{number}", source)
                counts.file_bytes = bytes_before + file.tell()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            what = f"damaged gzip after line {number}: {error}"
            raise UserError(f"{path}: {what}; fetch the file again") from None


def _text_of_line(line: bytes, place: str, source: TextSource) -> str | None:
    """None: not UTF-8, and to be skipped."""
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        _check_may_skip(f"{place}: byte {error.start} of the line: 0x{line[error.start]:02x}", source)
        return None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place}: not JSON: {error}; a .jsonl file has one JSON object a line") from None
    if not isinstance(record, dict):
        raise UserError(f"{place}: {type(record).__name__}, a .jsonl file has one JSON object a line")
    if source.text_field not in record:
        fields = ", ".join(sorted(record)) or "none"
        raise UserError(f"{place}: no field {source.text_field!r}; pass --text-field (fields here: {fields})")
    text = record[source.text_field]
    if not isinstance(text, str):
        raise UserError(f"{place}: field {source.text_field!r} is {type(text).__name__}, it must be a string")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, written as \ud83d
        what = f"U+{ord(text[error.start]):04X}"
        _check_may_skip(f"{place}: character {error.start} of the text: {what}", source)
        return None
    return text


def _check_may_skip(bad: str, source: TextSource) -> None:
    if source.on_bad_utf8 == "error":
        raise UserError(f"{bad} is not UTF-8; repair it, or pass --on-bad-utf8 skip")


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """The options of every tool that reads documents; `source_of` takes them from the parsed arguments."""
    add = parser.add_argument
    formats = ", ".join(DEFAULT_PATTERNS)
    add(
        "--input",
        type=Path,
        nargs="+",
        required=True,
        metavar="PATH",
        help=f"files or directories: {formats}",
    )
    add("--glob", metavar="PATTERN", help="files to take from directories instead, for example '*.py'")
    add("--text-field", default="text", metavar="NAME", help="of a JSON line (default: %(default)s)")
    skip_help = "refuse, or skip the document and count it (default: %(default)s)"
    add("--on-bad-utf8", choices=get_args(BadUtf8), default="error", help=skip_help)


def source_of(arguments: argparse.Namespace) -> TextSource:
    """What `add_source_options` was given."""
    inputs = tuple(arguments.input)
    return TextSource(inputs, arguments.glob, arguments.text_field, arguments.on_bad_utf8)
