"""Text files to a shuffled, split, sharded data set: the logic behind tools/prepare_data.py.

    1. read the documents in order and tokenize runs of them in worker processes (`parts`);
    2. put all documents in the order of a hash of (content, seed), a bounded range of hashes at a time,
       and write each to its split. A document's split is a hash of its content, so that duplicates
       never stand on both sides. In this order they are neighbours: that is where they are left out, where
       asked for, in any amount of text and with no table of hashes.
    3. say what was done in dataset.md, for people, and in prepare.json.

The shards' bytes depend on the documents, the tokenizer and the options, not on workers or on having
been killed: unfinished work stays in OUTPUT/.partial and is used by the next run of the same job.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megassm.cli.progress import Progress
from megassm.data.dataset import TOKENIZER_NAMES, TRAIN, VALID, keep_tokenizer
from megassm.data.index import ShardSet, ShardSizes, load_index
from megassm.data.prepare.card import CARD_NAME, Card, card_text
from megassm.data.prepare.documents import ReadCounts, read_documents
from megassm.data.prepare.inputs import Inputs, find_inputs, shown
from megassm.data.prepare.shard_writer import ShardWriter
from megassm.data.prepare.shuffle import Shuffle
from megassm.data.prepare.source import TextSource
from megassm.data.prepare.tokenized import PartStore, TokenizeJob, cut_parts, default_part_bytes, tokenize_parts
from megassm.data.tokenizer.base import Tokenizer, TokenizerSpec, load_tokenizer
from megassm.errors import UserError
from megassm.files import write_atomically

JOB_VERSION = 2  # raised when the same job would write other bytes
JOB_NAME = "prepare.json"
PARTIAL_NAME = ".partial"
RESULT_NAMES = (TRAIN, VALID, *TOKENIZER_NAMES)
REPAIRED = "repaired UTF-8"
NEWER = {"format": "auto", "on_bad_record": "raise"}
SHUFFLE_BYTES = 256 << 20  # ids held at once while writing


@dataclass(frozen=True)
class PrepareJob:
    """What to prepare, and where. `workers` and `licence` have no part in the shards."""

    source: TextSource
    output: Path
    tokenizer: TokenizerSpec = field(default_factory=TokenizerSpec)
    deduplicate: bool = False  # of documents with the same text, keep the first
    valid_fraction: float = 0.05  # of the documents; not 0: at least one, where two differ
    seed: int = 0
    sizes: ShardSizes = field(default_factory=ShardSizes)
    workers: int = 1
    part_bytes: int | None = None  # of text; None: as suits the input
    licence: str | None = None  # a text for dataset.md

    def __post_init__(self) -> None:
        if not 0 <= self.valid_fraction < 1:
            raise UserError(f"valid fraction {self.valid_fraction}: it must be in [0, 1)")
        for name in ("workers", "part_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}, it must be at least 1")


@dataclass(frozen=True)
class Prepared:
    """The splits in OUTPUT, and what the filters did."""

    splits: dict[str, ShardSet]  # "train", and "valid" unless its fraction is 0
    filtered: dict[str, int]  # documents by what befell them: FILTERS
    was_there: bool  # an earlier run had finished the same job


def prepare(job: PrepareJob, progress: Progress) -> Prepared:
    """Does the job, goes on with it, or finds it done. UserError for what a user can put right."""
    tokenizer = load_tokenizer(job.tokenizer)
    job = replace(job, source=replace(job.source, without=job.output))
    inputs = find_inputs(job.source)
    job = replace(job, part_bytes=job.part_bytes or default_part_bytes(inputs.size))
    description = _describe(job, tokenizer, inputs)
    partial = job.output / PARTIAL_NAME
    was_there = _is_done(job.output, description)
    if not was_there:
        with _locked(job.output) as lock_path:
            was_there = _is_done(job.output, description)  # by another process, before we had the lock
            if not was_there:
                _claim(job.output, description, lock_path, progress)
                for line in inputs.summary():
                    progress.note(line)
                counts = ReadCounts()
                shuffle = _tokenize(job, inputs, counts, progress)
                duplicates = _write_splits(job, tokenizer, shuffle, progress)
                _publish(job, tokenizer, description, _filtered(counts, duplicates))
    shutil.rmtree(partial, ignore_errors=True)  # also that of a run killed at its very end
    prepared = _prepared(job.output, was_there)
    if not was_there or job.licence is not None or not (job.output / CARD_NAME).exists():
        _write_card(job, tokenizer, inputs, prepared)
    return prepared


def _tokenize(job: PrepareJob, inputs: Inputs, counts: ReadCounts, progress: Progress) -> Shuffle:
    assert job.part_bytes is not None
    progress.start("tokenize", inputs.size)
    store = PartStore(job.output / PARTIAL_NAME)
    texts = read_documents(job.source, inputs.files, counts)
    parts = cut_parts(texts, job.part_bytes, lambda: counts.file_bytes)
    work = TokenizeJob(store, job.tokenizer, job.seed, job.workers)
    number = tokenize_parts(parts, work, progress.update)
    if number == 0:
        left_out = ", ".join(f"{count} {name}" for name, count in _filtered(counts, 0).items() if count)
        raise UserError(
            f"--input: no text in {len(inputs.files)} files ({left_out or 'no documents'}); give files with text"
        )
    return Shuffle(store, number, SHUFFLE_BYTES)


def _filtered(counts: ReadCounts, duplicates: int) -> dict[str, int]:
    """Documents by what befell them, in words for tables; all but `repaired` are left out."""
    return {
        "empty": counts.empty,
        "not UTF-8": counts.bad_utf8,
        "no text in its record": counts.bad_record,
        "link in a tar": counts.members.links,
        "beside the text of a tar's sample": counts.members.others,
        "too short": counts.too_short,
        "too long": counts.too_long,
        "duplicate": duplicates,
        REPAIRED: counts.repaired,
    }


def _describe(job: PrepareJob, tokenizer: Tokenizer, inputs: Inputs) -> dict[str, Any]:
    """All that decides the result, as JSON keeps it."""
    filters = ("text_field", "on_bad_utf8", "min_document_bytes", "max_document_bytes")
    return {
        "version": JOB_VERSION,
        "files": [[str(file.path), file.size, file.path.stat().st_mtime_ns] for file in inputs.files],
        **{name: getattr(job.source, name) for name in filters},
        # Newer options, where they are used: a set made before there were any is still this job's.
        **{name: getattr(job.source, name) for name, default in NEWER.items() if getattr(job.source, name) != default},
        "tokenizer": tokenizer.sha256,
        "deduplicate": job.deduplicate,
        "valid_fraction": job.valid_fraction,
        "seed": job.seed,
        "part_bytes": job.part_bytes,
        **asdict(job.sizes),
    }


def _is_done(output: Path, description: dict[str, Any]) -> bool:
    """Whether OUTPUT holds this job's result; UserError where it holds anything else."""
    if (output / JOB_NAME).is_file():
        differing = _differing(output / JOB_NAME, description)
        if differing:
            what = f"holds a data set from another job (other: {', '.join(differing)})"
            raise UserError(f"--output {output}: {what}; give another directory or remove this one")
        return True
    if not (output / PARTIAL_NAME / JOB_NAME).exists():
        for name in RESULT_NAMES:
            if (output / name).exists():
                way_out = "give another directory or remove it"
                raise UserError(f"--output {output}: holds {name!r}, not made by this tool; {way_out}")
    return False


