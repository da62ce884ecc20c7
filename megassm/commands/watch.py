"""Watches a run in the terminal: loss, quality over K, throughput, health and events, until ctrl-C.

Reads the run directory only, so it works beside the run, from another machine that sees it, and after the run's end.
"""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from megassm.cli.arguments import Parser, path_argument, positive, print_line
from megassm.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from megassm.report.live import LiveRun


def parser() -> Parser:
    result = Parser(__doc__ or "", "python tools/watch.py runs/demo")
    result.add_argument("run", type=path_argument, metavar="RUN_DIR", help="run directory; it may not have begun yet")
    result.add_argument("--once", action="store_true", help="print one frame and leave: for pipes and logs")
    result.add_argument(
        "--history", action="store_true", help="print how the run was started and how it ended, and leave"
    )
    result.add_argument("--every", type=positive, default=2, metavar="SECONDS", help="between two frames (default: 2)")
    result.add_argument(
        "--width", type=positive, metavar="COLUMNS", help="of a frame (default: the terminal's, or 120)"
    )
    return result


def main() -> None:
    arguments = parser().parse_args()
    from rich.console import Console

    from megassm.report.live import LiveRun

    if (arguments.once or arguments.history) and not arguments.run.is_dir():
        raise UserError(f"{arguments.run}: no such run directory; give run.dir of a run, such as runs/demo")
    if arguments.history:
        show_history(arguments.run)
        return
    width = arguments.width or (shutil.get_terminal_size().columns if sys.stdout.isatty() else 120)
    console = Console(width=width, highlight=False)
    run = LiveRun(arguments.run).look()
    if arguments.once or not sys.stdout.isatty():
        show_once(run, console)
    else:
        follow(run, console, arguments.every, arguments.width)


def show_history(run_dir: Path) -> None:
    """Starts, shapes, ends and their causes, oldest first."""
    from megassm.report.run_files import event_text, event_time
    from megassm.run.lives import life_of

    for event in life_of(run_dir):
        step = event["step"] if isinstance(event.get("step"), int) else "?"
        print_line(
            f"{event_time(event):<19}  step {step:>8}  {event['kind']:<16}  {event_text(event)}".replace("\n", " ")
        )


def show_once(run: LiveRun, console: Console) -> None:
    from megassm.report.terminal import frame

    while run.read_share < 1:
        run.look()
    console.print(frame(run, console.width))


def follow(run: LiveRun, console: Console, every_s: int, width: int | None) -> None:
    """Draws a frame every so often, on a screen of its own; ctrl-C ends it, and leaves the last frame behind."""
    from rich.live import Live

    from megassm.report.terminal import frame

    try:
        with Live(frame(run, console.width), console=console, screen=True, auto_refresh=False) as live:
            while True:
                if run.read_share == 1:
                    time.sleep(every_s)
                if width is None:
                    console.width = shutil.get_terminal_size().columns
                live.update(frame(run.look(), console.width), refresh=True)
    except KeyboardInterrupt:
        console.print(frame(run, console.width))
