"""More of `tests.fuzz_kinds`: texts in tables and packed, this machine's caches, answers of servers, command lines."""

from __future__ import annotations

import contextlib
import gzip
import importlib
import io
import os
import socket
import sys
import threading
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from megassm.cli.arguments import run_tool
from megassm.data.cache import DiskCache
from megassm.data.stores import open_store
from megassm.data.transport import Meter, Patience, Transport
from megassm.errors import UserError
from megassm.ops.hankel import read_arrays, write_arrays
from tests.fuzz_kinds import Kind, documents, written

WORDS = {
    "plan": "--config configs/tiny.yaml --nodes 2 --gpus-per-node 4 --gpu-memory 80 --link-share 0.5 train.steps=3",
    "train": "--config configs/tiny.yaml --print-config train.steps=3 model.pattern=SSA data.path=http://host/set?sig=1",
    "watch": "{run} --history",
}
"""Command lines that write nothing."""


def tables(folder: Path) -> list[Kind]:
    """Texts in files that hold more than one, in each packing."""
    import bz2
    import lzma

    line = b'{"text": "some text", "n": 1}\n' * 20
    array = b"[" + line.strip().replace(b"\n", b",") + b"]"
    files = {"t.jsonl": line, "t.json": array, "t.jsonl.bz2": bz2.compress(line), "t.jsonl.xz": lzma.compress(line)}
    task = gzip.compress(b'{"query": "some text", "choices": ["x"]}\n' * 3, mtime=0)
    kinds = [_of_texts(written(folder / name, content)) for name, content in files.items()]
    try:
        import pyarrow
        from pyarrow import ipc, parquet

        rows = pyarrow.table({"text": ["some text", "more", None] * 20, "n": range(60)})
        parquet.write_table(rows, folder / "t.parquet", row_group_size=20)
        with ipc.new_stream(folder / "t.arrow", rows.schema, options=ipc.IpcWriteOptions(compression="lz4")) as file:
            file.write_table(rows, max_chunksize=20)
        packed = pyarrow.CompressedOutputStream(str(folder / "t.jsonl.zst"), "zstd")
        packed.write(line)
        packed.close()
        kinds += [_of_texts(folder / name) for name in ("t.parquet", "t.arrow", "t.jsonl.zst")]
        from megassm.eval.tasks.local import load
    except ImportError:
        return kinds
    os.environ["MEGASSM_EVAL_DATA"] = str(folder)
    path = written(folder / "lambada.jsonl.gz", task)
    return [*kinds, Kind("a task of the harness", path, lambda: load("lambada.jsonl.gz", "lambada"), share=0.5)]


def _of_texts(path: Path) -> Kind:
    return Kind(f"documents, {path.name}", path, lambda: documents(path))


def caches(folder: Path) -> list[Kind]:
    """What this machine keeps, where others may write too."""
    cache, kept = DiskCache(folder / "cache", 2**20), folder / "filters.npz"
    raw = bytes(range(256)) * 8
    crc32 = zlib.crc32(raw)
    cache.put("data", 7, raw)
    (block,) = (folder / "cache").glob("??/*")
    write_arrays(kept, {"phi": np.arange(60.0).reshape(20, 3), "sigma": np.arange(3.0)})

    def blocks() -> bytes | None:
        found = DiskCache(folder / "cache", 2**20)
        found.put("data", 8, b"other")
        return found.get("data", 7, len(raw), crc32) or raw  # what is damaged is fetched again

    def filters() -> Any:
        found = read_arrays(kept)
        return None if found is None else {name: array.tobytes() for name, array in found.items()}

    whole = filters()
    return [
        Kind("a cached block", block, blocks, checked=True, recovers=True),
        Kind("the size of a cache", folder / "cache/bytes", blocks, checked=True, recovers=True),
        Kind("cached filters", kept, lambda: filters() or whole, checked=True, recovers=True),
    ]


def command_lines(folder: Path) -> list[Kind]:
    """Command lines, a word a line."""
    kinds = []
    for name, words in WORDS.items():
        main = importlib.import_module(f"megassm.commands.{name}").main
        path = written(folder / f"{name}.words", words.format(run=folder / "run").replace(" ", "\n"))
        kinds.append(Kind(f"words of {name}", path, partial(_command, main, path), share=0.2))
    return kinds


def _command(main: Callable[[], None], path: Path) -> None:
    """Runs a command on the words in a file; a refusal with code 1 or 2 becomes a `UserError`."""
    words = ["megassm", *os.fsdecode(path.read_bytes().replace(b"\0", b"")).split("\n")]
    own = mock.patch.object(sys, "argv", words)  # whatever else this process tests reads its own
    with own, contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as said:
        try:
            run_tool(main)
        except SystemExit as stop:
            if stop.code not in (0, 1, 2, None):
                raise
            if stop.code:
                raise UserError(said.getvalue()) from None
    if "Traceback" in said.getvalue():
        raise RuntimeError(said.getvalue())


ANSWER = b"""HTTP/1.1 206 Partial Content\r
Content-Type: text/plain\r
Content-Range: bytes 0-9/10\r
Content-Length: 10\r
ETag: "abc"\r
\r
0123456789"""


def answers(folder: Path) -> list[Kind]:
    """What an HTTP server sends, headers and all."""
    path, server = written(folder / "answer", ANSWER), socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            connection = server.accept()[0]
            with contextlib.suppress(OSError), connection:
                connection.recv(2**16)
                connection.sendall(path.read_bytes())

    threading.Thread(target=serve, daemon=True).start()
    url = f"http://127.0.0.1:{server.getsockname()[1]}/set"

    def fetched() -> bytes:
        return Transport(open_store(url), Patience(0.05, 0.0, 0.0), Meter()).fetch("index.json", 0, 10)

    return [Kind("an HTTP answer", path, fetched, share=0.5)]
