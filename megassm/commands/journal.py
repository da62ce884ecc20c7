"""Writes a run's journal as CSV: a line an update, a column a figure, such as valid/bits_per_byte_k8.

What metrics.jsonl has by K, source or phase becomes a column each; a list becomes its numbers with spaces between.
Where a figure was not measured its cell is empty.
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from megassm.cli.arguments import Parser, output_file, path_argument
from megassm.errors import UserError

if TYPE_CHECKING:
    from megassm.run.lines import Unread


def parser() -> Parser:
    result = Parser(__doc__ or "", "python tools/journal.py runs/mine --csv mine.csv")
    result.add_argument("run", type=path_argument, metavar="RUN_DIR", help="run directory; it may be training")
    result.add_argument("--csv", type=output_file, metavar="FILE", help="(default: standard output)")
    return result


def main() -> None:
    arguments = parser().parse_args()
    from megassm.run.directory import METRICS

    journal = arguments.run / METRICS
    if not journal.is_file():
        raise UserError(f"{journal}: not there; give the run.dir of a run that has trained, such as runs/demo")
    if arguments.csv is None:
        write(journal, sys.stdout)
        return
    arguments.csv.parent.mkdir(parents=True, exist_ok=True)
    with arguments.csv.open("w", encoding="utf-8", newline="") as file:
        lines = write(journal, file)
    print(f"{arguments.csv}: {lines:,} updates")


def write(journal: Path, file: IO[str]) -> int:
    """Writes all records that are there now; returns how many. Read twice, for any of them may bring a column.

    Lines that are not whole are told once, on stderr.
    """
    from megassm.run.lines import Unread

    columns: dict[str, None] = {}
    count = 0
    for row in _rows(journal):
        columns |= dict.fromkeys(row)
        count += 1
    table = csv.DictWriter(file, list(columns), extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    for row, _ in zip(_rows(journal, Unread(journal)), range(count), strict=False):
        table.writerow(row)
    return count


def _rows(journal: Path, unread: Unread | None = None) -> Iterator[dict[str, Any]]:
    from megassm.run.records import iterate_records
    from megassm.run.tracker import flat

    for record in iterate_records(journal, unread):
        lists = {name: " ".join(map(str, value)) for name, value in record.items() if isinstance(value, list)}
        yield flat(record) | lists
