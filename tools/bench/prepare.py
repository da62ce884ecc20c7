"""Preparation beside a plain tokenizer loop: rate and peak memory, by kind of input, size and tokenizer.

    python -m tools.bench.prepare --text books.jsonl.gz --megabytes 100 --kinds many --tokenizers bytes bpe unigram json

The plain loop is what people write first: read a document, `encode`, append the ids to one flat file, in one process.
Preparation runs with one worker, so that both are rates of one process; each in a process of its own, whose CPU time
and largest resident memory the system tells. `many` is JSON lines of about a kilobyte, `one` one text file.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megassm.cli.arguments import TableRow, path_argument, print_table, run_tool, tool_parser
from megassm.data.prepare.documents import ReadCounts, read_documents
from megassm.data.prepare.inputs import find_inputs
from megassm.data.prepare.source import TextSource
from megassm.data.tokenizer.base import load_tokenizer, train_sentencepiece

KINDS = {"many": "many.jsonl", "one": "one.txt", "parquet": "many.parquet", "zstd": "many.jsonl.zst"}
TOKENIZERS = ("bytes", "bpe", "unigram", "json")
DOCUMENT_CHARS = 1000
VOCAB_SIZE, SAMPLE_CHARS = 8000, 4_000_000
LOOP = """
import json, sys
import numpy as np
path, tokenizer, target = sys.argv[1:]
if tokenizer == "bytes":
    encode = lambda text: np.frombuffer(text.encode(), dtype=np.uint8)
elif tokenizer.endswith(".json"):
    from tokenizers import Tokenizer
    backend = Tokenizer.from_file(tokenizer)
    encode = lambda text: backend.encode(text).ids
else:
    from sentencepiece import SentencePieceProcessor
    encode = SentencePieceProcessor(model_file=tokenizer).encode
def documents():
    if path.endswith(".txt"):
        with open(path, encoding="utf-8", newline="") as file:
            while text := file.read(1 << 18):
                yield text
    elif path.endswith(".parquet"):
        from pyarrow import parquet
        for batch in parquet.ParquetFile(path, pre_buffer=False).iter_batches(1000, columns=["text"]):
            yield from batch.column(0).to_pylist()
    else:
        import io, pyarrow
        opened = pyarrow.input_stream(path)  # unpacks .zst
        for line in io.BufferedReader(opened, 1 << 20):
            yield json.loads(line)["text"]
with open(target, "wb") as out:
    for text in documents():
        out.write(np.array(encode(text), dtype=np.uint16).tobytes())
