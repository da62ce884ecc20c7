"""Checks a data set whole: every byte, every count, every id; and shows some of its text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from megassm.data.blocks import local_fetch, read_block
from megassm.data.index import PREPARE_AGAIN, ShardSet
from megassm.data.prepare.workers import in_processes, worthwhile
from megassm.data.tokenizer.base import Tokenizer
from megassm.errors import UserError
from megassm.files import open_given

SAMPLE_CHARS = 300


def verify(
    shard_set: ShardSet, workers: int = 1, on_done: Callable[[int], None] = lambda read_bytes: None
) -> list[str]:
    """Every damage found, one message each, naming shard and offset; empty: the set is sound.

    `on_done` is told the bytes of the shards that are done.
    """
    done_bytes = 0

    def count(view: ShardSet) -> None:
        nonlocal done_bytes
        done_bytes += view.shards[0].bytes
        on_done(done_bytes)

    workers = worthwhile(workers, sum(shard.bytes for shard in shard_set.shards))
    found = in_processes(_verify_shard, _views(shard_set), workers, count)
    return [damage for damages in found for damage in damages]


def _views(shard_set: ShardSet) -> list[ShardSet]:
    """The set as if it had one shard only, for each: what a worker process needs to know of it."""
    order = np.argsort(shard_set.blocks["shard"], kind="stable")
    blocks = shard_set.blocks[order]
    starts = np.searchsorted(blocks["shard"], np.arange(len(shard_set.shards) + 1))
    blocks["shard"] = 0
    return [
        replace(shard_set, shards=(shard,), blocks=blocks[starts[number] : starts[number + 1]])
        for number, shard in enumerate(shard_set.shards)
    ]


def _verify_shard(view: ShardSet) -> list[str]:
    [shard] = view.shards
    path = view.directory / shard.name
    if not path.is_file():
        return [f"{path}: offset 0: no such file, expected {shard.bytes} bytes; {PREPARE_AGAIN}"]
    damages, documents, fetch = [], 0, local_fetch(view.directory)
    for block in range(len(view.blocks)):
        try:
            documents += int(np.count_nonzero(read_block(view, block, fetch) == view.eod))
        except UserError as error:
            damages.append(str(error))
    with open_given(path) as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != shard.sha256:
        where = "" if damages else f" {_outside_blocks(view)}:"
        damages.append(f"{path}:{where} expected sha256 {shard.sha256}, got {sha256}; {PREPARE_AGAIN}")
    elif not damages and documents != shard.documents:
        damages.append(f"{path}: expected {shard.documents} documents, got {documents}; {PREPARE_AGAIN}")
    return damages


def _outside_blocks(view: ShardSet) -> str:
    """Where a damage must be that is in no block."""
    starts = [*view.blocks["offset"].tolist(), view.shards[0].bytes]
    ends = [0, *(view.blocks["offset"] + view.blocks["size"]).tolist()]
    gaps = [f"[{end}, {start})" for end, start in zip(ends, starts, strict=True) if start > end]
    return f"outside its blocks, at offsets {' or '.join(gaps)}"


class Sample(NamedTuple):
    """The beginning of a document."""

    place: str  # shard and block
    text: str


def sample_texts(shard_set: ShardSet, tokenizer: Tokenizer, count: int) -> Iterator[Sample]:
    """The beginnings of `count` documents (fewer where there are fewer blocks), spread over the set."""
    fetch, blocks = local_fetch(shard_set.directory), len(shard_set.blocks)
    for block in np.unique(np.linspace(0, blocks - 1, min(count, blocks)).astype(int)).tolist():
        ids = read_block(shard_set, block, fetch)
        ends = np.flatnonzero(ids == shard_set.eod)
        start = int(ends[len(ends) // 2 - 1]) + 1 if len(ends) > 1 else 0
        entry = shard_set.blocks[block]
        place = f"{shard_set.shards[int(entry['shard'])].name}, block at offset {int(entry['offset'])}"
        stop = int(ends[np.searchsorted(ends, start)]) if len(ends) and start <= ends[-1] else ids.size
        text = tokenizer.decode(ids[start : min(stop, start + SAMPLE_CHARS)].tolist())
        yield Sample(place, text[:SAMPLE_CHARS])


def check_tokenizer(shard_set: ShardSet, tokenizer: Tokenizer, name: str) -> list[str]:
    """What is wrong with taking this tokenizer for the set; empty: it made the set."""
    if tokenizer.sha256 == shard_set.tokenizer_sha256:
        return []
    made = f"{shard_set.tokenizer} (sha256 {shard_set.tokenizer_sha256[:12]})"
    given = f"{name} ({tokenizer.sha256[:12]})"
    return [f"{shard_set.directory}: made with tokenizer {made}, not with {given}; give its own as --tokenizer"]


def set_directories(directory: Path, mark: str, names: tuple[str, ...]) -> list[Path]:
    """A directory with a file like `mark`, or those of its folders `names` that have one; UserError where none has."""
    found = [path for path in (directory, *(directory / name for name in names)) if any(path.glob(mark))]
    if not found:
        places = ", ".join(f"{name}/" for name in names)
        raise UserError(f"{directory}: holds no {mark}, and {places} neither; give the directory of a data set")
    return found[:1] if found[0] == directory else found
