"""The charts of a run report: a line a run where runs compare, a line a K or a phase where one run is told apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from megassm.report.charts import Chart, Line, Values, budget_ticks, places, smoothed
from megassm.report.history import History, Span

FEW_SHARE = 12
"""As `SMOOTHED_SHARE`, of the updates at one K."""
LOG_FROM = 30
"""Largest over smallest value from which on a logarithmic axis says more."""
BUDGET = "budget K (spectral channels)"
BITS_LABEL, NATS_LABEL = "bits per byte", "nats a token"
TWO_SIDED = 1.96
INTERVAL = "95% interval over the validation's sequences"
BEHIND = "smallest to largest of the updates behind a point"

Histories = Mapping[str, History]
"""By the name that a run has on the page."""
Xs = dict[str, list[float]]


def quality_charts(runs: Histories, tokenizers: Mapping[str, str]) -> list[Chart]:
    """Validation over K and over the run; the training loss, in bits per byte where it is of text.

    Args:
        tokenizers: what tells each run's tokenizer from others: nats a token of several are not comparable.
    """
    chosen = []
    for unit in dict.fromkeys(history.validated for history in runs.values() if history.validations):
        validated = {name: h for name, h in runs.items() if h.validations and h.validated == unit}
        chosen += _validations(validated, unit, named=len(runs) > 1)
    chosen.append(_figure(runs, _Figure("bits_per_byte", "training, bits per byte (at the K drawn)", BITS_LABEL)))
    for name, history in runs.items():
        chosen.append(_training_by_budget(history, _of(name, runs)))
    for mark in dict.fromkeys(tokenizers[name] for name in runs):
        alike = {name: history for name, history in runs.items() if tokenizers[name] == mark}
        which = "" if len(alike) == len(runs) else f" ({', '.join(alike)})"
        chosen.append(_losses(alike, f"training loss, nats a token{which}"))
    return _drawn(chosen)


def speed_charts(runs: Histories) -> list[Chart]:
    """Throughput, utilisation, memory, and where an update's time went."""
    chosen = [
        _figure(runs, _Figure("tokens_per_s", "tokens/s", "tokens/s", from_zero=True)),
        _figure(runs, _Figure("mfu", "model FLOPs utilisation", "percent of the peak rate", 100, from_zero=True)),
    ]
    for name, history in runs.items():
        if history.phases:
            chosen.append(_phases(history, f"where an update's time goes{_of(name, runs)}"))
    if not all(history.phases for history in runs.values()):
        chosen.append(_figure(runs, _Figure("data_wait_s", "wait for data", "seconds an update", from_zero=True)))
    label = "GiB, largest of all ranks"
    chosen.append(
        _figure(runs, _Figure("peak_memory_bytes", "peak memory", label, 2**-30, smooth=True, from_zero=True))
    )
    return _drawn(chosen)


def optimiser_charts(runs: Histories) -> list[Chart]:
    return _drawn(
        [
            _figure(runs, _Figure("lr", "learning rate", "learning rate", smooth=True)),
            _figure(runs, _Figure("grad_norm", "gradient norm before clipping", "norm", may_be_log=True)),
            _figure(runs, _Figure("k", "budget K (largest of the update)", "K", from_zero=True)),
        ]
    )


def _drawn(chosen: Sequence[Chart]) -> list[Chart]:
    """Those that have a value."""
    kept = [
        chart._replace(lines=[line for line in chart.lines if any(value is not None for value in line.y)])
        for chart in chosen
    ]
    return [chart for chart in kept if chart.lines]


def _of(name: str, runs: Histories) -> str:
    return f" ({name})" if len(runs) > 1 else ""


def _xs(spans: Sequence[Span]) -> Xs:
    """Where the spans of a run end, by what a reader may choose."""
    return {
        "updates": [span.step for span in spans],
        "tokens": [span.tokens for span in spans],
        "hours": [span.seconds / 3600 for span in spans],
    }


class _Figure(NamedTuple):
    """A figure of the journal."""

    field: str
    title: str
    label: str
    scale: float = 1.0
    smooth: bool = False
    """Drawn as it is."""
    from_zero: bool = False
    may_be_log: bool = False


