"""Small data sets for tests: random documents of byte ids, written by the real writer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from megassm.data.index import ShardSet, ShardSizes, index_checksum
from megassm.data.prepare.shard_writer import ShardWriter
from megassm.data.tokenizer.base import BytesTokenizer
from megassm.data.tokenizer.ids import Ids

SMALL = ShardSizes(shard_tokens=1200, block_tokens=400, member_tokens=150)


class WideTokenizer(BytesTokenizer):
    """As many ids as a test needs, so that every token of a data set can be another one."""

    name = "wide"
    vocab_size = 1 << 20
    eod = vocab_size - 1


def edit_index(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Changes what index.json says, its checksum with it: as another writer would have written it."""
    index = json.loads((directory / "index.json").read_text())
    edit(index)
    (directory / "index.json").write_text(json.dumps(index | {"checksum": index_checksum(index)}))


def random_documents(count: int, seed: int = 0, longest: int = 90) -> list[Ids]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 256, random.integers(1, longest)) for _ in range(count)]


def write_documents(directory: Path, documents: list[Ids], sizes: ShardSizes = SMALL) -> ShardSet:
    """Documents of byte ids."""
    with ShardWriter(directory, BytesTokenizer(), sizes) as writer:
        for ids in documents:
            writer.add(ids, text_bytes=ids.size)
        return writer.finish()


def write_unique_ids(directory: Path, tokens: int, sizes: ShardSizes = SMALL) -> ShardSet:
    """`tokens` ids, all different but the EOD after every 49th: exactly-once can be counted."""
    with ShardWriter(directory, WideTokenizer(), sizes) as writer:
        for start in range(0, tokens, 50):
            ids = np.arange(start, min(start + 49, tokens - 1))
            writer.add(ids, text_bytes=ids.size)
        return writer.finish()
