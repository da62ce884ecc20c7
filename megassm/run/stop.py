"""What asks a job to save and end: signals of a person, of SLURM, or the launcher's end. Needs no torch."""

from __future__ import annotations

import os
import signal
from types import FrameType

from megassm.cli.arguments import STOPPED
from megassm.run.launcher import launcher_is_gone, launcher_pids


class StopRequest:
    """SIGTERM, SIGUSR1, SIGINT, or the launcher's end: save what whole updates have made, leave.

    One object a process: a signal is remembered when the run goes back to a checkpoint. Signals may come several times,
    from a cluster, its launcher and a script; only a second SIGINT acts at once.
    """

    def __init__(self) -> None:
        self._signalled = False
        self._launcher = launcher_pids()
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    @property
    def received(self) -> bool:
        return self._signalled or launcher_is_gone(self._launcher)


def leave_when_told() -> None:
    """Until there is a `StopRequest`, and anything to save, SIGUSR1 and SIGTERM end this process at once."""
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, lambda *_: os._exit(STOPPED))
