"""What the command lines share: the guard around `main`, the parser's shape, tables that are also JSON.

Imports nothing heavy: a mistake must be reported in under a second.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, NoReturn, TextIO

from megassm.errors import UserError, shortened, visible
from megassm.files import open_given

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

LOG_COLUMNS = 120
"""Width of tables that go to no terminal."""
LEAST_TEXT_COLUMNS = 24
"""Text up to this long is not broken either; longer text is folded, to no less."""
OTHER_RANKS_WAIT_S = 2.0
MAX_DIGITS = 12
WORDS_BYTES = 2**24
"""Of a file with words of the command line."""
MAX_BUDGET = 100_000
STOPPED = 75
"""Exit code of a job that was told to stop before its end, and has saved: "try again" (EX_TEMPFAIL)."""

SCRIPTS = {
    "tools/train_tokenizer.py": "tokenizer",
    "tools/prepare_data.py": "prepare",
    "tools/index_shards.py": "index",
    "tools/verify_data.py": "verify",
    "tools/make_task.py": "make_task",
    "tools/plan.py": "plan",
    "launch/pretrain.py": "train",
    "launch/slurm.py": "slurm",
    "tools/branch.py": "branch",
    "tools/watch.py": "watch",
    "tools/journal.py": "journal",
    "tools/inspect_data.py": "inspect",
    "tools/diagnose.py": "diagnose",
    "tools/profile_training.py": "profile",
    "tools/sweep_budgets.py": "sweep",
    "tools/evaluate_tasks.py": "tasks",
    "tools/report.py": "report",
    "tools/generate.py": "generate",
    "tools/export.py": "export",
}
"""The commands of `megassm` by the scripts that start them; messages name the scripts."""

TableRow = Mapping[str, Any]


def as_started(text: str) -> str:
    """`text` with this package's commands as this process was started: in a process started as `megassm`,
    "python tools/sweep_budgets.py" is "megassm sweep", as is the script's name alone."""
    if not Path(sys.argv[0]).name.startswith("megassm "):
        return text
    start = r"((python|deepspeed --num_gpus \d+) )?"
    return re.sub(
        rf"{start}(?P<script>{'|'.join(map(re.escape, SCRIPTS))})", lambda f: f"megassm {SCRIPTS[f['script']]}", text
    )


def is_rank_zero() -> bool:
    """Whether this process prints for the job; launchers set RANK."""
    return int(os.environ.get("RANK", "0")) == 0


def cores() -> int:
    """CPUs that this process may use: a batch system or a container may leave it few of the machine's."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux's
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def print_line(message: str, stream: TextIO | None = None) -> None:
    """Prints at once what may hold text from outside, its control characters shown (`visible`).

    A full disk or a closed terminal behind the stream does not end a job.
    """
    with contextlib.suppress(OSError):
        # with its end in one write: another thread may print between two
        print(f"{visible(as_started(message))}\n", end="", file=stream or sys.stdout, flush=True)


def refuse(message: str, code: int) -> NoReturn:
    """Prints `message` and leaves with `code`: rank 0 at once, the others after a while, with their host and rank.

    A launcher ends all ranks with the first that leaves. So where all refuse for one reason, rank 0 alone speaks, or
    one rank a machine; and where only one does, its reason is not lost.
    """
    if not is_rank_zero():
        first_here = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0"
        time.sleep(OTHER_RANKS_WAIT_S * (1 if first_here else 2))
        message = f"[rank {os.environ['RANK']} on {os.uname().nodename}] {message}"
    print(visible(as_started(shortened(message))), file=sys.stderr, flush=True)
    raise SystemExit(code)


def run_tool(main: Callable[[], None]) -> None:
    """Runs a tool's `main`: a `UserError` or an `OSError` becomes one message and exit code 1."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without UTF-8 shows '?', and nothing breaks
    python_format = warnings.formatwarning
    warnings.formatwarning = lambda message, category, filename, *rest: (
        f"warning: {message}\n" if category is UserWarning else python_format(message, category, filename, *rest)
    )
    try:
        main()
    except BrokenPipeError:
        raise SystemExit(0) from None
    except (UserError, OSError) as error:
        refuse(f"error: {error_text(error)}", 1)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def error_text(error: UserError | OSError) -> str:
    """What to tell the user; of an `OSError` the file and the system's reason."""
    if isinstance(error, OSError):
        return f"{error.filename or 'file system'}: {error.strerror or error}"
    return str(error)


