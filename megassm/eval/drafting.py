"""How to draft: at which budget and how far, fixed, or chosen while a text grows by what is accepted and what it costs.

A round of m drafts at K', each accepted with probability a, gives 1 + a + ... + a^m tokens in expectation, and takes m
steps at K' and one reading of m + 1 tokens at the full K. `Chooser` knows both from what it has seen, takes the round
that gives most tokens a second, and a plain step where none gives more. What it has not seen it tries only as far as
the text stays within `SLOWER` of plain decoding's time.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple
from weakref import WeakKeyDictionary

from megassm.config.model import Budget
from megassm.errors import UserError
from megassm.eval.costs import Costs, Kind
from megassm.model import LanguageModel

SLOWER = 0.04
"""Share of plain decoding's time that trying may cost."""
CLEARLY = 1.03
"""How many times faster than plain decoding a round must look."""
PLAIN_STEPS = 4
"""That are timed before anything is tried."""
REFRESHED = 50
"""One in so many rounds is a plain step, so that its time stays known while the machine's load changes."""
FORGOTTEN = 0.98
"""What earlier drafts count at each later round."""
LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16)
"""Numbers of drafts that are weighed."""
WEIGHED = 16
"""Plain steps after which rounds are weighed anew: that takes as long as a small model's step."""
CHEAP_DRAFT = 0.5
"""Of the cheapest step that was timed: what a draft is hoped to cost before one was timed."""
UNKNOWN_READING = 3.0
"""Plain steps that a reading is taken to cost before one was timed."""


class Drafting(NamedTuple):
    """How to draft."""

    k: int | Literal["auto"]
    """Budget of the drafts; "auto": chosen, as is their number, while the text grows."""
    tokens: int = 4
    """Drafts a round, at most where they are chosen."""

    @classmethod
    def auto(cls, most: int = 8) -> Drafting:
        """Budget and number of drafts chosen from what is accepted and what it costs."""
        return cls("auto", most)

    def check(self, k: Budget) -> None:
        """UserError naming the value and the rule; `k` is the budget that texts are to have."""
        most = k if isinstance(k, int) else max(k)
        if self.k != "auto" and not (isinstance(self.k, int) and 1 <= self.k <= most):
            raise UserError(f"draft_k = {self.k}: must be between 1 and the budget K = {most} of the text, or auto")
        if self.k == "auto" and not isinstance(k, int):
            raise UserError("draft_k = auto: is for texts of one K in all layers; give a number")
        if self.tokens < 1:
            raise UserError(f"draft_tokens = {self.tokens}: must be at least 1")


class Round(NamedTuple):
    """What to do next: `tokens` drafts at `k`; 0 is a plain step."""

    k: int
    tokens: int


class _Seen:
    """Of the drafts at one budget."""

    def __init__(self) -> None:
        self.accepted, self.offered = 0.0, 0.0

    def add(self, accepted: int, offered: int) -> None:
        self.accepted = FORGOTTEN * self.accepted + accepted
        self.offered = FORGOTTEN * self.offered + offered

    @property
    def rate(self) -> float:
        """The share accepted, as if one of two had been before any was seen."""
        return (self.accepted + 1.0) / (self.offered + 2.0)

    @property
    def at_best(self) -> float:
        """What it may still turn out to be."""
        return min(0.99, self.rate + 1.0 / math.sqrt(self.offered + 1.0))


