"""The plots of a run report: a line a run where runs compare, a line a K or a phase where one run is told apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import matplotlib
from matplotlib.ticker import EngFormatter

from megassm.report.figures import Panel, budget_axis, legend_below
from megassm.report.history import History

SMOOTHED_FROM = 100
"""Points of a line from which on it is drawn with its running mean ..."""
SMOOTHED_SHARE = 80
"""... over this part of them to either side."""
SMOOTH = ("lr", "peak_memory_bytes")
"""Figures that are drawn as they are."""
LOG_FROM = 30
"""Largest over smallest value from which on a logarithmic axis says more."""

Histories = Mapping[str, History]
"""By the name that a run has on the page."""
Points = Sequence[tuple[float, float]]


def quality_panels(runs: Histories) -> list[Panel]:
    """Loss over steps and tokens; validation over K and over steps."""
    chosen = [
        Panel("training loss over steps (band: smallest to largest of the updates behind a point)", _loss(runs)),
        Panel("training loss over tokens", _loss_over_tokens(runs)),
    ]
    validated = {name: history for name, history in runs.items() if history.validations}
    if validated:
        chosen.append(Panel("newest validation over K (lower is better)", _over_budgets(validated)))
    for name, history in validated.items():
        if len(history.validations) > 1:
            chosen.append(Panel(f"validation over steps{_of(name, runs)}", _over_steps(history)))
    return chosen


def speed_panels(runs: Histories) -> list[Panel]:
    """Throughput, utilisation, memory, and where an update's time went."""
    chosen = [
        Panel("tokens/s", _figure(runs, "tokens_per_s", "tokens/s", bottom=0)),
        Panel("model FLOPs utilisation", _figure(runs, "mfu", "percent of the peak rate", 100, bottom=0)),
    ]
    for name, history in runs.items():
        if history.phases:
            chosen.append(Panel(f"where an update's time goes{_of(name, runs)}", _phases(history)))
    if not all(history.phases for history in runs.values()):
        chosen.append(Panel("wait for data", _figure(runs, "data_wait_s", "seconds an update", bottom=0)))
    chosen.append(
        Panel("peak memory", _figure(runs, "peak_memory_bytes", "GiB, largest of all ranks", 2**-30, bottom=0))
    )
    return chosen


def optimiser_panels(runs: Histories) -> list[Panel]:
    return [
        Panel("learning rate", _figure(runs, "lr", "learning rate")),
        Panel("gradient norm before clipping", _figure(runs, "grad_norm", "norm", log=True)),
        Panel("budget K (largest of the update)", _figure(runs, "k", "K", bottom=0)),
    ]


def _of(name: str, runs: Histories) -> str:
    return f" ({name})" if len(runs) > 1 else ""


def _figure(
    runs: Histories, field: str, label: str, scale: float = 1.0, bottom: float | None = None, log: bool = False
) -> Callable[[Any], None]:
    """A figure of the journal over steps."""

    def points(history: History) -> Points:
        return [(span.step, scale * mean) for span, mean in history.series(field)]

    plain = _lines(runs, points, "step (updates)", label, noisy=field not in SMOOTH)

    def draw(axes: Any) -> None:
        plain(axes)
        values = [value for history in runs.values() for _, value in points(history) if value > 0]
        if log and values and max(values) > LOG_FROM * min(values):
            axes.set_yscale("log")
        if bottom is not None:
            axes.set_ylim(bottom=bottom)

    return draw


def _lines(
    runs: Histories, points: Callable[[History], Points], x_label: str, label: str, noisy: bool = True
) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        for name, history in runs.items():
            _line(axes, points(history), name, noisy)
        _finish(axes, x_label, label)

    return draw


