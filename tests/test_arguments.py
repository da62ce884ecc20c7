"""What command lines share: tables as they are, output places refused before the work."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from megassm.cli.arguments import budget_list, image_file, output_file, positive, print_table


def test_brackets_are_text_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("runs/[x]", [{"k": 4, "text": "self.d[key] = x[bold]; a[/b]"}])
    said = capsys.readouterr().out
    assert "runs/[x]" in said
    assert "self.d[key] = x[bold]; a[/b]" in said


def test_output_places_are_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert output_file(str(tmp_path / "new/deep.json")) == tmp_path / "new/deep.json"
    for wrong in (tmp_path, tmp_path / "file/x.json"):
        with pytest.raises(argparse.ArgumentTypeError, match="give"):
            output_file(str(wrong))
    with pytest.raises(argparse.ArgumentTypeError, match=r"must end in \.png"):
        image_file(str(tmp_path / "x.xyz"))


@pytest.mark.parametrize("text", ["", "a", "2,x", "0,2", "-1", "8-2", "2:2", "2-8:0", "2-", "1-4:x", "0-3"])
def test_budget_lists_that_are_none(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError):
        budget_list(text)


@pytest.mark.parametrize(
    ("text", "budgets"),
    [("8,2,2", [2, 8]), ("1-4", [1, 2, 3, 4]), ("2-9:3", [2, 5, 8]), ("1-3,8,16-32:8", [1, 2, 3, 8, 16, 24, 32])],
)
def test_budget_lists(text: str, budgets: list[int]) -> None:
    assert budget_list(text) == budgets


def test_positive() -> None:
    assert positive("3") == 3
    for wrong in ("0", "-1", "x", "1.5"):
        with pytest.raises(argparse.ArgumentTypeError, match="at least 1"):
            positive(wrong)
