"""Checks every byte and count of a data set and shows some of its text; see `megassm.data.prepare.verify`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from megassm.cli.arguments import TableRow, cores, path_argument, positive, print_line, print_table, tool_parser
from megassm.cli.progress import shown_progress
from megassm.errors import UserError

if TYPE_CHECKING:
    from megassm.data.tokenizer.base import Tokenizer

EXAMPLE = "python tools/verify_data.py data/corpus"


def main() -> None:
    """Verifies DIR, or its train/ and valid/; every damage is on stderr, and with any the exit code is 1."""
    arguments = _parser().parse_args()
    from megassm.data.dataset import TRAIN, VALID
    from megassm.data.prepare.verify import set_directories

    damages: list[str] = []
    rows: list[TableRow] = []
    if (arguments.directory / "model.safetensors").is_file():
        _verify_model(arguments.directory, arguments.json)
        return
    for directory in set_directories(arguments.directory, "index.*", (TRAIN, VALID)):
        found = _verify(directory, arguments, rows)
        for damage in found:
            print_line(damage, sys.stderr)
        damages += found
    print_table(str(arguments.directory), rows, arguments.json)
    if damages:
        raise UserError(f"{arguments.directory}: {len(damages)} damages, named above")


def _verify_model(folder: Path, json_path: Path | None) -> None:
    """An exported model: every file against its checksum, and the weights read once.

    Raises:
        UserError: naming what is wrong.
    """
    from megassm.checkpoint.exported import SUMS, open_model_folder, read_sums

    model = open_model_folder(folder)
    tensors = sum(1 for _ in model.weights())
    sums = read_sums(folder)
    if sums is None:
        print_line(f"warning: {folder}: has no {SUMS}, so its files are what they say they are; export it again")
    print_table(str(folder), [{"model": folder.name, "tensors": tensors, "checked_files": len(sums or ())}], json_path)


def _verify(directory: Path, arguments: argparse.Namespace, rows: list[TableRow]) -> list[str]:
    """Adds a row to the table, prints samples where the set is sound; returns the damages."""
    from megassm.data.index import read_index
    from megassm.data.prepare.verify import check_tokenizer, sample_texts, verify

    try:
        shards = read_index(directory)
    except UserError as error:
        return [str(error)]
    name, tokenizer = _tokenizer(directory, arguments)
    damages = check_tokenizer(shards, tokenizer, name)
    with shown_progress() as progress:
        progress.start("verify", sum(shard.bytes for shard in shards.shards))
        damages += verify(shards, arguments.workers, progress.update)
    counts = {"documents": shards.documents, "tokens": shards.tokens, "shards": len(shards.shards)}
    rows.append({"data_set": str(directory), **counts, "blocks": len(shards.blocks), "damages": len(damages)})
    if not damages:
        for sample in sample_texts(shards, tokenizer, arguments.samples):
            print_line(f"-- {directory.name}/{sample.place}:\n{sample.text}\n")
    return damages


def _tokenizer(directory: Path, arguments: argparse.Namespace) -> tuple[str, Tokenizer]:
    from megassm.data.dataset import own_tokenizer
    from megassm.data.tokenizer.base import BytesTokenizer, TokenizerSpec, load_tokenizer

    own = own_tokenizer(directory)
    name = arguments.tokenizer or (own if own != BytesTokenizer.name else own_tokenizer(directory.parent))
    return name, load_tokenizer(TokenizerSpec(name, arguments.eod_token))


def _parser() -> argparse.ArgumentParser:
    parser = tool_parser(
        "Checks checksums, counts and ids of a data set, and shows samples of its text; or an exported model's files.",
        EXAMPLE,
    )
    add, default = parser.add_argument, "(default: %(default)s)"
    add(
        "directory",
        type=path_argument,
        metavar="DIR",
        help="a data set, one of its train/ and valid/, or an exported model",
    )
    add("--tokenizer", metavar="bytes|FILE", help="that made the ids (default: the data set's own)")
    add("--eod-token", metavar="TOKEN", help="that ends a document; of a tokenizer.json (default: as it says)")
    add("--samples", type=int, default=3, metavar="N", help=f"documents to show the beginning of {default}")
    add("--workers", type=positive, default=cores(), metavar="N", help=f"processes {default}")
    return parser
