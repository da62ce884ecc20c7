"""What an input file is: decided once, by its first bytes and its name, after its compression is peeled off.

The table of docs/data.md, "What goes in", says the same in words. What is not understood is refused by name:
packed or binary bytes are never text.
"""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Literal, NamedTuple

from megassm.data.prepare.records import first_object, has_field, is_object
from megassm.data.prepare.shard_lists import LIST_NAME, shard_list
from megassm.data.prepare.token_files import FLAT_DTYPES, FlatKind, token_kind
from megassm.data.prepare.unpack import MAGIC_BYTES, open_unpacked, packing_of, split_packing
from megassm.errors import UserError

TokenKind = Literal["u16", "u32", "i64", "llm.c", "megatron"]
Kind = Literal["text", "json lines", "json values", "parquet", "arrow", "tar", "mds", "litdata", TokenKind]
Format = Literal["auto", "text", "json", FlatKind]

HEAD_BYTES = 1 << 16
BY_THEMSELVES = (".parquet", ".arrow", ".tar", ".mds")  # are what they are, whatever the --format
LEAST_WIDE_BYTES = 8  # of text that is taken for UTF-16 without its mark
LINE_SUFFIXES = (".jsonl", ".ndjson", ".jsonlines")
JSON_SUFFIXES = (*LINE_SUFFIXES, ".json")
TEXT_SUFFIXES = (".txt", ".md")
READ_SUFFIXES = (*TEXT_SUFFIXES, *JSON_SUFFIXES, ".parquet", ".arrow", ".tar", ".mds")
UNPACK = "unpack it and give what it holds"
CONVERT = "convert it to text, JSON lines or Parquet"
TOKENS = "token ids: see --format u16, u32, i64; tar shards of such go to tools/index_shards.py"
FOREIGN = {
    b"PK\x03\x04": ("a zip archive (or .docx, .xlsx, .npz)", UNPACK),
    b"7z\xbc\xaf\x27\x1c": ("a 7z archive", UNPACK),
    b"Rar!\x1a\x07": ("a rar archive", UNPACK),
    b"\x04\x22\x4d\x18": ("an lz4 file", UNPACK),
    b"Obj\x01": ("an Avro file", CONVERT),
    b"SQLite format 3\0": ("an SQLite database", CONVERT),
    b"\x89HDF": ("an HDF5 file", CONVERT),
    b"%PDF-": ("a PDF file", CONVERT),
    b"\xd0\xcf\x11\xe0": ("an Office file", CONVERT),
    b"\x93NUMPY": ("a NumPy array", TOKENS),
    b"MMIDIDX\0": ("an index of Megatron-LM", "give the .bin beside it"),
    b"\x80\x02": ("a pickle", CONVERT),
    b"\x80\x04": ("a pickle", CONVERT),
    b"\x89PNG": ("an image", CONVERT),
    b"\xff\xd8\xff": ("an image", CONVERT),
    b"\x7fELF": ("a program", CONVERT),
}
ARROW_MARKS = (b"ARROW1\0\0", b"\xff\xff\xff\xff")  # a file, a stream
WIDE = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\0\0\xfe\xff": "UTF-32"}


class InputFile(NamedTuple):
    """A file to read documents from."""

    path: Path
    kind: Kind
    packing: str | None  # one of unpack.MAGIC
    size: int  # bytes on disk
    for_validation: bool = False  # a file of --valid-input

    @property
    def beside(self) -> tuple[Path, ...]:
        """Other files that say what is in this one."""
        index, listed = self.path.with_suffix(".idx"), self.path.parent / LIST_NAME
        return {"megatron": (index,), "litdata": (listed,)}.get(self.kind, ())


def is_read(name: str) -> bool:
    """Whether a file of this name is taken from a folder that is searched."""
    return split_packing(name)[0].endswith(READ_SUFFIXES)