class Chooser:
    """Chooses rounds for texts at budget k; what it learns of the model serves later texts too."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.budgets = [1 << power for power in range(1, k.bit_length()) if 1 << power < k]
        self._costs, self._seen = Costs(), {budget: _Seen() for budget in self.budgets}
        self._rounds = 0
        self._weighed_for = (0, 0)
        self._best = Round(k, 0)
        self._worth_trying: list[tuple[Round, float]] = []
        self.begin()

    def begin(self) -> None:
        """A new batch of texts: what earlier ones have gained is not there to be spent."""
        self.spent_s = self.plain_s = 0.0

    def choose(self, texts: int, most: int) -> Round:
        """For so many texts, with at most so many drafts."""
        plain = Round(self.k, 0)
        if most < 1 or not self.budgets or self._costs.count("step", self.k, texts) < PLAIN_STEPS:
            return plain
        self._rounds += 1
        if self._rounds % WEIGHED == 0 or self._weighed_for != (texts, most):
            self._weigh(texts, most)
        if self._rounds % REFRESHED == 0:
            return plain
        step_s = self._costs.seconds("step", self.k, texts)
        left_s = (1 + SLOWER) * (self.plain_s + step_s) - self.spent_s
        for round_, at_worst_s in self._worth_trying:
            if at_worst_s <= left_s:
                return round_
        return self._best if left_s >= (1 + SLOWER) * step_s else plain

    def stepped(self, texts: int, seconds: float) -> None:
        """A plain step was made."""
        self._costs.add("step", self.k, texts, seconds)
        self._count(texts, seconds, 1.0)

    def drafted(self, made: Round, accepted: list[int], draft_s: float, read_s: float) -> None:
        """A round was made; `accepted` of each text's drafts."""
        texts = len(accepted)
        self._costs.add("step", made.k, texts, draft_s / made.tokens)
        self._costs.add("verify", self.k, texts * (made.tokens + 1), read_s)
        for count in accepted:
            self._seen[made.k].add(count, min(count + 1, made.tokens))
        self._weighed_for = (0, 0)
        self._count(texts, draft_s + read_s, 1.0 + sum(accepted) / texts)

    @property
    def speed_up(self) -> float | None:
        """Over plain decoding, by the time of its steps, since `begin`."""
        return self.plain_s / self.spent_s if self.spent_s else None

    def _count(self, texts: int, seconds: float, tokens: float) -> None:
        self.spent_s += seconds
        self.plain_s += tokens * self._costs.seconds("step", self.k, texts)

    def _weigh(self, texts: int, most: int) -> None:
        """Finds the best of the rounds that are known, and those that may turn out better, most promising first."""
        self._weighed_for = (texts, most)
        lengths = sorted({*(length for length in LENGTHS if length <= most), most})
        rounds = [Round(budget, length) for budget in self.budgets for length in lengths]
        step_s = self._costs.seconds("step", self.k, texts)
        best_speed, self._best = CLEARLY / step_s, Round(self.k, 0)
        for round_ in rounds:
            draft_s, read_s = self._timed(round_, texts)
            if draft_s is not None and read_s is not None:
                speed = expected_tokens(self._seen[round_.k].rate, round_.tokens) / (round_.tokens * draft_s + read_s)
                if speed > best_speed:
                    best_speed, self._best = speed, round_
        timed = [draft_s for draft_s, _ in (self._timed(Round(budget, 1), texts) for budget in self.budgets) if draft_s]
        cheap_s = CHEAP_DRAFT * min((step_s, *timed))
        hoped = []
        for round_ in rounds:
            draft_s, read_s = self._timed(round_, texts)
            at_best_s = round_.tokens * (draft_s or cheap_s) + (read_s or step_s)
            speed = expected_tokens(self._seen[round_.k].at_best, round_.tokens) / at_best_s
            if speed > CLEARLY * best_speed:
                at_worst_s = round_.tokens * (draft_s or step_s) + (read_s or UNKNOWN_READING * step_s)
                hoped.append((speed, round_, at_worst_s))
        self._worth_trying = [(round_, at_worst_s) for _, round_, at_worst_s in sorted(hoped, reverse=True)]

    def _timed(self, round_: Round, texts: int) -> tuple[float | None, float | None]:
        """Seconds of a draft and of the reading, each None where it was never timed at this size."""
        draft: tuple[Kind, int, int] = ("step", round_.k, texts)
        read: tuple[Kind, int, int] = ("verify", self.k, texts * (round_.tokens + 1))
        draft_s, read_s = (self._costs.seconds(*each) if self._costs.count(*each) else None for each in (draft, read))
        return draft_s, read_s


def expected_tokens(rate: float, drafts: int) -> float:
    """Of a round, each draft accepted with probability `rate`."""
    return sum(rate**count for count in range(drafts + 1))


_CHOOSERS: WeakKeyDictionary[LanguageModel, dict[int, Chooser]] = WeakKeyDictionary()


def chooser_of(model: LanguageModel, k: int) -> Chooser:
    """What is known of drafting for this model at k; kept as long as the model is."""
    chooser = _CHOOSERS.setdefault(model, {}).setdefault(k, Chooser(k))
    chooser.begin()
    return chooser
