"""Rows in files: a full disk loses none, a kill in the middle of a line costs that line."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from megassm.run import records
from megassm.run.lines import Known, Line
from megassm.run.records import RecordFile, cut_after, iterate_records, newest_record, records_newest_first


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file may grow beyond `size` bytes: a write is cut there, and the next ones fail, as on a full disk."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def steps(path: Path) -> list[int]:
    return [row["step"] for row in iterate_records(path)]


def test_a_full_disk_loses_nothing_and_is_told_once(tmp_path: Path) -> None:
    said: list[str] = []
    file = RecordFile(tmp_path / "m", said.append)
    file.write({"step": 1})
    with room_for(20):
        for step in range(2, 50):
            file.write({"step": step})
        assert steps(tmp_path / "m") == [1]
        assert (tmp_path / "m").stat().st_size == 20, "the second row is cut"
    assert len(said) == 1
    assert "records wait in memory" in said[0]
    file.write({"step": 50})
    file.close()
    assert steps(tmp_path / "m") == list(range(1, 51))
    assert (tmp_path / "m").read_bytes() == b"".join(b'{"step": %d}\n' % step for step in range(1, 51))
    assert len(said) == 2
    assert said[1].endswith("every record is written")


def test_what_waits_is_bounded_and_what_is_lost_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records, "WAITING_BYTES", 60)
    said: list[str] = []
    file = RecordFile(tmp_path / "m", said.append)
    with room_for(5):
        for step in range(10, 30):
            file.write({"step": step})
    file.write({"step": 30})
    file.close()
    assert steps(tmp_path / "m") == [10, 26, 27, 28, 29, 30], "the one that was half written, and the newest"
    assert "but for 15 that were too many to keep" in said[1]


def test_an_end_without_room_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    file = RecordFile(tmp_path / "m", said.append)
    with room_for(5):
        file.write({"step": 1})
        file.close()
    assert "1 records could not be written" in said[-1]


@pytest.mark.parametrize(
    ("text", "step", "left"),
    [
        ('{"step": 1}\n{"step": 2}\n{"step": 3}\n', 2, [1, 2]),
        ('{"step": 1}\n{"step": 2}\n{"ste', 2, [1, 2]),
        ('{"step": 1}\n{"step": 2}', 2, [1]),  # without an end it may be cut: {"step": 20}
        ('{"step": 1}\n{"step": null}\n[]\n\xff\n', 9, [1]),
        ('{"step": 5}\n', 2, []),
        ("", 2, []),
    ],
)
def test_rows_that_are_made_again_are_cut_off(tmp_path: Path, text: str, step: int, left: list[int]) -> None:
    path = tmp_path / "m"
    path.write_text(text, encoding="latin-1")
    with room_for(0):  # truncating needs no room
        cut_after(path, step)
    assert [json.loads(line)["step"] for line in path.read_bytes().splitlines()] == left


def test_a_journal_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    cut_after(tmp_path / "m", 3)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("block", [1, 7, 64, 2**18])
def test_rows_are_read_from_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(records, "BLOCK_BYTES", block)
    path = tmp_path / "m"
    assert list(records_newest_first(path)) == []
    whole = [b'{"step": 1}\n', b'\xff\n\n{"step": 2, "text": "' + b"x" * 100 + b'"}\n', b'[]\n{"step": 3}\n']
    path.write_bytes(b"".join(whole) + b'{"step": 4')
    ends = [(3, len(b"".join(whole))), (2, len(b"".join(whole[:2]))), (1, len(whole[0]))]
    assert [(row["step"], end) for row, end in records_newest_first(path)] == ends
    assert newest_record(path) == {"step": 3}


def test_only_the_end_of_a_long_journal_is_read_to_cut_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, parsed, read_line = tmp_path / "m", [0], records.read_line
    path.write_text("".join(f'{{"step": {step}}}\n' for step in range(1, 20_001)))

    def counting(line: bytes, is_known: Known) -> Line:
        parsed[0] += 1
        return read_line(line, is_known)

    monkeypatch.setattr(records, "read_line", counting)
    cut_after(path, 19_990)
    assert parsed[0] == 11
    monkeypatch.undo()
    assert steps(path) == list(range(1, 19_991))
