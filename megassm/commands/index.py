"""Indexes shards of token ids made elsewhere, so that training reads them as they are.

The logic is in `megassm.data.prepare.foreign`.
"""

from __future__ import annotations

import argparse
from typing import get_args

from megassm.cli.arguments import TableRow, cores, path_argument, print_table, tool_parser
from megassm.cli.progress import shown_progress

EXAMPLE = "python tools/index_shards.py data/theirs --tokenizer data/theirs/tokenizer.json"


def main() -> None:
    """Indexes DIR, or its train/ and valid/, and keeps the tokenizer beside them."""
    arguments = _parser().parse_args()
    from megassm.data.dataset import TRAIN, VALID, keep_tokenizer
    from megassm.data.index import INDEX_NAME
    from megassm.data.prepare.foreign import IndexJob, index_shards
    from megassm.data.prepare.verify import set_directories
    from megassm.data.tokenizer.base import TokenizerSpec, load_tokenizer

    spec = TokenizerSpec(arguments.tokenizer, arguments.eod_token)
    tokenizer = load_tokenizer(spec)
    rows: list[TableRow] = []
    found = set_directories(arguments.directory, "*.tar", (TRAIN, VALID))
    missing = [directory for directory in found if not (directory / INDEX_NAME).exists()]
    if found != [arguments.directory]:
        keep_tokenizer(tokenizer, arguments.directory)
    for directory in missing or found:  # one that is complete is left alone, unless it is all there is: refused then
        options = (arguments.members, arguments.suffix, arguments.block_tokens, arguments.workers)
        with shown_progress() as progress:
            shards = index_shards(IndexJob(directory, spec, *options), progress)
        rows.append(
            {
                "data_set": str(directory),
                "documents": shards.documents,
                "tokens": shards.tokens,
                "text_bytes": shards.text_bytes,
                "shards": len(shards.shards),
                "blocks": len(shards.blocks),
            }
        )
    print_table(str(arguments.directory), rows, arguments.json)


def _parser() -> argparse.ArgumentParser:
    from megassm.data.index import MemberKind

    description = "Writes index.json and index.npz for tar shards of token ids; the shards stay as they are."
    parser = tool_parser(description, EXAMPLE)
    add, default = parser.add_argument, "(default: %(default)s)"
    add("directory", type=path_argument, metavar="DIR", help="holds *.tar, or train/ and valid/ that hold them")
    add("--tokenizer", required=True, metavar="bytes|FILE", help="that made the ids: .model or tokenizer.json")
    add("--eod-token", metavar="TOKEN", help="that ends a document; of a tokenizer.json (default: as it says)")
    members_help = (
        "documents: a member is whole documents, and reading ends the last with EOD where that is missing; "
        f"chunks: ids as they are {default}"
    )
    add("--members", choices=get_args(MemberKind), default="documents", help=members_help)
    add("--suffix", metavar="NAME", help="of the members with ids: u16, u32, npy, tokens.npy (default: as found)")
    add("--block-tokens", type=int, default=1 << 20, metavar="N", help=f"tokens read at once {default}")
    add("--workers", type=int, default=cores(), metavar="N", help=f"processes {default}")
    return parser
