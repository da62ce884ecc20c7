"""Plots as pictures for people and as SVG inside a page, whatever they show."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

from megassm.files import write_atomically

PANEL_INCHES = (5.6, 4.4)
COLUMNS = 3
TITLE_CHARS = 60
INK = "#010203"
"""Stands for the page's own text colour in an SVG, so that it can be read on dark and on light."""


class Panel(NamedTuple):
    """One plot."""

    title: str
    draw: Callable[[Any], None]
    """Draws on matplotlib axes."""


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


def inline_svg(panel: Panel, number: int) -> str:
    """A panel as an element of a page; `number` keeps the ids of several apart."""
    colours = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color")
    settings: Any = dict.fromkeys(colours, INK) | {"svg.fonttype": "none", "svg.hashsalt": f"panel {number}"}
    with matplotlib.rc_context(settings):
        figure, axes = pyplot.subplots(figsize=PANEL_INCHES, layout="constrained")
        panel.draw(axes)
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
        pyplot.close(figure)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor").replace('id="', f'id="p{number}-')
    return svg.replace("url(#", f"url(#p{number}-").replace('href="#', f'href="#p{number}-')


def plot_over_steps(lines: Mapping[int, Sequence[tuple[int, float]]], label: str, path: Path) -> None:
    """Draws (step, bits per byte) for each K."""
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    colours = matplotlib.colormaps["viridis"]
    for place, (k, points) in enumerate(sorted(lines.items())):
        colour = colours(0.9 * place / max(1, len(lines) - 1))
        axes.plot([x for x, _ in points], [y for _, y in points], marker=".", color=colour, label=f"K={k}")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="step (updates)", ylabel=label)
    axes.grid(alpha=0.3)
    axes.legend(ncols=2)
    _save(figure, path)


def legend_below(axes: Any) -> None:
    """Below the axes, where it hides no line."""
    count = len(axes.get_lines())
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.14), frameon=False, fontsize="small", ncols=1 + count // 7)


def budget_axis(axes: Any, values: Sequence[int]) -> None:
    """Ticks at the values, but for those too near to the next."""
    ticks = [values[-1]]
    for value in reversed(values):
        if value <= ticks[-1] / 1.3:
            ticks.append(value)
    axes.set_xscale("log", base=2)
    axes.set_xticks(ticks, [str(value) for value in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    if axes.get_yscale() == "linear":
        axes.yaxis.set_major_formatter(ScalarFormatter(useOffset=False))
    axes.grid(alpha=0.3)


def _save(figure: Figure, path: Path) -> None:
    file = io.BytesIO()
    figure.savefig(file, format=path.suffix[1:], dpi=120)
    pyplot.close(figure)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, file.getvalue())
