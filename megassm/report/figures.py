"""Plots as picture files, by matplotlib."""

from __future__ import annotations

import io
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

from megassm.files import write_atomically
from megassm.report.charts import LIGHT, LIGHT_RAMP, Chart, budget_ticks, places, ramp

PANEL_INCHES = (5.6, 4.4)
COLUMNS = 3
TITLE_CHARS = 60


class Panel(NamedTuple):
    """One plot."""

    title: str
    draw: Callable[[Any], None]
    """Draws on matplotlib axes."""


def save_charts(charts: Sequence[Chart], path: Path) -> None:
    """All charts over budgets or lengths in one picture."""
    save_panels([Panel(chart.title, _drawing(chart)) for chart in charts], path)


def save_panels(chosen: Sequence[Panel], path: Path) -> None:
    """All panels in one picture; the format is the file's suffix."""
    columns = min(COLUMNS, len(chosen))
    rows = -(-len(chosen) // columns)
    size = (PANEL_INCHES[0] * columns, PANEL_INCHES[1] * rows)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    for axes, panel in zip(grid.flat, chosen, strict=False):
        panel.draw(axes)
        axes.set_title(textwrap.fill(panel.title, TITLE_CHARS), fontsize="medium")
    for axes in list(grid.flat)[len(chosen) :]:
        axes.remove()
    _save(figure, path)


def plot_over_steps(lines: Mapping[int, Sequence[tuple[int, float]]], label: str, path: Path) -> None:
    """Draws (step, bits per byte) for each K."""
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for place, (k, points) in zip(places(len(lines)), sorted(lines.items()), strict=True):
        colour = ramp(LIGHT_RAMP, place)
        axes.plot([x for x, _ in points], [y for _, y in points], marker=".", color=colour, label=f"K={k}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="step (updates)", ylabel=label)
    axes.grid(alpha=0.3)
    axes.legend(ncols=2)
    _save(figure, path)


def budget_axis(axes: Any, values: Sequence[int]) -> None:
    """Ticks at the values, but for those too near to the next."""
    ticks = budget_ticks(values)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(value) for value in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    axes.grid(alpha=0.3)


def _drawing(chart: Chart) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        (axis,) = chart.axes
        for number, line in enumerate(chart.lines):
            colour = LIGHT[number % len(LIGHT)] if line.place is None else ramp(LIGHT_RAMP, line.place)
            style = "-" if number < len(LIGHT) or line.place is not None else "--"
            axes.plot(line.x[axis], line.y, marker="o", label=line.label, color=colour, linestyle=style)
            if line.low:
                axes.fill_between(line.x[axis], line.low, line.high, color=colour, alpha=0.15, linewidth=0)
        if chart.mark:
            axes.axvline(chart.mark[0], linestyle=":", color="#808080", label=chart.mark[1])
        axes.set(xlabel=axis, ylabel=chart.y_label + (f" (band: {chart.band})" if chart.band else ""))
        if chart.from_zero:
            axes.set_ylim(bottom=0)
        budget_axis(axes, chart.ticks)
        count = len(axes.get_lines())
        place = {"loc": "upper left", "bbox_to_anchor": (0, -0.14), "ncols": 1 + count // 7}
        axes.legend(frameon=False, fontsize="small", **place)  # below, where it hides no line

    return draw


def _as_written(figure: Figure) -> None:
    """Titles, labels and legends may hold text from outside, where `$` begins no formula; ticks are ours."""
    for axes in figure.axes:
        legend = axes.get_legend()
        shown = legend.get_texts() if legend else []
        for text in (axes.title, axes.xaxis.label, axes.yaxis.label, *axes.texts, *shown):
            text.set_parse_math(False)


def _save(figure: Figure, path: Path) -> None:
    _as_written(figure)
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # a letter of a name that its font has not
        figure.savefig(file, format=path.suffix[1:], dpi=120)
    pyplot.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, file.getvalue())
