"""Documents in WebDataset shards of text: which member of a sample is its document.

A sample is consecutive members with one key. Where tar and webdataset would disagree about what a key stands for (it
comes again later in the file, or two members have one name), the file is refused.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import IO

from megassm.data.prepare.records import MOST_RECORD_BYTES, RawDocument, too_long
from megassm.data.prepare.tar import TarMember, members_of
from megassm.errors import UserError

TEXT, JSON = "txt", "json"
PACK_AGAIN = "pack the tar again with each sample's files side by side (tar --sort=name)"


@dataclass
class LeftOutMembers:
    """Members of tar files that hold text and are not read."""

    links: int = 0
    others: int = 0  # a text beside the text of its sample

    def __bool__(self) -> bool:
        return bool(self.links or self.others)


@dataclass
class _Shard:
    path: Path
    raw: IO[bytes]
    left_out: LeftOutMembers
    seen: set[bytes] = field(default_factory=set)  # hashes of the keys so far

    def documents(self, sample: list[TarMember]) -> Iterator[RawDocument]:
        """Of a whole sample: its `.txt`, or else `.json`, or else those whose names hold more dots."""
        if not sample:
            return
        key = blake2b(sample[0].sample.encode(errors="surrogateescape"), digest_size=8).digest()
        names = [member.suffix for member in sample]
        if key in self.seen or len(set(names)) < len(names):
            rule = "its key comes twice, and webdataset and tar would read two things in it"
            raise UserError(f"{self.path}: {sample[0].name}: {rule}; {PACK_AGAIN}")
        self.seen.add(key)
        chosen = _chosen(sample)
        self.left_out.others += sum(_last(member.suffix) == TEXT for member in sample) - sum(
            _last(member.suffix) == TEXT for member in chosen
        )
        for member in chosen:
            is_json = _last(member.suffix) == JSON
            place = f"{self.path}: {member.name}"
            yield RawDocument(place, member.data, self.raw.tell(), is_json, " of the member")


def documents_of_tar(path: Path, stream: IO[bytes], raw: IO[bytes], left_out: LeftOutMembers) -> Iterator[RawDocument]:
    """The documents of a shard, in its order; `raw` tells how far into the file reading has come.

    Raises:
        UserError: damaged, no text in it, a key that comes again, or a member too long to hold.
    """
    shard = _Shard(path, raw, left_out)
    links = left_out.links

    def wanted(entry: tarfile.TarInfo) -> bool:
        if _last(entry.name.rpartition("/")[2].lower()) not in (TEXT, JSON):
            return False
        left_out.links += entry.issym() or entry.islnk()
        if entry.size > MOST_RECORD_BYTES:
            raise too_long(f"{path}: {entry.name}")
        return True

    sample: list[TarMember] = []
    size = 0
    for member in members_of(path, stream, wanted):
        if sample and member.sample != sample[0].sample:
            yield from shard.documents(sample)
            sample = []
        size = len(member.data) + (size if sample else 0)
        sample.append(member)
        if size > MOST_RECORD_BYTES:
            raise too_long(f"{path}: {member.name} and the others of its key")
    yield from shard.documents(sample)
    if not shard.seen:
        rule = "a shard of text holds members named *.txt or *.json"
        found = f" ({left_out.links - links} links to such)" if left_out.links > links else ""
        raise UserError(f"{path}: holds no text{found}: {rule}; shards of token ids go to tools/index_shards.py")


def _last(suffix: str) -> str:
    return suffix.rpartition(".")[2]


def _chosen(sample: list[TarMember]) -> list[TarMember]:
    for suffix in (TEXT, JSON):
        exact = [member for member in sample if member.suffix == suffix]
        if exact:
            return exact
    for suffix in (TEXT, JSON):
        dotted = [member for member in sample if _last(member.suffix) == suffix]
        if dotted:
            return dotted
    return []
