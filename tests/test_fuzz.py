"""Damaged and forged files of every kind: taken or refused, nothing else. `tests.fuzz` alone tries many more."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megassm.errors import UserError
from tests.fuzz import all_kinds, fuzz, try_one
from tests.fuzz_kinds import Kind

EACH = 12


def test_every_kind_is_taken_or_refused(tmp_path: Path) -> None:
    kinds = all_kinds(tmp_path)
    assert len({kind.name for kind in kinds}) == len(kinds) >= 40
    fuzz(kinds, EACH * len(kinds), seed=1)
    assert {kind.name: kind.faults for kind in kinds if kind.faults} == {}
    assert all(0 < kind.inputs <= EACH for kind in kinds)
    assert all(kind.refused for kind in kinds if kind.checked and not kind.recovers)


@pytest.mark.parametrize(
    ("read", "fault"),
    [
        (lambda: 1, "taken, though it says something else"),
        (lambda: [][0], "IndexError: list index out of range"),
        (lambda: exec("raise UserError('no')", {"UserError": UserError}), None),
    ],
)
def test_a_fault_is_one(read: Callable[[], object], fault: str | None, tmp_path: Path) -> None:
    kind = Kind("x", tmp_path / "x", read, checked=True)
    try_one(kind, b"", 2)
    assert kind.faults == ([fault] if fault else [])
    assert kind.refused == (fault is None)
