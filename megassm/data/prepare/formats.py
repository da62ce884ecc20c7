"""The kinds of files that documents are read from: one function a kind, each yields what the file holds, unchecked.

    text         the file is one document, or one every separator; a long one comes in pieces
    json lines   one JSON object a line
    json values  one JSON array of objects, or objects one after the other
    parquet      one row a document
    arrow        the same: a file or stream of Arrow, as `datasets` saves a data set to disk
    tar          WebDataset shards: one sample a document, `.txt` or else `.json`
    mds, litdata shards of samples with columns: one sample a document, or stretches of a stream of token ids
    megatron, llm.c, u16, u32, i64   files of token ids

`kinds` says which a file is. Each may be compressed. Memory: one document, of a text file one piece, of Parquet a
batch of rows and the pages they stand in. zstd and Parquet need pyarrow, an optional dependency.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megassm.data.prepare.columns import BATCH_ROWS, check_arrow, check_lengths, parquet_rows
from megassm.data.prepare.ids import documents_of_ids
from megassm.data.prepare.kinds import InputFile
from megassm.data.prepare.records import RawDocument, json_values, lines_of
from megassm.data.prepare.sample_shards import Wanted, documents_of_litdata, documents_of_mds
from megassm.data.prepare.samples import LeftOutMembers, documents_of_tar
from megassm.data.prepare.shard_lists import shard_list
from megassm.data.prepare.source import TextSource
from megassm.data.prepare.text import documents_of_text
from megassm.data.prepare.token_files import runs_of_file
from megassm.data.prepare.unpack import load_pyarrow, open_unpacked
from megassm.errors import UserError

ARROW_FAULTS = (OSError, OverflowError, MemoryError, UnicodeDecodeError)
"""What pyarrow raises besides its own for a damaged file: one may ask for any memory, and name columns in no UTF-8."""
ARROW_END = b"\xff\xff\xff\xff\0\0\0\0"


def read_file(file: InputFile, source: TextSource, left_out: LeftOutMembers) -> Iterator[RawDocument]:
    """The documents of one file. UserError where it is damaged; a record's own faults are the caller's to find."""
    try:
        match file.kind:
            case "parquet":
                yield from _read_parquet(file, source.text_field)
            case "arrow":
                yield from _read_arrow(file, source.text_field)
            case "u16" | "u32" | "i64" | "llm.c" | "megatron":
                yield from documents_of_ids(file.path, runs_of_file(file.path, file.kind), source.ids)
            case _:
                yield from _read_stream(file, source, left_out)
    except OSError as error:
        why = error.strerror or error
        raise UserError(f"{file.path}: cannot be read: {why}; mend that, or leave the file out") from None


def _read_stream(file: InputFile, source: TextSource, left_out: LeftOutMembers) -> Iterator[RawDocument]:
    wanted = Wanted(source.text_field, source.format, source.samples == "chunks", source.ids)
    with open(file.path, "rb") as raw:
        stream = open_unpacked(file.path, file.packing, raw)
        match file.kind:
            case "text":
                yield from documents_of_text(file.path, stream, raw, source.document_separator)
            case "json lines":
                for number, line in lines_of(file.path, stream):
                    if line.strip():
                        yield RawDocument(f"{file.path}:{number}", line, raw.tell(), True, " of the line")
            case "json values":
                for number, value in enumerate(json_values(file.path, stream), start=1):
                    place = f"{file.path}: record {number}"
                    yield RawDocument(place, value, raw.tell(), True, " of the record")
            case "tar":
                yield from documents_of_tar(file.path, stream, raw, left_out)
            case "mds":
                yield from documents_of_mds(file.path, stream, raw, wanted)
            case "litdata":
                listed = shard_list(file.path.parent)
                if listed is None or listed.columns is None or file.path.name not in listed.shards:
                    raise UserError(f"{file.path}: the index.json beside it was changed; run the command again")
                samples = listed.shards[file.path.name].samples
                yield from documents_of_litdata(file.path, stream, raw, listed.columns, samples, wanted)
            case _:
                raise AssertionError(f"{file.kind} is read by its own reader")


def _read_parquet(file: InputFile, field: str) -> Iterator[RawDocument]:
    path = file.path
    if file.packing is not None:
        raise UserError(f"{path}: a Parquet file within {file.packing}; unpack it, it is compressed by itself")
    pyarrow = load_pyarrow(path)
    from pyarrow import parquet

    try:
        # Not pre-buffered: that would keep every column chunk it has read.
        with open(path, "rb") as raw, parquet.ParquetFile(raw, pre_buffer=False) as opened:  # a name may not be UTF-8
            _check_text_column(file, opened.schema_arrow, field)
            rows, total = 0, opened.metadata.num_rows
            for batch in _parquet_batches(path, opened, field):
                # As bytes: Arrow does not promise that a file's strings are UTF-8.
                column = _flat(batch.column(0), pyarrow).cast(pyarrow.large_binary())
                check_lengths(column, f"{path}: a text after row {rows}")
                for content in column.to_pylist():
                    rows += 1
                    position = file.size * rows // total
                    yield RawDocument(f"{path}: row {rows}", content or b"", position, within=" of the text")
            if rows != total:
                raise UserError(f"{path}: damaged Parquet file: {rows} of {total} rows; fetch the file again")
    except (pyarrow.ArrowException, *ARROW_FAULTS) as error:
        raise UserError(f"{path}: damaged Parquet file: {error}; fetch the file again") from None


def _parquet_batches(path: Path, opened: Any, field: str) -> Iterator[Any]:
    for group in range(opened.num_row_groups):
        rows = parquet_rows(path, opened.metadata, group, field)
        yield from opened.iter_batches(rows, row_groups=[group], columns=[field])


def _read_arrow(file: InputFile, field: str) -> Iterator[RawDocument]:
    path = file.path
    if file.packing is not None:
        raise UserError(f"{path}: an Arrow file within {file.packing}; unpack it")
    pyarrow = load_pyarrow(path)
    from pyarrow import ipc

    try:
        with open(path, "rb") as raw, pyarrow.PythonFile(raw, mode="r") as mapped:  # a name may not be UTF-8
            check_arrow(path, raw)
            is_stream = mapped.read(4) == b"\xff\xff\xff\xff"
            mapped.seek(0)
            opened = ipc.open_stream(mapped) if is_stream else ipc.open_file(mapped)
            _check_text_column(file, opened.schema, field)
            outer = field if field in opened.schema.names else field.partition(".")[0]
            batches = opened if is_stream else map(opened.get_batch, range(opened.num_record_batches))
            rows = 0
            for whole in batches:
                for start in range(0, whole.num_rows, BATCH_ROWS):
                    column = whole.column(whole.schema.get_field_index(outer)).slice(start, BATCH_ROWS)
                    for name in field.split(".")[1:] if outer != field else ():
                        column = column.flatten()[column.type.get_field_index(name)]
                    for content in _checked_bytes(column, pyarrow, f"{path}: a text after row {rows}"):
                        rows += 1
                        yield RawDocument(f"{path}: row {rows}", content or b"", mapped.tell(), within=" of the text")
            if is_stream:
                _check_arrow_end(path, mapped)
    except (pyarrow.ArrowException, *ARROW_FAULTS) as error:
        raise UserError(f"{path}: damaged Arrow file: {error}; fetch the file again") from None


def _checked_bytes(column: Any, pyarrow: Any, place: str) -> list[bytes | None]:
    """A column's texts. Arrow believes the offsets that a file holds, and would read whatever lies there."""
    plain = pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
    column.validate(full=not plain)  # of strings that would refuse bytes that are not UTF-8, which are checked later
    stored = column.cast(pyarrow.large_binary())
    stored.validate(full=True)
    check_lengths(stored, place)
    texts: list[bytes | None] = stored.to_pylist()
    return texts