def _figure(runs: Histories, figure: _Figure) -> Chart:
    """A line a run."""
    lines = []
    for name, history in runs.items():
        means = [span.mean(figure.field) for span in history.spans]
        values = [None if mean is None else figure.scale * mean for mean in means]
        mean, raw = (values, ()) if figure.smooth else smoothed(values)
        lines.append(Line(name, _xs(history.spans), mean, raw=raw))
    positive = [value for line in lines for value in line.y if value is not None and value > 0]
    log_y = figure.may_be_log and bool(positive) and max(positive) > LOG_FROM * min(positive)
    return Chart(figure.title, figure.label, lines, from_zero=figure.from_zero, log_y=log_y)


def _losses(runs: Histories, title: str) -> Chart:
    lines = []
    for name, history in runs.items():
        mean, _ = smoothed([span.mean("loss") for span in history.spans])
        low, high = (
            [None if value is None else end for value, end in zip(mean, ends, strict=True)]
            for ends in ([span.low for span in history.spans], [span.high for span in history.spans])
        )
        lines.append(Line(name, _xs(history.spans), mean, low, high))
    return Chart(title, NATS_LABEL, lines, BEHIND)


def _training_by_budget(history: History, of: str) -> Chart:
    """A line for each K; of updates whose micro-steps were all at it."""
    lines, place = [], dict(zip(history.drawn, places(len(history.drawn)), strict=True))
    for k in history.drawn:
        spans = history.series(f"bits_per_byte/{k}")
        xs = _xs([span for span, _ in spans])
        lines.append(Line(f"K={k}", xs, smoothed([mean for _, mean in spans], FEW_SHARE)[0], place=place[k]))
    if len(lines) < 2:
        lines = []  # the chart of all updates shows it
    return Chart(f"training, bits per byte by the K drawn{of}", BITS_LABEL, lines)


def _validations(runs: Histories, unit: str, named: bool) -> list[Chart]:
    newest = [_over_budgets(name, history) for name, history in runs.items()]
    budgets = sorted({k for history in runs.values() for k in history.validations[-1][2]})
    title = f"newest validation over K, {unit} (lower is better)"
    chosen = [Chart(title, unit, newest, INTERVAL * any(line.low for line in newest), ticks=budget_ticks(budgets))]
    if len(runs) > 1:
        shared = sorted(set.intersection(*(set(history.validations[-1][2]) for history in runs.values())))
        for k in dict.fromkeys((*shared[-1:], *shared[:1])):
            lines = [_validated(history, k, name) for name, history in runs.items()]
            chosen.append(Chart(f"validation at K={k}, {unit}", unit, lines))
    for name, history in runs.items():
        if len(history.validations) > 1:
            budgets = sorted({k for _, _, scores in history.validations for k in scores})
            lines = [
                _validated(history, k, f"K={k}", place)
                for k, place in zip(budgets, places(len(budgets)), strict=True)
            ]  # fmt: skip
            chosen.append(Chart(f"validation by K, {unit}{f' ({name})' if named else ''}", unit, lines))
    return chosen


def _over_budgets(name: str, history: History) -> Line:
    """The newest validation, with its interval where the journal has one for each K."""
    step, _, scores = history.validations[-1]
    budgets = sorted(scores)
    line = Line(f"{name}, step {step:,}", {BUDGET: budgets}, [scores[k] for k in budgets])
    if not all(k in history.errors for k in budgets):
        return line
    low, high = ([scores[k] + ends * history.errors[k] for k in budgets] for ends in (-TWO_SIDED, TWO_SIDED))
    return line._replace(low=low, high=high)


def _validated(history: History, k: int, label: str, place: float | None = None) -> Line:
    known = [(step, tokens, scores[k]) for step, tokens, scores in history.validations if k in scores]
    xs: Xs = {
        "updates": [step for step, _, _ in known],
        "tokens": [tokens for _, tokens, _ in known],
        "hours": [history.seconds_at(step) / 3600 for step, _, _ in known],
    }
    return Line(label, xs, [score for _, _, score in known], place=place)


def _phases(history: History, title: str) -> Chart:
    """Shares of the time of an update, one above the other; a span without phases is left out."""
    spans = [span for span, _ in history.series(f"phases_s/{history.phases[0]}")]
    lines, xs = [], _xs(spans)
    for name in history.phases:
        shares: Values = [100 * (span.mean(f"phases_s/{name}") or 0.0) / (span.mean("step_s") or 1.0) for span in spans]
        lines.append(Line(name, xs, smoothed(shares)[0]))
    return Chart(title, "percent of the update", lines, kind="stack", from_zero=True)
