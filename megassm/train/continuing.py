"""What is not as it was where a run continues: said, and kept among its events."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from megassm.config.changes import Change, changes
from megassm.config.schema import Config
from megassm.optim import learning_rate
from megassm.run.events import Events

RISE = 1.001
"""A learning rate that is so many times what the schedule gave before rises."""


class Changed(NamedTuple):
    """The differences between the configuration that a checkpoint was trained with and the one that continues."""

    differences: list[Change]
    last_rate: float
    """Of the last update that is done."""
    expected_rate: float
    """Of the next update, had nothing changed; beyond the end of a schedule its last."""
    next_rate: float

    @property
    def rises(self) -> bool:
        return self.next_rate > RISE * max(self.last_rate, self.expected_rate)

    @property
    def text(self) -> str:
        parts = [str(change) for change in self.differences]
        if self.next_rate != self.expected_rate:
            parts.append(f"learning rate {self.last_rate:.3g} -> {self.next_rate:.3g}")
        return "; ".join(parts)


def changed(before: Config, now: Config, step: int) -> Changed:
    """What differs where a run of `before` goes on as `now` after `step` updates, at least 1."""
    # another name of the folder that the run is in, such as ./runs/a for runs/a, is no difference
    same_place = Path(before.run.dir).absolute() == Path(now.run.dir).absolute()
    found = [change for change in changes(before, now) if change.knob != "run.dir" or not same_place]
    return Changed(
        found,
        learning_rate(before.optim, before.train, step - 1),
        learning_rate(before.optim, before.train, step),
        learning_rate(now.optim, now.train, step),
    )


def tell_changes(before: Config, now: Config, step: int, events: Events) -> None:
    """One line and one event with every difference, and a warning where the learning rate rises."""
    what = changed(before, now, step)
    if not what.differences:
        return
    figures = {change.knob: [change.before, change.now] for change in what.differences}
    rates = [what.last_rate, what.next_rate]
    events.add("change", step, f"since step {step}: {what.text}", knobs=figures, learning_rate=rates)
    if what.rises:
        events.add(
            "rising rate",
            step,
            f"the learning rate rises from {what.last_rate:.3g} to {what.next_rate:.3g} in one update: the loss may "
            "jump, and what a decay has gained is undone. Lower optim.lr, or go on from before the decay: "
            f"python tools/branch.py {now.run.dir} --at STEP --to NEW (docs/resuming.md)",
            learning_rate=rates,
        )
