"""What a run report says before its plots: quality, speed and health of each run, and which of several is best."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megassm.eval.curve import Step, describe, shape
from megassm.report.history import BITS, History
from megassm.report.loaded import LoadedRun
from megassm.run.console import WORTH_SAYING, rate
from megassm.run.events import WARNINGS

Finding = tuple[str, bool]
"""A sentence, and whether it is bad news."""
WAITING = ("data", "communication")
"""Phases in which nothing is computed."""


def findings_of(runs: Sequence[LoadedRun]) -> dict[str, list[Finding]]:
    """Sentences by run, and what comparing them says."""
    found = {}
    for run in runs:
        found[run.name] = [(_how_far(run), bool(run.failure))]
        if run.history.records:
            found[run.name] += [*_quality(run.history), *_speed(run.history)]
        found[run.name] += _health(run)
    return found | {"compared": [*_comparison(runs)]}


def median_of(history: History) -> str:
    """What "now" is, in words."""
    return f"median of the newest {len(history.recent)} updates"


def _how_far(run: LoadedRun) -> str:
    newest = run.history.newest
    tokens = f", {newest['tokens']:,} tokens" if newest and newest.get("tokens") else ""
    return f"{run.state}{tokens}, {run.history.seconds / 3600:.2f} hours inside updates."


def _quality(history: History) -> Iterator[Finding]:
    if not history.validations:
        yield "Nothing has been validated yet.", False
        return
    step, _, scores = history.validations[-1]
    full, small = max(scores), min(scores)
    cost = f", {scores[small]:.4f} at K={small} ({scores[small] / scores[full] - 1:+.1%})" if small < full else ""
    error = f" \u00b1 {history.errors[full]:.4f}" if full in history.errors else ""
    yield f"Validation after step {step:,}: {scores[full]:.4f}{error} {history.validated} at K={full}{cost}.", False
    best, best_step = min((scores[full], step) for step, _, scores in history.validations if full in scores)
    if best < scores[full]:
        yield f"At K={full} it was best after step {best_step:,}: {best:.4f}; it has risen since.", True
    for cliff in cliffs(history):
        yield f"Cliff at {describe(cliff)}: do not cut below K={cliff.next_k}.", True


def cliffs(history: History) -> list[Step]:
    """Of the newest validation of a text."""
    text = history.validations and history.validated == BITS
    return shape(history.validations[-1][2]).cliffs if text else []


def _speed(history: History) -> Iterator[Finding]:
    speed = history.now("tokens_per_s")
    if speed is None:
        return
    low, high = history.spread("tokens_per_s")
    mfu = "" if (share := history.now("mfu")) is None else f", {share:.1%} of the peak rate"
    yield f"{rate(speed)} tokens/s (90%: {rate(low)} to {rate(high)}; {median_of(history)}){mfu}.", False
    shares = history.phase_shares(history.recent)
    waiting = {name: share for name in WAITING if (share := shares.get(name, 0.0)) >= WORTH_SAYING}
    if waiting:
        named = " and ".join(f"{share:.0%} of its time on {name}" for name, share in waiting.items())
        yield f"It waits: {named}.", False


def _health(run: LoadedRun) -> Iterator[Finding]:
    if run.history.skipped:
        yield f"{run.history.skipped:,} of {run.history.records:,} updates were skipped: not finite.", True
    if starts := run.event_kinds["resume"]:
        yield f"It was continued {starts:,} {'time' if starts == 1 else 'times'}.", False
    warned = {kind: run.event_kinds[kind] for kind in WARNINGS if run.event_kinds[kind]}
    if warned:
        yield f"Warnings: {', '.join(f'{count:,} x {kind}' for kind, count in warned.items())}; see Events.", False
    for told in run.unread:
        yield f"{told}.", True


def _comparison(runs: Sequence[LoadedRun]) -> Iterator[Finding]:
    """The best of runs validated in one unit, at the largest K and the smallest that all of them have."""
    for unit in dict.fromkeys(run.history.validated for run in runs):
        newest = {run.name: run.history.validations[-1][2] for run in runs
                  if run.history.validations and run.history.validated == unit}  # fmt: skip
        shared = sorted(set.intersection(*map(set, newest.values()))) if len(newest) > 1 else []
        for k in dict.fromkeys((*shared[-1:], *shared[:1])):
            (best, name), (second, _) = sorted((scores[k], name) for name, scores in newest.items())[:2]
            yield f"Best at K={k}: {name}, by {second - best:.4f} {unit}, on each run's own validation text.", False
