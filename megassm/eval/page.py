"""The report of one or several sweeps as one HTML file: no script, picture or font from anywhere else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from string import Template
from typing import Any

from megassm.eval.curve import CLIFF_LOSS, CLIFF_SHARE, CONFIDENCE, NEAR_FULL, RESAMPLES, RISE_TOLERANCE, describe
from megassm.eval.plots import inline_svg, panels
from megassm.eval.sweep import BudgetRow, Curve, Sweep

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --paper: #ffffff; --ink: #1a1d21; --faint: #5c6570; --line: #d5dae0; --head: #f2f4f7;
        --alarm: #a8201a; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #15181c; --ink: #e4e7eb; --faint: #9aa4b0; --line: #363c44; --head: #20252b; --alarm: #ff8a80; }
}
body { background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto;
       max-width: 76rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
p.note, figcaption, dd { color: var(--faint); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem; }
figure { margin: 0; } figure svg { width: 100%; height: auto; } figcaption { font-weight: 600; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; white-space: nowrap; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: right; }
th.text, td.text { text-align: left; }
th { background: var(--head); position: sticky; top: 0; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 2px solid currentColor; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.alarm { color: var(--alarm); font-weight: 600; }
dt { font-weight: 600; margin-top: .5rem; } dd { margin-left: 1rem; }
</style>
</head>
<body>
<h1>$title</h1>
<p class="note">$subtitle</p>
<h2>Curves</h2>
$summary
<h2>Plots</h2>
<div class="plots">
$plots
</div>
<h2>Every budget</h2>
<p class="note">Click a heading to sort.</p>
$table
<h2>What the figures mean</h2>
<dl>
$meanings
</dl>
<script>
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") !== "ascending";
    heads.forEach(other => other.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = row => { const v = row.cells[column].dataset.value; return v === "" ? NaN : +v; };
    const text = row => row.cells[column].textContent;
    const compare = head.classList.contains("text")
      ? (a, b) => text(a).localeCompare(text(b), undefined, { numeric: true })
      : (a, b) => (Number.isNaN(key(a)) - Number.isNaN(key(b))) || key(a) - key(b);
    const body = table.tBodies[0];
    [...body.rows].sort((a, b) => up ? compare(a, b) : compare(b, a)).forEach(row => body.append(row));
  }));
}
</script>
</body>
</html>
""")

MEANINGS = {
    "bits per byte": "Negative log-likelihood in bits over the UTF-8 bytes of the text; comparable between tokenizers.",
    "95%": f"The middle {CONFIDENCE:.0%} of {RESAMPLES:,} bootstrap resamples of whole sequences (seed 0).",
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

Cell = tuple[str, float | str | None]
"""What is shown, and what is sorted by: a number, None for a missing one, or text."""


def render_page(sweeps: Sequence[Sweep]) -> str:
    """The whole file."""
    title = sweeps[0].name if len(sweeps) == 1 else f"{len(sweeps)} runs over budgets"
    subtitle = "; ".join(f"{sweep.name} (trained at {sweep.trained_seq_len} tokens)" for sweep in sweeps)
    plots = [
        f"<figure><figcaption>{escape(panel.title)}</figcaption>{inline_svg(panel, number)}</figure>"
        for number, panel in enumerate(panels(sweeps))
    ]
    curves = [(sweep, curve) for sweep in sweeps for curve in sweep.curves]
    return PAGE.substitute(
        title=escape(title),
        subtitle=escape(subtitle),
        summary=_table([_summary_cells(sweep, curve) for sweep, curve in curves]),
        plots="\n".join(plots),
        table=_table([_labels(sweep, curve) | _cells(row) for sweep, curve in curves for row in curve.rows]),
        meanings="\n".join(f"<dt>{escape(term)}</dt><dd>{escape(text)}</dd>" for term, text in MEANINGS.items()),
    )


def _labels(sweep: Sweep, curve: Curve) -> dict[str, Cell]:
    return {
        "run": (sweep.run, sweep.run),
        "step": _number(sweep.step, ",d"),
        "text": (curve.data, curve.data),
        "tokens": _number(curve.seq_len, ",d"),
    }


def _summary_cells(sweep: Sweep, curve: Curve) -> dict[str, Cell]:
    shape = curve.shape
    broken = [f"cliff at {describe(step)}" for step in shape.cliffs] + [
        f"rise at {describe(step)}" for step in shape.rises
    ]
    return _labels(sweep, curve) | {
        "area": _number(shape.area, ".4f"),
        "area above full": _number(shape.area_gap_percent, ".2f", "%"),
        "full K": _number(curve.rows[-1].bits_per_byte, ".4f"),
        "near full from K": _number(shape.near_full_k, "d"),
        "best unigram": _number(curve.best_unigram_bits_per_byte, ".4f"),
        "sequences": _number(curve.sequences, ",d"),
        "findings": ("; ".join(broken), "; ".join(broken)) if broken else ("no rise, no cliff", "no rise, no cliff"),
    }


def _cells(row: BudgetRow) -> dict[str, Cell]:
    return {
        "K": _number(row.k, "d"),
        "parameters": _number(row.parameters, ",d"),
        "bits/byte": _number(row.bits_per_byte, ".4f"),
        "95%": _interval(row.bits_per_byte_low, row.bits_per_byte_high, ".4f"),
        "bits/token": _number(row.bits_per_token, ".4f"),
        "perplexity": _number(row.perplexity, ".3f"),
        "95% ": _interval(row.perplexity_low, row.perplexity_high, ".3f"),
        "gap": _number(row.gap_percent, ".2f", "%"),
        "95%  ": _interval(row.gap_percent_low, row.gap_percent_high, ".2f"),
        "MFLOP/token": _number(row.forward_flops_per_token / 1e6, ",.2f"),
        "prefill tokens/s": _number(row.prefill_tokens_per_s, ",.0f"),
        "decode tokens/s": _number(row.decode_tokens_per_s, ",.0f"),
        "memory MiB": _number(row.peak_memory_mib, ",.1f"),
    }


def _number(value: float | None, style: str, unit: str = "") -> Cell:
    return ("\u2013", None) if value is None else (f"{value:{style}}{unit}", value)


def _interval(low: float | None, high: float | None, style: str) -> Cell:
    return ("\u2013", None) if low is None or high is None else (f"{low:{style}} \u2026 {high:{style}}", low)


def _table(rows: Sequence[Mapping[str, Cell]]) -> str:
    names = list(rows[0])
    texts = {name for name in names if isinstance(rows[0][name][1], str)}
    head = "".join(
        f'<th scope="col"{_class(name in texts)}><button>{escape(name.strip())}</button></th>' for name in names
    )
    body = "\n".join("<tr>" + "".join(_td(row[name], name in texts) for name in names) + "</tr>" for row in rows)
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>'
        "</table></div>"
    )


def _td(cell: Cell, is_text: bool) -> str:
    shown, value = cell
    alarm = is_text and shown.startswith(("cliff", "rise"))
    data: Any = "" if is_text or value is None else repr(value)
    return f'<td{_class(is_text, alarm)} data-value="{data}">{escape(shown)}</td>'


def _class(is_text: bool, alarm: bool = False) -> str:
    names = " ".join(["text"] * is_text + ["alarm"] * alarm)
    return f' class="{names}"' if names else ""
