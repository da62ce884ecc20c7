"""Members of a tar file made elsewhere, one at a time, where a damaged file is refused.

Python's tarfile ends silently at a header that it cannot read, and at a file cut between two members: what is
missing would never be noticed. A sound tar file ends with zeros.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from megassm.errors import UserError
from megassm.guarded import check_tar

TAR_RECORD_BYTES = 512
META = re.compile(r"__[^/]*__(/|$)")  # webdataset's mark for what is no sample


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
    offset = 0
    try:
        with open(path, "rb") as file:
            check_tar(file, path.stat().st_size)
    except ValueError as error:
        raise UserError(f"{path}: not a sound tar file: {error}; fetch or make the file again") from None
    try:
        with open(path, "rb") as file, tarfile.open(fileobj=file, mode="r:") as opened:
            tar: Any = opened  # its list of members is not in its types
            while (entry := tar.next()) is not None:
                tar.members = []  # or it would remember every header of the file
                sample, suffix = split_name(entry.name)
                offset = tar.offset
                if entry.isfile() and sample and (not suffixes or suffix in suffixes):
                    content = tar.extractfile(entry)
                    yield TarMember(sample, suffix, entry.name, entry.offset, offset, content.read())
            _check_end(path, tar.offset)
    except tarfile.TarError as error:
        raise _damaged(path, offset, str(error)) from None


def split_name(name: str) -> tuple[str, str]:
    """(sample, suffix) of a member's name; an empty sample where webdataset skips the member."""
    folder, slash, base = name.rpartition("/")
    stem, dot, suffix = base.partition(".")
    if not stem or not dot or META.match(name):
        return "", ""
    return folder + slash + stem, suffix.lower()


def _check_end(path: Path, offset: int) -> None:
    """After the last member a tar file holds zeros, at least one record of them."""
    found = 0
    with open(path, "rb") as file:
        file.seek(offset)
        while rest := file.read(1 << 20):
            found += len(rest)
            if rest.strip(b"\0"):
                raise _damaged(path, offset, "no header of a member there")
    if found < TAR_RECORD_BYTES:
        raise _damaged(path, offset, "the file ends without the mark of an archive's end; it was cut short")


def _damaged(path: Path, offset: int, what: str) -> UserError:
    return UserError(f"{path}: offset {offset}: not a sound tar file: {what}; fetch or make the file again")
