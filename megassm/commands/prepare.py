"""Turns text into the sharded data set that pretraining reads; see `megassm.data.prepare.pipeline`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megassm.cli.arguments import TableRow, cores, path_argument, print_table, tool_parser
from megassm.cli.progress import shown_progress
from megassm.errors import UserError
from megassm.guarded import read_bytes

if TYPE_CHECKING:
    from megassm.data.prepare.pipeline import PrepareJob

MOST_WORKERS = 16  # unless asked for more: each may hold two parts in memory, and one reader feeds them all
LICENCE_BYTES = 2**20
EXAMPLE = "python tools/prepare_data.py --input corpus/ --glob '*.py' --output data/code --tokenizer bytes"


def main() -> None:
    """Prepares, then prints what lies in the output."""
    arguments = _parser().parse_args()
    from megassm.data.prepare.pipeline import prepare
    from megassm.data.prepare.work import REPAIRED

    with shown_progress() as progress:
        prepared = prepare(_job(arguments), progress)
    if prepared.was_there:
        print(f"{arguments.output} holds this data set already: nothing to do", file=sys.stderr)
    rows: list[TableRow] = []
    for split, shards in prepared.splits.items():
        counts = (shards.documents, shards.tokens, shards.text_bytes, len(shards.shards))
        rows.append(_row(split, *counts))
    for reason, documents in prepared.filtered.items():
        if documents:
            rows.append(_row(reason if reason == REPAIRED else f"left out: {reason}", documents))
    if prepared.repeated and not arguments.deduplicate:
        note = f"{prepared.repeated:,} documents repeat the text of another; --deduplicate leaves such out"
        print(note, file=sys.stderr)
    print_table(str(arguments.output), rows, arguments.json)


def _row(split: str, documents: int, tokens: int = 0, text_bytes: int = 0, shards: int = 0) -> TableRow:
    return {
        "split": split,
        "documents": documents,
        "tokens": tokens,
        "text_bytes": text_bytes,
        "shards": shards,
    }


def _parser() -> argparse.ArgumentParser:
    from megassm.data.prepare.source import add_source_options

    parser = tool_parser("Tokenizes, shuffles, splits and shards text for pretraining.", EXAMPLE)
    add_source_options(parser)
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--output", type=path_argument, required=True, metavar="DIR", help="holds train/ and valid/ afterwards")
    add(
        "--tokenizer", default="bytes", metavar="bytes|FILE", help=f"bytes, a .model file or a tokenizer.json {default}"
    )
    add("--eod-token", metavar="TOKEN", help="that ends a document; of a tokenizer.json (default: as it says)")
    add("--deduplicate", action="store_true", help="of documents with the same text, keep the first")
    valid_help = (
        "of the documents, by a hash of their text; where they are fewer than 20, of each document its end; 0: no "
        "validation set (default: 0.05, and files whose names say that they are split already are refused)"
    )
    add("--valid-fraction", type=float, metavar="F", help=valid_help)
    given_help = "what to validate on; all other input is for training. It may lie in a folder of --input"
    add("--valid-input", type=path_argument, nargs="+", default=[], metavar="PATH", help=given_help)
    add("--seed", type=int, default=0, metavar="N", help=f"of the shuffle {default}")
    add("--shard-tokens", type=int, default=1 << 28, metavar="N", help=f"tokens a file {default}")
    add("--block-tokens", type=int, default=1 << 20, metavar="N", help=f"tokens read at once {default}")
    add("--member-tokens", type=int, default=1 << 20, metavar="N", help=f"tokens a tar member {default}")
    licence_help = "of the text, for dataset.md: a file that holds it, or the words themselves"
    add("--licence", metavar="FILE|TEXT", help=licence_help)
    workers_help = f"processes; the result is the same for any number {default}"
    add("--workers", type=int, default=min(cores(), MOST_WORKERS), metavar="N", help=workers_help)
    return parser


def _licence(given: str | None) -> str | None:
    """A file's text, or what was given; a name that looks like a file's and is not one is an error."""
    if not given:
        return None
    path = Path(given)
    if len(given) < 256 and path.is_file():
        return read_bytes(path, LICENCE_BYTES, "give the licence's text").decode(errors="replace")
    if " " not in given and ("/" in given or path.suffix in (".txt", ".md")):
        raise UserError(f"--licence {given}: no such file; give a file, or the licence's text")
    return given


def _job(arguments: argparse.Namespace) -> PrepareJob:
    from dataclasses import replace

    from megassm.data.index import ShardSizes
    from megassm.data.prepare.pipeline import PrepareJob
    from megassm.data.prepare.source import source_of
    from megassm.data.tokenizer.base import TokenizerSpec

    return PrepareJob(
        source=replace(source_of(arguments), valid_inputs=tuple(arguments.valid_input)),
        output=arguments.output,
        tokenizer=TokenizerSpec(arguments.tokenizer, arguments.eod_token),
        deduplicate=arguments.deduplicate,
        valid_fraction=arguments.valid_fraction,
        seed=arguments.seed,
        sizes=ShardSizes(arguments.shard_tokens, arguments.block_tokens, arguments.member_tokens),
        workers=arguments.workers,
        licence=_licence(arguments.licence),
    )