def _differing(path: Path, description: dict[str, Any]) -> list[str]:
    try:
        found = json.loads(path.read_bytes())["job"]
        return [name for name in description if found.get(name) != description[name]]
    except (ValueError, KeyError, TypeError, AttributeError):
        return ["unreadable " + path.name]


@contextmanager
def _locked(output: Path) -> Iterator[Path]:
    """Holds OUTPUT/.partial for this process alone; the system lets go of it when the process ends."""
    path = output / PARTIAL_NAME / "lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path, "wb")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"--output {output}: cannot write there: {error.strerror}; give another") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"--output {output}: another process is preparing it; wait or stop it") from None
        yield path


def _claim(output: Path, description: dict[str, Any], lock_path: Path, progress: Progress) -> None:
    """Makes OUTPUT/.partial this job's: keeps the parts of the same job, discards those of another."""
    partial = lock_path.parent
    job_path = partial / JOB_NAME
    if job_path.exists():
        differing = _differing(job_path, description)
        if not differing:
            progress.note(f"going on with the unfinished work in {partial}")
            return
        progress.note(f"discarding unfinished work in {partial} (other: {', '.join(differing)})")
        job_path.unlink()
    for leftover in (*partial.iterdir(), *(output / name for name in RESULT_NAMES)):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        elif leftover != lock_path:
            leftover.unlink(missing_ok=True)
    write_atomically(job_path, json.dumps({"job": description}).encode())


