"""What a live run shows, subject by subject, each in a box of any size: labelled figures, and what has room."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, pairwise
from typing import NamedTuple

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from megassm.errors import visible
from megassm.report.braille import bar, curve, sparkline
from megassm.report.history import BITS
from megassm.report.live import LiveRun
from megassm.report.run_files import event_text, event_time
from megassm.run.lines import Record

PHASE_COLOURS = ("cyan", "blue", "magenta", "yellow", "red", "white")
WORST_BAR = 0.15
"""Of the longest bar, the best budget's."""
LABEL = 10
"""Columns of a figure's name."""
WIDE = 100
"""Columns from which on an event's day is shown."""


class Box(NamedTuple):
    """Room inside a panel."""

    width: int
    height: int


def panel(subject: str, run: LiveRun, width: int, height: int) -> Panel:
    """A subject of `SUBJECTS` in so many columns and rows, its border included."""
    box = Box(width - 4, height - 2)
    title, body = SUBJECTS[subject](run, box)
    return Panel(body, height=height, width=width, title=Text(title), title_align="left", border_style="grey50")


def loss(run: LiveRun, box: Box) -> tuple[str, RenderableType]:
    """The newest loss, and its curve since the first update."""
    title = f"loss, median of newest {len(run.history.recent)}"
    points = [(span.step, mean) for span, mean in run.history.series("loss")]
    if not points:
        return title, Text(_nothing(run), style="bold red" if run.history.records else "dim")
    newest, now = run.history.newest or {}, run.history.now
    bits = "" if now("bits_per_byte") is None else f"  {now('bits_per_byte'):.3f} bits/byte"  # a task has none
    figures = f"{_figure(now('loss'), '.4f')} nats/token{bits}  K {newest.get('k', '?')} drawn last"
    return title, Group(_line(figures), *_plot(points, box.width, box.height - 1, "cyan"))


def validation(run: LiveRun, box: Box) -> tuple[str, RenderableType]:
    """What was validated last, over K: the longer a bar the better; and the change since the time before."""
    if not run.history.validations:
        return "validation", Text("none yet", style="dim")
    step, _, scores = run.history.validations[-1]
    before = run.history.validations[-2][2] if len(run.history.validations) > 1 else {}
    unit = "bits/byte" if run.history.validated == BITS else "nats/answer"
    low, high = min(scores.values()), max(scores.values())
    shown = _spread(sorted(scores), max(1, box.height - 1))
    room = max(4, box.width - 26)
    rows = [_line(f"{'K':>4} {unit:>11}{' better →':<{room + 1}}{'change':>8}", "dim")]
    for k in shown:
        worse = 0.0 if high == low else (scores[k] - low) / (high - low)
        change = f"{scores[k] - before[k]:+.3f}" if k in before else ""
        length = bar(1 - (1 - WORST_BAR) * worse, room)
        row = Text(f"{k:>4} {scores[k]:>11.3f} ", no_wrap=True).append(length, "cyan")
        rows.append(row.append(f"{change:>8}", "green" if change.startswith("-") else "red"))
    full = max(scores)
    points = [(at, of[full]) for at, _, of in run.history.validations if full in of]
    below = box.height - len(rows) - 1
    if below >= 4 and len(points) > 1:
        rows += [_line(f"at K={full} since the first:", "dim"), *_plot(points, box.width, below, "cyan")]
    return f"validation, step {step:,}", Group(*rows)


def speed(run: LiveRun, box: Box) -> tuple[str, RenderableType]:
    """Throughput, utilisation, memory, and where the time of an update goes."""
    history, newest = run.history, run.history.newest or {}
    rates = [mean for _, mean in history.series("tokens_per_s")]
    peak = run.environment.get("peak_flops_per_rank")
    of = f" of {peak / 1e12:,.3g} TFLOP/s a rank" if isinstance(peak, int | float) else ""
    memory = newest.get("peak_memory_bytes")
    update = f"{_figure(history.now('step_s'), '.3g')} s"
    rows: list[RenderableType] = [_spark("tokens/s", _figure(history.now("tokens_per_s"), ",.0f"), rates, box.width)]
    mfu = history.now("mfu")  # of a CPU there is none
    utilisation = [] if mfu is None else [_pair("MFU", f"{mfu:.1%}{of}")]
    gibs = _pair("memory", f"{_figure(memory and memory / 2**30, '.2f')} GiB, largest of all ranks")
    if box.height >= 7:
        rows += [*utilisation, _pair("update", update), gibs]
    else:
        gib = _figure(memory and memory / 2**30, ".2f")
        rows.append(_line(f"{'' if mfu is None else f'MFU {mfu:.1%}  '}update {update}  {gib} GiB"))
    shares = history.phase_shares(history.recent)
    if not shares:
        wait, whole = history.now("data_wait_s"), history.now("step_s")
        shares = {"data wait": wait / whole} if wait is not None and whole else {}
    return f"speed, medians of newest {len(history.recent)}", Group(*rows, *_phases(shares, box, len(rows)))


