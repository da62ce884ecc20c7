"""Sets of a few examples, as the experiments want them."""

from __future__ import annotations

import json
import random
from pathlib import Path

from tests.conftest import run_python
from tools.experiments.arena import ARENA
from tools.experiments.lookup import LOOKUPS


def small_task(name: str, task: str, folder: Path) -> Path:
    """Of experiment `name`, made as its README says; `task` where it is a task's own."""
    wanted = LOOKUPS.get(name.removeprefix("filters_")) or ARENA.get(name)
    arguments = [task] if wanted is None else wanted.arguments.split()
    size = ["--examples", "40", "--valid-examples", "8"]
    if name == "arena_authors":
        size = []
        made = small_passages(folder)
        arguments = [word.replace("data/passages", str(made)) for word in arguments]
    run_python("tools/make_task.py", *arguments, "--output", str(folder / name), *size)
    return folder / name


def small_passages(folder: Path) -> Path:
    """Of eight authors, 5 to train on and 2 for validation each."""
    write_books(folder / "books.jsonl", authors=8)
    made = folder / "passages"
    options = ["--output", str(made), "--train", "5", "--valid", "2"]
    run_python("-m", "tools.experiments.passages", str(folder / "books.jsonl"), *options)
    return made


def write_books(path: Path, authors: int) -> None:
    """Two of each author, the second longer; every word of a book names it: a0b1 is of author 0's book 1."""
    lines = []
    for author in range(authors):
        for book, words in ((0, 1200), (1, 1500)):
            chance = random.Random(f"{author} {book}")
            text = " ".join(f"a{author}b{book}x{chance.randrange(100)}" for _ in range(words))
            lines.append(json.dumps({"id": f"Writer {author}/Book {book}.md", "text": text}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