class Parser(argparse.ArgumentParser):
    """A parser whose `--help` ends with a runnable example and whose errors are printed by rank 0 only."""

    def __init__(self, description: str, example: str) -> None:
        super().__init__(
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )

    def _read_args_from_files(self, arg_strings: list[str]) -> list[str]:
        """As argparse does, of files that have an end; it would read any."""
        for word in arg_strings:
            if word[:1] and word[0] in (self.fromfile_prefix_chars or ""):
                try:
                    with open_given(Path(word[1:])) as file:
                        content = file.read(WORDS_BYTES + 1)
                    content.decode()
                except OSError as error:
                    self.error(f"{word}: {error.strerror}")
                except UnicodeDecodeError as error:
                    self.error(f"{word}: not UTF-8 at byte {error.start}")
                if len(content) > WORDS_BYTES:
                    self.error(f"{word}: longer than the {WORDS_BYTES:,} bytes that are read")
        return super()._read_args_from_files(arg_strings)

    def format_help(self) -> str:
        return as_started(super().format_help())

    def error(self, message: str) -> NoReturn:
        refuse(f"{self.format_usage()}{self.prog}: {message}; --help has an example", 2)


def add_beyond(parser: argparse.ArgumentParser) -> None:
    """How texts longer than the trained length are read, where the model's own choice is not to count."""
    what = "texts longer than the trained length: by the filters' continuation, or by windows of half of it to all"
    parser.add_argument("--beyond", choices=("continue", "window"), help=f"{what} (default: model.beyond)")


def tool_parser(description: str, example: str) -> Parser:
    """The parser of a tool under tools/: every one takes `--json FILE`."""
    parser = Parser(description, example)
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the printed table there, as JSON")
    return parser


def path_argument(text: str) -> Path:
    """A path; an empty one would be the current directory, which nobody means. For argparse's `type`."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; give a path, or . for the current directory")
    return Path(text)


def output_file(text: str) -> Path:
    """A file that can be written later, an error now where it cannot; for argparse's `type`."""
    path = path_argument(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a directory; give a file's name")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r}: {folder} cannot be written to; give another place")
    return path


def image_file(text: str) -> Path:
    """`output_file` for a picture."""
    if not text.endswith((".png", ".svg", ".pdf")):
        raise argparse.ArgumentTypeError(f"{text!r}: must end in .png, .svg or .pdf")
    return output_file(text)


def add_ema(parser: Parser) -> None:
    """The option of every tool that opens a run's weights."""
    parser.add_argument("--ema", action="store_true", help="the weights' running average (optim.ema) for the weights")


def positive(text: str) -> int:
    """A whole number above 0; for argparse's `type`."""
    if not text.isdecimal() or not 0 < len(text.lstrip("0")) <= MAX_DIGITS:
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r}: must be a whole number of at least 1, of {MAX_DIGITS} digits at most"
        )
    return int(text)


def budget_list(text: str) -> list[int]:
    """Budgets K from "2,4,8", "1-32", "2-32:2" or a mixture, increasing; for argparse's `type`."""
    try:
        budgets = sorted({k for part in text.split(",") for k in _span(part)})
    except ValueError:
        way_out = "give a list such as 2,4,8, a range such as 1-32, or 2-32:2 for every second"
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of budgets; {way_out}") from None
    if not budgets or budgets[0] < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: budgets must be at least 1, and a range must not be empty")
    return budgets


