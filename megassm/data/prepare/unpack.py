"""Compressed files as streams of what they hold: recognised by their first bytes, read strictly.

What is cut short, or followed by bytes that are not compressed data, is refused: the standard library's readers of
bzip2 and xz end silently there. Memory: a megabyte, and the window that the file asks for. zstd needs pyarrow.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from megassm.errors import UserError, install_hint

BUFFER_BYTES = 1 << 20
STREAMS_BYTES = 1 << 14
"""Read at a time where many streams may follow each other: what is behind a stream's end is copied for each of them."""
XZ_MEMORY_BYTES = 1 << 29  # a dictionary of at most 256 MiB and more; `xz -9` asks for 64 MiB
MAGIC_BYTES = 10
MAGIC = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\0"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),  # the second: a frame to be skipped
}
SUFFIXES = {".gz": "gzip", ".bz2": "bzip2", ".xz": "xz", ".zst": "zstd", ".zstd": "zstd"}
SHORT_TAR = {".tgz": "gzip", ".tbz2": "bzip2", ".txz": "xz"}


def packing_of(head: bytes) -> str | None:
    """What compressed a file, by its first bytes; None: nothing that is known here."""
    return next((packing for packing, magic in MAGIC.items() if magic.match(head)), None)


def split_packing(name: str) -> tuple[str, str | None]:
    """(a file's name without its suffix of compression, in lower case; the compression that the suffix stands for)."""
    name = name.lower()
    for suffix, packing in SHORT_TAR.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix) + ".tar", packing
    for suffix, packing in SUFFIXES.items():
        if name.endswith(suffix):
            return name.removesuffix(suffix), packing
    return name, None


def open_unpacked(path: Path, packing: str | None, file: IO[bytes]) -> io.BufferedReader:
    """What `file` holds once unpacked. Reading it raises UserError where it is damaged."""
    raw: Any = file if packing is None else _Unpacked(path, packing, file)
    return io.BufferedReader(raw, BUFFER_BYTES)


class _Unpacked(io.RawIOBase):
    """Bytes out of a compressed file; every error of a library becomes a UserError."""

    def __init__(self, path: Path, packing: str, file: IO[bytes]) -> None:
        self._path, self._packing, self._done = path, packing, 0
        self._read = _reader(path, packing, file)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            content = self._read(len(buffer))
        except (EOFError, OSError, zlib.error, lzma.LZMAError, ValueError) as error:
            raise self._refusal(str(error)) from None
        self._done += len(content)
        buffer[: len(content)] = content
        return len(content)

    def _refusal(self, error: str) -> UserError:
        if "too much memory" in error or "emory usage limit" in error:
            how = "zstd -d --long=31" if self._packing == "zstd" else f"{self._packing} -d"
            way_out = f"unpack it first, with {how}"
            return UserError(f"{self._path}: this {self._packing} file asks for too large a window; {way_out}")
        after = f"after {self._done} bytes of its content"
        return UserError(f"{self._path}: damaged {self._packing} {after}: {error}; fetch the file again")


def _reader(path: Path, packing: str, file: IO[bytes]) -> Callable[[int], bytes]:
    match packing:
        case "gzip":
            return gzip.GzipFile(fileobj=file).read
        case "bzip2":
            return _Streams(file, bz2.BZ2Decompressor).read
        case "xz":
            return _Streams(file, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY_BYTES)).read
        case _:
            pyarrow = load_pyarrow(path)
            packed = pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd")
            read: Callable[[int], bytes] = packed.read
            return read


class _Streams:
    """Compressed streams end to end, as `cat a.xz b.xz` makes them."""

    def __init__(self, file: IO[bytes], start: Callable[[], Any]) -> None:
        self._file, self._start = file, start
        self._stream, self._begun = start(), False

    def read(self, size: int) -> bytes:
        while True:
            if self._stream.eof:
                rest: bytes = (self._stream.unused_data or self._file.read(STREAMS_BYTES)).lstrip(b"\0")
                self._stream, self._begun = self._start(), bool(rest)
            else:
                rest = self._file.read(STREAMS_BYTES) if self._stream.needs_input else b""
                self._begun = self._begun or bool(rest)
            if not rest and self._stream.needs_input:
                if self._begun:
                    raise EOFError("the file ends within its compressed data")
                return b""
            content: bytes = self._stream.decompress(rest, size)
            if content:
                return content


def load_pyarrow(path: Path) -> Any:
    """The optional dependency; UserError where it is not installed."""
    try:
        import pyarrow
    except ImportError:
        way_out = install_hint("arrow")
        raise UserError(f"{path}: reading {path.suffix} needs pyarrow, which is not installed; {way_out}") from None
    return pyarrow
