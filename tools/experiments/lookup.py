"""Looking up what was seen: associative recall over sizes and gaps, a needle in a haystack, chains, frequent words.

A model is trained on examples of all sizes at once, and tested on fresh ones of each size.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from megassm.config.schema import Config
from megassm.cost import parameters
from megassm.data.stream import MicroBatch
from megassm.data.task import Task, answer_mask
from megassm.data.tasks.synthetic import Frequent, Recall, Tracking, drawn
from megassm.eval.score import Score, score
from megassm.eval.session import open_session
from megassm.model import losses_at
from tools.experiments.arms import Arm, width_of_size
from tools.experiments.family import fixed, hybrid, overridden, paper_layer, transformer
from tools.experiments.measure import Point

EXAMPLES = 256
"""Of each size."""
ROWS = 64
FULL_FIRST = 0.7
"""Share of a training that an arm spends at K_max before any budget is drawn: a lookup is learnt late, and at once."""
SEED, SPLIT = 1, 2
"""Neither a training's nor a validation's."""

Made = Recall | Tracking | Frequent


class Cell(NamedTuple):
    """One size: a curve and a place on it."""

    series: str
    x: float
    made: Made


class Lookup(NamedTuple):
    """A task, and the sizes that it is tested at."""

    made: Made
    arguments: str
    """Of tools/make_task.py, for this task's data."""
    by: str
    """What x is, in words."""
    cells: tuple[Cell, ...]


_MANY = Recall((4, 16), gap=(0, 32))
_NEEDLES = Recall((1, 4), queries=1, haystack=(0, 96))
_CHAINS = Tracking(haystack=(0, 24))
_WORDS = Frequent(shown=(16, 96))
LOOKUPS = {
    "recall": Lookup(
        _MANY,
        "recall --pairs 4-16 --gap 0-32",
        "ids between what is shown and what is asked",
        tuple(
            Cell(f"{pairs} pairs", gap, replace(_MANY, pairs=pairs, gap=gap))
            for pairs in (4, 8, 16)
            for gap in (1, 8, 32)
        ),
    ),
    "needle": Lookup(
        _NEEDLES,
        "recall --pairs 1-4 --queries 1 --haystack 0-96",
        "ids of the haystack",
        tuple(
            Cell(f"{pairs} needle{'s' * (pairs > 1)}", ids, replace(_NEEDLES, pairs=pairs, haystack=ids))
            for pairs in (1, 4)
            for ids in (6, 24, 96)
        ),
    ),
    "tracking": Lookup(
        _CHAINS,
        "tracking --haystack 0-24",
        "variables of a chain",
        tuple(Cell("", hops + 1, replace(_CHAINS, hops=hops)) for hops in range(4)),
    ),
    "frequent": Lookup(
        _WORDS,
        "frequent --shown 16-96",
        "words shown",
        tuple(Cell("", shown, replace(_WORDS, shown=shown)) for shown in (16, 48, 96)),
    ),
}


def lookup_settings(name: str) -> tuple[str, ...]:
    """Of the configuration, for one of `LOOKUPS`."""
    return (f"data.path=data/{name}-sizes", f"model.seq_len={LOOKUPS[name].made.task(None).length}")


def lookup_arms(config: Config) -> list[Arm]:
    """Models of equal parameters at full K."""
    k = config.model.num_channels
    size = parameters(config.model, k)
    elastic = hybrid(config, size)
    alone = elastic.more(*overridden(**fixed(k)), name="hybrid (SA), K_max only")
    late = f"budget.full_steps={round(FULL_FIRST * config.train.steps)}"
    first = elastic.more(late, name="elastic hybrid (SA), K_max first")
    taps = transformer(config, "transformer with taps", size, input_taps=config.model.input_taps)
    width = width_of_size(config.model.model_copy(update={"selective": True}), size)
    fading = overridden(model__selective="true", model__d_ffn=width)
    return [
        Arm("elastic"),
        Arm("K_max only", overridden(**fixed(k))),
        Arm("elastic, selective", fading),
        Arm("K_max only, selective", (*fading, *overridden(**fixed(k)))),
        elastic,
        first,
        alone,
        transformer(config, "transformer", size),
        taps,
        paper_layer(config, size),
    ]


def lookup_points(run_dir: Path, name: str) -> list[Point]:
    """Accuracy over K, all sizes together, and of each size at the largest K."""
    session = open_session(run_dir, None, "auto")
    task, model = session.task, session.model.eval()
    assert task is not None, "the configuration's data are a task's"

    def losses(ids_BT: Tensor, k: int) -> Tensor:
        return losses_at(model, ids_BT, k, session.document_end, hits=True)

    lookup, budgets = LOOKUPS[name], session.config.eval_budgets()
    scores: dict[int, list[Score]] = {k: [] for k in budgets}
    for cell in lookup.cells:
        batches = examples(cell.made, task)
        for k in budgets:
            scores[k].append(score(losses, batches, k, session.token_bytes, session.device))
    largest = scores[max(budgets)]
    return [
        *(Point("accuracy", "", k, Score.total(found).accuracy) for k, found in scores.items()),
        *(
            Point(f"accuracy at the largest K; over: {lookup.by}", cell.series, cell.x, found.accuracy)
            for cell, found in zip(lookup.cells, largest, strict=True)
        ),
    ]


def examples(made: Made, task: Task, count: int = EXAMPLES) -> list[MicroBatch]:
    """Fresh ones of a size, in the ids and the length of the set that the model was trained on."""
    draw, after = made.draw(task), [len(task.answers) + 2, task.pad]  # the end, and where a next example would begin
    rows = [np.append(task.ids(example), after) for example in drawn(draw, count, SEED, SPLIT)]
    batches = []
    for first in range(0, count, ROWS):
        ids_BT = np.stack(rows[first : first + ROWS])
        samples_B = np.arange(first, first + len(ids_BT))
        batches.append(MicroBatch(ids_BT, answer_mask(ids_BT, len(task.answers)), samples_B))
    return batches
