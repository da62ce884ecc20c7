"""Continuous batching: texts join and leave a running batch, each with its own prompt, K, sampling and deadline.

    scheduler = Scheduler(model, FixedBudget())
    number = scheduler.submit(Request(prompt, k=8))
    while scheduler.is_busy:
        for news in scheduler.step():
            ...

A step reads some tokens of prompts that wait, then gives every text that is read one token: one pass of the model for
each K in use, so weights are read once a pass whatever the number of texts. A text's K may change from step to step, as
the policy says. Each text's state is its own; nothing is left of one that has ended or was cancelled.

A text is what `generate` gives for its prompt alone, at the same budgets and with the same seed, to rounding: sums of a
batch may be rounded otherwise than those of one text.
"""

from __future__ import annotations

import itertools
import time
import warnings
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megassm.errors import UserError
from megassm.eval.policies import FixedBudget, Need, Policy
from megassm.eval.sampling import Sampling, Text, check_prompts, draw
from megassm.layers.state import DecodingState
from megassm.model import LanguageModel


class Request(NamedTuple):
    """A prompt to continue."""

    prompt: Sequence[int]
    sampling: Sampling = Sampling()
    k: int | None = None
    """The largest budget it may have; None: K_max."""
    deadline_s: float | None = None
    """Seconds from now by which all its tokens are wanted."""


class News(NamedTuple):
    """What a step brought to one text."""

    number: int
    """Its request's."""
    token: int | None
    """Drawn now; None where the text ended before it."""
    k: int
    """The budget that it was drawn at."""
    text: list[int] | None
    """All its tokens, where it has ended: it is forgotten then."""


class Limits(NamedTuple):
    """How much is done at once."""

    texts: int = 16
    """That run at once, each with its state; the others wait in the order they came."""
    read_tokens: int = 256
    """Of prompts, read before each step: what running texts wait for."""


class _Running:
    """A text that is read or drawn."""

    def __init__(self, number: int, request: Request, k: int, ends_s: float) -> None:
        self.number, self.request, self.k, self.ends_s = number, request, k, ends_s
        self.text = Text(request.sampling)
        self.generator = torch.Generator().manual_seed(request.sampling.seed)
        self.read = 0
        self.last = 0
        """The token drawn last, which the state has not seen."""
        self.state: DecodingState | None = None

    def need(self, now_s: float) -> Need:
        unread = len(self.request.prompt) - self.read
        tokens = self.request.sampling.max_tokens - len(self.text.ids)
        return Need(self.k, unread, tokens, self.ends_s - now_s)


