"""What to read, as a user says it: the options of every tool that reads documents."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from megassm.cli.arguments import path_argument
from megassm.data.prepare.ids import IdFacts
from megassm.data.prepare.kinds import READ_SUFFIXES, Format
from megassm.data.prepare.text import separator_pattern
from megassm.errors import UserError

BadUtf8 = Literal["error", "skip", "replace"]
BadRecord = Literal["raise", "skip", "empty"]
Samples = Literal["documents", "chunks"]


@dataclass(frozen=True)
class TextSource:
    """What to read. A file is read whatever its suffix; a directory is searched, hidden files apart."""

    inputs: tuple[Path, ...]
    glob: str | None = None  # in directories; default: READ_SUFFIXES, and these compressed
    text_field: str = "text"  # of a JSON object, or the column of a Parquet file; `outer.inner` of a nested one
    format: Format = "auto"  # what files are, where content and name would say otherwise
    on_bad_utf8: BadUtf8 = "error"
    on_bad_record: BadRecord = "raise"  # no JSON, no such field, no string in it
    min_document_bytes: int = 0  # UTF-8 bytes; shorter documents are left out
    max_document_bytes: int | None = None  # UTF-8 bytes; longer documents are left out
    samples: Samples = "documents"  # of ids, in MDS and litdata: a document each, or stretches of a stream of them
    ids: IdFacts | None = None  # of the tokenizer; None: text alone is read
    document_separator: str | None = None  # within text files: LINE, BLANK or a regular expression; None: a file is one
    valid_inputs: tuple[Path, ...] = ()  # what is for validation alone; the rest is then for training alone
    without: Path | None = None  # a folder that is never searched: the output

    def __post_init__(self) -> None:
        choices_of = {"on_bad_utf8": BadUtf8, "on_bad_record": BadRecord, "format": Format, "samples": Samples}
        for name, kind in choices_of.items():
            if getattr(self, name) not in get_args(kind):
                choices = " or ".join(repr(choice) for choice in get_args(kind))
                raise UserError(f"{name} is {getattr(self, name)!r}; it is {choices}")
        if self.document_separator is not None:
            check_separator(self.document_separator)
        if self.min_document_bytes < 0:
            raise UserError(f"min_document_bytes is {self.min_document_bytes}, it must be at least 0")
        if self.max_document_bytes is not None and self.max_document_bytes < max(1, self.min_document_bytes):
            rule = f"it must be at least 1 and at least min_document_bytes ({self.min_document_bytes})"
            raise UserError(f"max_document_bytes is {self.max_document_bytes}; {rule}")


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """The options of every tool that reads documents; `source_of` takes them from the parsed arguments.

    A word @FILE stands for the lines of FILE, so that a command can name any number of inputs.
    """
    parser.fromfile_prefix_chars = "@"
    add, default = parser.add_argument, "(default: %(default)s)"
    inputs_help = (
        f"files or folders. In a folder, {' '.join(READ_SUFFIXES)} are read, also as .gz .bz2 .xz .zst. A document is "
        "a text file, a JSON record, a Parquet row, or a sample of a WebDataset, MDS or litdata shard. Token ids of "
        "Megatron-LM (.bin with .idx), llm.c, MDS and litdata are taken as they are. @FILE: one a line"
    )
    add("--input", type=path_argument, nargs="+", required=True, metavar="PATH", help=inputs_help)
    add("--glob", metavar="PATTERN", help="files to take from folders instead, for example '*.py'")
    field_help = f"of a JSON object, or a Parquet column; outer.inner of a nested one {default}"
    add("--text-field", default="text", metavar="NAME", help=field_help)
    format_help = (
        "read every file that says nothing else as text, as JSON, or as token ids end to end, 16, 32 or 64 bits wide, "
        f"which are also what bytes in MDS and litdata are then {default}"
    )
    separator_help = (
        "what divides a text file into documents: LINE (each line is one), BLANK (blank lines stand between), or a "
        "regular expression, which is left out itself (default: a text file is one document)"
    )
    add("--document-separator", metavar="LINE|BLANK|REGEX", help=separator_help)
    add("--format", choices=get_args(Format), default="auto", help=format_help)
    bad_help = f"refuse, or leave the document out, or put U+FFFD in place of it; counted {default}"
    samples_help = f"samples of token ids in MDS and litdata: whole, or documents go on in the next {default}"
    add("--samples", choices=get_args(Samples), default="documents", help=samples_help)
    add("--on-bad-utf8", choices=get_args(BadUtf8), default="error", help=bad_help)
    record_help = f"a record without a text: refuse, or leave it out, or take it for an empty one; counted {default}"
    add("--on-bad-record", choices=get_args(BadRecord), default="raise", help=record_help)
    add("--min-document-bytes", type=int, default=0, metavar="N", help="leave shorter documents out (UTF-8 bytes)")
    add("--max-document-bytes", type=int, metavar="N", help="leave longer documents out (UTF-8 bytes)")


def source_of(arguments: argparse.Namespace) -> TextSource:
    """What `add_source_options` was given."""
    return TextSource(
        inputs=tuple(arguments.input),
        glob=arguments.glob,
        text_field=arguments.text_field,
        format=arguments.format,
        samples=arguments.samples,
        document_separator=arguments.document_separator,
        on_bad_utf8=arguments.on_bad_utf8,
        on_bad_record=arguments.on_bad_record,
        min_document_bytes=arguments.min_document_bytes,
        max_document_bytes=arguments.max_document_bytes,
    )


def check_separator(separator: str) -> None:
    """UserError where a separator is not a regular expression, or would divide before every character."""
    try:
        pattern = separator_pattern(separator)
    except (re.error, RecursionError, OverflowError) as error:
        way_out = "give LINE, BLANK or a regular expression of Python"
        raise UserError(f"--document-separator {separator!r}: {error}; {way_out}") from None
    if separator == "" or pattern.fullmatch(""):
        rule = "matches where nothing stands, which is everywhere"
        raise UserError(
            f"--document-separator {separator!r}: {rule}; give LINE, BLANK, or what stands between documents"
        )
