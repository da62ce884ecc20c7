"""What a sweep leaves behind: sweep.json, .csv, .png, .html; the curves of a live run over its steps."""

from __future__ import annotations

import csv
import hashlib
import io
import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from megassm.cli.arguments import MAX_BUDGET
from megassm.errors import UserError, visible
from megassm.eval.swept import Sweep
from megassm.files import write_atomically
from megassm.guarded import Described, read_json
from megassm.report.figures import plot_over_steps, save_charts
from megassm.report.sweep_page import render_page
from megassm.report.sweep_plots import charts
from megassm.run.directory import STEPS_PLOT, SWEEP, step_name

NAME_CHARS = 80
"""Of the texts in a sweep's name."""
STEP_FILE = re.compile(r"step-[0-9]{8,18}\.json")


def flat_rows(sweep: Sweep) -> list[dict[str, Any]]:
    """One object for each text, length and K; those of one K a layer, which have `layers`, last."""
    return [
        {"run": sweep.run, "step": sweep.step, "data": curve.data, "seq_len": curve.seq_len} | asdict(row)
        for curve in sweep.curves
        for row in (*curve.rows, *curve.mixed)
    ]


def sweep_stem(sweep: Sweep, folder: Path) -> str:
    """The name in `folder` for a sweep's files, of its texts, lengths and checkpoint: DATA-LENGTH-step-NNNNNNNN.

    A sweep with other budgets or more sequences gets a number behind; the same one, measured again, takes its place.
    """
    texts = list(dict.fromkeys(curve.data for curve in sweep.curves))
    lengths = "+".join(str(length) for length in sorted({curve.seq_len for curve in sweep.curves}))
    exact = "+".join(texts)
    words = re.sub(r"[^A-Za-z0-9_.+]+", "-", exact).strip("-.")
    if len(words) > NAME_CHARS or words != exact.replace("/", "-"):  # two texts must not meet in one name
        words = f"{words[-NAME_CHARS:].strip('-.')}-{hashlib.sha256(exact.encode(errors='replace')).hexdigest()[:6]}"
    name = f"{words}-{lengths}-{step_name(sweep.step)}"
    numbered = (name if number == 1 else f"{name}-{number}" for number in itertools.count(1))
    return next(stem for stem in numbered if not _holds_another(folder / f"{stem}.json", sweep))


def _holds_another(path: Path, sweep: Sweep) -> bool:
    """Whether a file is there that is not this sweep's, measured before."""
    if not path.exists():
        return False
    try:
        found = read_json(path, _SweepFile)
    except (OSError, UserError):
        return True
    measured = [(curve.data, curve.seq_len, curve.sequences, [row.k for row in curve.rows]) for curve in found.curves]
    return measured != [(c.data, c.seq_len, c.sequences, [row.k for row in c.rows]) for c in sweep.curves]


def write_sweep(sweep: Sweep, folder: Path, stem: str = SWEEP) -> list[Path]:
    """Writes a sweep's .json, .csv, .png and .html into `folder`; returns their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}.{suffix}" for suffix in ("json", "csv", "png", "html")]
    write_json_sweep(sweep, paths[0])
    write_csv([sweep], paths[1])
    save_charts(charts([sweep]), paths[2])
    write_page([sweep], paths[3])
    return paths


def write_json_sweep(sweep: Sweep, path: Path) -> None:
    """The whole sweep as one object; `curves[].rows` are the table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, (json.dumps(asdict(sweep), indent=2) + "\n").encode())


def write_csv(sweeps: Sequence[Sweep], path: Path) -> None:
    rows = [row for sweep in sweeps for row in flat_rows(sweep)]
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, file.getvalue().encode())


def write_page(sweeps: Sequence[Sweep], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, render_page(sweeps).encode())


def plot_steps(folder: Path) -> Path | None:
    """Draws one line a K over the steps of all step-*.json in `folder`, where there are several: the first text at the
    trained length."""
    way_out = "remove it, and the checkpoint is measured again"
    names = sorted(path for path in folder.glob("step-*.json") if STEP_FILE.fullmatch(path.name))
    found = [read_json(path, _SweepFile, way_out) for path in names]
    if len(found) < 2:  # a point is no curve
        return None
    lines: dict[int, list[tuple[int, float]]] = {}
    for sweep in found:
        for row in sweep.first_curve.rows:
            lines.setdefault(row.k, []).append((sweep.step, row.bits_per_byte))
    last = found[-1].first_curve
    unit = "byte" if last.rows[0].accuracy is None else "answer"
    plot_over_steps(lines, f"bits per {unit} of {visible(last.data)}", folder / STEPS_PLOT)
    return folder / STEPS_PLOT


class _RowOfFile(Described):
    k: Annotated[int, Field(ge=1, le=MAX_BUDGET)]
    bits_per_byte: Annotated[float, Field(ge=0, le=1e30)]
    accuracy: float | None = None


class _CurveOfFile(Described):
    data: Annotated[str, Field(max_length=10_000)]
    seq_len: int
    sequences: int = 0
    rows: Annotated[tuple[_RowOfFile, ...], Field(min_length=1)]


class _SweepFile(Described):
    """What `plot_steps` needs of a step-*.json."""

    step: Annotated[int, Field(ge=0, le=2**53)]
    trained_seq_len: int
    curves: Annotated[tuple[_CurveOfFile, ...], Field(min_length=1)]

    @property
    def first_curve(self) -> _CurveOfFile:
        """The first text at the trained length; where there is none, the first."""
        return next((curve for curve in self.curves if curve.seq_len == self.trained_seq_len), self.curves[0])