def _loss(runs: Histories) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        for name, history in runs.items():
            shown = history.series("loss")
            steps = [span.step for span, _ in shown]
            colour = _line(axes, [(span.step, mean) for span, mean in shown], name)
            low, high = ([getattr(span, end) for span, _ in shown] for end in ("low", "high"))
            axes.fill_between(steps, low, high, color=colour, alpha=0.1, linewidth=0)
        _finish(axes, "step (updates)", "loss (nats a token)")

    return draw


def _loss_over_tokens(runs: Histories) -> Callable[[Any], None]:
    def points(history: History) -> Points:
        return [(span.tokens, mean) for span, mean in history.series("loss")]

    plain = _lines(runs, points, "tokens", "loss (nats a token)")

    def draw(axes: Any) -> None:
        plain(axes)
        axes.xaxis.set_major_formatter(EngFormatter())

    return draw


def _over_budgets(runs: Histories) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        budgets: set[int] = set()
        for name, history in runs.items():
            step, _, bits = history.validations[-1]
            shown = sorted(bits.items())
            budgets |= bits.keys()
            axes.plot([k for k, _ in shown], [y for _, y in shown], marker="o", label=f"{name}, step {step:,}")
        units = sorted({history.validated for history in runs.values()})
        axes.set(xlabel="budget K (spectral channels)", ylabel=", ".join(units))
        budget_axis(axes, sorted(budgets))
        legend_below(axes)

    return draw


def _over_steps(history: History) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        budgets = sorted({k for _, _, bits in history.validations for k in bits})
        colours = matplotlib.colormaps["viridis"]
        for place, k in enumerate(budgets):
            shown = [(step, bits[k]) for step, _, bits in history.validations if k in bits]
            colour = colours(0.9 * place / max(1, len(budgets) - 1))
            axes.plot([x for x, _ in shown], [y for _, y in shown], marker=".", color=colour, label=f"K={k}")
        _finish(axes, "step (updates)", history.validated)

    return draw


def _phases(history: History) -> Callable[[Any], None]:
    """Shares of the time of an update, one above the other; a span without phases is left out."""

    def draw(axes: Any) -> None:
        spans = [span for span, _ in history.series(f"phases_s/{history.phases[0]}")]
        totals = [span.mean("step_s") or 1.0 for span in spans]
        shares = [
            [100 * (span.mean(f"phases_s/{name}") or 0.0) / total for span, total in zip(spans, totals, strict=True)]
            for name in history.phases
        ]
        bands = axes.stackplot([span.step for span in spans], shares, labels=history.phases, alpha=0.85)
        axes.set(xlabel="step (updates)", ylabel="percent of the update", ylim=(0, 100))
        axes.grid(alpha=0.3)
        axes.margins(x=0)
        place = {"loc": "upper left", "bbox_to_anchor": (0, -0.14), "frameon": False, "fontsize": "small", "ncols": 3}
        axes.legend(bands, history.phases, **place)

    return draw


def _line(axes: Any, points: Points, label: str, noisy: bool = True) -> Any:
    """Draws the points; where they are many and noisy their running mean, before faint points; returns the colour."""
    xs, ys = [x for x, _ in points], [y for _, y in points]
    if len(points) < SMOOTHED_FROM or not noisy:
        (line,) = axes.plot(xs, ys, label=label, linewidth=1.2, marker="o" if len(points) < 3 else None)
        return line.get_color()
    (faint,) = axes.plot(xs, ys, linewidth=0.6, alpha=0.25)
    reach = len(points) // SMOOTHED_SHARE
    sums = [0.0, *accumulate(ys)]
    ends = [(max(0, i - reach), min(len(ys), i + reach + 1)) for i in range(len(ys))]
    means = [(sums[last] - sums[first]) / (last - first) for first, last in ends]
    axes.plot(xs, means, label=label, linewidth=1.4, color=faint.get_color())
    return faint.get_color()


def _finish(axes: Any, x_label: str, label: str) -> None:
    axes.set(xlabel=x_label, ylabel=label)
    axes.grid(alpha=0.3)
    legend_below(axes)
