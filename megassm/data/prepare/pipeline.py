"""Text files to a shuffled, split, sharded data set: the logic behind tools/prepare_data.py.

    1. look at every input, and decide how it is split (`inputs`, `split`)
    2. read and tokenize units of the input into parts (`units`, `parts`)
    3. put all documents in the order of a hash of (content, copy, seed), each split by itself (`shuffle`); copies of
       a text are left out there, where asked for
    4. cut the shards (`shards`), and say what was done in dataset.md, for people, and in prepare.json

Every phase is shared out to all workers, takes time linear in the text and memory that does not depend on it.
The shards' bytes depend on the documents, the tokenizer and the options, not on workers or on having been killed:
unfinished work stays in OUTPUT/.partial, and what fits is used by the next run, whatever else has changed.
"""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from megassm.cli.progress import Progress
from megassm.data.dataset import TOKENIZER_NAMES, TRAIN, VALID, keep_tokenizer
from megassm.data.index import ShardSet, ShardSizes, load_index
from megassm.data.prepare.card import CARD_NAME, Card, card_text
from megassm.data.prepare.ids import IdFacts
from megassm.data.prepare.inputs import Inputs, find_inputs, shown
from megassm.data.prepare.source import TextSource
from megassm.data.prepare.split import Split, plan_split
from megassm.data.prepare.units import describe, total_counts
from megassm.data.prepare.work import REPEATED, Work, WorkOptions, filtered
from megassm.data.prepare.workers import Crew
from megassm.data.tokenizer.base import Tokenizer, TokenizerSpec, load_tokenizer
from megassm.errors import UserError
from megassm.files import write_atomically

JOB_VERSION = 3  # raised when the same job would write other bytes
JOB_NAME = "prepare.json"
PARTIAL_NAME = ".partial"
LOCK_NAME = "lock"
RESULT_NAMES = (TRAIN, VALID, *TOKENIZER_NAMES)
NEWER = {"format": "auto", "on_bad_record": "raise", "document_separator": None, "samples": "documents"}


@dataclass(frozen=True)
class PrepareJob:
    """What to prepare, and where. `workers` and `licence` have no part in the shards."""

    source: TextSource
    output: Path
    tokenizer: TokenizerSpec = field(default_factory=TokenizerSpec)
    deduplicate: bool = False  # of documents with the same text, keep the first
    valid_fraction: float | None = None  # of the documents; None: as `split` decides
    seed: int = 0
    sizes: ShardSizes = field(default_factory=ShardSizes)
    workers: int = 1
    part_bytes: int | None = None  # of text; None: as suits the input
    licence: str | None = None  # a text for dataset.md

    def __post_init__(self) -> None:
        if self.valid_fraction is not None and not 0 <= self.valid_fraction < 1:
            raise UserError(f"valid fraction {self.valid_fraction}: it must be in [0, 1)")
        for name in ("workers", "part_bytes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}, it must be at least 1")


@dataclass(frozen=True)
class Prepared:
    """The splits in OUTPUT, and what the filters did."""

    splits: dict[str, ShardSet]  # "train", and "valid" unless its fraction is 0
    filtered: dict[str, int]  # documents by what the filters did to them: FILTERS
    was_there: bool  # an earlier run had finished the same job
    repeated: int = 0  # documents with the text of another before them, left out or not


def prepare(job: PrepareJob, progress: Progress) -> Prepared:
    """Does the job, goes on with it, or finds it done. UserError for what a user can put right."""
    tokenizer = load_tokenizer(job.tokenizer)
    facts = IdFacts(tokenizer.eod, tokenizer.vocab_size)
    job = replace(job, source=replace(job.source, without=job.output, ids=facts))
    inputs = find_inputs(job.source)
    split = plan_split(job.source, inputs.files, job.valid_fraction)
    description = _describe(job, tokenizer, inputs, split)
    partial = job.output / PARTIAL_NAME
    was_there = _is_done(job.output, description)
    if not was_there:
        with _locked(job.output), _disk_errors(job.output):
            was_there = _is_done(job.output, description)  # by another process, before we had the lock
            if not was_there:
                for line in [*inputs.summary(), *_claim(job.output, tokenizer)]:
                    progress.note(line)
                with Crew(job.workers) as crew:
                    work = Work(_options(job, split), tokenizer, partial, crew, progress)
                    records = work.read(inputs)
                    folders = work.write(records)
                counts = filtered(total_counts(records), work.duplicates)
                _publish(job, tokenizer, description, counts, folders)
    shutil.rmtree(partial, ignore_errors=True)  # also that of a run killed at its very end
    prepared = _prepared(job.output, was_there)
    if not was_there or job.licence is not None or not (job.output / CARD_NAME).exists():
        _write_card(job, split, tokenizer, inputs, prepared)
    return prepared


