"""The demo, end to end: tokenizer, shards, two ranks under the real deepspeed launcher, sweep, samples."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest

from megassm.run.journal import read_records
from tests.conftest import ROOT, SMALL, run_python
from tools.demo import find_text, fitting_steps, prepare, prompt

OWN = ("model.vocab_size", "model.num_channels", "budget", "eval.budgets")
SMALLER = [override for override in SMALL if not override.startswith(OWN)]


@pytest.mark.end_to_end
def test_demo(tmp_path: Path) -> None:
    """Python's modules, in a folder whose name has a space; the first command that was printed runs as it stands."""
    library, text = Path(sysconfig.get_paths()["stdlib"]), tmp_path / "my text"
    for name in ("json", "email", "http"):
        shutil.copytree(library / name, text / name, ignore=shutil.ignore_patterns("__pycache__"))
    run, data = tmp_path / "a run", tmp_path / "data"
    done = run_python(
        "tools/demo.py", "--text", str(text), "--glob", "*.py", "--run", str(run), "--data", str(data),
        *SMALLER, "train.steps=12", "parallel.zero_stage=3",
    )  # fmt: skip
    rows = read_records(run)
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < rows[0]["loss"]
    environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
    assert environment["world_size"] == 2
    sweep = json.loads((run / "sweep.json").read_text(encoding="utf-8"))
    assert [row["k"] for row in sweep["curves"][0]["rows"]] == [1, 2, 3, 4, 6, 8, 12, 16]
    samples = json.loads((run / "samples.json").read_text(encoding="utf-8"))
    assert [row["k"] for row in samples] == [4, 16]
    assert any(samples[0]["text"].startswith(line[:20]) for line in lines_of(text) if line.strip())
    table = {row["predicted_by"]: row["bits_per_byte"] for row in json.loads((run / "baselines.json").read_bytes())}
    assert {"unigram", "trigram with backoff", "gzip -9", "xz -9e", "the model, K=1", "the model, K=16"} <= set(table)
    assert table["trigram with backoff"] < table["unigram"]
    files = "baselines.png sweep.png sweep.html metrics.jsonl config.yaml checkpoints samples.json"
    for name in files.split():
        assert f"run/{name}" in done.stdout
        assert (run / name).exists()
    printed = next(line[2:] for line in done.stdout.splitlines() if line.startswith("$ ") and "prepare_data" in line)
    again = subprocess.run(printed, shell=True, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "nothing to do" in again.stderr


def lines_of(folder: Path) -> list[str]:
    return [line for path in folder.rglob("*.py") for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_text_is_known_by_what_it_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    notes = tmp_path / "My notes!"
    notes.mkdir()
    (notes / "a.md").write_text("one", encoding="utf-8")
    (notes / "b.txt").write_text("two", encoding="utf-8")
    found = find_text([notes], "*.md")
    assert re.fullmatch(r"demo-my-notes-[0-9a-f]{8}", found.name)
    assert found.size == 3
    assert find_text([notes], "*.md") == found
    assert find_text([notes], None).name != found.name
    (notes / "a.md").write_text("ane", encoding="utf-8")
    assert find_text([notes], "*.md").name != found.name
    os.utime(notes / "a.md", (1, 1))
    first = find_text([notes], "*.md")
    os.utime(notes / "a.md", (2, 2))
    assert find_text([notes], "*.md").name != first.name, "what prepare_data takes for another text has another name"
    library = find_text(None, None)
    assert library.name.startswith("demo-python-")
    (listed,) = [Path(word[1:]) for word in library.options if word.startswith("@")]
    assert all(Path(line).exists() for line in listed.read_text(encoding="utf-8").splitlines())


def test_a_few_notes_are_enough_and_their_repetition_is_warned_of(tmp_path: Path) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    for number in range(3):
        line = f"Note {number}. Buy milk, call Ann, read the paper.\n"
        (notes / f"{number}.md").write_text(line * 40, encoding="utf-8")
    text = find_text([notes], "*.md")
    prepare(text, str(tmp_path / "data"))
    assert prompt(tmp_path / "data").startswith("Note ")
    assert fitting_steps(tmp_path / "data", []) == ["train.steps=100"]
    assert fitting_steps(tmp_path / "data", ["train.steps=9"]) == ["train.steps=9"]
    said = run_python(
        "launch/pretrain.py", "--config", "configs/demo.yaml", f"run.dir={tmp_path / 'run'}",
        f"data.path={tmp_path / 'data'}", *SMALLER, "train.steps=100",
    ).stdout  # fmt: skip
    assert re.search(r"warning: data\.max_epochs = 4: 100 steps would read the training text \d+\.\d\d times", said)


@pytest.mark.end_to_end
def test_demo_names_the_step_that_failed(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 " * 20)
    done = run_python("tools/demo.py", "--text", str(tmp_path), "--data", str(tmp_path / "data"), check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "this step ended with exit code 1" in done.stderr
    missing = run_python("tools/demo.py", "--text", str(tmp_path / "nothing"), check=False)
    assert missing.returncode == 1
    assert "no such file or directory" in missing.stderr
