"""The curves of one or several sweeps as pictures: files for people, inline SVG for the report."""

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

from megassm.durable import write_atomically
from megassm.eval.sweep import Curve, Sweep

PANEL_INCHES = (5.6, 4.4)
COLUMNS = 3
TITLE_CHARS = 60
MAX_LINES = 6
"""Budgets drawn over sequence lengths, spread evenly."""
INK = "#010203"
"""Stands for the page's own text colour in an SVG, so that it can be read on dark and on light."""


class Panel(NamedTuple):
    """One plot."""

    title: str
    draw: Callable[[Any], None]
    """Draws on matplotlib axes."""


def panels(sweeps: Sequence[Sweep]) -> list[Panel]:
    """Quality over K for every text, over lengths where there are several, and speeds over K."""
    curves = [(sweep, curve) for sweep in sweeps for curve in sweep.curves]
    texts = list(dict.fromkeys(curve.data for _, curve in curves))
    result = []
    for text in texts:
        chosen = _labelled([(sweep, curve) for sweep, curve in curves if curve.data == text])
        result.append(Panel(f"bits per byte of {text} (lower is better)", _quality(chosen)))
    for sweep in sweeps:
        for text in texts:
            chosen_curves = [curve for curve in sweep.curves if curve.data == text]
            if len(chosen_curves) > 1:
                where = f" ({sweep.name})" if len(sweeps) > 1 else ""
                title = f"bits per byte of {text} over sequence length{where}"
                result.append(Panel(title, _over_lengths(chosen_curves, sweep.trained_seq_len)))
    # costs do not depend on the text: the first stands for all
    chosen = _labelled([(sweep, curve) for sweep, curve in curves if curve.data == sweep.curves[0].data])
    result.append(Panel("prefill tokens/s", _speed(chosen, "prefill_tokens_per_s")))
    if any(row.decode_tokens_per_s for _, curve in curves for row in curve.rows):
        result.append(Panel("decode tokens/s", _speed(chosen, "decode_tokens_per_s")))
    return result


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


def _labelled(curves: Sequence[tuple[Sweep, Curve]]) -> dict[str, Curve]:
    """What tells the curves of one panel apart."""
    several_runs = len({sweep.name for sweep, _ in curves}) > 1
    several_lengths = len({curve.seq_len for _, curve in curves}) > 1
    labelled = {}
    for sweep, curve in curves:
        parts = [sweep.name] * several_runs + [f"{curve.seq_len} tokens"] * several_lengths
        labelled[", ".join(parts) or sweep.name] = curve
    return labelled


def _quality(curves: Mapping[str, Curve]) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        for label, curve in curves.items():
            budgets = [row.k for row in curve.rows]
            (line,) = axes.plot(budgets, [row.bits_per_byte for row in curve.rows], marker="o", label=label)
            if curve.rows[0].gap_percent_low is not None:
                full = curve.rows[-1].bits_per_byte
                low, high = (
                    [full * (1 + getattr(row, f"gap_percent_{end}") / 100) for row in curve.rows]
                    for end in ("low", "high")
                )
                axes.fill_between(budgets, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set_ylabel("bits per byte (band: 95% of the gap)")
        _finish(axes, curves)

    return draw


def _speed(curves: Mapping[str, Curve], field: str) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        for label, curve in curves.items():
            axes.plot(
                [row.k for row in curve.rows], [getattr(row, field) for row in curve.rows], marker="o", label=label
            )
        axes.set_ylabel(field.removesuffix("_tokens_per_s") + " tokens/s")
        axes.set_ylim(bottom=0)
        _finish(axes, curves)

    return draw


def _over_lengths(curves: Sequence[Curve], trained: int) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        budgets = [row.k for row in curves[0].rows]
        shown = sorted({round(i * (len(budgets) - 1) / (MAX_LINES - 1)) for i in range(MAX_LINES)})
        lengths = [curve.seq_len for curve in curves]
        for place in shown:
            bits = [curve.rows[place].bits_per_byte for curve in curves]
            axes.plot(lengths, bits, marker="o", label=f"K={budgets[place]}")
        axes.axvline(trained, linestyle=":", color="#808080", label="trained at")
        axes.set(xlabel="sequence length (tokens)", ylabel="bits per byte")
        _log_axis(axes, sorted({*lengths, trained}))
        _legend(axes)

    return draw


def _finish(axes: Any, curves: Mapping[str, Curve]) -> None:
    axes.set_xlabel("budget K (spectral channels)")
    _log_axis(axes, sorted({row.k for curve in curves.values() for row in curve.rows}))
    _legend(axes)


def _legend(axes: Any) -> None:
    """Below the axes, where it hides no line."""
    count = len(axes.get_lines())
    axes.legend(loc="upper left", bbox_to_anchor=(0, -0.14), frameon=False, fontsize="small", ncols=1 + count // 7)


def _log_axis(axes: Any, values: Sequence[int]) -> None:
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
