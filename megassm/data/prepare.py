"""Text files to a shuffled, split, sharded data set: the logic behind tools/prepare_data.py.

    1. read the documents in order and tokenize runs of them in worker processes (`parts`);
    2. put all documents in the order of a hash of (content, seed), a bounded range of hashes at a time,
       and write each to its split. A document's split is a hash of its content, so that duplicates
       never stand on both sides.

The result's bytes depend on the documents, the tokenizer and the options, not on workers or on having
been killed: unfinished work stays in OUTPUT/.partial and is used by the next run of the same job.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from megassm.data.dataset import TOKENIZER_NAME, TRAIN, VALID
from megassm.data.documents import ReadCounts, TextSource, list_files, read_documents
from megassm.data.parts import PART_BYTES, PartStore, TokenizeJob, cut_parts, tokenize_parts
from megassm.data.shards import ShardSet, ShardSizes, ShardWriter, load_index
from megassm.data.tokenizer import BytesTokenizer, Tokenizer, load_tokenizer
from megassm.durable import write_atomically
from megassm.errors import UserError

JOB_VERSION = 1  # raised when the same job would write other bytes
JOB_NAME = "prepare.json"
PARTIAL_NAME = ".partial"
SHUFFLE_BYTES = 256 << 20  # ids held at once while writing


@dataclass(frozen=True)
class PrepareJob:
    """What to prepare, and where. `workers` alone has no part in the result."""

    source: TextSource
    output: Path
    tokenizer: str = BytesTokenizer.name  # as given to load_tokenizer
    valid_fraction: float = 0.05  # of the documents; not 0: at least one, where two differ
    seed: int = 0
    sizes: ShardSizes = field(default_factory=ShardSizes)
    workers: int = 1
    part_bytes: int = PART_BYTES

    def __post_init__(self) -> None:
        if not 0 <= self.valid_fraction < 1:
            raise UserError(f"valid fraction {self.valid_fraction}: it must be in [0, 1)")
        for name in ("workers", "part_bytes"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, it must be at least 1")


@dataclass(frozen=True)
class Prepared:
    """The splits in OUTPUT, and what was left out."""

    splits: dict[str, ShardSet]  # "train", and "valid" unless its fraction is 0
    empty: int  # documents dropped
    bad_utf8: int
    was_there: bool  # an earlier run had finished the same job


class Progress(Protocol):
    """Where `prepare` says how far it is."""

    def start(self, phase: str, total_bytes: int) -> None:
        """A phase begins."""

    def update(self, done_bytes: int) -> None:
        """So much of the phase is done."""

    def note(self, message: str) -> None:
        """Something the user should know."""


def prepare(job: PrepareJob, progress: Progress) -> Prepared:
    """Does the job, goes on with it, or finds it done. UserError for what a user can put right."""
    tokenizer = load_tokenizer(job.tokenizer)
    files = list_files(job.source)
    description = _describe(job, tokenizer, files)
    partial = job.output / PARTIAL_NAME
    was_there = _is_done(job.output, description)
    if not was_there:
        with _locked(job.output) as lock_path:
            was_there = _is_done(job.output, description)  # by another process, before we had the lock
            if not was_there:
                _claim(job.output, description, lock_path, progress)
                counts = ReadCounts()
                shuffle = _tokenize(job, files, counts, progress)
                _write_splits(job, tokenizer, shuffle, progress)
                _publish(job, description, counts)
    shutil.rmtree(partial, ignore_errors=True)  # also that of a run killed at its very end
    return _prepared(job.output, was_there)


def _tokenize(job: PrepareJob, files: list[Path], counts: ReadCounts, progress: Progress) -> _Shuffle:
    progress.start("tokenize", sum(path.stat().st_size for path in files))
    store = PartStore(job.output / PARTIAL_NAME)
    texts = cut_parts(read_documents(job.source, files, counts), job.part_bytes)
    work = TokenizeJob(store, job.tokenizer, job.seed, job.workers)
    parts = tokenize_parts(texts, work, lambda: progress.update(counts.file_bytes))
    if parts == 0:
        raise UserError(
            f"--input: no text in {len(files)} files ({counts.empty} documents of whitespace only, "
            f"{counts.bad_utf8} not UTF-8); give files with text"
        )
    return _Shuffle(store, parts)


def _describe(job: PrepareJob, tokenizer: Tokenizer, files: list[Path]) -> dict[str, Any]:
    """All that decides the result, as JSON keeps it."""
    stats = [(path, path.stat()) for path in files]
    return {
        "version": JOB_VERSION,
        "files": [[str(path), stat.st_size, stat.st_mtime_ns] for path, stat in stats],
        "text_field": job.source.text_field,
        "on_bad_utf8": job.source.on_bad_utf8,
        "tokenizer": tokenizer.sha256,
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
        for name in (TRAIN, VALID, TOKENIZER_NAME):
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
    for leftover in (*partial.iterdir(), output / TRAIN, output / VALID, output / TOKENIZER_NAME):
        if leftover.is_dir():
            shutil.rmtree(leftover)
        elif leftover != lock_path:
            leftover.unlink(missing_ok=True)
    write_atomically(job_path, json.dumps({"job": description}).encode())


@dataclass(frozen=True)
class _Bucket:
    """Documents with neighbouring keys, in the order of the shuffle."""

    documents: npt.NDArray[np.void]
    ids: list[npt.NDArray[Any]]


class _Shuffle:
    """All documents of a store in the order of their keys, a bounded number of ids at a time."""

    def __init__(self, store: PartStore, parts: int) -> None:
        self._store, self._parts = store, parts
        self.id_bytes, self.smallest_split = 0, 2**64
        for part in range(parts):
            documents, ids = store.read(part)
            self.id_bytes += ids.nbytes
            self.smallest_split = min(self.smallest_split, int(documents["split"].min()))

    def buckets(self) -> Iterator[_Bucket]:
        """Splits the keys in equal ranges: keys are hashes, so that their documents are nearly equal too."""
        bits = max(0, (self.id_bytes // SHUFFLE_BYTES).bit_length())
        for bucket in range(1 << bits):
            # Of a range's documents with one key (duplicates) the parts' order decides: the sort is stable.
            low, high = (bucket << (64 - bits), ((bucket + 1) << (64 - bits)) - 1)
            slices = [self._slice(part, low, high) for part in range(self._parts)]
            documents = np.concatenate([piece.documents for piece in slices])
            ids = [document_ids for piece in slices for document_ids in piece.ids]
            order = np.argsort(documents["key"], kind="stable")
            yield _Bucket(documents[order], [ids[row] for row in order])

    def _slice(self, part: int, low: int, high: int) -> _Bucket:
        documents, ids = self._store.read(part)
        keys = np.ascontiguousarray(documents["key"])
        first = int(np.searchsorted(keys, np.uint64(low), side="left"))
        stop = int(np.searchsorted(keys, np.uint64(high), side="right"))
        if first == stop:
            return _Bucket(np.empty(0, dtype=documents.dtype), [])
        ends = np.cumsum(documents["tokens"][:stop], dtype=np.int64)
        start = int(ends[first - 1]) if first else 0
        wanted = np.array(ids[start : int(ends[-1])])  # a copy: lets go of the file
        return _Bucket(np.array(documents[first:stop]), np.split(wanted, ends[first:-1] - start))


def _write_splits(job: PrepareJob, tokenizer: Tokenizer, shuffle: _Shuffle, progress: Progress) -> None:
    """Writes OUTPUT/.partial/train and /valid."""
    splits = (TRAIN, VALID) if job.valid_fraction else (TRAIN,)
    # At least the document with the smallest hash: a validation set asked for is never empty.
    last_valid = max(int(job.valid_fraction * 2**64) - 1, shuffle.smallest_split)
    progress.start("write", shuffle.id_bytes)
    done_bytes = 0
    with ExitStack() as stack:
        writers = {}
        for split in splits:
            directory = job.output / PARTIAL_NAME / split
            shutil.rmtree(directory, ignore_errors=True)
            writers[split] = stack.enter_context(ShardWriter(directory, tokenizer, job.sizes))
        for bucket in shuffle.buckets():
            splits_and_bytes = bucket.documents[["split", "text_bytes"]].tolist()
            for (split_hash, text_bytes), ids in zip(splits_and_bytes, bucket.ids, strict=True):
                is_valid = VALID in writers and split_hash <= last_valid
                writers[VALID if is_valid else TRAIN].add(ids, text_bytes)
                done_bytes += ids.nbytes
            progress.update(done_bytes)
        if writers[TRAIN].documents == 0:
            rule = f"every document fell into validation (fraction {job.valid_fraction})"
            raise UserError(f"--input: {rule}; give more documents, or --valid-fraction 0")
        for writer in writers.values():
            writer.finish()


def _publish(job: PrepareJob, description: dict[str, Any], counts: ReadCounts) -> None:
    """Moves the finished splits to OUTPUT; the job's description, last, declares them complete."""
    if job.tokenizer != BytesTokenizer.name:
        write_atomically(job.output / TOKENIZER_NAME, Path(job.tokenizer).read_bytes())
    for split in (TRAIN, VALID):
        written = job.output / PARTIAL_NAME / split
        if written.is_dir():
            shutil.rmtree(job.output / split, ignore_errors=True)  # ours: `_claim` made sure
            written.rename(job.output / split)
    record = {"job": description, "empty": counts.empty, "bad_utf8": counts.bad_utf8}
    write_atomically(job.output / JOB_NAME, json.dumps(record).encode() + b"\n")


def _prepared(output: Path, was_there: bool) -> Prepared:
    record = json.loads((output / JOB_NAME).read_bytes())
    splits = {split: load_index(output / split) for split in (TRAIN, VALID) if (output / split).is_dir()}
    return Prepared(splits, record["empty"], record["bad_utf8"], was_there)
