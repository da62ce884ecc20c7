"""Writes a task's data set: train/ and valid/, shards like any other's, and task.json (`megassm.data.task`)."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from megassm.data.dataset import TRAIN, VALID, keep_tokenizer
from megassm.data.index import ShardSet, ShardSizes
from megassm.data.prepare.shard_writer import ShardWriter
from megassm.data.task import Example, Task, TaskTokenizer
from megassm.errors import UserError
from megassm.files import sync

SIZES = ShardSizes(block_tokens=1 << 18, member_tokens=1 << 18)
"""Smaller blocks than a text's: the sets are small, and blocks are what an epoch's order is made of."""


def write_task(output: Path, task: Task, splits: Mapping[str, Iterable[Example]]) -> dict[str, ShardSet]:
    """Writes the examples of "train" and "valid" in their order; OUTPUT is there when all are.

    Raises:
        UserError: OUTPUT is there already, an example does not fit the task, a split has none.
    """
    if output.exists():
        raise UserError(f"--output {output}: is there already; give another directory or remove it")
    partial = output.with_name(f".partial-{output.name}")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        tokenizer = TaskTokenizer(task)
        keep_tokenizer(tokenizer, partial)
        written = {}
        for split in (TRAIN, VALID):
            with ShardWriter(partial / split, tokenizer, SIZES) as writer:
                for example in splits[split]:
                    writer.add(task.ids(example), text_bytes=task.asked)
                written[split] = writer.finish()
        sync(partial)
        partial.rename(output)
        sync(output.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return written
