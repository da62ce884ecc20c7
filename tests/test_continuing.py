"""What a person changes where a run continues is said, kept and refused as docs/resuming.md has it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from megassm.checkpoint.branch import branch
from megassm.checkpoint.format import (
    MANIFEST,
    Checkpoint,
    checksum_of,
    find_checkpoint,
    read_checkpoint,
)
from megassm.checkpoint.identity import check_identity, run_identity
from megassm.config.changes import MEANINGS, changes, effect_of, knobs_of
from megassm.config.load import load_config
from megassm.config.schema import Config
from megassm.data.skipped import LeftOut
from megassm.errors import UserError
from megassm.run.events import read_events
from megassm.run.left_out import leave_out, read_left_out
from megassm.run.opening import replace_config
from megassm.run.records import read_records
from megassm.train.continuing import changed
from tests.conftest import FINISHED, ROOT, SMALL, run_python

BASE, STEP = ROOT / "configs/tiny.yaml", 250
ROW = re.compile(r"^\| `([^`]+)` \| (\w+) \| (.+) \|$", re.MULTILINE)


def rows() -> list[tuple[str, str, str]]:
    """(overrides, effect, what a run says) of the table."""
    return ROW.findall((ROOT / "docs/resuming.md").read_text(encoding="utf-8"))


def outcome(overrides: str) -> tuple[str, str]:
    """The effect of what is changed first, and what a run of configs/tiny.yaml says that continues so after 250 of its
    500 updates."""
    before, now = load_config(BASE), load_config(BASE, overrides.split())
    manifest = SimpleNamespace(identity=run_identity(before, "data"), config=before.model_dump(mode="json"))
    effect = effect_of(overrides.partition("=")[0])
    try:
        check_identity(Checkpoint(Path("step"), manifest), run_identity(now, "data"))  # type: ignore[arg-type]
    except UserError as error:
        return effect, str(error).partition(": ")[2].partition(". Restore")[0]
    what = changed(before, now, STEP)
    return effect, what.text + "; warning: it rises" * what.rises


@pytest.mark.parametrize(("overrides", "effect", "says"), rows())
def test_a_change_does_what_the_page_says(overrides: str, effect: str, says: str) -> None:
    assert outcome(overrides) == (effect, says)


def test_the_page_has_every_effect_and_every_knob_has_one() -> None:
    table = rows()
    assert len(table) >= 25
    assert {effect for _, effect, _ in table} == set(MEANINGS)
    for knob in knobs_of(load_config(BASE)):
        assert effect_of(knob) in MEANINGS
    with pytest.raises(KeyError):
        effect_of("new_section.knob")


def test_changes_are_those_of_the_file_without_secrets() -> None:
    before = load_config(BASE, ["data.path=https://host/set?sig=ONE"])
    assert not changes(before, load_config(BASE, ["data.path=https://host/set?sig=TWO"]))
    (change,) = changes(before, load_config(BASE, ["data.path=https://me:ONE@host/other?sig=ONE"]))
    assert str(change) == "data.path 'https://host/set' -> 'https://host/other'"


@pytest.mark.parametrize(
    ("schedule", "rises"), [("cosine", True), ("wsd", True), ("cosine optim.lr=1e-4", False)], ids=str
)
def test_a_finished_run_that_is_extended(schedule: str, rises: bool) -> None:
    """The example of a rate that jumps: 20 updates, then 40."""
    same = [f"optim.schedule={schedule.split()[0]}", "optim.warmup_steps=2"]
    before = load_config(BASE, [*same, "train.steps=20"])
    what = changed(before, load_config(BASE, [*same, *schedule.split()[1:], "train.steps=40"]), 20)
    assert what.rises == rises
    assert what.text.startswith("optim.lr 0.004 -> 0.0001" if not rises else "train.steps 20 -> 40; learning rate ")
    assert (what.next_rate > 1.5 * what.last_rate) == rises


def test_a_configuration_that_is_replaced_is_kept(tmp_path: Path) -> None:
    def write(steps: int, start: int, done: int) -> list[str]:
        replace_config(load_config(BASE, [f"run.dir={tmp_path}", f"train.steps={steps}"]), start, done)
        assert load_config(tmp_path / "config.yaml").train.steps == steps
        return sorted(path.name for path in (tmp_path / "config-history").glob("*"))

    assert write(20, 1, 0) == []
    assert write(20, 2, 10) == []
    assert write(40, 3, 20) == ["before-start-0003-step-00000020.yaml"]
    assert len(write(60, 4, 20)) == 2
    history = tmp_path / "config-history"
    steps = [load_config(path).train.steps for path in sorted(history.iterdir())]
    assert steps == [20, 40]


def continued(run_dir: Path, *arguments: str) -> str:
    return run_python("launch/pretrain.py", "--config", *arguments, f"run.dir={run_dir}").stdout


def test_what_is_changed_is_said_and_a_branch_is_the_same_run(trained: Path, data_path: Path, tmp_path: Path) -> None:
    longer, branched = tmp_path / "longer", tmp_path / "runs" / "branched"
    shutil.copytree(trained, longer)
    own = (f"data.path={data_path}", *FINISHED, "train.steps=16", "model.filterbank=direct")
    said = continued(longer, "configs/tiny.yaml", *SMALL, *own)
    lines = [line for line in said.splitlines() if "since step 12: " in line]
    assert len(lines) == 1
    assert "train.steps 12 -> 16" in lines[0]
    assert "model.filterbank 'auto' -> 'direct'" in lines[0]
    assert "warning: the learning rate rises from " in said
    events = {event["kind"]: event for event in read_events(longer)}
    assert events["change"]["text"] in said
    assert events["change"]["figures"]["knobs"]["train.steps"] == [12, 16]
    last, following = events["change"]["figures"]["learning_rate"]
    rates = [record["lr"] for record in read_records(longer)]
    assert (last, following) == (rates[11], rates[12])
    assert events["rising rate"]["step"] == 12
    (kept,) = (longer / "config-history").iterdir()
    assert kept.read_bytes() == (trained / "config.yaml").read_bytes()

    told = run_python("tools/branch.py", str(trained), "--at", "12", "--to", str(branched)).stdout
    assert f"launch/pretrain.py --config {branched}/config.yaml train.steps=24" in told
    assert [record["step"] for record in read_records(branched)] == list(range(1, 13))
    continued(branched, str(branched / "config.yaml"), "train.steps=16", "model.filterbank=direct")
    assert [record["loss"] for record in read_records(branched)] == [record["loss"] for record in read_records(longer)]
    assert next(read_events(branched))["figures"] == {"run": str(trained), "step": 12}
    assert (trained / "config.yaml").read_bytes() == kept.read_bytes()


def test_a_branch_is_whole_or_not_there(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"no checkpoint after step 7; it has those of 12\. checkpoint\.every_steps"):
        branch(trained, 7, tmp_path / "new")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/file").touch()
    with pytest.raises(UserError, match="is there already"):
        branch(trained, 12, tmp_path / "full")
    monkeypatch.setattr("os.link", lambda *names: (_ for _ in ()).throw(OSError("no links here")))
    source = tmp_path / "source"
    shutil.copytree(trained, source)
    leave_out(source, LeftOut(20, 3))
    (tmp_path / "empty").mkdir()
    assert branch(source, 12, tmp_path / "empty").run.dir == str(tmp_path / "empty")
    assert find_checkpoint(tmp_path / "empty").manifest.step == 12
    assert read_left_out(tmp_path / "empty") == (LeftOut(20, 3),)
    monkeypatch.setattr("shutil.copyfile", lambda *names: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        branch(source, 12, tmp_path / "none")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "full", "source"]


def test_a_manifest_names_its_version_and_may_know_more(trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step-00000012"
    shutil.copytree(find_checkpoint(trained).folder, folder)
    facts = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    assert facts["version"]

    def written(**more: object) -> Checkpoint:
        changed_facts = facts | more
        text = json.dumps(changed_facts | {"checksum": checksum_of(changed_facts)})
        (folder / MANIFEST).write_text(text, encoding="utf-8")
        return read_checkpoint(folder)

    assert written(averages=[1, 2]).manifest.step == 12, "a fact of a later version"
    config = facts["config"] | {"optim": facts["config"]["optim"] | {"gone": 1}}
    with pytest.raises(UserError, match=r"not one of this version of megassm, .*optim\.gone\); use megassm 9\.9"):
        _ = written(version="9.9", config=config).config
    del facts["version"]
    assert written().manifest.version == "", "as older ones were written"


def test_an_older_checkpoints_identity_may_hold_what_is_free_now(small_config: Callable[..., Config]) -> None:
    before, now = small_config(), small_config("model.filterbank=fft", "model.gate_bias_init=-2")
    older = run_identity(before, "data") | {"model.filterbank": "auto", "model.gate_bias_init": 0.0}
    manifest = SimpleNamespace(identity=older, config=before.model_dump(mode="json"))
    check_identity(Checkpoint(Path("step"), manifest), run_identity(now, "data"))  # type: ignore[arg-type]
