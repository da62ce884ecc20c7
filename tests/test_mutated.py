"""Mutated inputs: a refusal or documents, never a traceback; and what was read is what an independent reader counts."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pytest
from pyarrow import parquet

from megassm.data.prepare.documents import ReadCounts, read_documents, read_pieces
from megassm.data.prepare.ids import IdFacts
from megassm.data.prepare.inputs import find_inputs
from megassm.data.prepare.source import TextSource
from megassm.errors import UserError
from tests.archives import unpack

TEXTS = [f'{n} d\u00e9j\u00e0 vu "x" \\ \n' * (1 + n % 7) for n in range(40)]
LINES = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS).encode()


def tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as file:
        for n, text in enumerate(TEXTS):
            entry = tarfile.TarInfo(f"{n:03d}.txt")
            entry.size = len(text.encode())
            file.addfile(entry, io.BytesIO(text.encode()))
    return out.getvalue()


def table(name: str) -> bytes:
    out, rows = io.BytesIO(), pyarrow.table({"text": TEXTS, "n": range(40)})
    if name == "parquet":
        parquet.write_table(rows, out, row_group_size=10)
    else:
        with pyarrow.ipc.new_stream(out, rows.schema) as writer:
            writer.write_table(rows, max_chunksize=10)
    return out.getvalue()


def samples() -> bytes:
    """A shard of MDS, whose format says where each sample is."""
    sized = [struct.pack("<I", len(text.encode())) + text.encode() for text in TEXTS]
    head = json.dumps({"column_names": ["text"], "column_encodings": ["str"], "column_sizes": [None]}).encode()
    first = 4 * (len(sized) + 2) + len(head)
    offsets = [first + sum(map(len, sized[:n])) for n in range(len(sized) + 1)]
    return struct.pack(f"<{len(offsets) + 1}I", len(sized), *offsets) + head + b"".join(sized)


WHOLE: dict[str, Callable[[], bytes]] = {
    "a.jsonl": lambda: LINES,
    "a.json": lambda: json.dumps([{"text": text} for text in TEXTS], indent=1).encode(),
    "a.tar": tar,
    "a.parquet": lambda: table("parquet"),
    "a.arrow": lambda: table("arrow"),
    "a.mds": samples,
    "a.jsonl.gz": lambda: gzip.compress(LINES, mtime=0),
    "a.jsonl.bz2": lambda: bz2.compress(LINES),
    "a.tar.xz": lambda: lzma.compress(tar()),
}
NO_CHECKSUM = {"a.jsonl", "a.json", "a.tar", "a.parquet", "a.arrow", "a.mds"}


def mutated(content: bytes, draw: random.Random) -> bytes:
    changed = bytearray(content)
    place = draw.randrange(len(changed))
    stop = place + draw.choice([1, 2, 8, 100, 1000])
    match draw.randrange(6):
        case 0:
            changed[place] ^= 1 << draw.randrange(8)
        case 1:
            del changed[place:stop]
        case 2:
            del changed[place:]
        case 3:
            changed[place:place] = draw.randbytes(draw.choice([1, 4, 64]))
        case 4:
            changed[place:place] = changed[place:stop]
        case _:
            changed += draw.choice([b"\0", b"x", b"\n", content[:50], b"{}", b"\xff\xfe"])
    return bytes(changed)


@pytest.mark.parametrize("name", WHOLE)
def test_mutations_are_refused_or_read(tmp_path: Path, name: str) -> None:
    draw = random.Random(name)
    whole = WHOLE[name]()
    refused = 0
    for _ in range(60):
        path = tmp_path / draw.choice([name, name, "b", "\udce9.jsonl", name.upper()])
        content = mutated(whole, draw)
        path.write_bytes(content)
        policies = {"on_bad_utf8": draw.choice(["error", "skip", "replace"]),
                    "on_bad_record": draw.choice(["raise", "skip", "empty"])}  # fmt: skip
        source, counts = TextSource((path,), **policies), ReadCounts()  # type: ignore[arg-type]
        try:
            found = list(read_documents(source, find_inputs(source).files, counts))
        except UserError:
            refused += 1
            continue
        finally:
            path.unlink()
        if name not in NO_CHECKSUM:
            assert set(found) <= {*TEXTS, content.decode(errors="replace")}, "a checksum fits, or the name says text"
        elif name == "a.jsonl" and len(found) > 1:
            met = len(found) + counts.empty + counts.bad_utf8 + counts.bad_record
            assert met == sum(bool(line.strip()) for line in content.split(b"\n"))
    assert refused > 5


def test_mutated_tokens_and_their_lists_are_refused_or_read(tmp_path: Path) -> None:
    """What stands beside a file decides over it, and may be damaged as well."""
    unpack(Path(__file__).with_name("token_samples.tar.xz"), tmp_path)
    draw, refused, read = random.Random(5), 0, 0
    for name in ("megatron", "mds_zstd", "litdata_tokens", "litdata_dict"):
        folder = tmp_path / "samples" / name
        paths = sorted(folder.iterdir())
        for _ in range(60):
            path = draw.choice(paths)
            whole = path.read_bytes()
            path.write_bytes(mutated(whole, draw))
            source = TextSource((folder,), ids=IdFacts(256, 257), samples=draw.choice(["documents", "chunks"]))
            try:
                read += sum(piece.ends for piece in read_pieces(source, find_inputs(source).files, ReadCounts()))
            except UserError:
                refused += 1
            path.write_bytes(whole)
    assert refused > 50
    assert read > 200
