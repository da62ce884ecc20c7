"""The report of one or several sweeps as one HTML file."""

from __future__ import annotations

from collections.abc import Sequence

from megassm.eval.curve import CLIFF_LOSS, CLIFF_SHARE, CONFIDENCE, NEAR_FULL, RESAMPLES, RISE_TOLERANCE, describe
from megassm.eval.sweep import BudgetCurve, BudgetRow, Sweep
from megassm.report.html import Cell, definitions, document, note, number, plots, table, words
from megassm.report.sweep_plots import panels

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


def render_page(sweeps: Sequence[Sweep]) -> str:
    """The whole file."""
    title = sweeps[0].name if len(sweeps) == 1 else f"{len(sweeps)} runs over budgets"
    subtitle = "; ".join(f"{sweep.name} (trained at {sweep.trained_seq_len} tokens)" for sweep in sweeps)
    curves = [(sweep, curve) for sweep in sweeps for curve in sweep.curves]
    summary = [_summary_cells(sweep, curve) for sweep, curve in curves]
    bits = "/".join(sorted({curve.bits.rpartition(" ")[2] for _, curve in curves}, reverse=True))  # byte, or answer
    every = [_labels(sweep, curve) | _cells(row, f"bits/{bits}") for sweep, curve in curves for row in curve.rows]
    sections = {
        "Curves": table(summary, alarms=("cliff", "rise")),
        "Plots": plots(panels(sweeps)),
        "Every budget": note("Click a heading to sort.") + table(every),
        "What the figures mean": definitions(MEANINGS),
    }
    return document(title, subtitle, sections)


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
        "K": number(row.k, "d"),
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
        "decode tokens/s": number(row.decode_tokens_per_s, ",.0f"),
        "memory MiB": number(row.peak_memory_mib, ",.1f"),
    }


def _interval(low: float | None, high: float | None, style: str) -> Cell:
    return ("\u2013", None) if low is None or high is None else (f"{low:{style}} \u2026 {high:{style}}", low)
