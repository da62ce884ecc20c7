"""wandb and TensorBoard after many restarts: one run each, every update once; the journal as CSV."""

from __future__ import annotations

import csv
import io
import json
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from megassm.commands.journal import write
from megassm.config.schema import Config
from megassm.run.directory import WANDB_RUN
from megassm.run.records import Record
from megassm.run.tensorboard_log import TensorBoardSink
from megassm.run.tracker import Sink, Tracker
from megassm.run.wandb_log import WandbSink, run_id
from tests.conftest import run_python
from tests.wandb_server import wandb_server

Make = Callable[..., Config]

STARTS = ((0, 4, 3), (3, 8, 6), (6, 7, 6), (6, 9, 9), (9, 11, 9), (9, 12, 12))
"""(updates done at the start, last update made, last checkpoint) of a run that is killed and continued five times."""
BLOCK = 32768


def record(step: int, start: int) -> Record:
    return {"step": step, "loss": step + start / 100, "valid": {"8": 2.0}, "k_micro": [8, 2]}


def live(make_sink: Callable[[int], Sink]) -> list[str]:
    """Plays `STARTS`; returns what was warned of."""
    warnings: list[str] = []
    for number, (done, last, checkpoint) in enumerate(STARTS):
        tracker = Tracker(make_sink(done), warnings.append)
        for step in range(done + 1, last + 1):
            tracker.tell(record(step, number))
            if step == checkpoint:
                tracker.saved(step)
        tracker.close()
    return warnings


TRUTH = {step: step + start / 100 for start, (done, _, checkpoint) in enumerate(STARTS)
         for step in range(done + 1, checkpoint + 1)}  # fmt: skip
