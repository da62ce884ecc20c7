"""The curves of one or several sweeps, as panels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megassm.eval.sweep import BudgetCurve, Sweep
from megassm.report.figures import Panel, budget_axis, legend_below

MAX_LINES = 6
"""Budgets drawn over sequence lengths, spread evenly."""


def panels(sweeps: Sequence[Sweep]) -> list[Panel]:
    """Quality over K for every text, over lengths where there are several, and speeds over K."""
    curves = [(sweep, curve) for sweep in sweeps for curve in sweep.curves]
    texts = list(dict.fromkeys(curve.data for _, curve in curves))
    result = []
    for text in texts:
        chosen = _labelled([(sweep, curve) for sweep, curve in curves if curve.data == text])
        bits = next(iter(chosen.values())).bits
        result.append(Panel(f"{bits} of {text} (lower is better)", _quality(chosen, bits)))
        if tasks := {label: curve for label, curve in chosen.items() if curve.is_task}:
            result.append(Panel(f"accuracy on {text}", _accuracy(tasks)))
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


def _labelled(curves: Sequence[tuple[Sweep, BudgetCurve]]) -> dict[str, BudgetCurve]:
    """What tells the curves of one panel apart."""
    several_runs = len({sweep.name for sweep, _ in curves}) > 1
    several_lengths = len({curve.seq_len for _, curve in curves}) > 1
    labelled = {}
    for sweep, curve in curves:
        parts = [sweep.name] * several_runs + [f"{curve.seq_len} tokens"] * several_lengths
        labelled[", ".join(parts) or sweep.name] = curve
    return labelled


def _quality(curves: Mapping[str, BudgetCurve], bits: str) -> Callable[[Any], None]:
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
        axes.set_ylabel(f"{bits} (band: 95% of the gap)")
        _finish(axes, curves)

    return draw


def _accuracy(curves: Mapping[str, BudgetCurve]) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        for label, curve in curves.items():
            budgets = [row.k for row in curve.rows]
            (line,) = axes.plot(budgets, [row.accuracy for row in curve.rows], marker="o", label=label)
            if curve.rows[0].accuracy_low is not None:
                ends = ([row.accuracy_low for row in curve.rows], [row.accuracy_high for row in curve.rows])
                axes.fill_between(budgets, *ends, color=line.get_color(), alpha=0.15, linewidth=0)
        axes.set_ylabel("share of right answers (band: 95%)")
        _finish(axes, curves)

    return draw


def _speed(curves: Mapping[str, BudgetCurve], field: str) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        for label, curve in curves.items():
            axes.plot(
                [row.k for row in curve.rows], [getattr(row, field) for row in curve.rows], marker="o", label=label
            )
        axes.set_ylabel(field.removesuffix("_tokens_per_s") + " tokens/s")
        axes.set_ylim(bottom=0)
        _finish(axes, curves)

    return draw


def _over_lengths(curves: Sequence[BudgetCurve], trained: int) -> Callable[[Any], None]:
    def draw(axes: Any) -> None:
        budgets = [row.k for row in curves[0].rows]
        shown = sorted({round(i * (len(budgets) - 1) / (MAX_LINES - 1)) for i in range(MAX_LINES)})
        lengths = [curve.seq_len for curve in curves]
        for place in shown:
            bits = [curve.rows[place].bits_per_byte for curve in curves]
            axes.plot(lengths, bits, marker="o", label=f"K={budgets[place]}")
        axes.axvline(trained, linestyle=":", color="#808080", label="trained at")
        axes.set(xlabel="sequence length (tokens)", ylabel="bits per byte")
        budget_axis(axes, sorted({*lengths, trained}))
        legend_below(axes)

    return draw


def _finish(axes: Any, curves: Mapping[str, BudgetCurve]) -> None:
    axes.set_xlabel("budget K (spectral channels)")
    budget_axis(axes, sorted({row.k for curve in curves.values() for row in curve.rows}))
    legend_below(axes)
