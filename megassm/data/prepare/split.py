"""Which documents are for training and which for validation.

    by hash        each document by a hash of its text: none moves when more text is added, and copies stay together
    by position    of fewer than FEW_DOCUMENTS the end of each is for validation, the rest for training
    as given       files of --valid-input are for validation, all others for training

Files whose names say that they are split already, as `wiki.train.tokens` beside `wiki.valid.tokens`, are not split
again unless the user says so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple

from megassm.data.prepare.documents import Piece, ReadCounts, read_pieces
from megassm.data.prepare.ids import ID_DTYPE
from megassm.data.prepare.kinds import InputFile
from megassm.data.prepare.source import TextSource
from megassm.data.prepare.text import boundary_before
from megassm.errors import UserError

Side = Literal["hashed", "train", "valid"]

FEW_DOCUMENTS = 20
DEFAULT_VALID_FRACTION = 0.05
NEAR_BYTES = 4096  # of the cut, where a line's end is looked for
NAMES = {
    "train": "train", "training": "train",
    "valid": "validation", "validation": "validation", "val": "validation", "dev": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip


class SidedPiece(NamedTuple):
    """A piece and where it belongs."""

    piece: Piece
    side: Side = "hashed"


@dataclass(frozen=True)
class Split:
    """How documents are divided. `cuts` has of each of few documents the byte that validation begins at."""

    valid_fraction: float
    as_given: bool = False
    cuts: tuple[int, ...] = ()

    @property
    def is_hashed(self) -> bool:
        return not self.as_given and not self.cuts

    @property
    def description(self) -> str:
        """In words, for dataset.md."""
        if self.as_given:
            return "the files of --valid-input"
        if self.cuts:
            return f"the last {self.valid_fraction:.3g} of each document, for there are only {len(self.cuts)}"
        return f"{self.valid_fraction:.3g} of the documents, by a hash of their text"

    def sided(self, pieces: Iterable[Piece], file_is_valid: bool = False) -> Iterator[SidedPiece]:
        """Says of every piece where it belongs; divides those that stand across a cut."""
        if self.as_given:
            yield from (SidedPiece(piece, "valid" if file_is_valid else "train") for piece in pieces)
        elif self.cuts:
            yield from _by_position(pieces, self.cuts)
        else:
            yield from (SidedPiece(piece) for piece in pieces)


def plan_split(source: TextSource, files: Sequence[InputFile], valid_fraction: float | None) -> Split:
    """How these files are divided. Reads as many documents as it takes to know that there are not few.

    Raises:
        UserError: the names say that they are split already, or there is too little text to divide.
    """
    as_given = bool(source.valid_inputs)
    if as_given and valid_fraction is not None:
        rule = "the files of --valid-input are the validation set"
        raise UserError(f"--valid-fraction {valid_fraction}: {rule}; leave one of the two out")
    if valid_fraction is None:
        _check_names(source, files)
    fraction = DEFAULT_VALID_FRACTION if valid_fraction is None else valid_fraction
    if as_given or fraction == 0:
        return Split(fraction, as_given)
    sizes = list(islice(_sizes(read_pieces(source, files, ReadCounts())), FEW_DOCUMENTS))
    if len(sizes) == FEW_DOCUMENTS or not sizes:
        return Split(fraction)
    if max(sizes) < 2:
        rule = f"{len(sizes)} documents of one byte cannot be divided into training and validation"
        raise UserError(f"--input: {rule}; give more text, or --valid-fraction 0")
    return Split(fraction, cuts=tuple(max(1, min(size - 1, round(size * (1 - fraction)))) for size in sizes))


def _sizes(pieces: Iterable[Piece]) -> Iterator[int]:
    size = 0
    for piece in pieces:
        size += len(piece.content)
        if piece.ends:
            yield size
            size = 0


def _by_position(pieces: Iterable[Piece], cuts: Sequence[int]) -> Iterator[SidedPiece]:
    number, begin, starts = -1, 0, True  # the document; where the piece begins in it; whether it starts what is written
    side: Side = "train"
    for piece in pieces:
        if piece.starts:
            number, begin, starts, side = number + 1, 0, True, "train"
        cut = cuts[number] - begin
        begin += len(piece.content)
        if side == "valid" or cut > len(piece.content):
            yield SidedPiece(piece._replace(starts=starts), side)
            starts = piece.ends
            continue
        width = ID_DTYPE.itemsize
        at = max(1, cut // width) * width if piece.are_ids else _near(piece.content, cut, keep_rest=piece.ends)
        yield SidedPiece(piece._replace(content=piece.content[:at], starts=starts, ends=True), "train")
        if at < len(piece.content):
            yield SidedPiece(piece._replace(content=piece.content[at:], starts=True), "valid")
        side, starts = "valid", at == len(piece.content) or piece.ends


def _near(content: bytes, cut: int, keep_rest: bool) -> int:
    """Where to divide: after the first line's end near the cut, else between two characters; never at 0."""
    newline = content.find(b"\n", cut, cut + NEAR_BYTES) + 1
    if newline and not (keep_rest and newline == len(content)):
        return newline
    at = boundary_before(content, cut)
    while at == 0 or (at < len(content) and content[at] & 0xC0 == 0x80):
        at += 1
    return at


def _check_names(source: TextSource, files: Sequence[InputFile]) -> None:
    """UserError where files of one family are named train, valid or test, and would all be trained on and mixed."""
    families: dict[str, dict[str, Path]] = {}
    for file in files:
        if not file.for_validation and (named := _named(file.path, source)):
            family, word = named
            families.setdefault(family, {}).setdefault(word, file.path)
    for members in families.values():
        if len(members) < 2:
            continue
        found = ", ".join(str(path) for path in members.values())
        rule = "their names say that they are split already, and mixing them would put one set into the other"
        way_out = "give the training files as --input and the others as --valid-input, or mix with --valid-fraction F"
        raise UserError(f"--input: {found}: {rule}; {way_out}")


def _named(path: Path, source: TextSource) -> tuple[str, str] | None:
    """(the family that a file belongs to by its name, which of its sets it is named as); None without such a name."""
    given = next((given for given in source.inputs if path.is_relative_to(given)), path)
    within = str(path.relative_to(given)) if given != path else path.name
    return _family(within) or _family(str(path.relative_to(given.parent)))  # the folder itself may be named so


def _family(name: str) -> tuple[str, str] | None:
    words = re.split(r"([^a-z]+)", name.lower())
    places = [place for place, word in enumerate(words) if word in NAMES]
    if len(places) != 1:
        return None
    [place] = places
    found = NAMES[words[place]]
    words[place] = "*"
    return re.sub(r"\d+", "#", "".join(words)), found
