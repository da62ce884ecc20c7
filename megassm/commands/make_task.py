"""Makes the data set of a task with labels: drawn (recall, listops and others), or from your files."""

from __future__ import annotations

import argparse
import re
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
    "recall": {"pairs": 8, "queries": 4, "keys": 64, "values": 16, "gap": 0, "haystack": 0} | COUNTS,
    "tracking": {"chains": 4, "hops": (0, 3), "queries": 4, "keys": 64, "values": 16, "haystack": 0} | COUNTS,
    "frequent": {"words": 16, "shown": (16, 64)} | COUNTS,
    "high_frequency": {"signals": 1, "noise": 1.0, "levels": 16, "periods": "2-8"} | COUNTS,
    "listops": {"min_length": 500, "max_length": 2000, "max_args": 10, "max_depth": 10}
    | {"examples": 96_000, "valid_examples": 2_000},
    "paths": {"size": 16, "dashes": 5, "distractors": 2} | COUNTS,
    "text": FILES,
    "image": FILES,
    "pathfinder": FILES,
}
"""The options of each task, with their defaults."""
SIZES = ("pairs", "gap", "haystack", "chains", "hops", "shown")
"""Options that may be the least and the most of what is drawn for each example."""
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
    from megassm.data.tasks.paths import Paths
    from megassm.data.tasks.synthetic import Frequent, HighFrequency, Recall, Tracking, drawn

    counts = [options.pop(name) for name in COUNTS]
    made: Recall | Tracking | Frequent | HighFrequency | Paths | ListOps
    match arguments.task:
        case "recall":
            made = Recall(**options)
        case "tracking":
            made = Tracking(**options)
        case "frequent":
            made = Frequent(**options)
        case "high_frequency":
            options["first"], options["last"] = _periods(options.pop("periods"))
            made = HighFrequency(**options)
        case "paths":
            made = Paths(**options)
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
    known = set(COUNTS)
    for task in (name for name, options in OPTIONS.items() if options is not FILES):
        group = parser.add_argument_group(task)
        for name, value in OPTIONS[task].items():
            if name not in known:
                group.add_argument(_flag(name), **_argument(name, value))
                known.add(name)  # tasks that have an option of one name have it once, with one default
    return parser


def _argument(name: str, value: Any) -> dict[str, Any]:
    if name not in SIZES:
        kind: Any = positive if isinstance(value, int) else type(value)
        return {"type": kind, "metavar": "N", "help": f"(default: {value})"}
    shown = value if isinstance(value, int) else f"{value[0]}-{value[1]}"
    what = f"a number, or the least and the most of it (default: {shown})"
    return {"type": _size, "metavar": "N[-N]", "help": what}


def _size(text: str) -> int | tuple[int, int]:
    found = re.fullmatch(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", text)
    if not found:
        raise argparse.ArgumentTypeError(f"{text[:60]!r}: give a number, or the least and the most, such as 4-16")
    return int(found[1]) if found[2] is None else (int(found[1]), int(found[2]))


def _fraction(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text}: must be between 0 and 1")
    return value
