"""Which budget each text of a running batch gets at this moment: one for all time, or the largest that is in time."""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, Protocol

import torch

from megassm.errors import UserError
from megassm.eval.costs import Costs, power_of_two
from megassm.eval.measure import seconds_of
from megassm.model import LanguageModel


class Need(NamedTuple):
    """What a text still needs."""

    k: int
    """The largest budget it may have."""
    unread: int
    """Tokens of its prompt."""
    tokens: int
    """Tokens to draw, at most."""
    left_s: float
    """Seconds to its deadline; infinite without one."""


class Policy(Protocol):
    """Chooses budgets, and is told what passes took."""

    def choose(self, running: Sequence[Need], waiting: Sequence[Need], places: int) -> list[int]:
        """K for each of the running texts, at most its own. `places` texts can run at once; the waiting ones follow in
        their order."""

    def read(self, k: int, tokens: int, seconds: float) -> None:
        """So many tokens of a prompt were read at k."""

    def stepped(self, k: int, texts: int, seconds: float) -> None:
        """So many texts got a token each at k."""


class FixedBudget:
    """The same K always, or each text's own; never more than its own."""

    def __init__(self, k: int | None = None) -> None:
        if k is not None and k < 1:
            raise UserError(f"k = {k}: must be at least 1")
        self._k = k

    def choose(self, running: Sequence[Need], waiting: Sequence[Need], places: int) -> list[int]:
        return [need.k if self._k is None else min(self._k, need.k) for need in running]

    def read(self, k: int, tokens: int, seconds: float) -> None:
        """Changes nothing."""

    def stepped(self, k: int, texts: int, seconds: float) -> None:
        """Changes nothing."""


class KeepDeadlines:
    """The largest K at which every text, the waiting ones too, is done by its deadline.

    All running texts get a token a step, so one ceiling holds for all. When each would be done follows from what
    passes take at each budget. A text that would be late at the smallest budget too does not count: it would cost the
    others their quality and be late all the same. What has not arrived yet is not foreseen.

    Args:
        budgets: K to choose among.
        costs: what passes take, from `measured_costs`; kept up to date.
        margin: the share of the time left that is planned with.
    """

    def __init__(self, budgets: Sequence[int], costs: Costs, margin: float = 0.9) -> None:
        self._budgets, self._costs, self._margin = sorted(set(budgets)), costs, margin
        if not self._budgets or self._budgets[0] < 1:
            raise UserError(f"budgets {list(budgets)}: must be at least one K, each at least 1")
        if not 0 < margin <= 1:
            raise UserError(f"margin = {margin}: must be above 0 and at most 1")

    def choose(self, running: Sequence[Need], waiting: Sequence[Need], places: int) -> list[int]:
        smallest, *larger = self._budgets
        can_be_in_time = [late <= 0 for late in self._lateness(smallest, running, waiting, places)]
        for k in reversed(larger):
            lateness = self._lateness(k, running, waiting, places)
            if all(late <= 0 for late, counts in zip(lateness, can_be_in_time, strict=True) if counts):
                return [min(k, need.k) for need in running]
        return [min(smallest, need.k) for need in running]

    def read(self, k: int, tokens: int, seconds: float) -> None:
        self._costs.add("read", k, power_of_two(tokens), seconds)

    def stepped(self, k: int, texts: int, seconds: float) -> None:
        self._costs.add("step", k, power_of_two(texts), seconds)

    def _lateness(self, k: int, running: Sequence[Need], waiting: Sequence[Need], places: int) -> Iterator[float]:
        """Seconds by which each text would be late at k, the running ones first; not above 0 where it is in time."""
        texts = min(places, len(running) + len(waiting))
        step_s = self._costs.seconds("step", k, power_of_two(texts)) if texts else 0.0
        ends: list[int] = []  # steps from now at which places become free
        unread = 0
        for need in (*running, *waiting):
            end = need.tokens + (0 if len(ends) < places else heapq.heappop(ends))
            heapq.heappush(ends, end)
            unread += need.unread
            yield end * step_s + self._reading_s(k, unread) - self._margin * need.left_s

    def _reading_s(self, k: int, tokens: int) -> float:
        size = min(power_of_two(tokens), TIMED_TOKENS[-1])
        return tokens / size * self._costs.seconds("read", k, size) if tokens else 0.0


TIMED_TOKENS = (16, 256)
"""Of prompts."""


@torch.no_grad()
def measured_costs(
    model: LanguageModel,
    budgets: Sequence[int],
    places: int,
    repeats: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> Costs:
    """Times steps of 1, 2, 4, ... texts, up to `places`, and the reading of prompts, at each budget.

    `clock` gives seconds, and is to be the scheduler's where that has one of its own.

    Raises:
        UserError: a budget out of range.
    """
    costs, device = Costs(), model.embedding_VD.device
    sizes = [1 << power for power in range(power_of_two(places).bit_length())]
    for _ in range(repeats):
        for k in budgets:
            for size in sizes:
                ids_B1 = torch.zeros(size, 1, dtype=torch.long, device=device)
                _, state = model.prefill(ids_B1, k)
                costs.add("step", k, size, seconds_of(partial(model.step, ids_B1[:, 0], state, k), device, clock))
            for size in TIMED_TOKENS:
                ids_1L = torch.zeros(1, size, dtype=torch.long, device=device)
                costs.add("read", k, size, seconds_of(partial(model.prefill, ids_1L, k), device, clock))
    return costs
