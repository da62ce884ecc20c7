"""What asks a job to save and end: signals of a person, of SLURM, or the launcher's end. Needs no torch."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from types import FrameType

from megassm.cli.arguments import STOPPED, is_rank_zero
from megassm.run.launcher import launcher_is_gone, launcher_pids

ASKING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT)


def heeded(*numbers: signal.Signals) -> list[signal.Signals]:
    """Those that this process was not started to ignore: `nohup` ignores SIGHUP."""
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


class StopRequest:
    """SIGTERM, SIGUSR1, SIGHUP (a terminal that closes), SIGINT, or the launcher's end: save what whole updates have
    made, leave.

    One object a process: a signal is remembered when the run goes back to a checkpoint. Signals may come several times,
    from a cluster, its launcher and a script. Only a second SIGINT acts at once, and not even that where there is a
    launcher: a person's Ctrl-C then comes from the terminal and from the launcher, each time.
    """

    def __init__(self) -> None:
        self._signal: signal.Signals | None = None
        self._launcher = launcher_pids()
        self._launched = "RANK" in os.environ
        for number in heeded(*ASKING):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._signal is None and is_rank_zero():
            how = "Ctrl-\\ ends it at once, unsaved" if self._launched else "Ctrl-C again ends it at once, unsaved"
            with contextlib.suppress(OSError):  # print may be interrupted in the middle of a line by this very handler
                os.write(2, f"\nstopping: whole updates are being saved; {how}\n".encode())
        self._signal = signal.Signals(number)
        if not self._launched:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    @property
    def received(self) -> bool:
        return self._signal is not None or launcher_is_gone(self._launcher)

    def told(self, step: int) -> str:
        """That a run stops after `step` updates, and why, in words; of another rank's stop this one knows nothing."""
        if self._signal is None and launcher_is_gone(self._launcher):
            return f"stopped because its launcher ended, after step {step}"
        return f"stopped by a signal after step {step} ({self._signal.name if self._signal else 'to another rank'})"


def leave_when_told(note: Callable[[str], None] = lambda text: None) -> None:
    """Until there is a `StopRequest`, and anything to save, SIGUSR1, SIGHUP and SIGTERM end this process at once,
    after `note`."""

    def leave(number: int, frame: FrameType | None) -> None:
        note(f"stopped by {signal.Signals(number).name} in its set-up; there was nothing to save")
        os._exit(STOPPED)

    for number in heeded(signal.SIGUSR1, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, leave)
