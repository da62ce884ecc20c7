"""Finds the input files, looks at each before any work begins, and keeps account of what is left out."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from megassm.data.prepare.documents import check_first_document
from megassm.data.prepare.kinds import READ_SUFFIXES, InputFile, is_read, is_token_file, look_at
from megassm.data.prepare.records import BadRecordError
from megassm.data.prepare.shard_lists import LIST_NAME, check_all_there, shard_list
from megassm.data.prepare.source import TextSource
from megassm.data.prepare.unpack import split_packing
from megassm.errors import UserError

ABOUT_THE_DATA = ("readme", "license", "licence", "copying", "changelog", "contributing", "citation", "dataset_card")
SCHEMES = ("http:/", "https:/", "s3:/", "gs:/", "hf:/", "ftp:/")
KINDS_SHOWN = 12
PREPARED = ({"prepare.json", "dataset.md"}, {"index.json", "index.npz"})  # files of a folder that does not hold text


@dataclass
class Inputs:
    """The files to read, in order, and what else was found."""

    files: list[InputFile] = field(default_factory=list)
    left_out: dict[str, list[str]] = field(default_factory=dict)  # why: the paths
    about: list[str] = field(default_factory=list)  # files read whose names say that they describe the data

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return sum(file.size for file in self.files)

    def leave_out(self, why: str, path: Path | str) -> None:
        self.left_out.setdefault(why, []).append(shown(path))

    def summary(self) -> list[str]:
        """Sentences for people: what was not read, and what was read and may not be meant."""
        lines = []
        if self.left_out:
            kinds = sorted(self.left_out.items(), key=lambda entry: -len(entry[1]))
            parts = [f"{len(paths):,} {why} (such as {paths[0]})" for why, paths in kinds[:KINDS_SHOWN]]
            rest = sum(len(paths) for _, paths in kinds[KINDS_SHOWN:])
            parts += [f"{rest:,} of other kinds"] if rest else []
            total = sum(len(paths) for paths in self.left_out.values())
            lines.append(f"left out: {total:,} files: {', '.join(parts)}")
        if self.about:
            lines.append(
                f"read as documents: {', '.join(self.about[:KINDS_SHOWN])}; name the files to read if not meant"
            )
        return lines


def shown(path: Path | str) -> str:
    """A path as text that can be printed and stored, whatever bytes its name is made of."""
    return os.fsencode(path).decode(errors="backslashreplace")


def find_inputs(source: TextSource) -> Inputs:
    """The files to read: inputs in the order given, each directory sorted, none twice.

    Every file is opened and its first record read, so that what is wrong shows before the work.

    Raises:
        UserError: nothing to read, a file that cannot be opened, or one that is nothing that is read here.
    """
    found, seen = Inputs(), set[tuple[int, int]]()
    # Those for validation first: a folder for training may hold them, and they are then no part of it.
    for given in (*source.valid_inputs, *source.inputs):
        path, for_validation = _checked(given), given in source.valid_inputs
        searched = path.is_dir()
        for candidate in _search(path, source, found) if searched else [path]:
            status = candidate.stat()
            if (status.st_dev, status.st_ino) in seen:
                found.leave_out("given twice, by another path or link", candidate)
                continue
            seen.add((status.st_dev, status.st_ino))
            file = look_at(candidate, source.text_field, source.format)._replace(for_validation=for_validation)
            _add(file, source, searched, found)
    for knob, wanted in (("input", False), ("valid-input", True))[: 1 + bool(source.valid_inputs)]:
        if not any(file.for_validation == wanted for file in found.files):
            rest = "; ".join(found.summary())
            raise UserError(f"--{knob}: nothing to read; {rest}; give other files or --text-field")
    return found


def _add(file: InputFile, source: TextSource, searched: bool, found: Inputs) -> None:
    """Takes a file, once its first record was read; one of a folder that is about the data is left out."""
    try:
        check_first_document(source, file)
    except UserError as error:
        if not (searched and source.glob is None and _is_about_the_data(file, error)):
            raise
        found.leave_out(f"JSON files without texts in {source.text_field!r}", file.path)
        return
    found.files.append(file)
    if searched and split_packing(file.path.name)[0].split(".")[0] in ABOUT_THE_DATA:
        found.about.append(shown(file.path))


def _is_about_the_data(file: InputFile, error: UserError) -> bool:
    """Whether a .json file of a folder is something else than texts, as package.json or dataset_infos.json."""
    is_json = split_packing(file.path.name)[0].endswith(".json")
    return is_json and file.kind == "json values" and isinstance(error, BadRecordError)


def _checked(path: Path) -> Path:
    """UserError where a path is nothing that can be read; with a hint where it looks like something else."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        text = str(path)
        if text.startswith(SCHEMES):
            raise UserError(f"--input {text}: is a URL; fetch it first, and give the files") from None
        hint = "; the shell did not expand '~', give the whole path" if text.startswith("~") else ""
        if isinstance(error, FileNotFoundError):
            raise UserError(f"--input {shown(path)}: no such file or directory{hint}") from None
        raise UserError(f"--input {shown(path)}: cannot be read: {error.strerror}{hint}") from None
    if not stat.S_ISDIR(mode) and not stat.S_ISREG(mode):
        rule = "is a pipe or device, and inputs are read twice"
        raise UserError(f"--input {shown(path)}: {rule}; write it to a file, and give that")
    return path


