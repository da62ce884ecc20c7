"""Tasks of Long Range Arena (arXiv 2011.04006) at a size that a CPU can train: what do they say of K?

The value of a nested expression (ListOps, shorter), two dots and the paths between them (Pathfinder, drawn at 16 x 16),
the author of a passage of a book that was not trained on (instead of Text's film reviews, byte by byte too).
"""

from __future__ import annotations

from typing import NamedTuple

from megassm.config.schema import Config
from megassm.cost import parameters
from tools.experiments.arms import Arm
from tools.experiments.family import paper_layer, transformer


class ArenaTask(NamedTuple):
    """A set of labelled examples."""

    question: str
    arguments: str
    """Of tools/make_task.py, for its data."""
    vocabulary: int
    classes: int
    length: int


ARENA = {
    "arena_listops": ArenaTask(
        "Is the value of a nested expression of 20 to 125 tokens found, over K?",
        "listops --min-length 20 --max-length 125",
        vocabulary=28,
        classes=10,
        length=128,
    ),
    "arena_paths": ArenaTask(
        "Is it seen in an image of 16 x 16, pixel by pixel, whether two dots are joined, over K?",
        "paths --length 259",
        vocabulary=8,
        classes=2,
        length=259,
    ),
    "arena_authors": ArenaTask(
        "Is the author of 253 bytes of a book known, of eight, over K?",
        "text --input data/passages/train.jsonl --valid-input data/passages/valid.jsonl --length 256",
        vocabulary=267,
        classes=8,
        length=256,
    ),
}


def arena_settings(name: str) -> tuple[str, ...]:
    """Of the configuration, for one of `ARENA`."""
    task = ARENA[name]
    return (
        f"data.path=data/{name}", f"model.vocab_size={task.vocabulary}", f"model.classes={task.classes}",
        f"model.seq_len={task.length}", "train.batch_sequences=32", "eval.sequences=2000",
    )  # fmt: skip


def arena_arms(config: Config) -> list[Arm]:
    """Models of equal parameters at full K; the static one is cut afterwards, as the elastic one is."""
    size = parameters(config.model, config.model.num_channels)
    paper = paper_layer(config, size)
    return [
        Arm("elastic"),
        Arm("static", ("budget.strategy=fixed",)),
        Arm("elastic, the paper's preset", ("preset=paper", *paper.overrides)),
        transformer(config, "transformer", size),
    ]
