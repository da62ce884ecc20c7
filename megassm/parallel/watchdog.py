"""Ends a job in which a rank hangs or has died: within parallel.timeout_s, with one message that names the rank.

The main thread of every rank notes where it is (`RankProgress`, an attribute). Two threads beside it look after that:

    beat     tells the job's store once a second that this rank lives and where its main thread is, and asks whether
             another rank has spoken; then this one ends too
    watch    ends the job where its own main thread has noted nothing for longer than a collective may take

A rank that must end the job, because its main thread is stuck or because a collective failed, reads what all ranks
told the store, twice: a rank whose beat stopped is dead or stopped; otherwise the rank behind the others hangs. The
first to find out writes the message, all write their stacks, and all leave with code 1.

Every wait here is bounded: the store may be held by the very rank that has stopped. So the failure file decides who
is the first to speak: whoever creates it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import queue
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple, NoReturn, TypeVar, cast

from torch._C._distributed_c10d import HashStore, Store, TCPStore

from megassm.errors import visible
from megassm.parallel.job_store import SignedStore, launcher_holds_store
from megassm.parallel.phases import PhaseClock, StepPhase

BEAT_S = 1.0
SILENCE_S = 4.0
"""A rank whose beat has not changed for so long has stopped."""
STORE_ANSWERS_S = 5.0
BEYOND_TIMEOUT_S = 5.0
"""The watch leaves a collective this much time beyond its own timeout, to fail by itself: it knows more."""
START_S = 600.0
"""Least patience with what comes before the second step: imports, filters, the first compilation."""
OTHERS_LEAVE_S = 5.0

T = TypeVar("T")


class Mark(NamedTuple):
    """A place that the main thread has reached; they are numbered, alike on all ranks."""

    number: int
    step: int
    place: str
    at: float
    phase: StepPhase | None = None
    """What its time counts for; None if it is not part of the update."""


class RankProgress:
    """Where this rank's main thread is."""

    def __init__(self) -> None:
        self.mark = Mark(0, 0, "its set-up", time.monotonic())
        self.steps_begun = 0
        self._clock = PhaseClock()

    def note(self, place: str, step: int | None = None, phase: StepPhase | None = None) -> None:
        """Costs nothing worth mentioning. All ranks must note the same places in the same order."""
        last, now = self.mark, time.monotonic()
        self.steps_begun += step is not None
        if step is None:
            self._clock.count(last.phase, now)
        else:
            self._clock.restart(now)
        self.mark = Mark(last.number + 1, last.step if step is None else step, place, now, phase)

    def phases(self) -> dict[StepPhase, float]:
        """Seconds of this update so far, by phase."""
        self._clock.count(self.mark.phase, time.monotonic())
        return self._clock.spent()


@dataclass(frozen=True)
class Beat:
    """What a rank tells the store."""

    number: int = 0
    count: int = 0
    step: int = 0
    """0 in its set-up."""
    place: str = "its set-up"
    stuck_s: float = 0.0
    where: str = ""
    """Code that the main thread is in, once it has been there for some time."""
    waits: bool = False
    """Whether that is in a collective."""


def verdict(before: Sequence[Beat | None], after: Sequence[Beat | None]) -> str:
    """Which rank is at fault, from two readings of all ranks' beats that lie more than a beat apart."""
    silent = [rank for rank, beat in enumerate(after) if beat is None or beat == before[rank]]
    if silent:
        last = after[silent[0]] or before[silent[0]]
        front = max((beat for beat in after if beat is not None), key=_step_of, default=None)
        ahead = f"; the others are in {front.place}" if front and _step_of(front) > _step_of(last) else ""
        return (
            f"{_ranks(silent)} no longer answer{'s' if len(silent) == 1 else ''}: ended, stopped, or cut off; "
            f"last heard of in {last.place if last else 'its start'}{ahead}"
        )
    beats = [cast(Beat, beat) for beat in after]
    first = min(beat.count for beat in beats)
    late = [rank for rank, beat in enumerate(beats) if beat.count == first]
    if len(late) == len(beats) > 1:  # all are in the same phase: who does not wait for others there?
        late = [rank for rank, beat in enumerate(beats) if not beat.waits] or late
    beat = beats[late[0]]
    at = f", at {beat.where}" if beat.where else ""
    others = next((f"; the others wait in {beats[rank].place}" for rank in range(len(beats)) if rank not in late), "")
    hang = "hangs" if len(late) == 1 else "hang"
    return f"{_ranks(late)} {hang}: in {beat.place} for {beat.stuck_s:.0f} s{at}{others}"


