"""The file formats that documents are read from: one function a format, each yields what the file holds, unchecked.

    .txt, .md, any other text     the file is one document
    .jsonl, .jsonl.gz, .jsonl.zst one JSON object a line
    .parquet                      one row a document
    .tar                          WebDataset shards: one sample a document, `.txt` or else `.json`

Memory: one document (Parquet: one batch of rows). .zst and .parquet need pyarrow, an optional dependency.
"""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from megassm.data.prepare.tar import TarMember, tar_members
from megassm.errors import UserError

JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst")
TEXT_SUFFIXES = (".txt", ".md")
SUFFIXES = (*TEXT_SUFFIXES, *JSONL_SUFFIXES, ".parquet", ".tar")
UNREADABLE_SUFFIXES = (".gz", ".zst", ".bz2", ".xz", ".zip", ".tgz", ".arrow", ".feather", ".pdf", ".docx")
MEMBER_SUFFIXES = ("txt", "json")
PARQUET_BATCH_ROWS = 64
ZSTD_BUFFER_BYTES = 1 << 20


class RawDocument(NamedTuple):
    """Bytes that should be UTF-8, where they stand, and how far into the file reading has come."""

    place: str
    content: bytes
    file_position: int  # bytes of the file read so far
    is_json: bool = False  # else it is the text itself
    within: str = ""  # what offsets count from, where that is not the file


def reader_of(path: Path) -> Callable[[Path, str], Iterator[RawDocument]]:
    """The function that reads a file, by its suffix: (path, name of the text's field) -> documents."""
    if path.name.endswith(JSONL_SUFFIXES):
        return _read_jsonl
    match path.suffix:
        case ".parquet":
            return _read_parquet
        case ".tar":
            return _read_tar
        case _:
            return _read_whole


def is_unreadable(path: Path) -> bool:
    """Whether a file's name says that it is packed in a way no reader here knows."""
    return path.name.endswith(UNREADABLE_SUFFIXES) and not path.name.endswith(SUFFIXES)


def _read_whole(path: Path, field: str) -> Iterator[RawDocument]:
    content = path.read_bytes()
    yield RawDocument(str(path), content, len(content))


def _read_jsonl(path: Path, field: str) -> Iterator[RawDocument]:
    number = 0
    try:
        with open(path, "rb") as file, _unpacked(path, file) as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield RawDocument(f"{path}:{number}", line, file.tell(), True, " of the line")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _damaged(path, "gzip", number, error) from None


@contextmanager
def _unpacked(path: Path, file: IO[bytes]) -> Iterator[Any]:
    """The lines of a file, whatever packs it."""
    match path.suffix:
        case ".gz":
            yield gzip.GzipFile(fileobj=file)
        case ".zst":
            yield _ZstdLines(path, file)
        case _:
            yield file


class _ZstdLines:
    """Iterates over lines; pyarrow's errors, which are of type OSError, become refusals."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        pyarrow = load_pyarrow(path)
        packed = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")
        self._lines: Any = io.BufferedReader(packed, ZSTD_BUFFER_BYTES)
        self._path, self._number = path, 0

    def __iter__(self) -> Iterator[bytes]:
        return self

    def __next__(self) -> bytes:
        try:
            line: bytes = next(self._lines)
        except OSError as error:
            raise _damaged(self._path, "zstd", self._number, error) from None
        self._number += 1
        return line


def _damaged(path: Path, packing: str, line: int, error: Exception) -> UserError:
    return UserError(f"{path}: damaged {packing} after line {line}: {error}; fetch the file again")


def _read_tar(path: Path, field: str) -> Iterator[RawDocument]:
    waiting: TarMember | None = None  # a sample's best member so far
    found = False
    for member in tar_members(path, MEMBER_SUFFIXES):
        found = True
        if waiting is not None and member.sample == waiting.sample:
            waiting = min(waiting, member, key=lambda m: MEMBER_SUFFIXES.index(m.suffix))
            continue
        if waiting is not None:
            yield _document_of(path, waiting)
        waiting = member
    if waiting is not None:
        yield _document_of(path, waiting)
    if not found:
        rule = "a shard of text holds members named *.txt or *.json"
        raise UserError(f"{path}: holds no text: {rule}; shards of token ids go to tools/index_shards.py")


def _document_of(path: Path, member: TarMember) -> RawDocument:
    is_json = member.suffix == "json"
    return RawDocument(f"{path}: {member.name}", member.data, member.offset, is_json, " of the member")


def _read_parquet(path: Path, field: str) -> Iterator[RawDocument]:
    pyarrow = load_pyarrow(path)
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            _check_text_column(path, file.schema_arrow, field)
            rows, total, size = 0, file.metadata.num_rows, path.stat().st_size
            for batch in file.iter_batches(PARQUET_BATCH_ROWS, columns=[field]):
                # As bytes: Arrow does not promise that a file's strings are UTF-8.
                for content in batch.column(0).cast(pyarrow.large_binary()).to_pylist():
                    rows += 1
                    position = size * rows // total
                    yield RawDocument(f"{path}: row {rows}", content or b"", position, within=" of the text")
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: damaged Parquet file: {error}; fetch the file again") from None


def _check_text_column(path: Path, schema: Any, field: str) -> None:
    if field not in schema.names:
        raise UserError(f"{path}: no column {field!r}; pass --text-field (columns here: {', '.join(schema.names)})")
    kind = str(schema.field(field).type)
    if not any(name in kind for name in ("string", "binary")) or "<" in kind.replace("dictionary<", "", 1):
        raise UserError(f"{path}: column {field!r} is {kind}, it must hold strings; pass another --text-field")


def load_pyarrow(path: Path) -> Any:
    """The optional dependency; UserError where it is not installed."""
    try:
        import pyarrow
    except ImportError:
        way_out = "pip install 'megassm[arrow]'"
        raise UserError(f"{path}: reading {path.suffix} needs pyarrow, which is not installed; {way_out}") from None
    return pyarrow
