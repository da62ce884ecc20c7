"""Files and words that should crash, fill or stop whoever reads them, and how each is read. See `tests.test_bombs`."""

from __future__ import annotations

import functools
import gzip
import hashlib
import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from safetensors.torch import save_file

from megassm.checkpoint.exported import SUMS, open_model_folder, write_model_folder
from megassm.checkpoint.format import FORMAT, MANIFEST, Manifest, _crc32, checksum_of, find_checkpoint, load_model
from megassm.config.load import load_config
from megassm.data.blocks import local_fetch, read_block
from megassm.data.index import index_checksum, load_index
from megassm.data.prepare.documents import ReadCounts, read_documents
from megassm.data.prepare.inputs import find_inputs
from megassm.data.prepare.source import TextSource
from megassm.data.tasks.from_files import items
from megassm.data.tokenizer.base import BytesTokenizer, load_tokenizer, train_sentencepiece
from megassm.model import build_model
from megassm.ops.bases import spectral_filters
from megassm.ops.hankel import cache_path
from megassm.report.live import LiveRun
from megassm.report.terminal import frame
from megassm.run.events import read_events
from megassm.run.failures import check_failures
from megassm.run.lives import life_of
from megassm.run.records import cut_after, newest_record, read_records
from tests.conftest import ROOT
from tests.shard_sets import random_documents, write_documents
from tests.test_export import config as small_model

Make = Callable[[Path], object]
Read = Callable[[Path], object]

DEEP = "[" * 1500
DIGITS = "9" * 5000
MANY = gzip.compress(b"a" * 2**24, 1)
"""Members of gzip follow each other: so a large file is made fast."""
TINY = str(ROOT / "configs/tiny.yaml")


@dataclass(frozen=True)
class Bomb:
    """`says` is what the refusal must match; None: it is harmless, and taken or passed over."""

    make: Make
    read: Read
    says: str | None


