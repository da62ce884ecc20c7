"""tools/inspect_data.py: the text it prints is what the run reads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megassm.config.load import dump_config
from megassm.config.schema import Config
from megassm.data.dataset import open_dataset
from megassm.data.inspect import read_samples, samples_of_update
from megassm.data.stream import StreamPlan, TokenStream
from tests.conftest import run_python


@pytest.fixture
def run_dir(tmp_path: Path, small_config: Callable[..., Config]) -> Path:
    """A run directory with nothing but its configuration, of a job with two tensor ranks."""
    config = small_config()
    config = config.model_copy(update={"parallel": config.parallel.model_copy(update={"tensor": 2})})
    folder = tmp_path / "inspected"
    folder.mkdir()
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    return folder


def test_the_text_of_a_batch_is_what_ranks_read(small_config: Callable[..., Config]) -> None:
    config = small_config()
    data = open_dataset(config)
    size = config.train.batch_sequences
    ranks = [TokenStream(data.train, StreamPlan(64, size, size // 2, config.run.seed, rank, 2)) for rank in range(2)]
    batches = [stream.micro_batch(99, 0) for stream in ranks]  # the 100th update
    rows = {
        sample: ids for batch in batches for sample, ids in zip(batch.sample_ids_B.tolist(), batch.ids_BT, strict=True)
    }
    texts = list(read_samples(config, samples_of_update(config, 100)))
    assert sorted(rows) == [text.sample for text in texts] == list(range(99 * size, 100 * size))
    for text in texts:
        bytes_read = bytes(rows[text.sample][rows[text.sample] < 256].astype(np.uint8))
        assert "".join(text.documents) == bytes_read.decode(errors="replace")
        assert (text.update, text.source, text.tokens) == (100, "data", 65)
        assert "shard-00000.tar at " in text.blocks[0]


def test_documents_are_told_apart(small_config: Callable[..., Config]) -> None:
    config = small_config()
    epoch = open_dataset(config).train.tokens // 64 + 1
    texts = list(read_samples(config, range(epoch)))
    ends = sum(len(text.documents) - 1 + text.ends_document for text in texts)
    documents = sum(source.shards.documents for source in open_dataset(config).train.sources)
    assert documents <= ends <= documents + len(texts)  # an EOD may stand in two samples: as label and as input
    assert any(len(text.documents) > 1 for text in texts)


def test_the_tool(run_dir: Path, tmp_path: Path) -> None:
    table = tmp_path / "samples.json"
    done = run_python("tools/inspect_data.py", str(run_dir), "--step", "3", "--json", str(table))
    rows = json.loads(table.read_text(encoding="utf-8"))
    assert [row["sample"] for row in rows] == [8, 9, 10, 11]
    for row in rows:
        assert f"=== sample {row['sample']} (update 3): data, epoch 0, number {row['number']}; 65 tokens" in done.stdout
        assert "<|end of document|>\n".join(row["documents"]) in done.stdout
    run_python("tools/inspect_data.py", str(run_dir), "run.seed=0", "--samples", "9,8", "--json", str(table))
    assert json.loads(table.read_text(encoding="utf-8")) == [rows[1], rows[0]]


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (("nowhere", "--step", "1"), 2, "nowhere/config.yaml: no such file"),
        (("nowhere",), 2, "one of the arguments --step --samples is required"),
        (("nowhere", "--step", "0"), 2, "must be a whole number of at least 1"),
        (("nowhere", "--samples", "1,-2"), 2, "is not a list of sample numbers"),
    ],
)
def test_refusals(arguments: tuple[str, ...], code: int, expected: str) -> None:
    done = run_python("tools/inspect_data.py", *arguments, check=False)
    assert (done.returncode, expected in done.stderr, "Traceback" in done.stderr) == (code, True, False), done.stderr
