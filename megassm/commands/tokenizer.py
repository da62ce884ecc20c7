"""Trains a SentencePiece tokenizer that loses nothing; see `megassm.data.tokenizer.base`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megassm.cli.arguments import output_file, print_table, tool_parser
from megassm.cli.progress import Progress, shown_progress, tracked
from megassm.errors import UserError

if TYPE_CHECKING:
    from megassm.data.prepare.source import TextSource

EXAMPLE = "python tools/train_tokenizer.py --input corpus/ --vocab-size 32000 --output data/english.model"


def main() -> None:
    """Trains on a sample of the text, then says how well the result compresses that sample."""
    arguments = _parser().parse_args()
    from megassm.data.prepare.source import source_of
    from megassm.data.tokenizer.base import load_tokenizer, train_sentencepiece
    from megassm.files import write_atomically

    _check_output(arguments.output)
    with shown_progress() as progress:
        sample = _sample(source_of(arguments), arguments.max_bytes, arguments.seed, progress)
        with progress.busy("train"):
            model = train_sentencepiece(sample, arguments.vocab_size, arguments.model_type)
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(arguments.output, model)
        tokenizer = load_tokenizer(arguments.output)
        texts = tracked(sample, progress, "measure", len(sample), "documents")
        sample_tokens = sum(ids.size for text in texts for ids in tokenizer.encode([text]))
    sample_bytes = sum(len(text.encode()) for text in sample)
    row = {
        "tokenizer": str(arguments.output),
        "vocab_size": tokenizer.vocab_size,
        "documents": len(sample),
        "sample_bytes": sample_bytes,
        "bytes_per_token": sample_bytes / sample_tokens,
        "sha256": tokenizer.sha256,
    }
    print_table("tokenizer", [row], arguments.json)


def _sample(source: TextSource, max_bytes: int, seed: int, progress: Progress) -> Sequence[str]:
    """What to train on, from one pass over all documents."""
    from megassm.data.prepare.documents import ReadCounts, read_pieces, sample_documents
    from megassm.data.prepare.inputs import find_inputs

    inputs, counts = find_inputs(source), ReadCounts()
    for line in inputs.summary():
        progress.note(line)
    progress.start("read", inputs.size)

    def counted() -> Iterator[str]:
        for piece in read_pieces(source, inputs.files, counts):
            yield piece.content.decode()
            progress.update(counts.file_bytes)

    return sample_documents(counted(), max_bytes, seed)


def _check_output(path: Path) -> None:
    """Only what this tool could have written is replaced."""
    from megassm.data.tokenizer.base import is_sentencepiece_model
    from megassm.guarded import TOKENIZER_BYTES, read_bytes

    if path.is_dir():
        raise UserError(f"--output {path}: is a directory; give a file, for example FILE.model")
    if path.exists() and not is_sentencepiece_model(read_bytes(path, TOKENIZER_BYTES, "give another --output")):
        raise UserError(f"--output {path}: exists and is no SentencePiece model; give another file, or remove it")


def _parser() -> argparse.ArgumentParser:
    from megassm.data.prepare.source import add_source_options

    parser = tool_parser("Trains a SentencePiece tokenizer on text.", EXAMPLE)
    add_source_options(parser)
    add, default = parser.add_argument, "(default: %(default)s)"
    add("--output", type=output_file, required=True, metavar="FILE.model", help="an older model there is replaced")
    add("--vocab-size", type=int, required=True, metavar="N", help="256 bytes and 2 control pieces included")
    add("--model-type", choices=("bpe", "unigram"), default="bpe", help=default)
    add("--max-bytes", type=int, default=50_000_000, metavar="N", help=f"of text to train on {default}")
    add("--seed", type=int, default=0, metavar="N", help=f"of the sample {default}")
    return parser
