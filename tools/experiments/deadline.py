"""Bursts of requests replayed against the real decoder: one K for all time, or the largest K that keeps every deadline.

Requests arrive at half the rate that full K can serve, then, in a burst, at `LOADS` times that rate, then at half of it
again. Each asks for a few tokens after a prompt and has a deadline. Time is the CPU time of the decoder's own thread,
and jumps to the next arrival where nothing is left to do: what else the machine does does not count.

What quality the budgets have cost is measured afterwards, on the texts that the prompts were taken from: bits per byte
of the true continuation, each token predicted at the K that the decoder had at that place.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from megassm.eval.policies import FixedBudget, KeepDeadlines, Policy, measured_costs
from megassm.eval.sampling import Sampling
from megassm.eval.scheduler import Limits, Request, Scheduler
from megassm.eval.session import Session, open_session
from megassm.model import LanguageModel
from tools.experiments.measure import Point

PROMPT, DRAWN = 32, 32
"""Tokens of each request."""
TEXTS = 96
"""At most: a sixth before the burst and a sixth after it."""
PLACES = 8
"""Texts that run at once."""
ALLOWED = 3.0
"""Deadline, in times of what full K takes for a text among `PLACES`."""
LOADS = (1.0, 2.0)
"""Arrivals in the burst over what full K serves."""

MISSED = "missed deadlines, %"
BITS_SERVED = "bits per byte at the K that tokens were drawn at"
MEAN_K = "mean K"


class ThreadClock:
    """CPU seconds of the calling thread, and those that were passed over."""

    def __init__(self) -> None:
        self._added_s = -time.thread_time()

    def __call__(self) -> float:
        return time.thread_time() + self._added_s

    def skip_to(self, at_s: float) -> None:
        """Goes on to a later time."""
        self._added_s += max(0.0, at_s - self())


@dataclass
class Served:
    """What became of a request."""

    budgets: list[int] = field(default_factory=list)
    """K of each token drawn."""
    ended_s: float = math.inf


class Trace(NamedTuple):
    """Requests in the order they arrive."""

    arrivals_s: Sequence[float]
    prompts: Sequence[Sequence[int]]


def deadline_points(run_dir: Path) -> list[Point]:
    """Misses, quality and mean K of every policy over the burst's load."""
    session = open_session(run_dir, None, "cpu")
    model, config = session.model.eval(), session.config
    texts = pieces(session)
    prompts = [ids[:PROMPT] for ids in texts]
    budgets = list(config.eval_budgets())
    busy_s = text_seconds(model, prompts[: 4 * PLACES])
    bits = BitsServed(model, texts, session)

    def points(load: float, name: str, policy: Policy) -> list[Point]:
        rng = np.random.default_rng(config.run.seed)  # the same arrivals for each policy
        trace = Trace(burst(len(texts), busy_s / load, 2 * busy_s, rng), prompts)
        allowed_s = ALLOWED * PLACES * busy_s
        served = replay(model, policy, trace, allowed_s)
        late = [each.ended_s > at_s + allowed_s for each, at_s in zip(served, trace.arrivals_s, strict=True)]
        return [
            Point(MISSED, name, load, 100 * sum(late) / len(late)),
            Point(BITS_SERVED, name, load, bits(served)),
            Point(MEAN_K, name, load, float(np.mean([k for each in served for k in each.budgets]))),
        ]

    found = [point for load in LOADS for k in budgets for point in points(load, f"K={k}", FixedBudget(k))]
    for load in LOADS:
        costs = measured_costs(model, budgets, PLACES, clock=time.thread_time)
        found += points(load, "largest K in time", KeepDeadlines(budgets, costs))
    return found


def pieces(session: Session) -> list[list[int]]:
    """Validation text in pieces of a prompt and its continuation."""
    size = PROMPT + DRAWN
    found: list[list[int]] = []
    for batch in session.validation(session.config.eval.sequences):
        for ids_T, counted_L in zip(batch.ids_BT, batch.mask_BL, strict=True):
            if counted_L.all():
                found += [ids_T[at : at + size].tolist() for at in range(0, len(ids_T) - size + 1, size)]
    return found[: min(TEXTS, 8 * session.config.eval.sequences)]


def burst(count: int, gap_s: float, quiet_gap_s: float, rng: np.random.Generator) -> list[float]:
    """Times of arrival: gaps are exponential, of mean `gap_s` but for a sixth before and a sixth after the burst."""
    quiet = count // 6
    means = [quiet_gap_s] * quiet + [gap_s] * (count - 2 * quiet) + [quiet_gap_s] * quiet
    return [float(at_s) for at_s in np.cumsum(rng.exponential(means))]


def text_seconds(model: LanguageModel, prompts: Sequence[Sequence[int]]) -> float:
    """What full K takes for a text, where there are always others that wait."""
    trace = Trace([0.0] * len(prompts), prompts)
    return max(each.ended_s for each in replay(model, FixedBudget(), trace, math.inf)) / len(prompts)


def replay(model: LanguageModel, policy: Policy, trace: Trace, allowed_s: float) -> list[Served]:
    """Runs the requests of a trace through the scheduler."""
    clock = ThreadClock()
    scheduler = Scheduler(model, policy, Limits(texts=PLACES), clock)
    left = deque(enumerate(trace.arrivals_s))
    served, of_number = [Served() for _ in trace.prompts], {}
    while left or scheduler.is_busy:
        if not scheduler.is_busy:
            clock.skip_to(left[0][1])
        while left and left[0][1] <= clock():
            place, at_s = left.popleft()
            deadline_s = max(1e-9, at_s + allowed_s - clock())  # it came while a step was made
            request = Request(trace.prompts[place], Sampling(DRAWN, temperature=0), deadline_s=deadline_s)
            of_number[scheduler.submit(request)] = served[place]
        for news in scheduler.step():
            of_number[news.number].budgets.append(news.k)
            if news.text is not None:
                of_number[news.number].ended_s = clock()
    return served


class BitsServed:
    """Bits per byte of true continuations at the budgets that a decoder had; each course of budgets is scored once."""

    def __init__(self, model: LanguageModel, texts: Sequence[Sequence[int]], session: Session) -> None:
        self._model, self._texts = model, texts
        self._bytes = sum(int(session.token_bytes[ids[PROMPT:]].sum()) for ids in texts)
        self._known: dict[tuple[int, tuple[int, ...]], float] = {}

    def __call__(self, served: Sequence[Served]) -> float:
        nats = 0.0
        for place, each in enumerate(served):
            key = place, tuple(each.budgets)
            if key not in self._known:
                self._known[key] = nats_at(self._model, self._texts[place], each.budgets)
            nats += self._known[key]
        return nats / math.log(2) / self._bytes


@torch.no_grad()
def nats_at(model: LanguageModel, ids: Sequence[int], budgets: Sequence[int]) -> float:
    """-log p of the last `len(budgets)` ids, each predicted at its own K, from the state that those before left."""
    first = len(ids) - len(budgets)
    ids_1T = torch.tensor([list(ids)])
    logits_1V, state = model.prefill(ids_1T[:, :first], budgets[0])
    predicted = [logits_1V]
    place = first
    for k, same in itertools.groupby(budgets[1:]):
        count = len(list(same))
        logits_1LV, extension = model.extend(ids_1T[:, place : place + count], state, k)
        state, place = extension.keep(), place + count
        predicted.append(logits_1LV[0])
    log_p_LV = torch.cat(predicted).double().log_softmax(-1)
    return -float(log_p_LV.gather(1, ids_1T[0, first:, None]).sum())
