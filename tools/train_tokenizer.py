"""Trains a SentencePiece tokenizer that loses nothing; see `megassm.data.tokenizer.base`."""

from __future__ import annotations

import argparse
from pathlib import Path

from megassm.cli.arguments import output_file, print_table, run_tool, tool_parser
from megassm.errors import UserError

EXAMPLE = "python tools/train_tokenizer.py --input corpus/ --vocab-size 32000 --output data/english.model"


def main() -> None:
    """Trains on a sample of the text, then says how well the result compresses that sample."""
    arguments = _parser().parse_args()
    from megassm.data.prepare.documents import ReadCounts, list_files, read_documents, sample_documents, source_of
    from megassm.data.tokenizer.base import load_tokenizer, train_sentencepiece
    from megassm.files import write_atomically

    _check_output(arguments.output)
    source = source_of(arguments)
    documents = read_documents(source, list_files(source), ReadCounts())
    sample = sample_documents(documents, arguments.max_bytes, arguments.seed)
    model = train_sentencepiece(sample, arguments.vocab_size, arguments.model_type)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.output, model)

    tokenizer = load_tokenizer(arguments.output)
    sample_bytes = sum(len(text.encode()) for text in sample)
    sample_tokens = sum(ids.size for text in sample for ids in tokenizer.encode([text]))
    row = {
        "tokenizer": str(arguments.output),
        "vocab_size": tokenizer.vocab_size,
        "documents": len(sample),
        "sample_bytes": sample_bytes,
        "bytes_per_token": sample_bytes / sample_tokens,
        "sha256": tokenizer.sha256,
    }
    print_table("tokenizer", [row], arguments.json)


def _check_output(path: Path) -> None:
    """Only what this tool could have written is replaced."""
    from megassm.data.tokenizer.base import is_sentencepiece_model

    if path.is_dir():
        raise UserError(f"--output {path}: is a directory; give a file, for example FILE.model")
    if path.exists() and not is_sentencepiece_model(path.read_bytes()):
        raise UserError(f"--output {path}: exists and is no SentencePiece model; give another file, or remove it")


def _parser() -> argparse.ArgumentParser:
    from megassm.data.prepare.documents import add_source_options

    parser = tool_parser("Trains a SentencePiece tokenizer on text.", EXAMPLE)
    add_source_options(parser)
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--output", type=output_file, required=True, metavar="FILE.model", help="an older model there is replaced")
    add("--vocab-size", type=int, required=True, metavar="N", help="256 bytes and 2 control pieces included")
    add("--model-type", choices=("bpe", "unigram"), default="bpe", help=default)
    add("--max-bytes", type=int, default=50_000_000, metavar="N", help=f"of text to train on {default}")
    add("--seed", type=int, default=0, metavar="N", help=f"of the sample {default}")
    return parser


if __name__ == "__main__":
    run_tool(main)
