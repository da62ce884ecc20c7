"""Which rank is slower than the others, and in which phase. Pure: times in, names out.

Compared is what each rank does itself, without its waits for others (`megassm.parallel.phases`), by medians over the
last `WINDOW` updates. A rank is a straggler in a phase if it takes `FACTOR` times what the median of the others takes,
by more than chance (`SPREADS` median absolute deviations of the others) and by a share of the update that is worth a
person's time (`SHARE`). A slow link is not seen: all ranks wait equally long for it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megassm.parallel.phases import COMPUTE

WINDOW = 20
FACTOR = 1.5
SPREADS = 6.0
SHARE = 0.1


class Straggler(NamedTuple):
    """A rank's seconds in a phase, and the median of the other ranks'; medians over updates."""

    rank: int
    s: float
    median_s: float


class Stragglers:
    """Looks at the last updates of all ranks."""

    def __init__(self, readers: int) -> None:
        """One rank in `readers` reads data; the others get it from that one."""
        self._readers = readers
        self._seconds: deque[npt.NDArray[np.float64]] = deque(maxlen=WINDOW)

    def add(self, seconds_RP: Sequence[Sequence[float]]) -> dict[str, Straggler]:
        """The slowest straggler of each phase that has one, after an update with these seconds by rank and phase."""
        self._seconds.append(np.array(seconds_RP))
        if len(self._seconds) < WINDOW:
            return {}
        typical_RP = np.median(np.stack(self._seconds), axis=0)
        update_s = float(np.median(typical_RP.sum(axis=1)))
        found: dict[str, Straggler] = {}
        for column, phase in enumerate(COMPUTE):
            step = self._readers if phase == "data" else 1
            slowest = _slowest(typical_RP[::step, column], update_s)
            if slowest is not None:
                found[phase] = slowest._replace(rank=slowest.rank * step)
        return found


def _slowest(seconds_R: npt.NDArray[np.float64], update_s: float) -> Straggler | None:
    if len(seconds_R) < 2:
        return None
    rank = int(seconds_R.argmax())
    others_R = np.delete(seconds_R, rank)
    median, mine = float(np.median(others_R)), float(seconds_R[rank])
    spread = 1.4826 * float(np.median(np.abs(others_R - median)))
    excess = mine - median
    slow = mine > FACTOR * median and excess > SPREADS * spread and excess > SHARE * update_s
    return Straggler(rank, mine, median) if slow else None
