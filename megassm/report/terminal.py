"""A live run as one frame of a terminal: loss, quality over K, speed, health, events."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from megassm.errors import visible
from megassm.report.braille import bar, curve, sparkline
from megassm.report.live import LiveRun
from megassm.report.run_files import event_text, event_time
from megassm.run.console import duration, tokens_of_planned
from megassm.run.records import Record

NARROW = 90
"""Columns under which panels stand below each other."""
PLOT_ROWS = 9
LOWER_ROWS = 8
EVENTS_SHOWN = 6
COLOURS = {"running": "green", "finished": "green", "stalled": "bold red", "failed": "bold red"}
PHASE_COLOURS = ("cyan", "blue", "magenta", "yellow", "red", "white")


def frame(run: LiveRun, width: int) -> RenderableType:
    """The whole view, `width` columns wide."""
    if run.history.newest is None:
        waiting = Text("no update yet" + (f": {run.failure}" if run.failure else ""), style="dim")
        return Group(_head(run, width), Panel(waiting, title="loss", title_align="left"), _events(run))
    if width < NARROW:
        panels = (draw(run, width) for draw in (_loss, _budgets, _speed, _health))
        return Group(_head(run, width), *panels, _events(run))
    left = width * 3 // 5
    grid = Table.grid(expand=True)
    grid.add_column(width=left)
    grid.add_column(width=width - left)
    grid.add_row(_loss(run, left), _budgets(run, width - left))
    grid.add_row(_speed(run, left), _health(run, width - left))
    return Group(_head(run, width), grid, _events(run))


def _head(run: LiveRun, width: int) -> RenderableType:
    newest, steps = run.history.newest, run.steps
    first = Text.assemble((str(run.run_dir), "bold"), "  ", (_state(run), COLOURS.get(run.state, "yellow")))
    if run.read_share < 1:
        first.append(f"  reading the journal: {run.read_share:.0%}", "dim")
    if newest is None:
        return first
    step = newest["step"]
    second = Text(f"step {step:,}" + (f"/{steps:,} " if steps else " "))
    if steps:
        second.append(bar(step / steps, max(10, width // 4)), "green on grey23")
        second.append(f" {step / steps:.0%}")
    if newest.get("tokens"):
        second.append(f"  {tokens_of_planned(newest, steps or step)}")
    if run.state in ("running", "stalled") and run.left_s is not None:
        second.append(f"  eta {duration(run.left_s)}")
    return Group(first, second)


def _state(run: LiveRun) -> str:
    age = "" if run.age_s is None else duration(run.age_s)
    match run.state:
        case "stalled":
            return f"stalled for {age}: no record since then"
        case "failed":
            return f"failed: {run.failure}"
        case "starting":
            return f"starting, for {age}"
        case "finished" | "not started":
            return run.state
        case "running":
            return f"running, last record {age} ago"


def _loss(run: LiveRun, width: int) -> Panel:
    points = [(span.step, mean) for span, mean in run.history.series("loss")]
    if not points:
        return _panel("loss", Text("no finite loss yet", style="bold red"))
    plot_width = width - 14
    low, high = min(y for _, y in points), max(y for _, y in points)
    body = Text()
    for place, line in enumerate(curve(points, plot_width, PLOT_ROWS)):
        label = f"{high:.3f}" if place == 0 else f"{low:.3f}" if place == PLOT_ROWS - 1 else ""
        body.append(f"{label:>8} ", "dim").append(f"{line}\n", "cyan")
    ends = f"{points[0][0]:,}", f"{points[-1][0]:,}"
    body.append(" " * 9 + ends[0] + ends[1].rjust(plot_width - len(ends[0])), "dim")
    newest = run.history.newest or {}
    return _panel(
        f"loss {_figure(run.history.now('loss'), '.4f')}  {_bits(run)}(update: K {newest.get('k', '?')})",
        body,
    )


def _bits(run: LiveRun) -> str:
    bits = run.history.now("bits_per_byte")  # a task has none
    return "" if bits is None else f"{bits:.3f} bits/byte  "


def _budgets(run: LiveRun, width: int) -> Panel:
    """What was validated last, over K; bars are the distance from the best, and the change since last."""
    if not run.history.validations:
        return _panel("validation over K", Text("none yet", style="dim"), PLOT_ROWS + 3)
    step, _, bits = run.history.validations[-1]
    before = run.history.validations[-2][2] if len(run.history.validations) > 1 else {}
    low, high = min(bits.values()), max(bits.values())
    table = Table.grid(padding=(0, 1))
    for justify in ("right", "right", "left", "right"):
        table.add_column(justify=justify)
    for k, value in sorted(bits.items())[-PLOT_ROWS - 1 :]:
        share = 1.0 if high == low else 0.15 + 0.85 * (value - low) / (high - low)
        change = f"{value - before[k]:+.3f}" if k in before else ""
        style = "green" if change.startswith("-") else "red"
        table.add_row(f"K={k}", f"{value:.3f}", Text(bar(share, max(5, width - 27)), "cyan"), Text(change, style))
    return _panel(f"validation, {run.history.validated} over K, step {step:,}", table, PLOT_ROWS + 3)


def _speed(run: LiveRun, width: int) -> Panel:
    history, spark = run.history, max(10, width - 34)
    peak = run.environment.get("peak_flops_per_rank")
    of = f" of {peak / 1e12:,.4g} TFLOP/s a rank" if isinstance(peak, int | float) else ""
    table = Table.grid(padding=(0, 1))
    rates = [mean for _, mean in history.series("tokens_per_s")]
    table.add_row("tokens/s", _figure(history.now("tokens_per_s"), ",.0f"), Text(sparkline(rates, spark), "cyan"))
    table.add_row("MFU", _figure(history.now("mfu"), ".1%"), Text(of.strip(), "dim"))
    table.add_row(
        "update", _figure(history.now("step_s"), ".3g", " s"), Text(f"of {len(history.recent)} newest, median", "dim")
    )
    memory = history.newest.get("peak_memory_bytes") if history.newest else None
    table.add_row("memory", _figure(memory and memory / 2**30, ".2f", " GiB"), Text("largest of all ranks", "dim"))
    shares = history.phase_shares(history.recent)
    if not shares:
        wait, update = history.now("data_wait_s"), history.now("step_s")
        shares = {"data wait": wait / update} if wait is not None and update else {}
        return _panel("speed", Group(table, _phase_line(shares)), LOWER_ROWS)
    stacked = Text()
    for (_, share), colour in zip(shares.items(), PHASE_COLOURS * 2, strict=False):
        stacked.append("█" * round(share * (width - 6)), colour)
    return _panel("speed", Group(table, stacked, _phase_line(shares)), LOWER_ROWS)


def _phase_line(shares: dict[str, float]) -> Text:
    line = Text()
    for (name, share), colour in zip(shares.items(), PHASE_COLOURS * 2, strict=False):
        line.append(f"{name} {share:.0%}  ", colour)
    return line


def _health(run: LiveRun, width: int) -> Panel:
    history, newest = run.history, run.history.newest or {}
    table = Table.grid(padding=(0, 1))
    norms = [mean for _, mean in history.series("grad_norm")]
    table.add_row("grad norm", _figure(history.now("grad_norm"), ".3g"), Text(sparkline(norms, width - 26), "cyan"))
    table.add_row("lr", _figure(newest.get("lr"), ".2e"))
    table.add_row("skipped", Text(f"{history.skipped:,}", "bold red" if history.skipped else "green"),
                  Text(f"of {history.records:,} updates", "dim"))  # fmt: skip
    table.add_row("data", *_data_counters(history.recent))
    budgets = [record["k"] for record in history.recent if isinstance(record.get("k"), int)]
    table.add_row("K", str(newest.get("k", "?")), Text(sparkline(budgets, width - 26), "dim"))
    return _panel("health", table, LOWER_ROWS)


def _data_counters(records: Sequence[Record]) -> tuple[str, Text]:
    names = {"data_reconnects": "reconnects", "data_refetches": "refetches", "data_masked_samples": "masked"}
    found = {what: total for name, what in names.items() if (total := sum(record.get(name) or 0 for record in records))}
    if not found:
        return "ok", Text("no reconnects", "dim")
    return "uneven", Text(", ".join(f"{total:,} {what}" for what, total in found.items()), "yellow")


def _events(run: LiveRun) -> Panel:
    if not run.events:
        return _panel("events", Text("none", style="dim"))
    table = Table.grid(padding=(0, 1), expand=True)
    for _ in range(3):
        table.add_column(no_wrap=True)
    table.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    for event in list(run.events)[-EVENTS_SHOWN:]:
        step = f"step {event['step']:,}" if isinstance(event.get("step"), int) else ""
        kind = Text(visible(str(event.get("kind", "event"))), "yellow")
        table.add_row(Text(event_time(event), "dim"), step, kind, Text(event_text(event).replace("\n", " ")))
    return _panel(f"events ({len(run.events)})", table)


def _panel(title: str, body: RenderableType, height: int | None = None) -> Panel:
    return Panel(body, height=height, title=Text(title), title_align="left", border_style="grey50")


def _figure(value: float | None, style: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{style}}{unit}"