def health(run: LiveRun, box: Box) -> tuple[str, RenderableType]:
    """What warns early: gradients, skipped updates, the data's connections; and the drawn K."""
    history, newest = run.history, run.history.newest or {}
    norms = [mean for _, mean in history.series("grad_norm")]
    rates = [mean for _, mean in history.series("lr")]
    budgets = [record["k"] for record in history.recent if isinstance(record.get("k"), int)]
    skipped = _pair("skipped", f"{history.skipped:,} of {history.records:,} updates")
    skipped.stylize("bold red" if history.skipped else "green", LABEL)
    counters, style = _data_counters(history.recent)
    data = _pair("data", counters)
    data.stylize(style, LABEL)
    rows = [
        _spark("grad norm", _figure(history.now("grad_norm"), ".3g"), norms, box.width),
        skipped,
        data,
        _spark("lr", _figure(newest.get("lr"), ".2e"), rates, box.width),
        _spark("K drawn", str(newest.get("k", "?")), budgets, box.width),
    ]
    below = box.height - len(rows) - 1
    points = [(span.step, mean) for span, mean in history.series("grad_norm")]
    if below >= 4 and points:
        rows += [_line("gradient norm before clipping:", "dim"), *_plot(points, box.width, below, "cyan")]
    return "health", Group(*rows)


def events(run: LiveRun, box: Box) -> tuple[str, RenderableType]:
    """The newest, as many as there is room for."""
    if not run.events:
        return "events", Text("none", style="dim")
    table = Table.grid(padding=(0, 1), expand=True)
    for _ in range(3):
        table.add_column(no_wrap=True)
    table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    for event in list(run.events)[-box.height :]:
        step = f"step {event['step']:,}" if isinstance(event.get("step"), int) else ""
        kind = Text(visible(str(event.get("kind", "event"))), "yellow")
        time = event_time(event) if box.width >= WIDE else event_time(event)[-8:]
        table.add_row(Text(time, "dim"), step, kind, Text(event_text(event).replace("\n", " ")))
    return f"events, newest of {len(run.events)}", table


SUBJECTS: Mapping[str, Callable[[LiveRun, Box], tuple[str, RenderableType]]] = {
    "loss": loss,
    "validation": validation,
    "speed": speed,
    "health": health,
    "events": events,
}


def _nothing(run: LiveRun) -> str:
    if run.history.records:
        return "no finite loss yet"
    return "no update yet" + (f": {run.failure}" if run.failure else "")


def _plot(points: Sequence[tuple[float, float]], width: int, rows: int, colour: str) -> list[Text]:
    """A curve with the ends of its axes: values to the left, updates below."""
    if rows < 2:
        return []
    labels = 9
    plot_width = max(4, width - labels)
    low, high = min(y for _, y in points), max(y for _, y in points)
    lines = []
    for place, line in enumerate(curve(_joined(points, 2 * plot_width), plot_width, rows - 1)):
        label = f"{high:.4g}" if place == 0 else f"{low:.4g}" if place == rows - 2 else ""
        lines.append(Text(f"{label:>{labels - 1}} ", "dim", no_wrap=True).append(line, colour))
    first, last = f"update {points[0][0]:,}", f"{points[-1][0]:,}"
    lines.append(_line(" " * labels + first + last.rjust(max(0, plot_width - len(first))), "dim"))
    return lines


def _joined(points: Sequence[tuple[float, float]], columns: int) -> list[tuple[float, float]]:
    """Few points with straight lines between them, a value for each column of dots."""
    joined = [points[0]]
    for (x, y), (next_x, next_y) in pairwise(points):
        between = int(columns * (next_x - x) / max(1e-9, points[-1][0] - points[0][0]))
        joined += [(x + (next_x - x) * i / between, y + (next_y - y) * i / between) for i in range(1, between)]
        joined.append((next_x, next_y))
    return joined


def _phases(shares: dict[str, float], box: Box, above: int) -> list[Text]:
    """A bar a phase where there is room for that; else one bar of all, and their names."""
    styles = dict(zip(shares, cycle(PHASE_COLOURS), strict=False))
    if box.height - above >= len(shares):
        room = max(4, box.width - 22)
        return [Text(f"{name:<14} {share:>5.0%} ", no_wrap=True).append(bar(share, room), styles[name])
                for name, share in shares.items()]  # fmt: skip
    stacked, names = Text(no_wrap=True), Text()
    for name, share in shares.items():
        stacked.append("█" * round(share * box.width), styles[name])
        names.append(f"{name} {share:.0%} ", styles[name])
    return [stacked, names]


def _data_counters(records: Sequence[Record]) -> tuple[str, str]:
    names = {"data_reconnects": "reconnects", "data_refetches": "refetches", "data_masked_samples": "masked"}
    found = {what: total for name, what in names.items() if (total := sum(record.get(name) or 0 for record in records))}
    if not found:
        return "ok, no reconnects", "green"
    return ", ".join(f"{total:,} {what}" for what, total in found.items()), "yellow"


def _spread(values: Sequence[int], count: int) -> list[int]:
    """At most so many of them, the first and the last among these."""
    if len(values) <= count:
        return list(values)
    return sorted({values[-1 - round(place * (len(values) - 1) / max(1, count - 1))] for place in range(count)})


def _spark(label: str, value: str, values: Sequence[float], width: int) -> Text:
    """A figure and its newest course."""
    line = _pair(label, f"{value:<9} ")
    return line.append(sparkline(values, max(0, width - len(line.plain))), "cyan")


def _pair(label: str, value: str) -> Text:
    return Text(f"{label:<{LABEL}}", "dim", no_wrap=True, overflow="ellipsis").append(value, "default not dim")


def _line(text: str, style: str = "") -> Text:
    return Text(text, style, no_wrap=True, overflow="ellipsis")


def _figure(value: float | None, style: str) -> str:
    return "-" if value is None else f"{value:{style}}"