def _span(part: str) -> range:
    """One number, FIRST-LAST, or FIRST-LAST:STEP."""
    ends, _, step = part.partition(":")
    first, dash, last = ends.partition("-")
    if step and not dash:
        raise ValueError(part)
    found = range(int(first), int(last if dash else first) + 1, int(step or 1))
    if found and found[-1] > MAX_BUDGET:
        raise argparse.ArgumentTypeError(f"{part[:40]!r}: a budget is at most {MAX_BUDGET:,}")
    return found


def print_table(title: str, rows: Sequence[TableRow], json_path: Path | None = None) -> None:
    """Prints rows (all with the keys of the first) as a table; writes them as JSON where asked.

    No figure is broken over lines. What is too wide becomes several tables, each with the first column; a single row
    becomes a table of names and values.
    """
    from rich.console import Console
    from rich.text import Text

    console = Console(width=None if sys.stdout.isatty() else LOG_COLUMNS)
    columns = [_column(name, [row[name] for row in rows]) for name in (rows[0] if rows else ())]
    if len(rows) == 1 and sum(column.least for column in columns) >= console.width:
        values = _Column("", [column.cells[0] for column in columns])
        tables = [[_Column("", [column.title for column in columns]), values]]
    else:
        tables = list(_fitting(columns, console.width - 1))
    for number, table in enumerate(tables):
        console.print(_drawn(Text(visible(title) if number == 0 else ""), table))
    write_json(rows, json_path)


class _Column(NamedTuple):
    """A column as text. Figures and short words are never broken, longer text may be."""

    title: str
    cells: list[str]
    numeric: bool = False

    @property
    def least(self) -> int:
        """Characters it takes at least, its border included."""
        title = max((len(word) for word in self.title.split()), default=0)
        cells = max(map(len, self.cells), default=0)
        return max(title, cells if self.numeric else min(cells, LEAST_TEXT_COLUMNS)) + 3


def _column(name: str, values: Sequence[Any]) -> _Column:
    style = _number_format([value for value in values if isinstance(value, float) and math.isfinite(value)])

    def cell(value: Any) -> str:
        if value is None:
            return "-"
        if not _is_number(value):
            return visible(str(value))
        if value == 0 and style.endswith("e"):
            return "0"
        return format(value, style if isinstance(value, float) else ",")

    numeric = all(value is None or _is_number(value) for value in values)
    return _Column(visible(name.replace("_", " ")), [cell(value) for value in values], numeric)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _number_format(values: Sequence[float]) -> str:
    """One for a column: four digits of its largest figure, two of its smallest; powers of ten where six decimals would
    not do."""
    sizes = [abs(value) for value in values if value]
    if not sizes:
        return ",.1f"
    decimals = max(3 - math.floor(math.log10(max(sizes))), 1 - math.floor(math.log10(min(sizes))), 0)
    return f",.{decimals}f" if decimals <= 6 else ".2e"


def _fitting(columns: Sequence[_Column], width: int) -> Iterator[list[_Column]]:
    """The columns in tables that are no wider, the first column in each."""
    table: list[_Column] = []
    for column in columns:
        if len(table) > 1 and sum(other.least for other in table) + column.least > width:
            yield table
            table = [columns[0]]
        table.append(column)
    yield table


def _drawn(title: Text, columns: Sequence[_Column]) -> Table:
    from rich.table import Table
    from rich.text import Text

    drawn = Table(title=title if title.plain else None, title_justify="left", show_header=any(c.title for c in columns))
    for column in columns:
        justify: Literal["left", "right"] = "right" if column.numeric else "left"
        drawn.add_column(column.title, justify=justify, overflow="fold", min_width=column.least - 3)
    for cells in zip(*(column.cells for column in columns), strict=True):
        drawn.add_row(*map(Text, cells))  # Text: brackets are no markup
    return drawn


def write_json(rows: Sequence[TableRow], path: Path | None) -> None:
    """Writes a table's rows where `--json` said, if it did."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps([dict(row) for row in rows], indent=2) + "\n", encoding="utf-8")
