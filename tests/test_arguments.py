"""What command lines share: tables as they are, output places refused before the work."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from megassm.cli import arguments
from megassm.cli.arguments import budget_list, image_file, output_file, positive, print_table


def test_brackets_are_text_not_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("runs/[x]", [{"k": 4, "text": "self.d[key] = x[bold]; a[/b]"}])
    said = capsys.readouterr().out
    assert "runs/[x]" in said
    assert "self.d[key] = x[bold]; a[/b]" in said


ROWS = [
    {"K": k, "params": 1_174_104 + k, "bits/byte": 1.7 + k / 100, "ppl 95%": "31.22-38.49", "gap %": gap,
     "seconds": seconds, "MFLOP/tok": 2.12, "prefill/s": 12_519.4, "decode/s": None, "MiB": 31.7}
    for k, gap, seconds in ((1, 13.25, 0.0012), (2, 0.5, 35.2), (32, 0.0, 7.0))
]  # fmt: skip


@pytest.mark.parametrize("columns", [50, 80, 100, 120])
def test_no_figure_is_broken_whatever_the_width(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], columns: int
) -> None:
    monkeypatch.setattr(arguments, "LOG_COLUMNS", columns)
    print_table("a sweep", ROWS)
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= columns
    figures = ("1,174,136", "1.710", "31.22-38.49", "13.25", " 0.50 ", "0.0012", "35.2000", "12,519", " - ", "31.70")
    assert [figure for figure in figures if figure not in said] == []
    assert said.count("a sweep") == 1


def test_a_column_has_one_number_of_decimals(capsys: pytest.CaptureFixture[str]) -> None:
    values = [(1.5, 2e-8, 123456.7), (10.25, 3.0, 1000.0), (0.0, 0.0, 2.0)]
    print_table("", [dict(zip("abc", row, strict=True)) for row in values])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("\u2502")]
    cells = [line.replace("\u2502", " ").split() for line in lines]
    assert cells == [["1.50", "2.00e-08", "123,456.7"], ["10.25", "3.00e+00", "1,000.0"], ["0.00", "0", "2.0"]]


def test_a_single_row_that_is_too_wide_stands_on_end(capsys: pytest.CaptureFixture[str]) -> None:
    print_table("tokenizer", [{f"name {i}": 1_000_000 * i for i in range(1, 12)}])
    said = capsys.readouterr().out
    assert "name 11" in said
    assert "11,000,000" in said
    assert len(said.splitlines()) == 14


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
