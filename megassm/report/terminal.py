"""A live run as one frame of a terminal of any size: all subjects on one page, or one of them on the whole screen."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from megassm.report.braille import bar
from megassm.report.live import LiveRun
from megassm.report.panels import SUBJECTS, panel
from megassm.run.console import duration, tokens_of_planned

NARROW = 72
"""Columns under which panels stand below each other."""
HEAD_ROWS = 2
TALL = 32
"""Rows of panels from which on speed and health have more."""
COLOURS = {"running": "green", "finished": "green", "stalled": "bold red", "failed": "bold red"}
OVERVIEW = "overview"
PAGES = (OVERVIEW, *SUBJECTS)


def frame(run: LiveRun, width: int, height: int, page: str = OVERVIEW, keys: bool = False) -> RenderableType:
    """So many columns and rows.

    Args:
        page: of `PAGES`.
        keys: the last row says what they do.
    """
    rows = height - HEAD_ROWS - keys
    if page != OVERVIEW:
        body: RenderableType = panel(page, run, width, rows)
    elif width < NARROW:
        body = Group(*(panel(subject, run, width, own) for subject, own in _stacked(rows).items()))
    else:
        body = _overview(run, width, rows)
    return Group(_head(run, width), body, *[_keys(page, width)] * keys)


def _overview(run: LiveRun, width: int, rows: int) -> RenderableType:
    """Loss beside validation, speed beside health, events below."""
    left = width // 2
    middle = 11 if rows >= TALL else 7
    lower = max(4, (rows - middle) // 3)
    upper = max(4, rows - middle - lower)
    grid = Table.grid()
    for first, second, own in (("loss", "validation", upper), ("speed", "health", middle)):
        grid.add_row(panel(first, run, left, own), panel(second, run, width - left, own))
    return Group(grid, panel("events", run, width, lower))


def _stacked(rows: int) -> dict[str, int]:
    """Rows of each panel, one below the other; every one has a row of its own at least."""
    weights = {"loss": 7, "validation": 5, "speed": 5, "health": 5, "events": 4}
    heights = {subject: max(3, rows * weight // sum(weights.values())) for subject, weight in weights.items()}
    return heights | {"loss": max(3, rows - sum(heights.values()) + heights["loss"])}


def _keys(page: str, width: int) -> Text:
    line = Text(no_wrap=True, overflow="ellipsis")
    for number, name in enumerate(PAGES, start=1):
        line.append(f"{number} {name}", "reverse" if name == page else "").append("  ")
    return line.append("tab next  q quit", "dim")


def _head(run: LiveRun, width: int) -> RenderableType:
    newest, steps = run.history.newest, run.steps
    first = Text(no_wrap=True, overflow="ellipsis")
    first.append(str(run.run_dir), "bold").append("  ").append(_state(run), COLOURS.get(run.state, "yellow"))
    if run.read_share < 1:
        first.append(f"  reading the journal: {run.read_share:.0%}", "dim")
    for unread in run.unread:
        first.append(f"  {unread.short}", "bold yellow")
    if newest is None:
        return Group(first, Text(""))
    step = newest["step"]
    second = Text(f"step {step:,}" + (f"/{steps:,} " if steps else " "), no_wrap=True, overflow="ellipsis")
    if steps:
        second.append(bar(step / steps, max(6, width // 4)), "green on grey23")
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
