"""Indexes shards made elsewhere, so that training reads them as they are: the logic behind tools/index_shards.py.

A shard is a plain tar whose samples hold token ids: .u16 or .u32 (little-endian) or .npy. What else a sample holds
is left alone. Nothing but index.json and index.npz is written, and these only when every shard was read.
"""

from __future__ import annotations

import hashlib
import zlib
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from megassm.cli.progress import Progress
from megassm.data.blocks import ID_FORMATS, id_format, member_ids, stored_ids
from megassm.data.index import INDEX_NAME, MemberKind, MemberLayout, ShardFile, ShardSet, load_index, token_dtype
from megassm.data.prepare.shard_writer import write_index
from megassm.data.prepare.tar import TarMember, tar_members
from megassm.data.prepare.workers import in_processes, worthwhile
from megassm.data.tokenizer.base import Tokenizer, TokenizerSpec, load_tokenizer
from megassm.errors import UserError

HASH_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class IndexJob:
    """Which shards to index, and what they hold. `workers` has no part in the result."""

    directory: Path
    tokenizer: TokenizerSpec
    members: MemberKind = "documents"
    suffix: str | None = None  # of the members with ids; None: the only one that is there
    block_tokens: int = 1 << 20
    workers: int = 1

    def __post_init__(self) -> None:
        for name in ("block_tokens", "workers"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, it must be at least 1")
        if self.suffix is not None and not id_format(self.suffix):
            raise UserError(f"suffix {self.suffix!r}: ids are read from {', '.join(ID_FORMATS)} or NAME.npy")


@dataclass(frozen=True)
class _Scan:
    """What one shard holds; the number of the shard is not in the blocks yet."""

    shard: ShardFile
    text_bytes: int
    blocks: list[tuple[int, ...]]  # rows of BLOCK_DTYPE


def index_shards(job: IndexJob, progress: Progress) -> ShardSet:
    """Reads every *.tar in the directory, in the order of their names, and writes their index.

    Raises:
        UserError: no shards, an index already there, a damaged shard, ids that the tokenizer does not know; names
            shard, member and offset.
    """
    if (job.directory / INDEX_NAME).exists():
        rule = f"has an {INDEX_NAME} already"
        raise UserError(f"{job.directory}: {rule}; check it with tools/verify_data.py, or remove it to index again")
    paths = shards_in(job.directory)
    if not paths:
        raise UserError(f"{job.directory}: holds no *.tar; a shard must be an unpacked tar file to be read in parts")
    job = replace(job, suffix=job.suffix or _only_suffix(paths[0]))
    tokenizer = load_tokenizer(job.tokenizer)
    total_bytes = sum(path.stat().st_size for path in paths)
    progress.start("index", total_bytes)
    done_bytes = 0

    def on_done(path: Path) -> None:
        nonlocal done_bytes
        done_bytes += path.stat().st_size
        progress.update(done_bytes)

    scans = in_processes(partial(_scan, job), paths, worthwhile(job.workers, total_bytes), on_done)
    blocks = [(number, *row[1:]) for number, scan in enumerate(scans) for row in scan.blocks]
    layout = {"suffix": str(job.suffix), "members": job.members}
    text_bytes = sum(scan.text_bytes for scan in scans)
    write_index(job.directory, tokenizer, text_bytes, [scan.shard for scan in scans], blocks, layout)
    return load_index(job.directory)


def shards_in(directory: Path) -> list[Path]:
    """The tar files of a directory, by name."""
    return sorted(path for path in directory.glob("*.tar") if path.is_file() and not path.name.startswith("."))


def _only_suffix(path: Path) -> str:
    """The suffix of the members with ids, from the shard's first sample."""
    sample, found = None, []
    for member in tar_members(path):
        if sample not in (None, member.sample):
            break
        sample = member.sample
        found.append(member.suffix)
    usable = [suffix for suffix in found if id_format(suffix)]
    if len(usable) != 1:
        rule = f"its first sample holds {', '.join('.' + suffix for suffix in found) or 'nothing'}"
        raise UserError(f"{path}: {rule}; say with --suffix which are token ids ({', '.join(ID_FORMATS)} or NAME.npy)")
    return usable[0]


class _Counter:
    """The running counts of a shard and of its last block."""

    def __init__(self, job: IndexJob, tokenizer: Tokenizer, path: Path) -> None:
        self._job, self._path, self._eod = job, path, tokenizer.eod
        dtype = token_dtype(tokenizer.vocab_size)
        self._layout = MemberLayout(str(job.suffix), job.members, dtype, tokenizer.eod, tokenizer.vocab_size)
        self._bytes_of = tokenizer.token_bytes()
        self._last_sample = ""
        self.tokens = self.documents = self.text_bytes = 0
        self.spans: list[list[int]] = []  # of blocks: [offset, end, tokens, members]

    def add(self, member: TarMember) -> None:
        place = f"{self._path}: offset {member.offset}: {member.name}"
        if member.sample == self._last_sample:
            raise UserError(f"{place}: a second .{member.suffix} in one sample; give each sample one")
        self._last_sample = member.sample
        try:
            stored = stored_ids(member.data, self._layout)
            ids = member_ids(member.data, self._layout)
        except ValueError as error:
            raise UserError(f"{place}: {error}; give the tokenizer and the --suffix of these shards") from None
        if stored.size < ids.size and np.any(stored == self._eod):
            rule = "holds an end of document, and does not end with one"
            raise UserError(f"{place}: {rule}; pass --members chunks if documents go on in the next member")
        if not self.spans or self.spans[-1][2] >= self._job.block_tokens:
            self.spans.append([member.offset, 0, 0, 0])
        span = self.spans[-1]
        span[1:] = [member.end, span[2] + ids.size, span[3] + 1]
        self.tokens += ids.size
        self.documents += int(np.count_nonzero(ids == self._eod))
        self.text_bytes += int(self._bytes_of[ids].sum())


def _scan(job: IndexJob, path: Path) -> _Scan:
    """Reads a shard, in a worker process."""
    counter = _Counter(job, load_tokenizer(job.tokenizer), path)
    for member in tar_members(path, (str(job.suffix),)):
        counter.add(member)
    if counter.tokens == 0:
        raise UserError(f"{path}: holds no ids in members named *.{job.suffix}; remove it, or give --suffix")
    blocks: list[tuple[int, ...]] = []
    with open(path, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        for offset, end, tokens, members in counter.spans:
            file.seek(offset)
            crc32 = 0
            for start in range(offset, end, HASH_CHUNK_BYTES):
                crc32 = zlib.crc32(file.read(min(HASH_CHUNK_BYTES, end - start)), crc32)
            if tokens:  # a last block may hold empty members only
                blocks.append((0, offset, end - offset, tokens, members, crc32))
    shard = ShardFile(path.name, path.stat().st_size, sha256, counter.tokens, counter.documents)
    return _Scan(shard, counter.text_bytes, blocks)