def _check_arrow_end(path: Path, mapped: Any) -> None:
    """A stream ends with a mark; pyarrow takes one that was cut between two batches for whole."""
    end = mapped.tell()
    mapped.seek(max(0, end - len(ARROW_END)))
    if mapped.read(len(ARROW_END)) != ARROW_END or mapped.read(1):
        rule = "it does not end with its mark, or something follows"
        raise UserError(f"{path}: damaged Arrow file: {rule}; fetch the file again")


def _flat(column: Any, pyarrow: Any) -> Any:
    """The texts of a column; of a nested one, which comes as structs, the field within."""
    while pyarrow.types.is_struct(column.type):
        column = column.flatten()[0]
    return column


def _check_text_column(file: InputFile, schema: Any, field: str) -> None:
    names: list[str] = schema.names
    if names.count(field) > 1:
        raise UserError(f"{file.path}: has {names.count(field)} columns named {field!r}; rename one of them")
    outer, *inner = [field] if field in names else field.split(".")
    if outer not in names:
        raise UserError(f"{file.path}: no column {field!r}; pass --text-field (columns here: {', '.join(names)})")
    kind = schema.field(outer).type
    for name in inner:
        children = [kind.field(n).name for n in range(kind.num_fields)] if "struct" in str(kind)[:6] else []
        if name not in children:
            found = ", ".join(children) or "none"
            raise UserError(f"{file.path}: no column {field!r}; pass --text-field (fields in {outer}: {found})")
        kind = kind.field(name).type
    if not any(name in str(kind) for name in ("string", "binary")) or "<" in str(kind).replace("dictionary<", "", 1):
        raise UserError(f"{file.path}: column {field!r} is {kind}, it must hold strings; pass another --text-field")
