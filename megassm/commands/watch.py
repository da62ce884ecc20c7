"""Watches a run in the terminal: loss, quality over K, throughput, health and events, until q or ctrl-C.

Reads the run directory only, so it works beside the run, from another machine that sees it, and after the run's end.
A frame fits the terminal, from 80 x 24 up. Keys: 1 to 6, tab and arrows change the page, q leaves.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from megassm.cli.arguments import Parser, path_argument, positive, print_line
from megassm.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

    from megassm.report.live import LiveRun

PAGES = ("overview", "loss", "validation", "speed", "health", "events")
NUMBERS = "123456"
QUIT = "q"
KEYS = {"\t": 1, "\x1b[C": 1, "\x1b[B": 1, "\x1b[Z": -1, "\x1b[D": -1, "\x1b[A": -1}
"""What tab, backtab and the arrows send, and how many pages further they lead."""
PIPE_COLUMNS, PIPE_ROWS = 120, 40


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
    result.add_argument("--height", type=positive, metavar="ROWS", help="of a frame (default: the terminal's, or 40)")
    result.add_argument("--page", choices=PAGES, default=PAGES[0], help="shown first; keys 1 to 6 change it")
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
    console = Console(highlight=False)
    resize(console, arguments)
    run = LiveRun(arguments.run).look()
    if arguments.once or not sys.stdout.isatty():
        show_once(run, console, arguments.page)
    else:
        follow(run, console, arguments)


def resize(console: Console, arguments: argparse.Namespace) -> None:
    """Gives a frame the size that was asked for, or the terminal's."""
    columns, rows = shutil.get_terminal_size() if sys.stdout.isatty() else (PIPE_COLUMNS, PIPE_ROWS)
    console.width, console.height = arguments.width or columns, arguments.height or rows


def show_history(run_dir: Path) -> None:
    """Starts, shapes, ends and their causes, oldest first."""
    from megassm.report.run_files import event_text, event_time
    from megassm.run.lives import life_of

    for event in life_of(run_dir):
        step = event["step"] if isinstance(event.get("step"), int) else "?"
        print_line(
            f"{event_time(event):<19}  step {step:>8}  {event['kind']:<16}  {event_text(event)}".replace("\n", " ")
        )


def show_once(run: LiveRun, console: Console, page: str) -> None:
    from megassm.report.terminal import frame

    while run.read_share < 1:
        run.look()
    rows = console.height - sys.stdout.isatty()  # the prompt comes below
    console.print(frame(run, console.width, rows, page))


def follow(run: LiveRun, console: Console, arguments: argparse.Namespace) -> None:
    """Draws a frame every so often, on a screen of its own; q or ctrl-C ends it, and leaves the last frame behind."""
    from rich.live import Live

    from megassm.report.terminal import frame

    page: str = arguments.page

    def view() -> RenderableType:
        return frame(run, console.width, console.height, page, keys=True)

    with (
        contextlib.suppress(KeyboardInterrupt),
        pressed_keys() as wait_for_key,
        Live(view(), console=console, screen=True, auto_refresh=False) as live,
    ):
        key = ""
        while key != QUIT:
            key = wait_for_key(arguments.every if run.read_share == 1 else 0)
            page = next_page(page, key)
            resize(console, arguments)
            if not key:
                run.look()
            live.update(view(), refresh=True)
    console.print(frame(run, console.width, console.height - 1, page))


def next_page(page: str, key: str) -> str:
    """The page that a key leads to: its number, tab or an arrow; any other key changes nothing."""
    if key in NUMBERS:
        return PAGES[NUMBERS.index(key)]
    return PAGES[(PAGES.index(page) + KEYS.get(key, 0)) % len(PAGES)]


@contextlib.contextmanager
def pressed_keys() -> Iterator[Callable[[float], str]]:
    """A function that waits so many seconds at most for a key, and gives what it sends, or nothing."""

    def wait(seconds: float) -> str:
        time.sleep(seconds)
        return ""

    if not sys.stdin.isatty():
        yield wait
        return
    import select
    import termios
    import tty

    keyboard = sys.stdin.fileno()

    def key_within(seconds: float) -> str:
        if not select.select([keyboard], [], [], seconds)[0]:
            return ""
        return os.read(keyboard, 16).decode(errors="replace") or QUIT  # nothing to read: the terminal is gone

    before = termios.tcgetattr(keyboard)
    tty.setcbreak(keyboard)
    try:
        yield key_within
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