def look_at(path: Path, text_field: str, forced: Format = "auto") -> InputFile:
    """What a file is. UserError where it cannot be opened, is damaged at its start, or is nothing that is read."""
    name, named_packing = split_packing(path.name)
    try:
        if known := _by_what_lies_beside(path, named_packing, forced):
            return known
        with open(path, "rb") as file:
            size = path.stat().st_size
            packing = packing_of(file.read(MAGIC_BYTES))
            if named_packing is not None and packing != named_packing:
                what = f"begins as {packing}" if packing else "does not begin as one" if size else "is empty"
                way_out = "fetch the file again, or rename it where it is not packed"
                raise UserError(f"{path}: damaged {named_packing}: it {what}; {way_out}")
            file.seek(0)
            head = open_unpacked(path, packing, file).read(HEAD_BYTES)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}; mend that, or leave the file out") from None
    if again := packing_of(head):
        raise UserError(f"{path}: packed twice ({packing or named_packing}, {again}); {UNPACK}")
    return InputFile(path, _kind_of(path, name, head, text_field, forced), packing, size)


def is_token_file(path: Path, forced: Format) -> bool:
    """Whether a file of a folder, whose name alone does not say so, holds token ids or samples."""
    if path.suffix != ".bin":
        return False
    try:
        return _listed(path) is not None or token_kind(path, forced) is not None
    except (OSError, UserError):
        return True  # which says what is wrong when it is looked at


def _listed(path: Path) -> InputFile | None:
    """A chunk of litdata, which nothing but the list beside it tells."""
    found = shard_list(path.parent)
    if found is None or found.kind != "litdata" or path.name not in found.shards:
        return None
    return InputFile(path, "litdata", found.shards[path.name].packing, path.stat().st_size)


def _by_what_lies_beside(path: Path, named_packing: str | None, forced: Format) -> InputFile | None:
    """Files whose first bytes may be any: what they are must be known before these are looked at."""
    if listed := _listed(path):
        return listed
    kind = token_kind(path, forced)
    if kind in FLAT_DTYPES and split_packing(path.name)[0].endswith(BY_THEMSELVES):
        return None
    if kind in FLAT_DTYPES and named_packing is not None:
        raise UserError(f"{path}: token ids within {named_packing}; {UNPACK}")
    return None if kind is None else InputFile(path, kind, None, path.stat().st_size)


def _kind_of(path: Path, name: str, head: bytes, field: str, forced: Format) -> Kind:
    if name.endswith(".mds"):
        return "mds"
    if head.startswith(b"PAR1\x15") or (name.endswith(".parquet") and forced == "auto"):
        return "parquet"
    if head.startswith(ARROW_MARKS):
        return "arrow"
    if _begins_as_tar(head) or (name.endswith(".tar") and forced == "auto"):
        return "tar"
    _refuse_what_is_no_text(path, head)
    start = head.removeprefix(codecs.BOM_UTF8).lstrip()
    if forced == "json" or (forced == "auto" and name.endswith(JSON_SUFFIXES)):
        return _json_kind(name, start)
    if forced == "auto" and has_field(first_object(start), field):
        return _json_kind(name, start)
    return "text"


def _json_kind(name: str, start: bytes) -> Kind:
    line, newline, _ = start.partition(b"\n")
    if start.startswith(b"["):
        return "json values"
    if name.endswith(LINE_SUFFIXES):
        return "json values" if line.strip() == b"{" else "json lines"
    return "json lines" if newline and is_object(line) is not None else "json values"


def _begins_as_tar(head: bytes) -> bool:
    return head[257:262] == b"ustar"


def _refuse_what_is_no_text(path: Path, head: bytes) -> None:
    for magic, (what, way_out) in FOREIGN.items():
        if head.startswith(magic):
            raise UserError(f"{path}: is {what}, which is not read; {way_out}")
    encoding = next((name for mark, name in WIDE.items() if head.startswith(mark)), None)
    zeros = [head[start::2].count(0) * 4 > len(head) for start in (0, 1)]
    if encoding is None and len(head) >= LEAST_WIDE_BYTES and any(zeros) and not all(zeros):
        encoding = "UTF-16"
    if encoding is not None:
        raise UserError(f"{path}: is {encoding}, text must be UTF-8; convert it: iconv -f {encoding} -t UTF-8")
    if head.count(0) * 4 > len(head) or (b"\0" in head and not _is_utf8(head)):
        raise UserError(f"{path}: holds binary data, not text; {CONVERT} ({TOKENS})")


def _is_utf8(head: bytes) -> bool:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return False
    return True
