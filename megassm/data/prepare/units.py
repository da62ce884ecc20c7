"""What is read at one go: runs of input files. Many are read by many processes; of few, one process reads them all and
hands their parts to the others. A unit that was read whole is not read again unless its files or options changed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from megassm.data.prepare.documents import ReadCounts, read_pieces
from megassm.data.prepare.kinds import InputFile
from megassm.data.prepare.parts import Part, PartStore, cut_parts
from megassm.data.prepare.samples import LeftOutMembers
from megassm.data.prepare.source import TextSource
from megassm.data.prepare.split import Split
from megassm.data.prepare.workers import Crew
from megassm.errors import UserError
from megassm.files import write_atomically

UNIT_BYTES = 64 << 20  # on disk
NO_PART_OF_A_TEXT = ("inputs", "valid_inputs", "glob", "without", "ids")  # of one tokenizer are all units


@dataclass(frozen=True)
class Unit:
    """Input files that follow each other, with what decides the texts in them."""

    files: tuple[InputFile, ...]
    source: TextSource
    split: Split
    part_bytes: int

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.size for file in self.files)

    @property
    def name(self) -> str:
        options = {name: value for name, value in asdict(self.source).items() if name not in NO_PART_OF_A_TEXT}
        files = [describe(file) for file in self.files]
        facts = [files, options, asdict(self.split), self.part_bytes]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]

    def parts(self, counts: ReadCounts) -> Iterator[Part]:
        """Reads the files. UserError also where one changes meanwhile."""
        before = [describe(file) for file in self.files]

        def pieces() -> Iterator[Any]:
            if self.split.as_given:
                for file in self.files:
                    yield from self.split.sided(read_pieces(self.source, [file], counts), file.for_validation)
            else:
                yield from self.split.sided(read_pieces(self.source, self.files, counts))

        yield from cut_parts(pieces(), self.part_bytes, lambda: counts.file_bytes)
        for file, description in zip(self.files, before, strict=True):
            if describe(file) != description:
                raise UserError(f"{file.path}: was changed while it was read; run the command again when it is at rest")


class UnitRecord(NamedTuple):
    """A unit that was read whole."""

    parts: list[str]  # their names
    counts: ReadCounts


@dataclass(frozen=True)
class UnitStore:
    """Records of units, beside the parts."""

    parts: PartStore

    def path(self, unit: Unit) -> Path:
        return self.parts.directory / f"unit-{unit.name}.json"

    def get(self, unit: Unit) -> UnitRecord | None:
        """None where the unit is to be read, or read again."""
        try:
            found = json.loads(self.path(unit).read_bytes())
            counts = ReadCounts(**{**found["counts"], "members": LeftOutMembers(**found["counts"]["members"])})
            names = [str(name) for name in found["parts"]]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            return None  # cut by a power cut: the unit is read again
        return UnitRecord(names, counts) if all(map(self.parts.has, names)) else None

    def put(self, unit: Unit, record: UnitRecord) -> None:
        content = {"parts": record.parts, "counts": asdict(record.counts)}
        write_atomically(self.path(unit), json.dumps(content).encode())


def describe(file: InputFile) -> list[Any]:
    """What a file is known by, as JSON keeps it."""
    try:
        status = file.path.stat()
    except OSError as error:
        raise UserError(f"{file.path}: cannot be read: {error.strerror}; run the command again") from None
    described = [str(file.path), status.st_size, status.st_mtime_ns, file.kind, file.packing]
    described += [beside.stat().st_mtime_ns for beside in file.beside if beside.exists()]
    return [*described, True] if file.for_validation else described


def cut_units(files: Sequence[InputFile], source: TextSource, split: Split, part_bytes: int) -> list[Unit]:
    """Runs of files of UNIT_BYTES or more; one alone where documents are counted to be divided by position."""
    runs: list[list[InputFile]] = []
    size = 0
    for file in files:
        if not runs or (size >= UNIT_BYTES and not split.cuts):
            runs.append([])
            size = 0
        runs[-1].append(file)
        size += file.size
    return [Unit(tuple(run), source, split, part_bytes) for run in runs]


@dataclass
class Reading:
    """Reads units and tokenizes their parts, with all workers."""

    store: UnitStore
    crew: Crew
    on_done: Callable[[int], None]  # bytes of the input that are tokenized
    _done: int = 0
    _open: dict[int, list[Any]] = field(default_factory=dict)  # by unit: [parts missing yet, its record]

    def records(self, units: Sequence[Unit]) -> list[UnitRecord]:
        """What every unit holds. UserError from reading."""
        pending = [unit for unit in units if self.store.get(unit) is None]
        self._tell(sum(unit.size for unit in units) - sum(unit.size for unit in pending))
        if self.crew.workers > 1 and len(pending) >= 2 * self.crew.workers:
            self.crew.run(_ReadUnit(self.store), pending, lambda unit, _: self._tell(unit.size))
        else:
            self._from_one_reader(pending)
        records = [self.store.get(unit) for unit in units]
        if None in records:
            raise UserError("parts of the unfinished work are gone; run the command again")
        return [record for record in records if record is not None]

    def _from_one_reader(self, units: Sequence[Unit]) -> None:
        begun, handed_out = self._done, set[str]()

        def missing() -> Iterator[tuple[int, Part]]:
            before = begun
            for number, unit in enumerate(units):
                record = UnitRecord([], ReadCounts())
                self._open[number] = [0, None]
                for part in unit.parts(record.counts):
                    part = part._replace(read_bytes=before + part.read_bytes)
                    record.parts.append(part.name)
                    if part.name in handed_out or self.store.parts.has(part.name):
                        self._tell_at(part.read_bytes)
                    else:
                        handed_out.add(part.name)
                        self._open[number][0] += 1
                        yield number, part
                before += unit.size
                self._open[number][1] = record
                self._close(number, units)

        def done(item: tuple[int, Part], _: None) -> None:
            self._open[item[0]][0] -= 1
            self._tell_at(item[1].read_bytes)
            self._close(item[0], units)

        self.crew.run(_MakePart(self.store.parts), missing(), done)
        self._tell_at(begun + sum(unit.size for unit in units))

    def _close(self, number: int, units: Sequence[Unit]) -> None:
        missing, record = self._open[number]
        if missing == 0 and record is not None:
            self.store.put(units[number], record)
            del self._open[number]

    def _tell(self, more: int) -> None:
        self._tell_at(self._done + more)

    def _tell_at(self, done: int) -> None:
        self._done = max(self._done, done)
        self.on_done(self._done)


@dataclass(frozen=True)
class _MakePart:
    store: PartStore

    def __call__(self, item: tuple[int, Part]) -> None:
        self.store.make(item[1])


@dataclass(frozen=True)
class _ReadUnit:
    """Reads and tokenizes a whole unit, in a worker."""

    store: UnitStore

    def __call__(self, unit: Unit) -> None:
        record = UnitRecord([], ReadCounts())
        for part in unit.parts(record.counts):
            if not self.store.parts.has(part.name):
                self.store.parts.make(part)
            record.parts.append(part.name)
        self.store.put(unit, record)


def total_counts(records: Sequence[UnitRecord]) -> ReadCounts:
    """The sums over all units."""
    total = ReadCounts()
    for record in records:
        for name in (one.name for one in fields(ReadCounts) if one.name != "members"):
            setattr(total, name, getattr(total, name) + getattr(record.counts, name))
        members = record.counts.members
        total.members = replace(
            total.members, links=total.members.links + members.links, others=total.members.others + members.others
        )
    return total
