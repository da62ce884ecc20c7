"""Draws the README's plot, quality over size of the family's main curves, from the stored results of `family`."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import numpy as np
from matplotlib import pyplot

from megassm.cli.arguments import Parser, path_argument, run_tool
from megassm.errors import UserError
from megassm.files import write_atomically
from tools.experiments.family import ALONE_CHANNELS, CHANNELS, HYBRID, nearly_closed_gate, stratified
from tools.experiments.measure import BITS, BY_SIZE
from tools.experiments.results import Curve, Results, curves, read

SPECTRAL, MIXED = (nearly_closed_gate(stratified(name)) for name in (CHANNELS, HYBRID))
ALONE = nearly_closed_gate(ALONE_CHANNELS)
SHOWN = {
    "transformer with taps of each size": ("transformer with taps, each size alone", "tab:gray", "s:"),
    stratified("transformer with taps, elastic width"): ("the same, elastic width: one training", "tab:gray", "o-"),
    ALONE: ("spectral, each K trained alone", "tab:blue", "x:"),
    SPECTRAL: ("elastic spectral: one training, cut to each K", "tab:blue", "o-"),
    MIXED: ("elastic hybrid with attention: one training", "tab:orange", "o-"),
    "Mamba-2": ("Mamba-2, one size", "tab:green", "D"),
}
"""By the curve's name in the results: what it is called here, its colour and its line."""
ONE_TRAINING = (SPECTRAL, MIXED)
"""Whose points are cuts, and are marked with their K."""
MARGIN = 0.88
"""Of the smallest size of the elastic models, to the left of which nothing is drawn."""


def parser() -> Parser:
    result = Parser(__doc__ or "", "python tools/experiments/headline.py")
    add = result.add_argument
    add("--results", type=path_argument, default=Path("docs/results/family.json"), metavar="FILE",
        help="what the experiment `family` wrote (default: docs/results/family.json)")  # fmt: skip
    add("--output", type=path_argument, default=Path("docs/figures/family.png"), metavar="FILE",
        help="(default: docs/figures/family.png)")  # fmt: skip
    return result


def draw(results: Results) -> bytes:
    """PNG: bits per byte over parameters; the bands of several seeds are 95% intervals of their mean, `_levelled`.

    Raises:
        UserError: a curve is not in the results.
    """
    found = {curve.label: curve for curve in curves(results, BITS + BY_SIZE)}
    if missing := sorted(SHOWN.keys() - found.keys()):
        raise UserError(f"the results have no curve {', '.join(map(repr, missing))}; run all arms of `family`")
    budgets = {curve.label: curve.x for curve in curves(results, BITS)}
    found = _levelled({label: found[label] for label in SHOWN})
    figure, axes = pyplot.subplots(figsize=(7.6, 5.2), layout="constrained")
    for label, (name, colour, line) in SHOWN.items():
        curve = _within(found[label], MARGIN * min(found[each].x[0] for each in ONE_TRAINING))
        size = np.array(curve.x) / 1000
        axes.plot(size, curve.mean, line, color=colour, markersize=6, label=name)
        if curve.half is not None:
            axes.fill_between(size, *_band(curve.mean, curve.half), color=colour, alpha=0.12, linewidth=0)
        if label in ONE_TRAINING:
            for x, y, k in zip(size, curve.mean, budgets[label], strict=True):
                axes.annotate(f"K={k:g}", (x, y), xytext=(0, 6), textcoords="offset points", ha="center", fontsize=8)
    seeds = len(results.seeds)
    axes.set(xlabel="parameters, thousands", ylabel=f"bits per byte on unseen books, {seeds} seed{'s' * (seeds > 1)}")
    axes.grid(alpha=0.3)
    figure.legend(fontsize="small", loc="outside lower center", ncols=2)
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)
    return file.getvalue()


def _levelled(found: Mapping[str, Curve]) -> dict[str, Curve]:
    """Without what a seed gives to all curves alike: by how much seeds differ in what tells the curves apart.

    Cousineau's intervals (Tutorials in Quantitative Methods for Psychology 1, 2005) with Morey's factor (4, 2008).
    """
    levels_S = np.mean([curve.y_SN.mean(1) for curve in found.values()], axis=0)
    factor = (len(found) / (len(found) - 1)) ** 0.5
    levelled = {}
    for label, curve in found.items():
        mean_N = curve.y_SN.mean(0)
        own_SN = curve.y_SN - mean_N - (levels_S - levels_S.mean())[:, None]
        levelled[label] = Curve(curve.label, curve.x, mean_N + factor * own_SN)
    return levelled


def _within(curve: Curve, least: float) -> Curve:
    kept = [number for number, x in enumerate(curve.x) if x >= least]
    return Curve(curve.label, [curve.x[number] for number in kept], curve.y_SN[:, kept])


def _band(mean: Sequence[float], half: Sequence[float]) -> tuple[list[float], list[float]]:
    pairs = list(zip(mean, half, strict=True))
    return [m - h for m, h in pairs], [m + h for m, h in pairs]


def main() -> None:
    arguments = parser().parse_args()
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(arguments.output, draw(read(arguments.results)))
    print(arguments.output)


if __name__ == "__main__":
    run_tool(main)
