"""The mixer's benchmark: all ways compute the same, the table has its columns."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megassm.errors import UserError
from megassm.eval.mixer_bench import BenchPlan, bench
from tests.conftest import run_python


def test_every_method_computes_the_same() -> None:
    plan = BenchPlan([100, 256], [1, 5], methods=("authors", "fft", "direct", "chunked"), d_model=16, repeats=1)
    rows = list(bench(plan))
    assert [(row.length, row.k) for row in rows[::4]] == [(100, 1), (100, 5), (256, 1), (256, 5)]
    for row in rows:
        assert row.relative_error is not None
        assert row.relative_error < 1e-5
        assert min(row.forward_s, row.forward_backward_s, row.peak_bytes, row.gflops_per_s) > 0


def test_chunked_keeps_less_than_the_authors_formulation() -> None:
    plan = BenchPlan([2048], [16], methods=("authors", "chunked"), d_model=32, repeats=1)
    authors, chunked = bench(plan)
    assert chunked.peak_bytes < authors.peak_bytes / 2


def test_unknown_method() -> None:
    with pytest.raises(UserError, match="methods magic: must be among authors"):
        list(bench(BenchPlan([8], [1], methods=("magic",))))


def test_tool(tmp_path: Path) -> None:
    table = tmp_path / "bench.json"
    done = run_python("tools/bench_mixer.py", "--lengths", "64,128", "--budgets", "2", "--d-model", "16",
                      "--repeats", "1", "--json", str(table))  # fmt: skip
    assert "chunked" in done.stdout
    rows = json.loads(table.read_text(encoding="utf-8"))
    assert {"method", "length", "k", "forward_s", "forward_backward_s", "peak_bytes", "relative_error"} <= set(rows[0])
    assert [row["length"] for row in rows if row["method"] == "chunked"] == [64, 128]
    assert all(row["speed_over_authors"] > 0 for row in rows)
