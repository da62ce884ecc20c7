"""Checkpoints of a run that trains: begun, waited for where they must be, reported."""

from __future__ import annotations

from megassm.checkpoint.save import Saved
from megassm.errors import UserError
from megassm.train.setup import Run


def save(run: Run, done_steps: int, must: bool) -> None:
    """Saves a checkpoint, after the one that is still being written; returns when training may go on.

    A full disk does not end a run, but for the last save, which must be there before this returns.

    Raises:
        UserError: it failed, and must not.
    """
    finish_save(run)
    ended = run.saver.begin(done_steps)
    if ended is None and (must or not run.config.checkpoint.asynchronous):
        ended = run.saver.finish()
    report(run, ended, must)


def finish_save(run: Run) -> None:
    """Waits until no save is under way."""
    if run.saver.busy:
        report(run, run.saver.finish())


def advance_save(run: Run, ready: bool) -> None:
    """Moves on the save that is under way, if all ranks are `ready` with their part of it."""
    if ready:
        report(run, run.saver.advance())


def report(run: Run, ended: Saved | None, must: bool = False) -> None:
    """Tells how a save ended, if it has.

    Raises:
        UserError: it failed, and must not.
    """
    if ended is None:
        return
    if not ended.failure:
        run.save_failure, run.saved_steps = "", ended.step
        times = {"waited_s": ended.waited_s, "took_s": ended.took_s}
        run.events.add("checkpoint", ended.step, f"checkpoint after step {ended.step}", **times)
        if run.journal is not None:
            run.journal.saved(ended.step)
        return
    what = f"no checkpoint after step {ended.step}: {ended.failure}; older ones are untouched"
    if must:
        raise UserError(f"{what}. Make room, and start again: the same command continues from the last one")
    if ended.failure != run.save_failure:  # a disk that stays full, or read-only, is reported once
        run.save_failure = ended.failure
        run.events.add("disk", ended.step, what)