"""
TIMED = """
import json, resource, subprocess, sys, time
begun = time.monotonic()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([used.ru_utime + used.ru_stime, time.monotonic() - begun, used.ru_maxrss / 1024]))
"""


def main() -> None:
    """Measures every kind with every tokenizer and prints a table."""
    parser = tool_parser("Times data preparation beside a plain tokenizer loop.", __doc__.splitlines()[2].strip())
    add = parser.add_argument
    add("--text", type=path_argument, required=True, metavar="PATH", help="where the text is from, repeated as needed")
    add("--megabytes", type=float, default=100, metavar="N", help="of text (default: %(default)s)")
    add("--kinds", nargs="+", choices=tuple(KINDS), default=["many"], help="(default: many)")
    add("--tokenizers", nargs="+", choices=TOKENIZERS, default=list(TOKENIZERS), help="(default: all)")
    add("--work", type=path_argument, metavar="DIR", help="for the files, which are removed (default: a temporary one)")
    add("--alone", action="store_true", help="leave the plain loop out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.work) as name:
        work = Path(name)
        source = TextSource((arguments.text,))
        text = "".join(read_documents(source, find_inputs(source).files, ReadCounts()))
        tokenizers = {kind: make_tokenizer(kind, text, work) for kind in arguments.tokenizers}
        rows: list[TableRow] = []
        for kind in arguments.kinds:
            path = work / KINDS[kind]
            size = write_text(path, documents(text, round(arguments.megabytes * 1e6)))
            for tokenizer, place in tokenizers.items():
                rows.append(
                    {
                        "input": kind,
                        "MB": size / 1e6,
                        "tokenizer": tokenizer,
                        **measured(path, place, size, not arguments.alone),
                    }
                )
            path.unlink()
    print_table("prepare", rows, arguments.json)


def documents(text: str, size: int) -> Iterator[str]:
    """Different ones of about a kilobyte, so many bytes in all."""
    done = number = 0
    while done < size:
        start = number * DOCUMENT_CHARS % max(1, len(text) - DOCUMENT_CHARS)
        document = f"{number} {text[start : start + DOCUMENT_CHARS]}\n"
        yield document
        done += len(document.encode())
        number += 1


def write_text(path: Path, texts: Iterator[str]) -> int:
    """Writes them as the file's name says; returns bytes of text."""
    size = 0
    if path.suffix == ".txt":
        with open(path, "wb") as file:
            for text in texts:
                size += file.write(text.encode())
        return size
    if path.suffix == ".parquet":
        import pyarrow
        from pyarrow import parquet

        with parquet.ParquetWriter(path, pyarrow.schema([("text", pyarrow.string())])) as writer:
            batch: list[str] = []
            for text in texts:
                batch.append(text)
                size += len(text.encode())
                if len(batch) == 10_000:
                    writer.write_table(pyarrow.table({"text": batch}))
                    batch = []
            writer.write_table(pyarrow.table({"text": pyarrow.array(batch, pyarrow.string())}))
        return size
    opened: Any = open(path, "wb")  # noqa: SIM115
    if path.suffix == ".zst":
        import pyarrow

        opened = pyarrow.output_stream(path, compression="zstd")
    with opened as file:
        for text in texts:
            file.write(json.dumps({"text": text}).encode() + b"\n")
            size += len(text.encode())
    return size


def make_tokenizer(kind: str, text: str, work: Path) -> str:
    """Its path, trained on the beginning of the text."""
    sample = text[:SAMPLE_CHARS].splitlines(keepends=True)
    if kind == "bytes":
        return kind
    if kind == "json":
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        backend = Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        special = ["<|endoftext|>"]
        trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, initial_alphabet=alphabet, special_tokens=special)
        backend.train_from_iterator(sample, trainer)
        backend.save(str(work / "tokenizer.json"))
        return str(work / "tokenizer.json")
    model = work / f"{kind}.model"
    model.write_bytes(train_sentencepiece(sample, VOCAB_SIZE, "bpe" if kind == "bpe" else "unigram"))
    load_tokenizer(model)
    return str(model)


def measured(path: Path, tokenizer: str, size: int, with_loop: bool) -> TableRow:
    """Both, one after the other; rates in MB of text per second of CPU, and of the clock for preparation."""
    flat, output = path.with_suffix(".bin"), path.with_name("set")
    tool = Path(__file__).parents[1] / "prepare_data.py"
    options = ["--input", str(path), "--tokenizer", tokenizer, "--output", str(output), "--workers", "1"]
    cpu_s, wall_s, mib = timed([sys.executable, str(tool), *options])
    shutil.rmtree(output)
    row = {"prepare_MB_per_cpu_s": size / 1e6 / cpu_s, "prepare_MB_per_s": size / 1e6 / wall_s, "prepare_MiB": mib}
    if with_loop:
        loop_s, _, loop_mib = timed([sys.executable, "-c", LOOP, str(path), tokenizer, str(flat)])
        flat.unlink()
        row |= {"loop_MB_per_cpu_s": size / 1e6 / loop_s, "of_loop": loop_s / cpu_s, "loop_MiB": loop_mib}
    return row


def timed(command: list[str]) -> tuple[float, float, float]:
    """(CPU seconds, seconds, MiB of the largest resident memory) of a command. Raises where it fails."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    # From a small process: a process's largest memory begins with that of the one it was started from.
    done = subprocess.run([sys.executable, "-c", TIMED, *command], env=environment, stdout=subprocess.PIPE, check=True)
    cpu_s, wall_s, mib = json.loads(done.stdout.splitlines()[-1])
    return cpu_s, wall_s, mib


if __name__ == "__main__":
    run_tool(main)
