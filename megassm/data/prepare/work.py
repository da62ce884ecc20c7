"""The phases of preparation that take long: read and tokenize, shuffle, write."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from megassm.cli.progress import Progress
from megassm.data.dataset import TRAIN, VALID
from megassm.data.index import ShardSizes, load_index, stored_dtype, token_dtype
from megassm.data.prepare.documents import ReadCounts
from megassm.data.prepare.inputs import Inputs
from megassm.data.prepare.parts import ROW_BYTES, PartStore, default_part_bytes
from megassm.data.prepare.shard_writer import write_index
from megassm.data.prepare.shards import StreamPlan, WriteShard, plan_stream
from megassm.data.prepare.shuffle import (
    BUCKET_BYTES,
    RANGE_ROWS,
    CountRepeats,
    MakeRun,
    RangeFacts,
    Shuffle,
    SortBucket,
    run_groups,
)
from megassm.data.prepare.source import TextSource
from megassm.data.prepare.split import Split
from megassm.data.prepare.units import Reading, UnitRecord, UnitStore, cut_units, total_counts
from megassm.data.prepare.workers import Crew
from megassm.data.tokenizer.base import Tokenizer, TokenizerSpec
from megassm.errors import UserError
from megassm.files import write_atomically

REPAIRED = "repaired UTF-8"
REPEATED = "duplicate"


@dataclass(frozen=True)
class WorkOptions:
    """What is done, beside what to read."""

    source: TextSource
    split: Split
    tokenizer: TokenizerSpec
    deduplicate: bool
    seed: int
    sizes: ShardSizes
    part_bytes: int | None


def filtered(counts: ReadCounts, duplicates: int) -> dict[str, int]:
    """Documents by what the filters did to them, in words for tables; all but `repaired` are left out."""
    return {
        "empty": counts.empty,
        "not UTF-8": counts.bad_utf8,
        "no text in its record": counts.bad_record,
        "link in a tar": counts.members.links,
        "beside the text of a tar's sample": counts.members.others,
        "too short": counts.too_short,
        "too long": counts.too_long,
        REPEATED: duplicates,
        REPAIRED: counts.repaired,
    }


@dataclass
class Work:
    """The phases that take long."""

    options: WorkOptions
    tokenizer: Tokenizer
    directory: Path  # for what is unfinished
    crew: Crew
    progress: Progress
    duplicates: int = 0

    def __post_init__(self) -> None:
        self._store = PartStore(self.directory, self.options.tokenizer, self.tokenizer.sha256)
        self._dtype = token_dtype(self.tokenizer.vocab_size)

    def read(self, inputs: Inputs) -> list[UnitRecord]:
        """Tokenizes every input."""
        self.progress.start("tokenize", inputs.size)
        part_bytes = self.options.part_bytes or default_part_bytes(inputs.size)
        units = cut_units(inputs.files, self.options.source, self.options.split, part_bytes)
        records = Reading(UnitStore(self._store), self.crew, self.progress.update).records(units)
        if not any(record.parts for record in records):
            counts = filtered(total_counts(records), 0).items()
            left_out = ", ".join(f"{count} {name}" for name, count in counts if count) or "no documents"
            raise UserError(f"--input: no text in {len(inputs.files)} files ({left_out}); give files with text")
        return records

    def write(self, records: Sequence[UnitRecord]) -> dict[str, Path]:
        """Shuffles what was tokenized and writes the shards; returns the folder of each split."""
        names = [name for record in records for name in record.parts]
        sizes = [(len(self._store.rows(name)), self._store.ids(name).nbytes) for name in names]
        id_bytes = sum(nbytes for _, nbytes in sizes)
        shuffle = self._shuffle(names, sum(rows for rows, _ in sizes), id_bytes)
        self.progress.start("shuffle", 2 * id_bytes)
        facts: dict[int, RangeFacts] = {}
        self.crew.run(CountRepeats(shuffle), range(shuffle.ranges), facts.__setitem__)
        self.duplicates = sum(fact.duplicates for fact in facts.values())
        # At least the document with the smallest hash: a validation set asked for is never empty.
        smallest = min(fact.smallest_split for fact in facts.values())
        fraction = self.options.split.valid_fraction
        last_valid = max(int(fraction * 2**64) - 1, smallest) if self.options.split.is_hashed and fraction else 0
        groups = run_groups([rows * ROW_BYTES + nbytes for rows, nbytes in sizes])
        done = _Counted(self.progress)
        if not all(map(shuffle.has_bucket, range(shuffle.buckets))):
            share = id_bytes // len(groups)
            self.crew.run(MakeRun(shuffle, last_valid), groups, lambda *_: done.add(share))
            share = id_bytes // shuffle.buckets
            buckets = range(shuffle.buckets)
            self.crew.run(SortBucket(shuffle, len(groups)), buckets, lambda *_: done.add(share))
        done.to(2 * id_bytes)
        for group in groups:
            shuffle.run_path(group.run).unlink(missing_ok=True)
        return self._write_shards(shuffle, id_bytes)

    def _shuffle(self, names: Sequence[str], rows: int, id_bytes: int) -> Shuffle:
        options = self.options
        listed = json.dumps(names).encode()
        # What was shuffled before of the same parts, in the same way, is used.
        facts = [options.seed, options.deduplicate, asdict(self.options.split), asdict(options.sizes)]
        name = hashlib.sha256(listed + json.dumps(facts).encode()).hexdigest()[:32]
        directory = self._store.directory / f"shuffle-{name}"
        for other in self._store.directory.glob("shuffle-*"):
            if other != directory:
                shutil.rmtree(other)
        directory.mkdir(exist_ok=True)
        write_atomically(directory / "parts.json", listed)
        ranges, buckets = (1 << (-(-size // unit) - 1).bit_length() for size, unit in
                           ((rows, RANGE_ROWS), (id_bytes, BUCKET_BYTES)))  # fmt: skip
        id_size = stored_dtype(self._dtype).itemsize
        return Shuffle(self._store, directory, options.seed, options.deduplicate, id_size, ranges, buckets)

    def _write_shards(self, shuffle: Shuffle, id_bytes: int) -> dict[str, Path]:
        self.progress.start("write", id_bytes)
        plans = [plan_stream(shuffle, split, self.options.sizes) for split in (TRAIN, VALID)]
        done, id_size = _Counted(self.progress), shuffle.id_bytes
        self._check(plans)
        for plan in plans:
            if not plan.shards:
                continue
            directory = shuffle.directory / plan.split
            directory.mkdir(exist_ok=True)
            block_tokens = self.options.sizes.block_tokens
            writer = WriteShard(shuffle, directory, plan.split, plan.starts, block_tokens, self._dtype)
            self.crew.run(writer, plan.shards, lambda shard, _: done.add(id_size * shard.tokens))
            records = [writer.read_record(shard.number) for shard in plan.shards]
            blocks = [row for _, rows in records for row in rows]
            layout = {"suffix": self._dtype, "members": "chunks"} if plan.has_pieces else {}
            write_index(directory, self.tokenizer, plan.text_bytes, [shard for shard, _ in records], blocks, layout)
            load_index(directory)
            for shard in plan.shards:
                writer.record_path(shard.number).unlink()
        done.to(id_bytes)
        return {plan.split: shuffle.directory / plan.split for plan in plans if plan.shards}

    def _check(self, plans: Sequence[StreamPlan]) -> None:
        train, valid = (bool(plan.shards) for plan in plans)
        if not train:
            rule = f"every document fell into validation (fraction {self.options.split.valid_fraction})"
            raise UserError(f"--input: {rule}; give more documents, or --valid-fraction 0")
        if not valid and (self.options.split.as_given or self.options.split.valid_fraction):
            raise UserError("--input: no text is left for validation; give more text, or --valid-fraction 0")


class _Counted:
    """Progress in steps."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._done = progress, 0

    def add(self, size: int) -> None:
        self.to(self._done + size)

    def to(self, done: int) -> None:
        self._done = done
        self._progress.update(done)