def write(name: str, content: str | bytes) -> Make:
    def make(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return make


def nothing(folder: Path) -> None:
    """Words alone."""


# Texts that prepare reads


def documents(name: str, **options: Any) -> Read:
    def read(folder: Path) -> None:
        source = TextSource((folder / name,), **options)
        for _ in read_documents(source, find_inputs(source).files, ReadCounts()):
            pass

    return read


def packed(raw: bytes, name: str = "0.txt", **changes: object) -> bytes:
    header = tarfile.TarInfo(name)
    header.size = len(raw)
    for key, value in changes.items():
        setattr(header, key, value)
    return header.tobuf(tarfile.PAX_FORMAT) + raw + b"\0" * (-len(raw) % 512)


SPARSE = packed(b"x", pax_headers={"GNU.sparse.size": "6000000000", "GNU.sparse.major": "1"}) + b"\0" * 10240
HUGE_ATTRIBUTES = gzip.compress(packed(b"", type=tarfile.XHDTYPE, size=3 * 2**30)) + MANY * 192
ONE_KEY = b"".join(packed(b"\n" * 2**20, f"a.{n}.txt") for n in range(100))


def texts_alike(folder: Path) -> None:
    """Texts of 16 MB, all alike: each takes a byte of the file."""
    import pyarrow
    from pyarrow import parquet

    alike = pyarrow.table({"text": pyarrow.array(["a" * 16_000_000] * 12)})
    parquet.write_table(alike, folder / "x.parquet", compression="zstd")


def one_text(folder: Path) -> None:
    """A text of 280 MiB of one byte, in both formats."""
    import pyarrow
    from pyarrow import ipc, parquet

    content = pyarrow.py_buffer(bytes(280 * 2**20))
    offsets = pyarrow.py_buffer(np.array([0, len(content)], "<i8").tobytes())
    one = pyarrow.table({"text": pyarrow.LargeStringArray.from_buffers(1, offsets, content)})
    parquet.write_table(one, folder / "x.parquet", compression="zstd", use_dictionary=False)
    with ipc.new_stream(folder / "x.arrow", one.schema, options=ipc.IpcWriteOptions(compression="zstd")) as file:
        file.write_table(one)


# Data sets


def forged_index(change: Callable[[dict[str, Any]], object], blocks: bytes | None = None) -> Make:
    """A data set whose index says something else, under checksums that fit."""

    def make(folder: Path) -> None:
        own = folder / "set"
        if not own.exists():
            write_documents(own, random_documents(5))
        index = json.loads((own / "index.json").read_text())
        if blocks is not None:
            (own / "index.npz").write_bytes(blocks)
            index["blocks_sha256"] = hashlib.sha256(blocks).hexdigest()
        change(index)
        (own / "index.json").write_text(json.dumps(index | {"checksum": index_checksum(index)}))

    return make


def zeros(columns: int = 2**26) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        file.writestr("shard.npy", bytes(columns))
    return content.getvalue()


def forged_blocks(folder: Path, raw: bytes = b"", **change: int) -> None:
    """A set whose first shard begins with `raw`, and whose first block is what is said, under checksums that fit."""
    forged_index(lambda index: None)(folder)
    own = folder / "set"
    shard = sorted(own.glob("*.tar"))[0]
    content = raw + shard.read_bytes()[len(raw) :]
    shard.write_bytes(content)
    with np.load(own / "index.npz") as found:
        columns = dict(found)
    spans = zip(columns["offset"].tolist(), columns["size"].tolist(), strict=True)
    columns["crc32"] = np.array([zlib.crc32(content[start : start + size]) for start, size in spans], "<u4")
    for name, value in change.items():
        columns[name][0] = value
    file = io.BytesIO()
    np.savez(file, **columns)

    def fitting(index: dict[str, Any]) -> None:
        index["shards"][0]["sha256"] = hashlib.sha256(content).hexdigest()

    forged_index(fitting, file.getvalue())(folder)


def data_set(folder: Path) -> None:
    shards = load_index(folder / "set")
    for number in range(len(shards.blocks)):
        read_block(shards, number, local_fetch(folder / "set"))


# Runs


def views(folder: Path) -> None:
    """What watch, report, resume and the next start read of a run directory."""
    run = LiveRun(folder)
    while run.look().read_share < 1:
        pass
    Console(file=io.StringIO(), width=100).print(frame(run, 100, 40))
    list(read_events(folder))
    life_of(folder)
    if (folder / "metrics.jsonl").exists():
        read_records(folder)
        newest_record(folder / "metrics.jsonl")
        cut_after(folder / "metrics.jsonl", 1)
    check_failures(folder, folder / "metrics.jsonl", folder / "failure.txt", 3)


def rows(*lines: object) -> Make:
    """A journal with these lines among sound ones."""
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    return write("metrics.jsonl", "\n".join(['{"step": 1, "loss": 2.5}', *texts, '{"step": 2}', ""]))


def pipes(folder: Path) -> None:
    """Whoever opens one waits for its writer."""
    for name in ("metrics.jsonl", "events.jsonl"):
        os.mkfifo(folder / name)


def checkpoint(change: Callable[[dict[str, Any]], object], weights: bytes | None = None) -> Make:
    """One with a manifest that says something else, under checksums that fit."""

    def make(folder: Path) -> None:
        step = folder / "step-00000001"
        step.mkdir()
        path = step / "weights-00001-of-00001.safetensors"
        save_file({"a": torch.zeros(3)}, path)
        if weights is not None:
            path.write_bytes(weights)
        files = {path.name: (path.stat().st_size, _crc32(path))}
        config = load_config(Path(TINY)).model_dump(mode="json")
        facts = asdict(Manifest(FORMAT, 1, 1, 1, {}, {}, config, files))
        change(facts)
        facts["checksum"] = checksum_of(facts)
        (step / MANIFEST).write_text(json.dumps(facts).replace("Infinity", "1e999"))

    return make


def weights_of_checkpoint(folder: Path) -> None:
    load_model(find_checkpoint(folder / "step-00000001"))


# Models and tokenizers


def exported(folder: Path, **change: object) -> None:
    write_model_folder(folder, build_model(small_model(vocab_size=300), 0), BytesTokenizer(), torch.float32)
    (folder / SUMS).unlink()
    described = json.loads((folder / "config.json").read_text())
    described["megassm"]["model"] |= change
    (folder / "config.json").write_text(json.dumps(described))


def model(folder: Path) -> None:
    load_model(open_model_folder(folder))


def of_transformers(folder: Path) -> None:
    from megassm.hf.heads import MegaSSMForCausalLM

    MegaSSMForCausalLM.from_pretrained(folder)


@functools.cache
def pieces() -> bytes:
    return train_sentencepiece(["some text of words, and some more of them"] * 20, 300)


@functools.cache
def byte_level() -> str:
    from tokenizers import Tokenizer, models, trainers

    backend = Tokenizer(models.BPE())
    backend.train_from_iterator(["some text"], trainers.BpeTrainer(vocab_size=300, show_progress=False))
    return str(backend.to_str())


def with_id(number: float) -> Make:
    described = json.loads(byte_level())
    described["model"]["vocab"]["some"] = number
    return write("tokenizer.json", json.dumps(described))


def cut_amid_a_character(folder: Path) -> None:
    """Of two prefixes Python's reader takes the last, Rust's the first: the others are null."""
    described = json.loads(byte_level())
    described["model"] |= {"vocab": {"a": 0, "a\u00e9": 1, "b": 2}, "merges": [["b", "a\u00e9"]]}
    text = json.dumps(described).replace('"continuing_subword_prefix": null', '"continuing_subword_prefix": "##"')
    write("one/tokenizer.json", text)(folder)
    twice = text.replace('"##"', '"##", "continuing_subword_prefix": null')
    write("two/tokenizer.json", twice)(folder)


def tokenizer(name: str) -> Read:
    return lambda folder: load_tokenizer(str(folder / name)).encode(["some text"])


# Labelled files


def labelled(kind: Any, name: str) -> Read:
    return lambda folder: [item.load() for item in items(kind, [folder / name])]


def png(width: int, height: int) -> bytes:
    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


class _Crafted:
    def __reduce__(self) -> Any:
        return np.ndarray, ((2**40,), "V8")


def tuples_of_tuples(end: bytes) -> bytes:
    """A pickle with a tuple of twice the tuple before, 40 times: what looks at all of it never comes to an end."""
    twice = b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(40))
    return b"\x80\x02}K\x00" + twice + end


def npy(shape: str, kind: str = "|u1") -> bytes:
    header = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header


def arrays(images: bytes, labels: bytes) -> Make:
    def make(folder: Path) -> None:
        write("set/images.npy", images)(folder)
        write("set/labels.npy", labels)(folder)

    return make


TASK = "hellaswag"


def local_task(folder: Path) -> None:
    os.environ["MEGASSM_EVAL_DATA"] = str(folder)
    from megassm.eval.tasks.local import load

    load(f"{TASK}.jsonl.gz", TASK)


def markup(text: str, answer: float = 0) -> bytes:
    row = {"activity_label": "a", "ctx_a": text, "ctx_b": "b", "endings": ["a", "b"], "label": answer}
    return gzip.compress(json.dumps(row).replace("Infinity", "1e999").encode())


# What this machine keeps


def filters_of_zeros(folder: Path) -> None:
    os.environ["MEGASSM_CACHE"] = str(folder)
    path = cache_path(64, 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zeros())
    for other in range(1, 65):
        cache_path(64, other).write_bytes(zeros(2**10))


def filters(folder: Path) -> None:
    os.environ["MEGASSM_CACHE"] = str(folder)
    assert float(np.abs(spectral_filters(64, 8)[1]).max()) > 0
