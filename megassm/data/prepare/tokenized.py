"""The middle of data preparation: tokenized parts on disk, so that a killed run loses little.

A part is a run of documents with at least `part_bytes` of text: where it begins and ends depends on the
documents alone, never on the number of workers. Its documents are sorted by shuffle key, so that the
global shuffle reads a range of keys from each part and holds only that range in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megassm.data.index import stored_dtype, token_dtype
from megassm.data.order import splitmix64
from megassm.data.prepare.workers import worker_lost, worker_pool
from megassm.data.tokenizer.base import Tokenizer, TokenizerSpec, load_tokenizer
from megassm.files import commit, open_temporary

MOST_PART_BYTES, LEAST_PART_BYTES = 32 << 20, 1 << 20
PARTS_AIMED_AT = 64  # of a small input: work for every process, and a killed run loses little
ENCODE_CHARS = 1 << 20  # tokenized at once: bounds the memory of a worker
DOCUMENT_DTYPE = np.dtype(
    [
        ("key", "<u8"),  # place in the global shuffle, hashed from content and seed
        ("split", "<u8"),  # hashed from content alone: duplicates fall in one split, whatever the seed
        ("tokens", "<u8"),  # without EOD
        ("text_bytes", "<u8"),
    ]
)


@dataclass(frozen=True)
class PartStore:
    """The parts of one job in a directory. A part exists once its documents file does."""

    directory: Path

    def documents_path(self, part: int) -> Path:
        """Structured array of DOCUMENT_DTYPE, sorted by key."""
        return self.directory / f"part-{part:06d}.documents.npy"

    def ids_path(self, part: int) -> Path:
        """The documents' ids end to end, in the same order."""
        return self.directory / f"part-{part:06d}.ids.npy"

    def has(self, part: int) -> bool:
        return self.documents_path(part).exists()

    def read(self, part: int) -> tuple[npt.NDArray[np.void], npt.NDArray[Any]]:
        """(documents, ids), both mapped from disk: slices read what they touch."""
        documents = np.load(self.documents_path(part), mmap_mode="r")
        return documents, np.load(self.ids_path(part), mmap_mode="r")

    def write(self, part: int, documents: npt.NDArray[np.void], ids: npt.NDArray[Any]) -> None:
        _save_durably(self.ids_path(part), ids)
        _save_durably(self.documents_path(part), documents)


class Part(NamedTuple):
    """Documents to be tokenized together."""

    texts: list[str]
    read_bytes: int  # of the input, up to the part's end


def default_part_bytes(input_bytes: int) -> int:
    """A part's size for an input of this size."""
    return min(MOST_PART_BYTES, max(LEAST_PART_BYTES, input_bytes // PARTS_AIMED_AT))


def cut_parts(texts: Iterable[str], part_bytes: int, read_bytes: Callable[[], int]) -> Iterator[Part]:
    """Runs of documents, each run with at least `part_bytes` of text but the last."""
    part: list[str] = []
    size = 0
    for text in texts:
        part.append(text)
        size += len(text.encode())
        if size >= part_bytes:
            yield Part(part, read_bytes())
            part, size = [], 0
    if part:
        yield Part(part, read_bytes())


def tokenize_part(texts: list[str], tokenizer: Tokenizer, seed: int) -> tuple[npt.NDArray[np.void], Any]:
    """(documents, ids) of a part, sorted by shuffle key."""
    documents = np.empty(len(texts), dtype=DOCUMENT_DTYPE)
    stored = stored_dtype(token_dtype(tokenizer.vocab_size))
    ids = [ids.astype(stored) for batch in _encode_batches(texts) for ids in tokenizer.encode(batch)]
    for row, text in enumerate(texts):
        content = text.encode()
        split, shuffle = np.frombuffer(blake2b(content, digest_size=16).digest(), dtype="<u8").tolist()
        documents[row] = (shuffle, split, ids[row].size, len(content))
    documents["key"] = splitmix64(documents["key"] ^ splitmix64(np.array([seed % 2**64], dtype=np.uint64)))
    order = np.lexsort((documents["split"], documents["key"]))
    return documents[order], np.concatenate([ids[row] for row in order])


def _encode_batches(texts: list[str]) -> Iterator[list[str]]:
    batch: list[str] = []
    chars = 0
    for text in texts:
        batch.append(text)
        chars += len(text)
        if chars >= ENCODE_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


@dataclass(frozen=True)
class TokenizeJob:
    """What a worker needs to turn texts into a part."""

    store: PartStore
    tokenizer: TokenizerSpec
    seed: int
    workers: int


def tokenize_parts(parts: Iterable[Part], job: TokenizeJob, on_done: Callable[[int], None]) -> int:
    """Tokenizes every part that is not in the store yet; returns how many parts there are.

    `on_done` is told how many bytes of the input are tokenized. At most two parts a worker are in flight:
    that bounds the memory of this process.
    """
    if job.workers > 1:
        return _tokenize_in_pool(parts, job, on_done)
    tokenizer, total = load_tokenizer(job.tokenizer), 0
    for total, part in enumerate(parts, start=1):
        if not job.store.has(total - 1):
            job.store.write(total - 1, *tokenize_part(part.texts, tokenizer, job.seed))
        on_done(part.read_bytes)
    return total


def _tokenize_in_pool(parts: Iterable[Part], job: TokenizeJob, on_done: Callable[[int], None]) -> int:
    total, done_bytes = 0, 0
    in_flight: dict[Future[None], int] = {}  # to the bytes of the input that a part takes

    def collect() -> None:
        nonlocal done_bytes
        for future in wait(in_flight, return_when=FIRST_COMPLETED).done:
            done_bytes += in_flight.pop(future)
            future.result()
        on_done(done_bytes)

    with worker_pool(job.workers, _set_up_worker, job) as pool:
        try:
            before = 0
            for total, part in enumerate(parts, start=1):
                part_bytes, before = part.read_bytes - before, part.read_bytes
                if job.store.has(total - 1):
                    done_bytes += part_bytes
                    on_done(done_bytes)
                else:
                    in_flight[_submit(pool, total - 1, part.texts)] = part_bytes
                while len(in_flight) >= 2 * job.workers:
                    collect()
            while in_flight:
                collect()
        except BrokenProcessPool:
            raise worker_lost("run the same command again with fewer --workers: finished parts are kept") from None
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return total


def _submit(pool: Executor, part: int, texts: list[str]) -> Future[None]:
    try:
        return pool.submit(_work, part, texts)
    except (ValueError, OSError):
        # The pool starts workers as work comes. Where one dies meanwhile, it closes the pipes under the
        # one that starts, which then fails with either of these.
        raise BrokenProcessPool from None


_worker: tuple[TokenizeJob, Tokenizer] | None = None  # of a worker process; set once when it starts


def _set_up_worker(job: TokenizeJob) -> None:
    global _worker
    _worker = (job, load_tokenizer(job.tokenizer))


def _work(part: int, texts: list[str]) -> None:
    assert _worker is not None
    job, tokenizer = _worker
    job.store.write(part, *tokenize_part(texts, tokenizer, job.seed))


def _save_durably(path: Path, array: npt.NDArray[Any]) -> None:
    with open_temporary(path) as file:
        np.save(file, array)
        commit(file, path)
