"""The curves of one or several sweeps, as charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from megassm.eval.speed import TIMED_REPEATS
from megassm.eval.swept import BudgetCurve, Sweep
from megassm.report.charts import Chart, Line, Values, budget_ticks, places

MAX_LINES = 6
"""Budgets drawn over sequence lengths, spread evenly."""
BUDGET, LENGTH = "budget K (spectral channels)", "sequence length (tokens)"

Curves = Mapping[str, BudgetCurve]
"""By what tells them apart in one chart."""


def charts(sweeps: Sequence[Sweep]) -> list[Chart]:
    """Quality over K for every text, over lengths where there are several, and speeds over K."""
    curves = [(sweep, curve) for sweep in sweeps for curve in sweep.curves]
    texts = list(dict.fromkeys(curve.data for _, curve in curves))
    result = []
    for text in texts:
        chosen = labelled([(sweep, curve) for sweep, curve in curves if curve.data == text])
        bits = next(iter(chosen.values())).bits
        lines = [_line(label, curve, "bits_per_byte", _gap_band(curve)) for label, curve in chosen.items()]
        title = f"{bits} of {text} (lower is better)"
        result.append(Chart(title, bits, lines, "95% of the gap to full K", ticks=_budgets(chosen)))
        if tasks := {label: curve for label, curve in chosen.items() if curve.is_task}:
            lines = [_line(label, curve, "accuracy", _accuracy_band(curve)) for label, curve in tasks.items()]
            title, share = f"accuracy on {text}", "share of right answers"
            result.append(Chart(title, share, lines, "95%", ticks=_budgets(tasks)))
    for sweep in sweeps:
        for text in texts:
            chosen_curves = [curve for curve in sweep.curves if curve.data == text]
            if len(chosen_curves) > 1:
                where = f" ({sweep.name})" if len(sweeps) > 1 else ""
                title = f"{chosen_curves[0].bits} of {text} over sequence length{where}"
                result.append(_over_lengths(title, chosen_curves, sweep.trained_seq_len))
    # costs do not depend on the text: the first stands for all
    chosen = labelled([(sweep, curve) for sweep, curve in curves if curve.data == sweep.curves[0].data])
    for field in ("prefill_tokens_per_s", "decode_tokens_per_s"):
        if any(is_faster_somewhere(curve, field) for curve in chosen.values()):
            title = field.removesuffix("_tokens_per_s") + " tokens/s"
            lines = [_line(label, curve, field, _speed_band(curve, field)) for label, curve in chosen.items()]
            band = f"slowest to fastest of {TIMED_REPEATS} runs"
            result.append(Chart(title, "tokens/s", lines, band, from_zero=True, ticks=_budgets(chosen)))
    return result


def labelled(curves: Sequence[tuple[Sweep, BudgetCurve]]) -> dict[str, BudgetCurve]:
    """What tells the curves of one chart apart."""
    several_runs = len({sweep.name for sweep, _ in curves}) > 1
    several_lengths = len({curve.seq_len for _, curve in curves}) > 1
    named = {}
    for sweep, curve in curves:
        parts = [sweep.name] * several_runs + [f"{curve.seq_len} tokens"] * several_lengths
        named[", ".join(parts) or sweep.name] = curve
    return named


def _line(label: str, curve: BudgetCurve, field: str, band: tuple[Values, Values] = ((), ())) -> Line:
    return Line(label, {BUDGET: [row.k for row in curve.rows]}, [getattr(row, field) for row in curve.rows], *band)


def _gap_band(curve: BudgetCurve) -> tuple[Values, Values]:
    """The interval of the gap, around the bits at full K: what all budgets find hard does not widen it."""
    full = curve.rows[-1].bits_per_byte
    gaps = [(row.gap_percent_low, row.gap_percent_high) for row in curve.rows]
    if gaps[0][0] is None:
        return (), ()
    low, high = ([None if end is None else full * (1 + end / 100) for end in ends] for ends in zip(*gaps, strict=True))
    return low, high


def is_faster_somewhere(curve: BudgetCurve, field: str) -> bool:
    """Whether a budget's speed differs from another's by more than the runs of each differ among themselves."""
    spans = [(getattr(row, f"{field}_low"), getattr(row, f"{field}_high")) for row in curve.rows]
    if any(low is None or high is None for low, high in spans):  # an older sweep, which kept its medians only
        return any(getattr(row, field) for row in curve.rows)
    return bool(max(low for low, _ in spans) > min(high for _, high in spans))


def _speed_band(curve: BudgetCurve, field: str) -> tuple[Values, Values]:
    low, high = ([getattr(row, f"{field}_{end}") for row in curve.rows] for end in ("low", "high"))
    return ((), ()) if None in low or None in high else (low, high)


def _accuracy_band(curve: BudgetCurve) -> tuple[Values, Values]:
    if curve.rows[0].accuracy_low is None:
        return (), ()
    return [row.accuracy_low for row in curve.rows], [row.accuracy_high for row in curve.rows]


def _over_lengths(title: str, curves: Sequence[BudgetCurve], trained: int) -> Chart:
    curves = sorted(curves, key=lambda curve: curve.seq_len)
    budgets = [row.k for row in curves[0].rows]
    shown = sorted({round(i * (len(budgets) - 1) / (MAX_LINES - 1)) for i in range(MAX_LINES)})
    lengths = [curve.seq_len for curve in curves]
    lines = [
        Line(f"K={budgets[row]}", {LENGTH: lengths}, [curve.rows[row].bits_per_byte for curve in curves], place=place)
        for row, place in zip(shown, places(len(shown)), strict=True)
    ]
    ticks = budget_ticks(sorted({*lengths, trained}))
    return Chart(title, curves[0].bits, lines, ticks=ticks, mark=(trained, "trained at"))


def _budgets(curves: Curves) -> list[int]:
    return budget_ticks(sorted({row.k for curve in curves.values() for row in curve.rows}))
