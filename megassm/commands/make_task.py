"""Makes the data set of a task with labels: drawn (recall, high_frequency, listops), or from your files."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from megassm.cli.arguments import path_argument, positive, print_table, tool_parser
from megassm.cli.progress import shown_progress
from megassm.errors import UserError

if TYPE_CHECKING:
    from megassm.data.task import Example, Task

    Splits = dict[str, Iterable[Example]]

EXAMPLE = """python tools/make_task.py recall --output data/recall --pairs 16 --queries 8
  python tools/make_task.py text --input reviews/train --valid-input reviews/test --output data/reviews"""
COUNTS: dict[str, Any] = {"examples": 20_000, "valid_examples": 2_000}
FILES: dict[str, Any] = {"input": None, "valid_input": None, "valid_fraction": 0.1, "labels": None}
OPTIONS: dict[str, dict[str, Any]] = {
    "recall": {"pairs": 8, "queries": 4, "keys": 64, "values": 16} | COUNTS,
    "high_frequency": {"signals": 1, "noise": 1.0, "levels": 16, "periods": "2-8"} | COUNTS,
    "listops": {"min_length": 500, "max_length": 2000, "max_args": 10, "max_depth": 10}
    | {"examples": 96_000, "valid_examples": 2_000},
    "text": FILES,
    "image": FILES,
    "pathfinder": FILES,
}
"""The options of each task, with their defaults."""
COMMON = ("task", "output", "json", "seed", "length")


def main() -> None:
    """Writes the set, then prints what it holds."""
    arguments = _parser().parse_args()
    from megassm.data.tasks.write import write_task

    options = _chosen(arguments)
    made = _from_files if OPTIONS[arguments.task] is FILES else _drawn
    task, splits = made(arguments, options)
    with shown_progress() as progress, progress.busy("write"):
        written = write_task(arguments.output, task, splits)
    rows = [
        {"split": split, "examples": shards.documents, "tokens": shards.tokens, "shards": len(shards.shards)}
        for split, shards in written.items()
    ]
    print_table(f"{arguments.output}: {task.name}", rows, arguments.json)
    vocabulary = task.first_symbol + len(task.symbols)
    classes = f" model.classes={len(task.answers)} (or null)" if task.asked == 1 else ""
    print(f"train it with model.vocab_size={vocabulary} model.seq_len={task.length}{classes}")


def _drawn(arguments: argparse.Namespace, options: dict[str, Any]) -> tuple[Task, Splits]:
    from megassm.data.dataset import TRAIN, VALID
    from megassm.data.tasks.listops import ListOps
    from megassm.data.tasks.synthetic import HighFrequency, Recall, drawn

    counts = [options.pop(name) for name in COUNTS]
    made: Recall | HighFrequency | ListOps
    match arguments.task:
        case "recall":
            made = Recall(**options)
        case "high_frequency":
            options["first"], options["last"] = _periods(options.pop("periods"))
            made = HighFrequency(**options)
        case _:
            made = ListOps(**options)
    task = made.task(arguments.length)
    draw, seed = made.draw(task), arguments.seed
    return task, {split: drawn(draw, counts[number], seed, number) for number, split in enumerate((TRAIN, VALID))}


def _from_files(arguments: argparse.Namespace, options: dict[str, Any]) -> tuple[Task, Splits]:
    from megassm.data.tasks.from_files import Labelled, labelled_task

    if not options["input"]:
        raise UserError(f"--input: {arguments.task} is made of your own labelled files; name them")
    labels = options["labels"].split(",") if options["labels"] else None
    places = options["input"], options["valid_input"]
    source = Labelled(arguments.task, *places, valid_fraction=options["valid_fraction"], labels=labels)
    return labelled_task(source, arguments.length, arguments.seed)


def _chosen(arguments: argparse.Namespace) -> dict[str, Any]:
    """The task's options, as given or by default. UserError where one was given that it has not."""
    known = OPTIONS[arguments.task]
    given = {name: value for name, value in vars(arguments).items() if value is not None and name not in COMMON}
    if others := sorted(given.keys() - known.keys()):
        rule = f"not an option of {arguments.task}, which has {', '.join(map(_flag, known))}"
        raise UserError(f"{', '.join(map(_flag, others))}: {rule}")
    return known | given


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _periods(text: str) -> tuple[int, int]:
    first, _, last = text.partition("-")
    if not (first.isdecimal() and last.isdecimal()):
        raise UserError(f"--periods {text}: give the first and the last, such as 2-8")
    return int(first), int(last)


def _parser() -> argparse.ArgumentParser:
    from megassm.data.tasks import from_files as labelled

    parser = tool_parser("Makes the data set of a task with labels; configs/tasks/ has a configuration each.", EXAMPLE)
    add, default = parser.add_argument, "(default: %(default)s)"
    add("task", choices=list(OPTIONS), metavar="TASK", help=", ".join(OPTIONS))
    add("--output", type=path_argument, required=True, metavar="DIR", help="holds train/, valid/, task.json afterwards")
    add("--length", type=positive, metavar="N", help="ids an example, model.seq_len (default: as suits the task)")
    add("--seed", type=int, default=0, metavar="N", help=f"of what is drawn, and of the order of files {default}")
    files = parser.add_argument_group("text, image, pathfinder", str(labelled.__doc__).partition("\n\n")[2])
    files.add_argument("--input", type=path_argument, nargs="+", metavar="PATH", help="files or folders as above")
    files.add_argument("--valid-input", type=path_argument, nargs="+", metavar="PATH", help="the same, for validation")
    files.add_argument("--valid-fraction", type=_fraction, metavar="F", help="... or so much of --input (default: 0.1)")
    files.add_argument("--labels", metavar="A,B,..", help="the classes, in order; others are left out")
    for name, value in COUNTS.items():
        add(_flag(name), type=positive, metavar="N", help=f"drawn tasks (default: {value}; listops: "
            f"{OPTIONS['listops'][name]})")  # fmt: skip
    for task in ("recall", "high_frequency", "listops"):
        group = parser.add_argument_group(task)
        for name, value in OPTIONS[task].items():
            if name not in COUNTS:
                kind: Any = positive if isinstance(value, int) else type(value)
                group.add_argument(_flag(name), type=kind, metavar="N", help=f"(default: {value})")
    return parser


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be between 0 and 1")
    return value
