"""The sweep of runs on disk: which checkpoint, which texts, a live run followed, refusals before the work."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megassm.checkpoint.format import find_checkpoint
from megassm.errors import UserError
from megassm.eval import watch as runs
from megassm.eval.text import open_texts
from megassm.eval.watch import SweepRequest, sweep_file, sweep_path, watch
from megassm.parallel.world import Peers, join_peers, leave_world
from megassm.report.sweep_files import write_json_sweep
from tests.conftest import ROOT, SMALL, run_python
from tests.shard_sets import edit_index

QUICK = SweepRequest(budgets=[2], sequences=2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data_path: Path) -> Path:
    """A run of 4 steps with a checkpoint at 2 and at 4."""
    run = tmp_path_factory.mktemp("runs") / "small"
    run_python("launch/pretrain.py", "--config", "configs/tiny.yaml", *SMALL, f"run.dir={run}",
               f"data.path={data_path}", "train.steps=4", "checkpoint.every_steps=2")  # fmt: skip
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture(scope="module")
def peers() -> Iterator[Peers]:
    yield join_peers("cpu")
    leave_world()


def test_a_run_or_one_checkpoint_wherever_it_lies(run: Path, tmp_path: Path, peers: Peers) -> None:
    newest, folder = sweep_path(run, QUICK, peers)
    assert (newest.step, newest.run, folder) == (4, str(run), run)
    assert [row.k for row in newest.curves[0].rows] == [2, 8]
    first, folder = sweep_path(run / "checkpoints/step-00000002", QUICK, peers)
    assert (first.step, folder) == (2, run)
    copied = shutil.copytree(run / "checkpoints/step-00000002", tmp_path / "elsewhere/mine")
    moved, folder = sweep_path(copied, QUICK, peers)
    assert moved.curves[0].rows[0].bits_per_byte == first.curves[0].rows[0].bits_per_byte
    assert folder == copied, "its files go beside it, not into what lies above"


def test_prepared_sets_and_plain_text_give_the_same_score_for_the_same_text(
    run: Path, tmp_path: Path, data_path: Path, peers: Peers
) -> None:
    first, second = tmp_path / "text/one.txt", tmp_path / "two.txt"
    first.parent.mkdir()
    first.write_text("def f(x):\n    return x + 1\n" * 40, encoding="utf-8")
    second.write_text("A sentence, and another one. " * 40, encoding="utf-8")
    run_python("tools/prepare_data.py", "--input", str(first), "--valid-input", str(second), "--output",
               str(tmp_path / "set"), "--block-tokens", "512", "--member-tokens", "512")  # fmt: skip
    sources = [first, first.parent, second, tmp_path / "set", data_path]
    sweep, _ = sweep_path(run, SweepRequest([2], None, 8, [str(path) for path in sources]), peers)
    assert [curve.data for curve in sweep.curves] == [str(path) for path in sources]
    file, folder, other, prepared, own = [curve.rows[0].bits_per_byte for curve in sweep.curves]
    assert file == folder != other
    assert prepared == pytest.approx(other, rel=1e-6)
    assert own == sweep_path(run, SweepRequest([2], None, 8), peers)[0].curves[0].rows[0].bits_per_byte


def test_sources_that_cannot_be_scored(run: Path, tmp_path: Path, data_path: Path) -> None:
    config = find_checkpoint(run).config
    (tmp_path / "empty.txt").write_text(" \n", encoding="utf-8")
    lost = config.model_copy(update={"data": config.data.model_copy(update={"path": "gone"})})
    other = tmp_path / "other"
    shutil.copytree(data_path, other)
    for part in ("train", "valid"):
        edit_index(other / part, lambda index: index.update(tokenizer_sha256="0" * 64))
    for source, settings, refusal in (
        (tmp_path / "missing.txt", config, "missing.txt: no such file"),
        (tmp_path / "empty.txt", config, "holds no text"),
        (data_path / "valid", config, "one part of a prepared set; give the folder that holds valid/"),
        (other, config, "tokenizer"),
        (ROOT / "README.md", lost, "the run's tokenizer lies with its data"),
    ):
        with pytest.raises(UserError, match=refusal):
            open_texts(settings, [str(source)])
    texts, _ = open_texts(lost, [str(ROOT / "README.md"), str(data_path)])
    assert len(texts) == 2, "a set prepared with the same tokenizer brings it"


def test_watching_measures_every_checkpoint_once_and_ends_with_the_run(
    run: Path, peers: Peers, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    last = run / "checkpoints/step-00000004"
    hidden = last.rename(run / "checkpoints/.partial-step-00000004")
    shutil.copytree(run / "checkpoints/step-00000002", run / "checkpoints/step-00000003")
    with next((run / "checkpoints/step-00000003").glob("weights*")).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    monkeypatch.setattr(runs, "POLL_S", 0.0)
    monkeypatch.setattr(time, "sleep", lambda _: hidden.rename(last) if hidden.exists() else None)
    seen = []
    for sweep in watch(run, QUICK, peers):
        seen.append(sweep.step)
        write_json_sweep(sweep, sweep_file(run, sweep.step))
    assert seen == [2, 4], "the second is published while it waits"
    assert capsys.readouterr().out.count("passed over") == 1, "the damaged one, said once"
    assert list(watch(run, QUICK, peers)) == []
    os.utime(sweep_file(run, 2), (0, 0))
    assert [sweep.step for sweep in watch(run, QUICK, peers)][:1] == [2], "a result of an earlier run in this place"
    with pytest.raises(UserError, match="no such run directory"):
        next(watch(run / "nothing", QUICK, peers))


def test_the_tool_alone_under_torchrun_and_watching(run: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / f"both.{name}" for name in ("png", "html", "csv", "json")}
    done = run_python(
        "tools/sweep_budgets.py", str(run), str(run / "checkpoints/step-00000002"), "--budgets", "1-4:3",
        "--seq-lens", "32,64", "--sequences", "3", "--plot", str(files["png"]), "--report", str(files["html"]),
        "--csv", str(files["csv"]), "--json", str(files["json"]),
    )  # fmt: skip
    alone = json.loads(files["json"].read_text(encoding="utf-8"))
    assert [(row["step"], row["seq_len"], row["k"]) for row in alone] == [
        (step, length, k) for step in (4, 2) for length in (32, 64) for k in (1, 4, 8)
    ]
    assert all(path.stat().st_size > 500 for path in files.values())
    assert "area under the curve" in done.stdout
    both = tmp_path / "ranks.json"
    run_python(
        "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "tools/sweep_budgets.py", str(run), "--watch", "--sequences", "3", "--json", str(both),
    )  # fmt: skip
    found = {(row["step"], row["k"]): row["bits_per_byte"] for row in json.loads(both.read_text(encoding="utf-8"))}
    assert sorted(found) == [(step, k) for step in (2, 4) for k in (1, 2, 8)]
    (expected,) = [row["bits_per_byte"] for row in alone if (row["step"], row["seq_len"], row["k"]) == (4, 64, 8)]
    assert found[4, 8] == pytest.approx(expected, rel=1e-6)
    assert sorted(path.name for path in (run / "sweeps").glob("step*")) == [
        "step-00000002.json", "step-00000004.json", "steps.png",
    ]  # fmt: skip


def test_refusals_come_before_the_work(run: Path) -> None:
    for arguments, code, said in (
        ((str(run), str(run), "--watch"), 2, "--watch takes one RUN_DIR"),
        ((str(run), "--budgets", "3-1"), 2, "must not be empty"),
        ((str(run), "--budgets", "9"), 1, "K_max = 8"),
        ((str(run), "--data", "no/such"), 1, "no such file"),
    ):
        done = run_python("tools/sweep_budgets.py", *arguments, check=False)
        assert done.returncode == code
        assert said in done.stderr
        assert "Traceback" not in done.stderr
