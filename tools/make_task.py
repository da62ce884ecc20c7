"""Makes the data set of a task with labels: drawn (recall, high_frequency, listops), or from your files."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from megassm.cli import path_argument, positive, print_table, run_tool, tool_parser
from megassm.errors import UserError

if TYPE_CHECKING:
    from megassm.data.task import Example, Task

EXAMPLE = "python tools/make_task.py recall --output data/recall --pairs 16 --queries 8"
DRAWN: dict[str, dict[str, Any]] = {
    "recall": {"pairs": 8, "queries": 4, "keys": 64, "values": 16},
    "high_frequency": {"signals": 1, "noise": 1.0, "levels": 16, "periods": "2-8"},
}
"""The options of each task that is drawn, with their defaults."""
COUNTS = {"examples": 20_000, "valid_examples": 2_000}


def main() -> None:
    """Writes the set, then prints what it holds."""
    arguments = _parser().parse_args()
    from megassm.data.taskset import write_task

    task, splits = drawn_task(arguments)
    written = write_task(arguments.output, task, splits)
    rows = [
        {"split": split, "examples": shards.documents, "tokens": shards.tokens, "shards": len(shards.shards)}
        for split, shards in written.items()
    ]
    print_table(f"{arguments.output}: {task.name}", rows, arguments.json)
    vocabulary = task.first_symbol + len(task.symbols)
    classes = f" model.classes={len(task.answers)} (or null)" if task.asked == 1 else ""
    print(f"train it with model.vocab_size={vocabulary} model.seq_len={task.length}{classes}")


def drawn_task(arguments: argparse.Namespace) -> tuple[Task, dict[str, Iterable[Example]]]:
    """(the task, its splits' examples)."""
    from megassm.data.dataset import TRAIN, VALID
    from megassm.data.synthetic import HighFrequency, Recall, drawn

    options = chosen(arguments, DRAWN[arguments.task] | COUNTS)
    counts = [options.pop(name) for name in COUNTS]
    if "periods" in options:
        options["first"], options["last"] = _periods(options.pop("periods"))
    made = Recall(**options) if arguments.task == "recall" else HighFrequency(**options)
    task = made.task(arguments.length)
    draw, seed = made.draw(task), arguments.seed
    return task, {split: drawn(draw, counts[number], seed, number) for number, split in enumerate((TRAIN, VALID))}


def chosen(arguments: argparse.Namespace, known: dict[str, Any]) -> dict[str, Any]:
    """The options of a task, as given or by default.

    Raises:
        UserError: one was given that the task has not.
    """
    given = {name: value for name, value in vars(arguments).items() if value is not None and name not in COMMON}
    if others := sorted(given.keys() - known.keys()):
        flags = ", ".join("--" + name.replace("_", "-") for name in others)
        ours = ", ".join("--" + name.replace("_", "-") for name in known)
        raise UserError(f"{flags}: not an option of {arguments.task}, which has {ours}")
    return known | given


COMMON = ("task", "output", "json", "seed", "length")


def _periods(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    if not (first.isdecimal() and last.isdecimal()):
        raise UserError(f"--periods {text}: give the first and the last, such as 2-8")
    return int(first), int(last)


def _parser() -> argparse.ArgumentParser:
    parser = tool_parser("Makes the data set of a task with labels; configs/tasks/ has a configuration each.", EXAMPLE)
    add = parser.add_argument
    add("task", choices=list(DRAWN), metavar="TASK", help=", ".join(DRAWN))
    add("--output", type=path_argument, required=True, metavar="DIR", help="holds train/, valid/, task.json afterwards")
    add("--length", type=positive, metavar="N", help="ids an example, model.seq_len (default: as suits the task)")
    add("--seed", type=int, default=0, metavar="N", help="of what is drawn (default: %(default)s)")
    drawn = parser.add_argument_group("drawn tasks")
    for name, value in COUNTS.items():
        drawn.add_argument("--" + name.replace("_", "-"), type=positive, metavar="N", help=f"(default: {value})")
    for task, options in DRAWN.items():
        group = parser.add_argument_group(task)
        for name, value in options.items():
            kind: Any = positive if isinstance(value, int) else type(value)
            group.add_argument("--" + name.replace("_", "-"), type=kind, help=f"(default: {value})")
    return parser


if __name__ == "__main__":
    run_tool(main)
