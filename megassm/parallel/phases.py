"""Where an update's time goes on one rank: data, forward, backward, update, and waiting for other ranks.

The loop notes them with its places for the watchdog (`megassm.parallel.watchdog.RankProgress`). What a phase spends in
a collective is taken out of it and counted as communication: so a slow rank's own phases are long, and those of the
ranks that only wait for it are not.

On CUDA the host's clock is read and nothing is synchronised: forward and backward are then the times of launching, and
the device's time shows in update, which reads the gradient norm.
"""

from __future__ import annotations

import time
from enum import StrEnum
from typing import Any

from torch._C._distributed_c10d import Work


class StepPhase(StrEnum):
    """A part of an update."""

    DATA = "data"
    FORWARD = "forward"
    BACKWARD = "backward"
    UPDATE = "update"
    COMMUNICATION = "communication"


COMPUTE = (StepPhase.DATA, StepPhase.FORWARD, StepPhase.BACKWARD, StepPhase.UPDATE)
"""What a rank does itself."""


class Waits:
    """Seconds that this process has spent in collectives."""

    seconds = 0.0
    counting = False


def count_waits() -> None:
    """Has every wait for a collective counted, DeepSpeed's too: all of torch's end in `Work.wait`."""
    if Waits.counting:
        return
    Waits.counting = True
    whole = Work.wait

    def wait(self: Work, *arguments: Any, **keywords: Any) -> Any:
        started = time.monotonic()
        try:
            return whole(self, *arguments, **keywords)
        finally:
            Waits.seconds += time.monotonic() - started

    Work.wait = wait  # type: ignore[method-assign]


class PhaseClock:
    """Sums of one update's seconds by phase."""

    def __init__(self) -> None:
        self.restart(time.monotonic())

    def restart(self, now: float) -> None:
        """Begins an update."""
        self._spent = dict.fromkeys(StepPhase, 0.0)
        self._counted_to, self._waited = now, Waits.seconds

    def count(self, phase: StepPhase | None, now: float) -> None:
        """What has passed since the last count was spent in `phase`; None: beside the update."""
        seconds, waited = now - self._counted_to, Waits.seconds - self._waited
        self._counted_to, self._waited = now, Waits.seconds
        if phase is not None:
            self._spent[phase] += max(0.0, seconds - waited)
            self._spent[StepPhase.COMMUNICATION] += waited

    def spent(self) -> dict[StepPhase, float]:
        return dict(self._spent)