class Scheduler:
    """Texts of one model, in one thread.

    Args:
        model: in evaluation mode.
        policy: which K each text gets; None: its own largest.
        limits: how much is done at once.
        clock: seconds, for deadlines and for what passes take.
    """

    def __init__(
        self,
        model: LanguageModel,
        policy: Policy | None = None,
        limits: Limits = Limits(),  # noqa: B008  # a value
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if min(limits) < 1:
            raise UserError(f"{limits}: each must be at least 1")
        self._model, self._policy, self._limits, self._clock = model, policy or FixedBudget(), limits, clock
        self._running: dict[int, _Running] = {}
        self._waiting: deque[_Running] = deque()
        self._numbers = itertools.count()

    @property
    def is_busy(self) -> bool:
        """Whether a text is not yet ended."""
        return bool(self._running or self._waiting)

    @property
    def state_bytes(self) -> int:
        """Of all texts' states."""
        return sum(text.state.nbytes for text in self._running.values() if text.state is not None)

    def submit(self, request: Request) -> int:
        """Puts a request last; its number, which its news have.

        Raises:
            UserError: an empty prompt, ids that the model does not know, a budget or a value out of range.
        """
        request.sampling.check()
        check_prompts([request.prompt])
        config = self._model.config
        unknown = next((token for token in request.prompt if not 0 <= token < config.vocab_size), None)
        if unknown is not None:
            raise UserError(f"the prompt has id {unknown}: must be between 0 and {config.vocab_size - 1}")
        if request.deadline_s is not None and not request.deadline_s > 0:
            raise UserError(f"deadline_s = {request.deadline_s}: must be above 0")
        k = config.num_channels if request.k is None else request.k
        warning = self._model.beyond_trained(len(request.prompt) + request.sampling.max_tokens, k)
        if warning:
            warnings.warn(warning, stacklevel=2)
        ends_s = float("inf") if request.deadline_s is None else self._clock() + request.deadline_s
        text = _Running(next(self._numbers), request, k, ends_s)
        self._waiting.append(text)
        return text.number

    def cancel(self, number: int) -> None:
        """Forgets a text, its state too; one that has ended is none any more."""
        self._running.pop(number, None)
        self._waiting = deque(text for text in self._waiting if text.number != number)

    @torch.no_grad()
    def step(self) -> list[News]:
        """Reads prompts, and gives each text that is read a token; news in no order."""
        while self._waiting and len(self._running) < self._limits.texts:
            text = self._waiting.popleft()
            self._running[text.number] = text
        texts, now_s = list(self._running.values()), self._clock()
        needs = [text.need(now_s) for text in texts]
        waiting = [text.need(now_s) for text in self._waiting]
        budgets = dict(zip(self._running, self._policy.choose(needs, waiting, self._limits.texts), strict=True))
        drawn = [text for text in texts if text.read == len(text.request.prompt)]
        news = list(self._read_prompts(texts, budgets))
        by_budget: dict[tuple[int, int], list[_Running]] = defaultdict(list)
        for text in drawn:  # those begun before the model has grown have states of another size
            assert text.state is not None
            by_budget[budgets[text.number], id(text.state.filterbank)].append(text)
        for (k, _), together in by_budget.items():
            news += self._step_together(together, k)
        for each in news:
            if each.text is not None:
                del self._running[each.number]
        return news

    def _read_prompts(self, texts: Sequence[_Running], budgets: dict[int, int]) -> Iterator[News]:
        """Reads on, up to the limit, in the order of arrival; news of the texts whose prompt is read now."""
        left = self._limits.read_tokens
        for text in texts:
            prompt = text.request.prompt
            if left == 0:
                return
            if text.read == len(prompt):
                continue
            count, k, started = min(left, len(prompt) - text.read), budgets[text.number], self._clock()
            ids_1L = self._tensor([list(prompt[text.read : text.read + count])])
            logits_1V, text.state = self._model.prefill(ids_1L, k, state=text.state)
            text.read += count
            left -= count
            if text.read == len(prompt):
                yield self._drawn(text, logits_1V, k)
            self._policy.read(k, count, self._clock() - started)

    def _step_together(self, texts: Sequence[_Running], k: int) -> list[News]:
        """One pass for texts of one K."""
        started = self._clock()
        states = [text.state for text in texts if text.state is not None]
        state = states[0] if len(texts) == 1 else DecodingState.joined(states)
        logits_BV, state = self._model.step(self._tensor([text.last for text in texts]), state, k)
        news = []
        for row, (text, own) in enumerate(zip(texts, [state] if len(texts) == 1 else state.parts(), strict=True)):
            text.state = own
            news.append(self._drawn(text, logits_BV[row : row + 1], k))
        self._policy.stepped(k, len(texts), self._clock() - started)
        return news

    def _drawn(self, text: _Running, logits_1V: Tensor, k: int) -> News:
        """Draws a text's next token."""
        before = len(text.text.ids)
        text.last = int(draw(logits_1V, text.request.sampling, text.generator))
        text.text.add([text.last])
        token = text.last if len(text.text.ids) > before else None
        return News(text.number, token, k, None if text.text.is_open else text.text.ids)

    def _tensor(self, ids: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor(ids, device=self._model.embedding_VD.device)