def _search(directory: Path, source: TextSource, found: Inputs) -> list[Path]:
    """The files to read in a directory, sorted; the others are told to `found`."""
    pattern = source.glob
    if pattern is not None and (pattern.startswith("/") or not pattern):
        raise UserError(f"--glob {pattern!r}: give a pattern of file names, for example '*.py'")
    paths = []
    for path in _walk(directory, source.without, found):
        relative = path.relative_to(directory)
        if pattern is not None:
            if _matches(relative, pattern) and path.is_file():
                paths.append(path)
        elif not path.exists():
            found.leave_out("broken links", path)
        elif not path.is_file():
            found.leave_out("pipes or devices", path)
        elif _belongs_to_another(path):
            continue
        elif (listed := shard_list(path.parent)) and path.name not in listed.shards:
            found.leave_out(f"not in the {LIST_NAME} beside them", path)
        elif is_read(path.name) or is_token_file(path, source.format):
            paths.append(path)
        else:
            suffixes = "".join(path.suffixes[-2:] if split_packing(path.name)[1] else path.suffixes[-1:])
            found.leave_out(f"named *{suffixes}" if suffixes else "without suffix", path)
    if not paths:
        names = pattern or " or ".join(f"*{suffix}" for suffix in READ_SUFFIXES)
        way_out = "give another --glob" if pattern else "pass --glob, for example '*.py'"
        raise UserError(f"--input {shown(directory)}: holds no file named {names}; {way_out}")
    for folder in {path.parent for path in paths}:
        check_all_there(folder)
    return sorted(paths)


def _belongs_to_another(path: Path) -> bool:
    """Whether a file says what is in others, and is read with them."""
    if path.name == LIST_NAME:
        return shard_list(path.parent) is not None
    return path.suffix == ".idx" and path.with_suffix(".bin").is_file()


def _matches(relative: Path, pattern: str) -> bool:
    """As Path.rglob: the pattern may hold folders, and stands for the end of the path."""
    parts, wanted = relative.parts, Path(pattern.removeprefix("**/")).parts
    return len(parts) >= len(wanted) and all(
        fnmatch(part, part_pattern)
        for part, part_pattern in zip(parts[len(parts) - len(wanted) :], wanted, strict=True)
    )


def _walk(directory: Path, without: Path | None, found: Inputs) -> Iterator[Path]:
    """All files below a directory, through links to folders, hidden ones apart; each folder once."""

    def refuse(error: OSError) -> None:
        place = shown(error.filename)
        raise UserError(f"--input {place}: cannot be read: {error.strerror}; mend that, or leave it out")

    skipped, visited = without and without.resolve(), set()
    for place, folders, names in os.walk(directory, onerror=refuse, followlinks=True):
        real = Path(place).resolve()
        if real in visited:
            found.leave_out("folders given twice, by another path or link", place)
            folders.clear()
            continue
        visited.add(real)
        if any(marks <= set(names) for marks in PREPARED):
            found.leave_out("prepared data sets", place)
            folders.clear()
            continue
        for name in [name for name in folders if name.startswith(".")]:
            found.leave_out("hidden", Path(place, name))
        folders[:] = sorted(
            name for name in folders if not name.startswith(".") and Path(place, name).resolve() != skipped
        )
        for name in names:
            if name.startswith("."):
                found.leave_out("hidden", Path(place, name))
            else:
                yield Path(place, name)