def _write_splits(job: PrepareJob, tokenizer: Tokenizer, shuffle: Shuffle, progress: Progress) -> int:
    """Writes OUTPUT/.partial/train and /valid; returns how many duplicates were left out."""
    splits = (TRAIN, VALID) if job.valid_fraction else (TRAIN,)
    # At least the document with the smallest hash: a validation set asked for is never empty.
    last_valid = max(int(job.valid_fraction * 2**64) - 1, shuffle.smallest_split)
    progress.start("write", shuffle.id_bytes)
    done_bytes = duplicates = 0
    with ExitStack() as stack:
        writers = {}
        for split in splits:
            directory = job.output / PARTIAL_NAME / split
            shutil.rmtree(directory, ignore_errors=True)
            writers[split] = stack.enter_context(ShardWriter(directory, tokenizer, job.sizes))
        for bucket in shuffle.buckets():
            for (split_hash, text_bytes), is_duplicate, ids in bucket.rows():
                done_bytes += ids.nbytes
                if is_duplicate and job.deduplicate:
                    duplicates += 1
                    continue
                is_valid = VALID in writers and split_hash <= last_valid
                writers[VALID if is_valid else TRAIN].add(ids, text_bytes)
            progress.update(done_bytes)
        if writers[TRAIN].documents == 0:
            rule = f"every document fell into validation (fraction {job.valid_fraction})"
            raise UserError(f"--input: {rule}; give more documents, or --valid-fraction 0")
        for writer in writers.values():
            writer.finish()
    return duplicates


def _publish(job: PrepareJob, tokenizer: Tokenizer, description: dict[str, Any], filtered: dict[str, int]) -> None:
    """Moves the finished splits to OUTPUT; the job's description, last, declares them complete."""
    keep_tokenizer(tokenizer, job.output)
    for split in (TRAIN, VALID):
        written = job.output / PARTIAL_NAME / split
        if written.is_dir():
            shutil.rmtree(job.output / split, ignore_errors=True)  # ours: `_claim` made sure
            written.rename(job.output / split)
    record = {"job": description, "filtered": filtered}
    write_atomically(job.output / JOB_NAME, json.dumps(record).encode() + b"\n")


def _prepared(output: Path, was_there: bool) -> Prepared:
    record = json.loads((output / JOB_NAME).read_bytes())
    splits = {split: load_index(output / split) for split in (TRAIN, VALID) if (output / split).is_dir()}
    return Prepared(splits, record["filtered"], was_there)


def _write_card(job: PrepareJob, tokenizer: Tokenizer, inputs: Inputs, prepared: Prepared) -> None:
    places = [shown(path) for path in job.source.inputs]
    options: dict[str, object] = {
        "deduplicate": job.deduplicate,
        "on bad UTF-8": job.source.on_bad_utf8,
        "on a bad record": job.source.on_bad_record,
        "shortest document (UTF-8 bytes)": job.source.min_document_bytes,
        "longest document (UTF-8 bytes)": job.source.max_document_bytes or "any",
        "fraction for validation": job.valid_fraction,
        "seed": job.seed,
    }
    card = Card(shown(job.output.resolve().name), places, inputs, prepared.splits, prepared.filtered, options)
    text = card_text(card, tokenizer, job.licence)
    write_atomically(job.output / CARD_NAME, text.encode())
