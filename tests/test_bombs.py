"""Small files and words that ask for more than any machine has are refused before it is given to them."""

from __future__ import annotations

import gzip
import json
import shutil
import struct
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from megassm.checkpoint.exported import SUMS, open_model_folder, write_model_folder
from megassm.checkpoint.format import load_model
from megassm.data.prepare.documents import ReadCounts, read_documents
from megassm.data.prepare.kinds import look_at
from megassm.data.prepare.source import TextSource
from megassm.data.tasks.from_files import items
from megassm.data.tokenizer.base import BytesTokenizer, load_tokenizer, train_sentencepiece
from megassm.errors import UserError
from megassm.model import build_model
from tests.conftest import run_python
from tests.test_export import config

MOST_BYTES = 200 * 2**20


@contextmanager
def refused(message: str) -> Iterator[None]:
    """The block is refused, with little memory."""
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message):
            yield
        assert tracemalloc.get_traced_memory()[1] < MOST_BYTES
    finally:
        tracemalloc.stop()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    write_model_folder(folder, build_model(config(vocab_size=300), 0), BytesTokenizer(), torch.float32)
    (folder / SUMS).unlink()
    return folder


@pytest.mark.parametrize("limit", [None, 1000])
def test_a_line_that_does_not_end(limit: int | None, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(b'{"text": "a"}\n{"text": "')
        for _ in range(160):
            file.write(b"a" * 2**20)
    assert path.stat().st_size < 2**20
    source = TextSource((path,), max_document_bytes=limit)
    with refused(r"x\.jsonl\.gz:2: longer than the \d+ MiB of one record"):
        list(read_documents(source, [look_at(path, "text")], ReadCounts()))


def test_a_picture_of_too_many_pixels(tmp_path: Path) -> None:
    pytest.importorskip("PIL")

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    (tmp_path / "a").mkdir()
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0))
    (tmp_path / "a" / "x.png").write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))
    [item] = items("image", [tmp_path])
    with refused(r"x\.png: .*(20000 x 20000|exceeds limit of \d+) pixels"):
        item.load()


@pytest.mark.parametrize(
    "change", [{"n_layers": 10**9}, {"vocab_size": 10**10}, {"seq_len": 10**9}, {"d_model": 2**40}]
)
def test_a_model_that_no_machine_holds(change: dict[str, int], exported: Path, tmp_path: Path) -> None:
    shutil.copytree(exported, tmp_path, dirs_exist_ok=True)
    described = json.loads((tmp_path / "config.json").read_text())
    described["megassm"]["model"] |= change
    (tmp_path / "config.json").write_text(json.dumps(described))
    with refused(r"config\.json"):
        load_model(open_model_folder(tmp_path))


def test_a_tokenizer_of_four_billion_ids(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.train_from_iterator(["some text"], tokenizers.trainers.BpeTrainer(vocab_size=300, show_progress=False))
    described = json.loads(backend.to_str())
    for number in (2**32 - 1, 2**32, 2**64, -1, 1e999):
        described["model"]["vocab"]["some"] = number
        (tmp_path / "tokenizer.json").write_text(json.dumps(described))
        with refused(r"tokenizer\.json: (has the id|not a tokenizer\.json)"):
            load_tokenizer(str(tmp_path / "tokenizer.json"))


def test_a_piece_that_is_not_utf8(tmp_path: Path) -> None:
    text = "some text of words, and some more of them"
    content = train_sentencepiece([text] * 20, 300)
    for old in (b"some", b"text", b"<0x41>"):
        assert old in content
        (tmp_path / "x.model").write_bytes(content.replace(old, b"\xff\xfe" + old[2:]))
        with refused(r"x\.model: "):
            load_tokenizer(str(tmp_path / "x.model"))


@pytest.mark.parametrize(
    "words",
    [
        ("tools/plan.py", "--config", "configs/tiny.yaml", "--nodes", "1" + "0" * 20),
        ("tools/sweep_budgets.py", "runs/none", "--budgets", "1-999999999"),
        ("tools/sweep_budgets.py", "\udcc4n"),
    ],
    ids=["nodes", "budgets", "not UTF-8"],
)
def test_words_of_the_command_line(words: tuple[str, ...]) -> None:
    done = run_python(*words, check=False)
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr
    assert len(done.stderr) < 3000
