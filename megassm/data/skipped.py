"""Batches that a run passes over: where its loss jumped, it went back to a checkpoint and on with what came after.

What is left out follows from the step alone, like all of the order: a resumed run reads what it would have read, at any
number of ranks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class LeftOut(NamedTuple):
    """One time that a run went back."""

    step: int
    """Updates done where it went on."""
    batches: int
    """Global batches that are passed over there."""


def batch_of(left_out: Sequence[LeftOut], step: int) -> int:
    """The batch, by its place in the order from 0, of update `step` (from 0)."""
    return step + sum(entry.batches for entry in left_out if entry.step <= step)


def step_of(left_out: Sequence[LeftOut], batch: int) -> int | None:
    """The update (from 0) that reads a batch; None for one that is passed over."""
    shift = 0
    for entry in sorted(left_out):
        if batch < entry.step + shift:
            break
        if batch < entry.step + shift + entry.batches:
            return None
        shift += entry.batches
    return batch - shift
