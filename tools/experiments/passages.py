"""Passages of books with their authors as labels, for the experiment `arena_authors`: train.jsonl and valid.jsonl.

The books are lines of {"id": "Author/Title", "text": ..}. Of each author one book is kept for validation: who wrote is
to be known by the writing, not by the names in a book that was trained on.
"""

from __future__ import annotations

import gzip
import json
import random
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

from megassm.cli.arguments import Parser, path_argument, positive, print_table, run_tool
from megassm.errors import UserError
from megassm.files import write_atomically

WIDTH = 253
"""Characters of a passage: the bytes that an example of 256 ids has room for."""
EDGE = 2_000
"""Characters at both ends of a book that are left out: titles, contents, licences name authors."""
NAMELESS = ("Anonymous", "Various", "Unknown")

Books = dict[str, dict[str, str]]
"""Texts by author and title."""


def parser() -> Parser:
    result = Parser(__doc__ or "", "python -m tools.experiments.passages books.jsonl.gz --output data/passages")
    add = result.add_argument
    add("books", type=path_argument, metavar="FILE", help=".jsonl or .jsonl.gz")
    add("--output", type=path_argument, required=True, metavar="DIR", help="holds train.jsonl, valid.jsonl afterwards")
    add("--authors", type=positive, default=8, metavar="N", help="those with the most text (default: 8)")
    add("--train", type=positive, default=4_000, metavar="N", help="passages an author (default: 4000)")
    add("--valid", type=positive, default=250, metavar="N", help="passages an author (default: 250)")
    add("--seed", type=int, default=0, metavar="N", help="of their places (default: 0)")
    return result


def main() -> None:
    arguments = parser().parse_args()
    counts = {"train": arguments.train, "valid": arguments.valid}
    splits = split_up(read_books(arguments.books), arguments.authors, counts["valid"])
    arguments.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for split, count in counts.items():
        found = passages(splits[split], count, f"{arguments.seed} {split}")
        lines = [json.dumps({"text": text, "label": author}) + "\n" for author, text in found]
        write_atomically(arguments.output / f"{split}.jsonl", "".join(lines).encode())
        rows += [{"split": split, "author": author, "books": len(titles), "passages": count}
                 for author, titles in splits[split].items()]  # fmt: skip
    print_table(f"{arguments.output}", rows)


def read_books(path: Path) -> Books:
    """By author and title. UserError where a line is something else."""
    books: Books = defaultdict(dict)
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                author, title = row["id"].split("/")
                books[author][title] = row["text"]
            except (ValueError, TypeError, KeyError, AttributeError):
                raise UserError(f'{path}:{number}: a line is {{"id": "Author/Title", "text": ".."}}') from None
    return books


def split_up(books: Books, authors: int, held: int) -> dict[str, Books]:
    """Of the authors with the most text, their shortest book of `held` passages or more for validation, and the others.

    Raises:
        UserError: fewer authors have two such books.
    """
    size = {author: sum(map(len, titles.values())) for author, titles in books.items()}
    train: Books = {}
    valid: Books = {}
    for author in sorted(size, key=lambda name: (-size[name], name)):
        titles = books[author]
        long = sorted((len(text), title) for title, text in titles.items() if len(text) >= room(held))
        if len(long) > 1 and author not in NAMELESS and len(train) < authors:
            _, kept = long[0]
            valid[author] = {kept: titles[kept]}
            train[author] = {title: text for title, text in titles.items() if title != kept}
    if len(train) < authors:
        raise UserError(f"--authors {authors}: {len(train)} have two books of {room(held):,} characters or more")
    return {"train": train, "valid": valid}


def room(count: int) -> int:
    """Characters of a book that has so many passages apart from each other."""
    return 2 * EDGE + count * WIDTH


def passages(books: Books, count: int, seed: str) -> Iterable[tuple[str, str]]:
    """(author, text): of each author so many, a book as often as it is long, none overlapping another as far as there
    is room."""
    for author, titles in books.items():
        chance = random.Random(f"{seed} {author}")
        places = [
            (title, start)
            for title in sorted(titles)
            for start in range(EDGE, len(titles[title]) - EDGE - WIDTH + 1, WIDTH)
        ]
        chosen = chance.sample(places, count) if count <= len(places) else chance.choices(places, k=count)
        for title, start in chosen:
            yield author, titles[title][start : start + WIDTH]


if __name__ == "__main__":
    run_tool(main)
