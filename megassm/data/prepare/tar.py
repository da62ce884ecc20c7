"""Members of a tar file made elsewhere, one at a time, where a damaged file is refused.

Python's tarfile ends silently at a header that it cannot read, and at a file cut between two members: what is
missing would never be noticed. A sound tar file ends with zeros.
"""

from __future__ import annotations

import io
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from megassm.data.prepare.records import MOST_RECORD_BYTES
from megassm.errors import UserError
from megassm.files import open_given
from megassm.guarded import check_tar

TAR_RECORD_BYTES = 512
KEPT_BYTES = 1 << 13  # behind the position in a stream: tarfile goes back by a few records at most
CHUNK_BYTES = 1 << 20
META = re.compile(r"__[^/]*__(/|$)")  # webdataset's mark of members that are not samples


class TarMember(NamedTuple):
    """A regular file in a tar; sample and suffix as webdataset splits them: `a/7.txt` is `a/7` and `txt`."""

    sample: str
    suffix: str  # lower case; may hold dots
    name: str
    offset: int  # of its first header in the tar
    end: int  # of the next member's
    data: bytes


def tar_members(path: Path, suffixes: tuple[str, ...] = ()) -> Iterator[TarMember]:
    """The regular files with one of `suffixes` (all, where none is given), in the order of the tar.

    Memory: one member.

    Raises:
        UserError: not a tar file, damaged, or cut short; names file and offset.
    """
    with open_given(path) as file:
        yield from members_of(path, file, lambda entry: not suffixes or split_name(entry.name)[1] in suffixes)


def members_of(path: Path, file: IO[bytes], wanted: Callable[[tarfile.TarInfo], bool]) -> Iterator[TarMember]:
    """As `tar_members`, of a stream that need not go back, and of the members that are `wanted`.

    `wanted` is asked of every entry that has a sample's name, also of links; these are never yielded.
    """
    if file.seekable():
        try:
            check_tar(file, path.stat().st_size)
        except ValueError as error:
            place, _, what = str(error).partition(": ")
            raise UserError(f"{path}: {place}: not a sound tar file: {what}; fetch or make the file again") from None
        file.seek(0)
    stream: Any = Forward(file)
    offset = 0
    try:
        with tarfile.open(fileobj=stream, mode="r:") as opened:
            tar: Any = opened  # its list of members is not in its types
            while (entry := tar.next()) is not None:
                tar.members = []  # or it would remember every header of the file
                sample, suffix = split_name(entry.name)
                offset = tar.offset
                if sample and not entry.isdir() and wanted(entry) and entry.isfile():
                    content = tar.extractfile(entry)
                    yield TarMember(sample, suffix, entry.name, entry.offset, offset, content.read())
            _check_end(path, stream, tar.offset)
    except (tarfile.TarError, EOFError) as error:
        raise _damaged(path, offset, str(error)) from None


def split_name(name: str) -> tuple[str, str]:
    """(sample, suffix) of a member's name; an empty sample where webdataset skips the member."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    if not stem or not dot or META.match(name):
        return "", ""
    return folder + slash + stem, suffix.lower()


class Forward:
    """A stream as tarfile wants it: it goes forward by reading, and back within the last bytes read."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._position, self._end = file, 0, 0
        self._kept = b""  # the last bytes before `_end`

    def tell(self) -> int:
        return self._position

    def seekable(self) -> bool:
        return True

    def seek(self, position: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or position < self._end - len(self._kept):
            raise tarfile.ReadError(f"a header points back to offset {position}")
        self._position = position
        return position

    def read(self, size: int = -1) -> bytes:
        if size > MOST_RECORD_BYTES + TAR_RECORD_BYTES and not self._file.seekable():  # of a file it was checked before
            raise tarfile.ReadError(f"asks for {size:,} bytes at once, more than the {MOST_RECORD_BYTES:,} of a record")
        if self._position > self._end and self._file.seekable():
            self._file.seek(self._position)
            self._kept, self._end = b"", self._position
        while self._position > self._end:
            if not self._fill(min(CHUNK_BYTES, self._position - self._end)):
                return b""
        behind = self._kept[len(self._kept) - (self._end - self._position) :] if self._position < self._end else b""
        found = behind if size < 0 else behind[:size]
        if size < 0 or len(found) < size:
            found += self._fill(-1 if size < 0 else size - len(found))
        self._position += len(found)
        return found

    def _fill(self, size: int) -> bytes:
        content = self._file.read(size)
        self._end += len(content)
        self._kept = (self._kept + content)[-KEPT_BYTES:] if len(content) < KEPT_BYTES else content[-KEPT_BYTES:]
        return content


def _check_end(path: Path, stream: Forward, offset: int) -> None:
    """After the last member a tar file holds zeros, at least one record of them."""
    found = 0
    stream.seek(offset)
    while rest := stream.read(CHUNK_BYTES):
        if b"ustar" in rest and rest.lstrip(b"\0")[257:262] == b"ustar" and (found or rest.startswith(b"\0")):
            way_out = "give the files that were joined, or pack their content again (tar --ignore-zeros reads them)"
            raise UserError(f"{path}: another tar follows after offset {offset}; {way_out}")
        found += len(rest)
        if rest.strip(b"\0"):
            raise _damaged(path, offset, "no header of a member there")
    if found < TAR_RECORD_BYTES:
        raise _damaged(path, offset, "the file ends without the mark of an archive's end; it was cut short")


def _damaged(path: Path, offset: int, what: str) -> UserError:
    return UserError(f"{path}: offset {offset}: not a sound tar file: {what}; fetch or make the file again")
