"""Lines that are cut or joined: each reader reads what is whole and names the rest."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from megassm.commands import journal as journal_command
from megassm.config.schema import Config
from megassm.report.live import LiveRun
from megassm.report.loaded import load_run
from megassm.report.run_findings import findings_of
from megassm.report.terminal import frame
from megassm.run.events import read_events
from megassm.run.journal import Journal
from megassm.run.lines import Line, Unread, read_line
from megassm.run.lives import life_of
from megassm.run.records import cut_after, is_record, newest_record, read_records, records_newest_first

Make = Callable[..., Config]


def row(step: int, text: str = "") -> bytes:
    """As a run writes it, with objects within."""
    return json.dumps(
        {"step": step, "loss": 2.5, "valid": {"8": 1.0}, "note": text, "channels": {"step": [step]}}
    ).encode()


R1, R2, R3, R4 = (row(step, "\u00e9 {") for step in (1, 2, 3, 4))
HALF = R2[: len(R2) // 2]
JOINED = [
    (R2 + R3, [2, 3], True),
    (R2 + b" " + R3 + b"\r", [2, 3], True),
    (HALF + R3, [3], False),
    (R2[:-3] + R3 + R4[:9], [3], False),
    (R2[: R2.index(b"channels") + 20] + R3, [3], False),
    (b"\0" * 40 + R2, [2], False),
    (b"\xff" + R2 + "\u00e9".encode() + R3, [2, 3], False),
    (HALF, [], False),
    (b"{}" + R2 + b'{"step": 0}' + R3, [2, 3], False),
    (b"".join(map(row, range(2, 60))), list(range(2, 60)), True),
    (b" \t", [], True),
]


@pytest.mark.parametrize(("line", "steps", "whole"), JOINED, ids=lambda value: str(value)[:20])
def test_all_readers_of_a_journal_read_what_is_whole_and_name_the_rest(
    line: bytes, steps: list[int], whole: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(R1 + b"\n" + line + b"\n" + row(99) + b"\n")
    truth = [1, *steps, 99]
    named = "" if whole else f"{path}: line 2 is not whole (cut by a crash"

    assert [record["step"] for record in read_records(tmp_path)] == truth
    assert named in capsys.readouterr().err
    unread = Unread(path)
    assert [record["step"] for record, _ in records_newest_first(path, unread)] == truth[::-1]
    assert unread.told.startswith(named)

    table = io.StringIO()
    assert journal_command.write(path, table) == len(truth)
    assert [text.partition(",")[0] for text in table.getvalue().splitlines()] == ["step", *map(str, truth)]
    assert capsys.readouterr().err.count("not whole") == (not whole)

    run = LiveRun(tmp_path).look()
    assert run.history.records == len(truth)
    console = Console(width=250, file=io.StringIO())
    console.print(frame(run, 250, 40))
    assert ("metrics.jsonl: line 2 is not whole" in console.file.getvalue()) == (not whole)  # type: ignore[attr-defined]
    loaded = load_run(tmp_path, "a")
    assert loaded.history.records == len(truth)
    said = [text for text, bad in findings_of([loaded])["a"] if bad]
    assert [text.startswith(named) for text in said] == [True] * (not whole)


@pytest.mark.parametrize("first", [R2, HALF, b"\0" * 9], ids=["whole", "half", "zeros"])
def test_a_run_goes_on_after_a_row_amid_a_line(
    first: bytes, small_config: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config()
    path = Path(config.run.dir) / "metrics.jsonl"
    path.parent.mkdir()
    path.write_bytes(R1 + b"\n" + first + R3 + R4 + b"\n")
    journal = Journal(config, 3)
    journal.close()
    said = capsys.readouterr().err
    assert path.read_bytes() == R1 + b"\n" + first + R3 + b"\n"
    assert (newest_record(path) or {})["step"] == 3
    assert said == ""
    Journal(config, 2).close()
    gap = f"warning: {path}: has no record of update 2, which the checkpoint holds; curves have a gap there\n"
    assert capsys.readouterr().err == ("" if first == R2 else gap)
    Journal(config, 12).close()
    assert f"has no record of updates {3 if first == R2 else 2} to 12" in capsys.readouterr().err


def test_events_are_read_alike(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"kind": "resume", "text": '{"time": ', "figures": {"step": 5}}
    events = [json.dumps({"time": 1.0 + step, "step": step, **facts}) for step in range(5)]
    text = f"{events[0]}{events[1]}\n{events[2][:-15]}{events[3]}\n{events[4]}\n"
    (tmp_path / "events.jsonl").write_text(text, encoding="utf-8")
    assert [event["step"] for event in read_events(tmp_path)] == [0, 1, 3, 4]
    assert "events.jsonl: line 2 is not whole" in capsys.readouterr().err
    assert [event["step"] for event in life_of(tmp_path)] == [0, 1, 3, 4], "as `watch --history` prints it"
    assert "events.jsonl: line 2 is not whole" in capsys.readouterr().err
    run = LiveRun(tmp_path).look()
    assert [event["step"] for event in run.events] == [0, 1, 3, 4]
    assert [unread.short for unread in run.unread] == ["events.jsonl: line 2 is not whole"]


def test_many_lines_are_counted_and_a_file_that_is_cut_starts_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(R1 + b"\n" + (HALF + b"\n") * 2000 + R2 + b"\n")
    unread = Unread(path)
    assert len(read_records(tmp_path, unread)) == 2
    assert unread.short == "metrics.jsonl: lines 2, 3, 4, 5 and 1,996 more are not whole"
    run = LiveRun(tmp_path).look()
    assert run.unread[0].numbers == unread.numbers == set(range(2, 2002))
    cut_after(path, 1)
    assert run.look().unread == []


def test_what_leads_to_nothing_is_not_searched_for_ever() -> None:
    nested = b'{"step": ' * 20_000
    assert read_line(nested + b"\n", is_record) == Line([], False)
    assert read_line(nested + R1, is_record) == Line([], False)
    assert read_line(b'{"step": 1' * 3 + R1, is_record).found == [(json.loads(R1), 30 + len(R1))]
