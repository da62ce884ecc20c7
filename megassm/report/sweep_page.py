"""The report of one or several sweeps as one HTML file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megassm.cli.mixtures import layers_text
from megassm.eval.curve import CLIFF_LOSS, CLIFF_SHARE, CONFIDENCE, NEAR_FULL, RESAMPLES, RISE_TOLERANCE, describe
from megassm.eval.swept import BudgetCurve, BudgetRow, Sweep
from megassm.report.html import Cell, definitions, document, findings, folded, number, plots, table, words
from megassm.report.sweep_plots import charts

MEANINGS = {
    "bits per byte": "Negative log-likelihood in bits over the UTF-8 bytes of the text; comparable between tokenizers.",
    "95%": f"The middle {CONFIDENCE:.0%} of {RESAMPLES:,} bootstrap resamples of whole sequences (seed 0).",
    "accuracy": "Of a task: the share of answers that are the likeliest of all. Its bits are of answers.",
    "gap": "Bits per byte above those of the same model at full K, in percent of them; its interval, and the plots' "
    "band, is of the difference on the same resamples, so a text that is hard at every K does not widen it.",
    "area": "Bits per byte averaged over log2 K from the smallest to the largest measured budget (trapezia): every "
    "doubling of K counts the same. Lower is better; compare only curves measured over the same range.",
    "near full from K": f"The smallest budget from which on all are within {NEAR_FULL:.0%} of full K.",
    "cliff": f"A step to the next smaller budget that takes at least {CLIFF_SHARE:.0%} of the whole gap and costs at "
    f"least {CLIFF_LOSS:.0%} of the bits per byte at full K.",
    "rise": f"A larger budget that is worse than a smaller one by more than {RISE_TOLERANCE:.1%}, in "
    "95% of the resamples.",
    "prefill, decode": "One rank alone: a micro-batch read at once; then a token of each of its sequences at a time.",
    "memory": "Weights and all that the prefill of a micro-batch keeps besides: on CUDA what the allocator held, on a "
    "CPU live tensors.",
}


Finding = tuple[str, bool]
"""A sentence, and whether it is bad news."""
MORE_OF_A_CURVE = ("area", "area above full", "sequences")
MORE_OF_A_BUDGET = ("bits/token", "perplexity", "95% ", "MFLOP/token")


def render_page(sweeps: Sequence[Sweep]) -> str:
    """The whole file."""
    title = sweeps[0].name if len(sweeps) == 1 else f"{len(sweeps)} runs over budgets"
    subtitle = "; ".join(f"{sweep.name} (trained at {sweep.trained_seq_len} tokens)" for sweep in sweeps)
    curves = [(sweep, curve) for sweep in sweeps for curve in sweep.curves]
    summary = [_summary_cells(sweep, curve) for sweep, curve in curves]
    bits = "/".join(sorted({curve.bits.rpartition(" ")[2] for _, curve in curves}, reverse=True))  # byte, or answer
    every = [_labels(sweep, curve) | _cells(row, f"bits/{bits}") for sweep, curve in curves
             for row in (*curve.rows, *curve.mixed)]  # fmt: skip
    sections = {
        "Findings": findings(_findings(curves)),
        "Curves": table(summary, alarms=("cliff", "rise"), more=MORE_OF_A_CURVE),
        "Plots": plots(charts(sweeps)),
        "Every budget": table(every, more=MORE_OF_A_BUDGET),
        "What the figures mean": folded("Units, intervals and words", definitions(MEANINGS)),
    }
    return document(title, subtitle, sections)


def _findings(curves: Sequence[tuple[Sweep, BudgetCurve]]) -> dict[str, list[Finding]]:
    """What each curve says, and which of several is best."""
    found: dict[str, list[Finding]] = {}
    for sweep, curve in curves:
        found.setdefault(f"{sweep.name} on {curve.data}, {curve.seq_len:,} tokens", []).extend(_of_curve(curve))
    return found | {"compared": [*_comparisons(curves)]}


def _of_curve(curve: BudgetCurve) -> Iterator[Finding]:
    full, small, shape = curve.rows[-1], curve.rows[0], curve.shape
    near = f"; within {NEAR_FULL:.0%} of that from K={shape.near_full_k} on" if len(curve.rows) > 1 else ""
    yield f"{_with_interval(full)} {curve.bits} at K={full.k}{near}.", False
    if len(curve.rows) > 1:
        yield _cut(small, full, curve.bits), False
    for step in shape.cliffs:
        lost = f"{step.share_of_gap:.0%} of what the whole cut loses"
        yield f"Cliff at {describe(step)}, {lost}: do not cut below K={step.next_k}.", True
    for step in shape.rises:
        yield f"More channels are worse: {describe(step)}.", True
    if full.bits_per_byte >= (known := curve.best_unigram_bits_per_byte):
        yield f"No better than a model that knows only how frequent each token is ({known:.3f}).", True


def _cut(small: BudgetRow, full: BudgetRow, bits: str) -> str:
    """What the smallest budget costs and saves."""
    sure = (
        "" if small.gap_percent_low is None else f" (95%: {small.gap_percent_low:.2f} to {small.gap_percent_high:.2f})"
    )
    saved = [f"{small.parameters / full.parameters:.0%} of the parameters"]
    saved.append(f"{small.prefill_tokens_per_s / (full.prefill_tokens_per_s or 1):.1f} times the prefill tokens/s")
    if small.decode_tokens_per_s and full.decode_tokens_per_s:
        saved.append(f"{small.decode_tokens_per_s / full.decode_tokens_per_s:.1f} times the decoded tokens/s")
    saved.append(f"{small.peak_memory_mib / (full.peak_memory_mib or 1):.0%} of the memory")
    return f"Cut to K={small.k}: {small.gap_percent:+.2f}%{sure} {bits}, with {', '.join(saved)}."


def _comparisons(curves: Sequence[tuple[Sweep, BudgetCurve]]) -> Iterator[Finding]:
    """Of each text and length that several runs were measured on: the best at full K and at the smallest."""
    for place in dict.fromkeys((curve.data, curve.seq_len) for _, curve in curves):
        alike = [(sweep.name, curve) for sweep, curve in curves if (curve.data, curve.seq_len) == place]
        for end, which in ((-1, "full"), (0, "the smallest")) if len(alike) > 1 else ():
            (name, best), (_, second) = sorted(
                ((name, curve.rows[end]) for name, curve in alike), key=lambda one: one[1].bits_per_byte
            )[:2]
            by = second.bits_per_byte - best.bits_per_byte
            overlap = None not in (best.bits_per_byte_high, second.bits_per_byte_low) and (
                (best.bits_per_byte_high or 0.0) >= (second.bits_per_byte_low or 0.0)
            )
            doubt = "; their intervals overlap" if overlap else ""
            yield (
                f"Best at {which} K on {place[0]}, {place[1]:,} tokens: {name}, by {by:.4f} {alike[0][1].bits}{doubt}.",
                False,
            )


def _with_interval(row: BudgetRow) -> str:
    interval = _interval(row.bits_per_byte_low, row.bits_per_byte_high, ".4f")[0]
    return f"{row.bits_per_byte:.4f}" + ("" if row.bits_per_byte_low is None else f" (95%: {interval})")


def _labels(sweep: Sweep, curve: BudgetCurve) -> dict[str, Cell]:
    return {
        "run": words(sweep.run),
        "step": number(sweep.step, ",d"),
        "text": words(curve.data),
        "tokens": number(curve.seq_len, ",d"),
    }


def _summary_cells(sweep: Sweep, curve: BudgetCurve) -> dict[str, Cell]:
    shape = curve.shape
    broken = [f"cliff at {describe(step)}" for step in shape.cliffs] + [
        f"rise at {describe(step)}" for step in shape.rises
    ]
    return _labels(sweep, curve) | {
        "area": number(shape.area, ".4f"),
        "area above full": number(shape.area_gap_percent, ".2f", "%"),
        "full K": number(curve.rows[-1].bits_per_byte, ".4f"),
        "near full from K": number(shape.near_full_k, "d"),
        "best unigram": number(curve.best_unigram_bits_per_byte, ".4f"),
        "sequences": number(curve.sequences, ",d"),
        "findings": words("; ".join(broken) or "no rise, no cliff"),
    }


def _cells(row: BudgetRow, bits: str) -> dict[str, Cell]:
    answers = {
        "accuracy": number(row.accuracy, ".4f"),
        "95%   ": _interval(row.accuracy_low, row.accuracy_high, ".4f"),
    }
    return {
        "K": number(row.k, "d") if row.layers is None else words(layers_text(row.layers)),
        "parameters": number(row.parameters, ",d"),
        **(answers if "answer" in bits else {}),
        bits: number(row.bits_per_byte, ".4f"),
        "95%": _interval(row.bits_per_byte_low, row.bits_per_byte_high, ".4f"),
        "bits/token": number(row.bits_per_token, ".4f"),
        "perplexity": number(row.perplexity, ".3f"),
        "95% ": _interval(row.perplexity_low, row.perplexity_high, ".3f"),
        "gap": number(row.gap_percent, ".2f", "%"),
        "95%  ": _interval(row.gap_percent_low, row.gap_percent_high, ".2f"),
        "MFLOP/token": number(row.forward_flops_per_token / 1e6, ",.2f"),
        "prefill tokens/s": number(row.prefill_tokens_per_s, ",.0f"),
        "slowest \u2026 fastest": _interval(row.prefill_tokens_per_s_low, row.prefill_tokens_per_s_high, ",.0f"),
        "decode tokens/s": number(row.decode_tokens_per_s, ",.0f"),
        "slowest \u2026 fastest ": _interval(row.decode_tokens_per_s_low, row.decode_tokens_per_s_high, ",.0f"),
        "memory MiB": number(row.peak_memory_mib, ",.1f"),
    }


def _interval(low: float | None, high: float | None, style: str) -> Cell:
    return ("\u2013", None) if low is None or high is None else (f"{low:{style}} \u2026 {high:{style}}", low)
