"""The demo, end to end: tokenizer, shards, two ranks under the real deepspeed launcher, sweep, samples."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest

from megassm.run.journal import read_rows
from tests.conftest import SMALL, run_python


@pytest.mark.end_to_end
def test_demo(tmp_path: Path) -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    small = [override for override in SMALL if not override.startswith(("model.vocab_size", "model.num_channels",
             "budget", "eval.budgets"))]  # fmt: skip
    done = run_python(
        "tools/demo.py", "--text", str(library / "json"), str(library / "email"), str(library / "http"),
        "--glob", "*.py", "--run", str(tmp_path / "run"), "--data", str(tmp_path / "data"),
        *small, "train.steps=12", "parallel.zero_stage=3",
    )  # fmt: skip
    rows = read_rows(tmp_path / "run")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["loss"] < rows[0]["loss"]
    environment = json.loads((tmp_path / "run/environment.json").read_text(encoding="utf-8"))
    assert environment["world_size"] == 2
    sweep = json.loads((tmp_path / "run/sweep.json").read_text(encoding="utf-8"))
    assert [row["k"] for row in sweep["curves"][0]["rows"]] == [1, 2, 3, 4, 6, 8, 16, 32]
    assert [row["k"] for row in json.loads((tmp_path / "run/samples.json").read_text(encoding="utf-8"))] == [4, 32]
    for name in ("sweep.png", "sweep.html", "metrics.jsonl", "config.yaml", "checkpoints", "samples.json"):
        assert f"run/{name}" in done.stdout
        assert (tmp_path / "run" / name).exists()


@pytest.mark.end_to_end
def test_demo_names_the_step_that_failed(tmp_path: Path) -> None:
    done = run_python("tools/demo.py", "--text", str(tmp_path / "nothing"), check=False)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "this step ended with exit code 1" in done.stderr
