"""Token ids as documents: of files that others have tokenized, whatever the format.

A document ends where the file says so, or at the tokenizer's end of document, which is not part of it: preparation
writes one after each. Ids travel as bytes, little-endian and 32 bits wide, and in pieces, as long texts do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from megassm.data.prepare.records import RawDocument
from megassm.errors import UserError

Ids = npt.NDArray[np.integer[Any]]

ID_DTYPE = np.dtype("<u4")
PIECE_IDS = 1 << 18  # of a longer document, which is divided
NO_ENDS = np.empty(0, dtype=np.int64)


class IdFacts(NamedTuple):
    """What reading ids takes to know of the tokenizer that made them."""

    eod: int
    vocab_size: int


class IdRun(NamedTuple):
    """Ids that follow those before them in a file; at most PIECE_IDS."""

    ids: Ids
    file_position: int  # bytes of the file read so far
    ends: npt.NDArray[np.int64] = NO_ENDS  # so many of these ids come before the end of a document; sorted


def id_facts(path: Path, facts: IdFacts | None) -> IdFacts:
    """UserError where text is wanted."""
    if facts is None:
        rule = "holds token ids, and text is wanted here"
        raise UserError(f"{path}: {rule}; give text (token ids go to tools/prepare_data.py)")
    return facts


def documents_of_ids(path: Path, runs: Iterable[IdRun], facts: IdFacts | None) -> Iterator[RawDocument]:
    """The documents of a file. An end of document that the file begins with ends nothing.

    Raises:
        UserError: ids outside the vocabulary.
    """
    known = id_facts(path, facts)
    number, position, starts, at_start = 1, 0, True, True
    held: Ids = np.empty(0, dtype=ID_DTYPE)

    def out(ends: bool) -> RawDocument:
        place = f"{path}: document {number}"
        return RawDocument(place, held.tobytes(), position, starts=starts, ends=ends, are_ids=True)

    for run in runs:
        ids, ends, position = checked_ids(path, run.ids, known), run.ends, run.file_position
        if at_start and ids.size and ids[0] == known.eod:
            ids, ends = ids[1:], np.maximum(ends - 1, 0)
        at_start, begin = at_start and not run.ids.size, 0
        for stop, skipped in [*_stops(ids, ends, known.eod), (len(ids), None)]:
            found, begin = ids[begin:stop], stop + (skipped or 0)
            if held.size and found.size and held.size + found.size > PIECE_IDS:
                yield out(ends=False)
                held, starts = held[:0], False
            held = np.concatenate([held, found]) if held.size else found
            if skipped is not None:
                yield out(ends=True)
                held, starts, number = held[:0], True, number + 1
    if held.size:
        yield out(ends=True)


def _stops(ids: Ids, ends: npt.NDArray[np.int64], eod: int) -> list[tuple[int, int]]:
    """(where a document ends, how many ids to pass over there): at each end, and each EOD that is not before one."""
    marks = np.flatnonzero(ids == eod)
    if ends.size:
        first = np.concatenate([[True], ends[1:] != ends[:-1]])
        ends = ends[~(first & np.isin(ends, marks + 1))]  # its EOD says it already
    stops = np.concatenate([ends, marks])
    skipped = np.repeat([0, 1], [ends.size, marks.size])
    order = np.lexsort((skipped, stops))
    return list(zip(stops[order].tolist(), skipped[order].tolist(), strict=True))


def checked_ids(path: Path, ids: Ids, facts: IdFacts) -> Ids:
    """The ids as they travel. UserError where one is outside the vocabulary."""
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < facts.vocab_size:
        rule = f"ids {ids.min()} to {ids.max()} leave the vocabulary [0, {facts.vocab_size})"
        raise UserError(f"{path}: {rule}; give the --tokenizer that made them, or the --format they are in")
    return ids.astype(ID_DTYPE, copy=False)


def runs_of(ids: Ids, file_position: int, is_document: bool) -> Iterator[IdRun]:
    """An array in runs."""
    for start in range(0, max(1, ids.size), PIECE_IDS):
        run = ids[start : start + PIECE_IDS]
        ends = np.array([run.size]) if is_document and start + PIECE_IDS >= ids.size else NO_ENDS
        yield IdRun(run, file_position, ends)
