"""Turns text into the sharded data set that pretraining reads; see `megassm.data.prepare`."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megassm.cli import Row, print_table, run_tool, tool_parser

if TYPE_CHECKING:
    from rich.progress import Progress

    from megassm.data.prepare import PrepareJob

MOST_WORKERS = 16  # unless asked for more: each may hold two parts in memory, and one reader feeds them all
EXAMPLE = "python tools/prepare_data.py --input corpus/ --glob '*.py' --output data/code --tokenizer bytes"


def main() -> None:
    """Prepares, then prints what lies in the output."""
    arguments = _parser().parse_args()
    from megassm.data.prepare import prepare

    with _progress_bar() as bar:
        prepared = prepare(_job(arguments), _BarProgress(bar))
    if prepared.was_there:
        print(f"{arguments.output} holds this data set already: nothing to do", file=sys.stderr)
    rows: list[Row] = []
    for split, shards in prepared.splits.items():
        counts = (shards.documents, shards.tokens, shards.text_bytes, len(shards.shards))
        rows.append(_row(split, *counts))
    for reason, documents in (("dropped: empty", prepared.empty), ("dropped: not UTF-8", prepared.bad_utf8)):
        if documents:
            rows.append(_row(reason, documents))
    print_table(str(arguments.output), rows, arguments.json)


def _row(split: str, documents: int, tokens: int = 0, text_bytes: int = 0, shards: int = 0) -> Row:
    return {
        "split": split,
        "documents": documents,
        "tokens": tokens,
        "text_bytes": text_bytes,
        "shards": shards,
    }


def _parser() -> argparse.ArgumentParser:
    from megassm.data.documents import add_source_options

    parser = tool_parser("Tokenizes, shuffles, splits and shards text for pretraining.", EXAMPLE)
    add_source_options(parser)
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--output", type=Path, required=True, metavar="DIR", help="holds train/ and valid/ afterwards")
    add("--tokenizer", default="bytes", metavar="bytes|FILE", help=f"bytes, or a .model file {default}")
    add("--valid-fraction", type=float, default=0.05, metavar="F", help=f"of the documents {default}")
    add("--seed", type=int, default=0, metavar="N", help=f"of the shuffle {default}")
    add("--shard-tokens", type=int, default=1 << 28, metavar="N", help=f"tokens a file {default}")
    add("--block-tokens", type=int, default=1 << 20, metavar="N", help=f"tokens read at once {default}")
    add("--member-tokens", type=int, default=1 << 20, metavar="N", help=f"tokens a tar member {default}")
    workers_help = f"processes; the result is the same for any number {default}"
    add("--workers", type=int, default=min(os.cpu_count() or 1, MOST_WORKERS), metavar="N", help=workers_help)
    return parser


def _job(arguments: argparse.Namespace) -> PrepareJob:
    from megassm.data.documents import source_of
    from megassm.data.prepare import PrepareJob
    from megassm.data.shards import ShardSizes

    return PrepareJob(
        source=source_of(arguments),
        output=arguments.output,
        tokenizer=arguments.tokenizer,
        valid_fraction=arguments.valid_fraction,
        seed=arguments.seed,
        sizes=ShardSizes(arguments.shard_tokens, arguments.block_tokens, arguments.member_tokens),
        workers=arguments.workers,
    )


def _progress_bar() -> Progress:
    from rich import progress
    from rich.console import Console

    columns = (
        progress.TextColumn("{task.description:8}"),
        progress.BarColumn(),
        progress.DownloadColumn(),
        progress.TransferSpeedColumn(),
        progress.TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    return progress.Progress(*columns, console=console, disable=not sys.stderr.isatty())


class _BarProgress:
    """Shows the phases of `prepare` on stderr; notes also where that is not a terminal."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("", visible=False)

    def start(self, phase: str, total_bytes: int) -> None:
        self._task = self._bar.add_task(phase, total=total_bytes)

    def update(self, done_bytes: int) -> None:
        self._bar.update(self._task, completed=done_bytes)

    def note(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)


if __name__ == "__main__":
    run_tool(main)