def _step_of(beat: Beat | None) -> int:
    return beat.step if beat else 0


def _ranks(ranks: Sequence[int]) -> str:
    few = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank {few}" if len(ranks) == 1 else f"ranks {few}"


RankAndSize = tuple[int, int]
"""(rank, number of ranks)."""


class Watchdog:
    """Looks after the ranks of a job, from `start` on."""

    def __init__(
        self, world: RankAndSize, progress: RankProgress, timeout_s: float, failure: Path, secret: bytes = b"alone"
    ) -> None:
        """`failure` is the file that the first to speak creates with what it says; `secret` the ranks' own."""
        self._rank, self._size = world
        self._progress, self._timeout_s, self._failure = progress, timeout_s, failure
        self._beat = Beat()
        self._requests: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._store_failed, self._stopped, self._spoken = (threading.Event() for _ in range(3))
        self.may_write: Callable[[], bool] = lambda: True
        """Whether the failure file is still this job's to write."""
        self._hang = False
        self._ending = threading.Lock()
        self._store = SignedStore(_own_connection() if self._size > 1 else HashStore(), secret)

    def start(self) -> None:
        self._publish()
        threading.Thread(target=self._run_beat, name="watchdog-beat", daemon=True).start()
        threading.Thread(target=self._run_watch, name="watchdog", daemon=True).start()

    def stop(self) -> None:
        self._stopped.set()

    def refuse(self, message: str) -> None:
        """Prints why the job ends, unless another rank has printed a reason: this one would repeat or mask it."""
        if not self._spoken.is_set() and self._is_first(message):
            _print(f"error: {message}")
        self._ask(lambda: self._store.set("spoken", "1"), BEAT_S)
        if self._size > 1 and self._rank == 0 and not launcher_holds_store():
            time.sleep(3 * BEAT_S)  # the store goes with this rank: the others must have read it by then

    def fail(self, why: str, error: BaseException | None = None) -> NoReturn:
        """Ends the job because a rank does not go on: finds out which, writes why if no rank has, leaves stacks."""
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # another thread of this process is at it, and will end it
        found = self._diagnose()
        if self._hang or not self._spoken.is_set():
            self._write_stacks(error)
            self._ask(lambda: self._store.set("hang", "1"), BEAT_S)
        self.refuse(
            f"{found} (noticed by rank {self._rank}: {why}). The stacks of the ranks that could still write them are "
            "above and below. The same command continues from the last checkpoint"
        )
        sys.stdout.flush()
        os._exit(1)

    def _run_watch(self) -> None:
        limit = self._timeout_s + BEYOND_TIMEOUT_S
        while not self._stopped.wait(BEAT_S):
            patience = limit if self._progress.steps_begun > 1 else max(limit, START_S)
            if time.monotonic() - self._progress.mark.at > patience:
                self.fail(f"no progress for longer than parallel.timeout_s = {self._timeout_s:g}")

    def _run_beat(self) -> None:
        try:
            while self._size > 1 or not self._stopped.is_set():  # other ranks ask until this process is gone
                with contextlib.suppress(queue.Empty):
                    self._requests.get(timeout=BEAT_S)()
                self._publish()
                if not self._spoken.is_set() and self._store.get("spoken"):
                    self._hang = bool(self._store.get("hang"))
                    self._spoken.set()
                    threading.Thread(target=self._follow, daemon=True).start()
        except RuntimeError:  # nobody holds the store any longer: the job ends, or its first rank has died
            self._store_failed.set()

    def _follow(self) -> None:
        """Another rank has printed why the job ends: this one ends too, even if its main thread hangs."""
        if not self._hang:
            time.sleep(OTHERS_LEAVE_S)
        if not self._stopped.is_set() and self._ending.acquire(blocking=False):
            if self._hang:
                self._write_stacks(None)
            why = f"rank {self._rank}: another rank ends the job, and its reason came to no file"
            if self._write_failure(why):
                _print(f"error: {why}; look above")
            os._exit(1)

    def _publish(self) -> None:
        mark = self._progress.mark
        stuck_s = time.monotonic() - mark.at
        where, waits = _main_thread() if stuck_s > SILENCE_S else ("", False)
        place = f"step {mark.step}, {mark.place}" if mark.step else mark.place
        self._beat = replace(
            self._beat, number=self._beat.number + 1, count=mark.number, step=mark.step, place=place,
            stuck_s=stuck_s, where=where, waits=waits,
        )  # fmt: skip
        self._store.set(f"beat/{self._rank}", json.dumps(asdict(self._beat)))

    def _read(self) -> list[Beat | None]:
        found = [self._store.get(f"beat/{rank}") for rank in range(self._size)]
        return [None if text is None else Beat(**json.loads(text)) for text in found]

    def _diagnose(self) -> str:
        before = self._ask(self._read, STORE_ANSWERS_S)
        self._spoken.wait(SILENCE_S if before is not None else 0)
        after = None if before is None else self._ask(self._read, STORE_ANSWERS_S)
        if before is None or after is None:
            holder = "the launcher" if launcher_holds_store() else "rank 0"
            return (
                f"{holder}, which holds the job's store at {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}, "
                "no longer answers: ended, stopped, or cut off"
            )
        return verdict(before, after)

    def _is_first(self, message: str) -> bool:
        """Whether no rank has printed a reason yet; also true if the file cannot tell: better twice than never."""
        return self._write_failure(message) is not False

    def _write_failure(self, message: str) -> bool | None:
        """True where this made the file, False where it was there, None where it cannot be made."""
        if not self.may_write():
            return None  # the file is the newer start's
        try:
            with self._failure.open("x", encoding="utf-8") as file:
                file.write(f"{message}\n")
        except FileExistsError:
            return False
        except OSError:
            return None
        return True

    def _ask(self, function: Callable[[], T], within_s: float) -> T | None:
        """What `function` returns, run by the beat's thread; None where the store does not answer in time."""
        answers: queue.SimpleQueue[T] = queue.SimpleQueue()
        self._requests.put(lambda: answers.put(function()))
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline and not self._store_failed.is_set():
            with contextlib.suppress(queue.Empty):
                return answers.get(timeout=BEAT_S / 10)
        return None

    def _write_stacks(self, error: BaseException | None) -> None:
        """In one piece, so that those of several ranks do not mix."""
        with tempfile.TemporaryFile() as file:
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            stacks = file.read().decode(errors="replace")
        raised = "".join(traceback.format_exception(error)) if error is not None else ""
        _print(f"--- rank {self._rank}: stacks of all threads\n{raised}{stacks}--- rank {self._rank}: end of stacks")


def _own_connection() -> Store:
    """To the job's store, for one thread: an answer that does not come must not block another's questions."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    patience = timedelta(seconds=STORE_ANSWERS_S)
    return TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=patience)


def _main_thread() -> tuple[str, bool]:
    """(innermost line of this package that the main thread is in, whether that waits in a collective)."""
    frame = sys._current_frames().get(cast(int, threading.main_thread().ident))
    package = str(Path(__file__).parents[1]) + os.sep
    waits = False
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(package):
            return f"{Path(name).relative_to(Path(package).parent)}:{frame.f_lineno} in {frame.f_code.co_name}", waits
        waits = waits or f"torch{os.sep}distributed" in name
        frame = frame.f_back
    return "", waits


def _print(text: str) -> None:
    sys.stderr.write(visible(text) + "\n")
    sys.stderr.flush()