def _options(job: PrepareJob, split: Split) -> WorkOptions:
    return WorkOptions(job.source, split, job.tokenizer, job.deduplicate, job.seed, job.sizes, job.part_bytes)


def _describe(job: PrepareJob, tokenizer: Tokenizer, inputs: Inputs, split: Split) -> dict[str, Any]:
    """All that decides the result, as JSON keeps it."""
    filters = ("text_field", "on_bad_utf8", "min_document_bytes", "max_document_bytes")
    return {
        "version": JOB_VERSION,
        "files": [describe(file) for file in inputs.files],
        **{name: getattr(job.source, name) for name in filters},
        # Newer options, where they are used: a set made before there were any is still this job's.
        **{name: getattr(job.source, name) for name, default in NEWER.items() if getattr(job.source, name) != default},
        "tokenizer": tokenizer.sha256,
        "deduplicate": job.deduplicate,
        "valid_fraction": split.valid_fraction,
        "seed": job.seed,
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
def _locked(output: Path) -> Iterator[None]:
    """Holds OUTPUT/.partial for this process alone; the system lets go of it when the process ends."""
    path = output / PARTIAL_NAME / LOCK_NAME
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
        yield


@contextmanager
def _disk_errors(output: Path) -> Iterator[None]:
    """A failed write says where, and whether the disk is full."""
    try:
        yield
    except OSError as error:
        place = shown(error.filename or output)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(output).free
            rule = f"the disk is full ({free >> 20:,} MiB free); the work takes about three times the finished set"
            way_out = "make room and run the same command again: finished parts are kept"
            raise UserError(f"--output {output}: {rule}; {way_out}") from None
        what = error.strerror or str(error)
        raise UserError(f"--output {output}: {place}: {what}; mend that, and run the same command again") from None


def _claim(output: Path, tokenizer: Tokenizer) -> list[str]:
    """Makes OUTPUT/.partial ready: finished parts stay where they are of this tokenizer. Returns what to say of it."""
    partial = output / PARTIAL_NAME
    made = partial / JOB_NAME
    try:
        same = json.loads(made.read_bytes())["tokenizer"] == tokenizer.sha256
    except (OSError, ValueError, KeyError, TypeError):
        same = False
    notes = []
    parts = list(partial.glob("part-*.rows.npy"))
    if same and parts:
        notes.append(f"going on with the unfinished work in {partial}: {len(parts):,} finished parts")
    elif not same:
        if parts:
            notes.append(f"discarding unfinished work in {partial} (other: tokenizer)")
        for leftover in partial.iterdir():
            if leftover.is_dir():
                shutil.rmtree(leftover)
            elif leftover.name != LOCK_NAME:
                leftover.unlink()
        write_atomically(made, json.dumps({"tokenizer": tokenizer.sha256}).encode())
    for name in RESULT_NAMES:  # ours: of a run that was killed while it published
        leftover = output / name
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)
    return notes


def _publish(
    job: PrepareJob,
    tokenizer: Tokenizer,
    description: dict[str, Any],
    counts: dict[str, int],
    folders: Mapping[str, Path],
) -> None:
    """Moves the finished splits to OUTPUT; the job's description, last, declares them complete."""
    keep_tokenizer(tokenizer, job.output)
    for split, folder in folders.items():
        folder.rename(job.output / split)
    repeated = counts[REPEATED]
    left_out = {**counts, REPEATED: repeated if job.deduplicate else 0}
    record = {"job": description, "filtered": left_out, "repeated": repeated}
    write_atomically(job.output / JOB_NAME, json.dumps(record).encode() + b"\n")


def _prepared(output: Path, was_there: bool) -> Prepared:
    record = json.loads((output / JOB_NAME).read_bytes())
    splits = {split: load_index(output / split) for split in (TRAIN, VALID) if (output / split).is_dir()}
    return Prepared(splits, record["filtered"], was_there, record.get("repeated", 0))


def _write_card(job: PrepareJob, split: Split, tokenizer: Tokenizer, inputs: Inputs, prepared: Prepared) -> None:
    places = [shown(path) for path in (*job.source.inputs, *job.source.valid_inputs)]
    options: dict[str, object] = {
        "deduplicate": job.deduplicate,
        "on bad UTF-8": job.source.on_bad_utf8,
        "on a bad record": job.source.on_bad_record,
        "shortest document (UTF-8 bytes)": job.source.min_document_bytes,
        "longest document (UTF-8 bytes)": job.source.max_document_bytes or "any",
        "for validation": split.description,
        "seed": job.seed,
    }
    card = Card(shown(job.output.resolve().name), places, inputs, prepared.splits, prepared.filtered, options)
    text = card_text(card, tokenizer, job.licence)
    write_atomically(job.output / CARD_NAME, text.encode())
