"""Bad input of every kind: one clear message, exit code 1 or 2, no traceback."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.conftest import ROOT, SMALL, run_python
from tests.test_train import command

TEXT = "Some text, long enough to be a document.\n" * 200


def refused(done: subprocess.CompletedProcess[str], code: int, *expected: str) -> None:
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    for part in expected:
        assert part in done.stderr
    assert done.stderr.count("error: ") <= 1


def train(tmp_path: Path, data: Path, *overrides: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    return run_python(*command(tmp_path / "run", data, ranks, *SMALL, *overrides)[1:], check=False)


def prepare(tmp_path: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return run_python("tools/prepare_data.py", *options, "--output", str(tmp_path / "out"), check=False)


@pytest.fixture
def damaged(tmp_path: Path, data_path: Path) -> Path:
    """A copy of the data set with one flipped byte in the middle of every training block's token ids."""
    copy = tmp_path / "damaged"
    shutil.copytree(data_path, copy)
    shard = next((copy / "train").glob("*.tar"))
    raw = bytearray(shard.read_bytes())
    for position in range(1024, len(raw), 4096):
        raw[position] ^= 0xFF
    shard.write_bytes(raw)
    return copy


def test_missing_config_file() -> None:
    done = run_python("launch/pretrain.py", "--config", "configs/nowhere.yaml", check=False)
    refused(done, 2, "configs/nowhere.yaml: no such file")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.n_layer=3", "no key 'model.n_layer'; did you mean 'model.n_layers'?"),
        ("train.steps=many", "train.steps = 'many': must be a whole number"),
        ("eval.budgets=[64]", "eval.budgets = [64]: must be at most model.num_channels = 8"),
    ],
)
def test_typo_wrong_type_and_budget_out_of_range(tmp_path: Path, data_path: Path, override: str, expected: str) -> None:
    refused(train(tmp_path, data_path, override), 2, f"command line '{override}'", expected)


@pytest.mark.ranks
def test_a_launcher_of_two_ranks_shows_the_refusal_once(tmp_path: Path, data_path: Path) -> None:
    done = train(tmp_path, data_path, "train.stps=3", ranks=2)
    assert done.returncode != 0
    assert done.stderr.count("no key 'train.stps'; did you mean 'train.steps'?") == 1


def test_missing_data(tmp_path: Path) -> None:
    refused(train(tmp_path, tmp_path / "nothing"), 1, "no such directory", "tools/prepare_data.py")


def test_missing_text(tmp_path: Path) -> None:
    refused(prepare(tmp_path, "--input", str(tmp_path / "nothing.txt")), 1, "nothing.txt")


def test_empty_text(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    refused(prepare(tmp_path, "--input", str(tmp_path / "empty.txt")), 1, "no text in 1 files")


def test_text_that_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("Gr\u00fc\u00dfe".encode("latin-1") * 100)
    refused(prepare(tmp_path, "--input", str(tmp_path / "latin.txt")), 1, "latin.txt", "UTF-8", "--on-bad-utf8 skip")


def test_malformed_json_line(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n', encoding="utf-8")
    refused(prepare(tmp_path, "--input", str(tmp_path / "bad.jsonl")), 1, "bad.jsonl:2")


def test_damaged_shard(tmp_path: Path, damaged: Path) -> None:
    refused(train(tmp_path, damaged), 1, "shard-00000.tar", "offset", "tools/prepare_data.py")


@pytest.mark.ranks
def test_damaged_shard_is_named_once_by_two_ranks(tmp_path: Path, damaged: Path) -> None:
    done = train(tmp_path, damaged, ranks=2)
    ours = [line for line in done.stderr.splitlines() if "shard-00000.tar" in line]
    assert done.returncode == 1
    assert len(ours) == 1
    assert 'launch/pretrain.py", line' not in done.stderr, "a traceback of ours"


def test_wrong_tokenizer_for_the_shards(tmp_path: Path, data_path: Path) -> None:
    (tmp_path / "t.txt").write_text(TEXT + "".join(map(chr, range(32, 127))), encoding="utf-8")
    model = tmp_path / "other.model"
    run_python("tools/train_tokenizer.py", "--input", str(tmp_path / "t.txt"), "--vocab-size", "400",
               "--output", str(model))  # fmt: skip
    done = train(tmp_path, data_path, f"data.tokenizer={model}", "model.vocab_size=512")
    refused(done, 1, "its shards were made with tokenizer bytes", "other.model")


def test_vocabulary_smaller_than_the_tokenizers(tmp_path: Path, data_path: Path) -> None:
    refused(train(tmp_path, data_path, "model.vocab_size=256"), 1, "model.vocab_size = 256: must be at least the 257")


def test_run_directory_that_cannot_be_written(tmp_path: Path, data_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    done = run_python(*command(tmp_path / "file/run", data_path, 1, *SMALL)[1:], check=False)
    refused(done, 1, "run.dir = ", "cannot be written (", "file/run")


def test_checkpoint_that_is_none(tmp_path: Path) -> None:
    for tool in ("sweep_budgets.py", "generate.py"):
        extra = ("--prompt", "x") if tool == "generate.py" else ()
        done = run_python(f"tools/{tool}", str(tmp_path), *extra, check=False)
        refused(done, 1, f"{tmp_path}: no complete checkpoint")


def test_cuda_where_there_is_none(tmp_path: Path, data_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    refused(train(tmp_path, data_path, "train.device=cuda"), 1, "0 CUDA devices", "train.device=cpu")


@pytest.mark.parametrize("tool", sorted(path.name for path in (ROOT / "tools").glob("*.py")))
def test_every_tool_has_help_with_an_example_and_refuses_unknown_options(tool: str) -> None:
    assert f"python tools/{tool}" in run_python(f"tools/{tool}", "--help").stdout
    done = run_python(f"tools/{tool}", "--no-such-option", check=False)
    refused(done, 2, "--help has an example")