"""The loss of each update as the start had it whose checkpoint holds it."""


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of a file of wandb's: a log of LevelDB's form, of protobuf messages."""
    from wandb.proto import wandb_internal_pb2

    raw = path.read_bytes()
    assert raw[:4] == b":W&B"
    position, text = 7, b""
    while position + 7 <= len(raw):
        if (left := BLOCK - position % BLOCK) < 7:
            position += left
            continue
        _, size, kind = struct.unpack("<IHB", raw[position : position + 7])
        text += raw[position + 7 : position + 7 + size]
        position += 7 + size
        if kind in (1, 4):  # whole, or a last part
            message = wandb_internal_pb2.Record()
            message.ParseFromString(text)
            yield message
            text = b""


def test_wandb_has_one_run_after_five_restarts(small_config: Make, tmp_path: Path) -> None:
    config = small_config("log.wandb=offline", "log.wandb_group=trials", "log.wandb_tags=[a,b]", "log.wandb_entity=us")
    run_dir = Path(config.run.dir)
    run_dir.mkdir()
    assert live(lambda done: WandbSink(config, done, print)) == []
    wandb.teardown()  # as at the end of a process: its service may still be writing what has been finished
    files = sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime)
    assert len(files) == len(STARTS)
    runs, losses = [], []
    for message in (message for path in files for message in wandb_records(path)):
        if message.WhichOneof("record_type") == "run":
            runs.append((message.run.run_id, message.run.entity, message.run.run_group, tuple(message.run.tags)))
            assert message.run.display_name == "run"
        if message.WhichOneof("record_type") == "history":
            items = {item.key or item.nested_key[0]: item.value_json for item in message.history.item}
            losses.append((int(items["_step"]), json.loads(items["loss"])))
    own = json.loads((run_dir / WANDB_RUN).read_text(encoding="utf-8"))["id"]
    assert set(runs) == {(own, "us", "trials", ("a", "b"))}
    assert losses == list(TRUTH.items()), "each update once, in order, as the checkpoints have it"


ONLINE = """
import sys
from megassm.config.schema import Config
from megassm.run.wandb_log import WandbSink
from tests.test_trackers import live
config = Config.model_validate_json(sys.argv[1])
print(live(lambda done: WandbSink(config, done, print)))
"""


@pytest.mark.parametrize("rewinds", [True, False])
def test_wandb_online_is_one_run_after_five_restarts(small_config: Make, tmp_path: Path, rewinds: bool) -> None:
    """In a process of its own: wandb remembers a key."""
    config = small_config("log.wandb=online", "log.wandb_group=trials", "log.wandb_tags=[a,b]", "log.wandb_entity=us")
    run_dir = Path(config.run.dir)
    run_dir.mkdir()
    with wandb_server(rewinds) as (told, address):
        given = {"WANDB_BASE_URL": address, "WANDB_API_KEY": "a" * 40, "HOME": str(tmp_path)}
        said = run_python("-c", ONLINE, config.model_dump_json(), **given)
    assert said.stdout == "[]\n", said
    own = json.loads((run_dir / WANDB_RUN).read_text(encoding="utf-8"))["id"]
    assert list(told.history) == [own]
    groups = [(one["groupName"], one["tags"]) for one in told.upserts if one["groupName"]]  # later ones are changes
    assert groups == [("trials", ["a", "b"])] * len(groups)
    assert len(groups) >= len(STARTS)
    lines = list(map(json.loads, told.history[own]))
    assert [line["_step"] for line in lines] == list(TRUTH)
    if rewinds:
        assert [line["loss"] for line in lines] == list(TRUTH.values()), "as the checkpoints have it"
    assert told.operations.count("RewindRun") == sum(done > 0 for done, *_ in STARTS)


SLOW = """
import sys
from megassm.config.schema import Config
from megassm.run import wandb_log
from megassm.run.tracker import Tracker
wandb_log.FINISH_TIMEOUT_S = 2
tracker = Tracker(wandb_log.WandbSink(Config.model_validate_json(sys.argv[1]), 0, print), print)
tracker.tell({"step": 1, "loss": 2.0})
tracker.close()
"""


def test_an_upload_that_does_not_end_is_said(small_config: Make, tmp_path: Path) -> None:
    config = small_config("log.wandb=online")
    Path(config.run.dir).mkdir()
    with wandb_server(rewinds=True, takes_files=False) as (_, address):
        given = {"WANDB_BASE_URL": address, "WANDB_API_KEY": "a" * 40, "HOME": str(tmp_path)}
        said = run_python("-c", SLOW, config.model_dump_json(), **given)
    assert said.stdout.count("\n") == 1
    assert f"its server had not taken everything; `wandb sync {config.run.dir}/wandb/run-" in said.stdout


def test_tensorboard_reads_one_curve_after_five_restarts(small_config: Make) -> None:
    config = small_config()
    assert live(lambda done: TensorBoardSink(config, done)) == []
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(f"{config.run.dir}/tensorboard").Reload()
    assert {event.step: pytest.approx(event.value) for event in read.Scalars("loss")} == TRUTH
    assert {event.value for event in read.Scalars("valid/bits_per_byte_k8")} == {2.0}


def test_a_run_is_told_of_as_it_goes_where_it_can_be_taken_back() -> None:
    class Told:
        name = "told"

        def __init__(self, holds: bool) -> None:
            self.holds, self.steps = holds, list[int]()

        def open(self) -> bool:
            return self.holds

        def log(self, record: Record) -> None:
            self.steps.append(record["step"])

        def close(self) -> None:
            self.steps.append(-1)

        def abandon(self) -> None:
            self.steps.append(-2)

    for holds, expected in ((True, [1, 2, -1]), (False, [1, 2, 3, -1])):
        sink = Told(holds)
        tracker = Tracker(sink, print)
        for item in (1, 2, 3):
            tracker.tell({"step": item})
        tracker.saved(2)
        tracker.close()
        assert sink.steps == expected


def test_what_fails_is_given_up_with_one_warning(small_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    warnings: list[str] = []
    tracker = Tracker(TensorBoardSink(small_config(), 0), warnings.append)
    tracker.close()
    tracker.tell({"step": 1})
    assert len(warnings) == 1
    assert "TensorBoard is given up (it is not installed: pip install -e '.[tensorboard]'" in warnings[0]


def test_a_copy_is_another_run_and_a_moved_one_is_not(tmp_path: Path) -> None:
    first, moved, copied = (tmp_path / name for name in ("first", "moved", "copied"))
    first.mkdir()
    own = run_id(first)
    assert run_id(first) == own
    first.rename(moved)
    assert run_id(moved) == own
    shutil.copytree(moved, copied)
    other = run_id(copied)
    assert other != own
    assert (run_id(copied), run_id(moved)) == (other, own)
    (moved / WANDB_RUN).write_text("{", encoding="utf-8")
    assert run_id(moved) not in (own, other)


def test_the_journal_as_csv(trained: Path, tmp_path: Path) -> None:
    table = tmp_path / "journal.csv"
    said = run_python("tools/journal.py", str(trained), "--csv", str(table)).stdout
    assert said == f"{table}: 12 updates\n"
    rows = list(csv.DictReader(table.open(encoding="utf-8", newline="")))
    journal = [json.loads(line) for line in (trained / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [float(row["loss"]) for row in rows] == [record["loss"] for record in journal]
    assert [row["k_micro"] for row in rows] == [" ".join(map(str, record["k_micro"])) for record in journal]
    assert rows[0]["valid/bits_per_byte_k8"] == ""
    assert float(rows[-1]["valid/bits_per_byte_k8"]) == journal[-1]["valid"]["8"]
    assert float(rows[0]["phases_s/forward"]) == journal[0]["phases_s"]["forward"]
    text = io.StringIO()
    assert write(trained / "metrics.jsonl", text) == 12
    assert text.getvalue() == table.read_text(encoding="utf-8")
    missing = run_python("tools/journal.py", str(tmp_path), check=False)
    assert "metrics.jsonl: not there" in missing.stderr
