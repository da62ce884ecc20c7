"""dataset.md: what a data set holds and where it came from, for people. Nothing reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

from megassm.data.index import ShardSet
from megassm.data.prepare.inputs import Inputs
from megassm.data.prepare.unpack import split_packing
from megassm.data.tokenizer.base import Tokenizer

CARD_NAME = "dataset.md"
LICENCE_UNKNOWN = "Not given. It is that of the text; `--licence FILE` of tools/prepare_data.py puts it here."


@dataclass(frozen=True)
class Card:
    """What dataset.md says, the tokenizer and the licence apart."""

    name: str
    places: list[str]  # as the user gave them
    inputs: Inputs
    splits: dict[str, ShardSet]
    filtered: dict[str, int]
    options: dict[str, object]


def card_text(card: Card, tokenizer: Tokenizer, licence: str | None) -> str:
    """The whole file. It holds today's date: the one thing here that another run makes otherwise."""
    sections = (
        f"# Data set {card.name}",
        f"Written on {datetime.now(UTC):%Y-%m-%d} (UTC) by MegaSSM's tools/prepare_data.py.",
        "## Sources",
        _sources(card),
        "## What it holds",
        _splits(card),
        "## Filters",
        _bullets({f"documents {name}": f"{count:,}" for name, count in card.filtered.items()}),
        "## Options",
        _bullets(card.options),
        "## Tokenizer",
        _bullets({"name": tokenizer.name, "vocabulary": f"{tokenizer.vocab_size:,}", "sha256": tokenizer.sha256}),
        "## Licence",
        (licence or LICENCE_UNKNOWN).strip(),
    )
    return "\n\n".join(sections) + "\n"


def _sources(card: Card) -> str:
    paths = [file.path for file in card.inputs.files]
    suffixes = Counter("".join(path.suffixes[-2 if split_packing(path.name)[1] else -1 :]) for path in paths)
    formats = ", ".join(f"{count:,} {suffix or 'without suffix'}" for suffix, count in sorted(suffixes.items()))
    size = f"Files: {formats}; {card.inputs.size:,} bytes on disk."
    notes = [f"\n{line[0].upper()}{line[1:]}." for line in card.inputs.summary()]
    return "\n".join([*(f"* `{place}`" for place in card.places), "", size, *notes])


def _splits(card: Card) -> str:
    rows = ["| split | documents | tokens | UTF-8 bytes of text | shards | fingerprint (sha256 of index.json) |",
            "|---|---|---|---|---|---|"]  # fmt: skip
    for split, shards in card.splits.items():
        counts = (shards.documents, shards.tokens, shards.text_bytes, len(shards.shards))
        rows.append(f"| {split} | {' | '.join(f'{count:,}' for count in counts)} | `{shards.fingerprint}` |")
    return "\n".join(rows)


def _bullets(entries: Mapping[str, object]) -> str:
    return "\n".join(f"* {name}: {value}" for name, value in entries.items())
