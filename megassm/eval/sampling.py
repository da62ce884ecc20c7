"""How prompts are read, tokens drawn from logits, and texts ended."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megassm.config.model import Budget
from megassm.errors import UserError
from megassm.layers.state import DecodingState
from megassm.model import LanguageModel


class Sampling(NamedTuple):
    """How to draw."""

    max_tokens: int = 64
    temperature: float = 0.8
    """0 takes the likeliest token."""
    top_k: int | None = None
    """Draw among the likeliest `top_k` tokens."""
    top_p: float | None = None
    """Draw among the likeliest tokens that together have this probability."""
    seed: int = 0
    stop_ids: Collection[int] = ()
    """A text ends before the first of these."""
    ended: Callable[[Sequence[int]], bool] | None = None
    """Whether a text, by its ids so far, has come to an end."""

    def check(self) -> None:
        """UserError naming the value and the rule."""
        for fine, rule in (
            (self.max_tokens >= 1, f"max_tokens = {self.max_tokens}: must be at least 1"),
            (self.temperature >= 0, f"temperature = {self.temperature}: must be at least 0"),
            (0 <= self.seed < 2**63, f"seed = {self.seed}: must be between 0 and 2^63 - 1"),
            (self.top_k is None or self.top_k >= 1, f"top_k = {self.top_k}: must be at least 1"),
            (self.top_p is None or 0 < self.top_p <= 1, f"top_p = {self.top_p}: must be above 0 and at most 1"),
        ):
            if not fine:
                raise UserError(rule)

    def ends(self, ids: Sequence[int]) -> bool:
        """Whether a text ends with the last of its ids so far."""
        return len(ids) == self.max_tokens or (self.ended is not None and self.ended(ids))


class Text:
    """A text while it grows."""

    def __init__(self, sampling: Sampling) -> None:
        self.ids: list[int] = []
        self.is_open = True
        self._sampling = sampling

    def add(self, tokens: Sequence[int]) -> None:
        """Tokens up to the one that ends the text."""
        for token in tokens:
            if not self.is_open:
                return
            if token in self._sampling.stop_ids:
                self.is_open = False
                return
            self.ids.append(token)
            self.is_open = not self._sampling.ends(self.ids)


def check_prompts(prompts: Sequence[Sequence[int]]) -> None:
    """UserError if there are no prompts, or one is empty."""
    if not prompts or not all(prompts):
        raise UserError("the prompt is empty; give at least one character")


def read_prompts(model: LanguageModel, prompts: Sequence[Sequence[int]], k: Budget) -> tuple[Tensor, DecodingState]:
    """(logits (B, V) after each prompt, the state there): all prompts at once, whatever their lengths."""
    counts = [len(prompt) for prompt in prompts]
    padded = [[*prompt, *[0] * (max(counts) - len(prompt))] for prompt in prompts]
    return model.prefill(torch.tensor(padded, device=model.embedding_VD.device), k, counts)


def draw(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> Tensor:
    """A token of each text (B,), on the CPU."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1).cpu()
    return torch.multinomial(probabilities(logits_BV, sampling), 1, generator=generator)[:, 0]


def probabilities(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """What a token is drawn from, (B, V) float32 on the CPU: all on the likeliest where the temperature is 0."""
    logits_BV = logits_BV.float().cpu()
    if sampling.temperature == 0:
        return torch.zeros_like(logits_BV).scatter_(1, logits_BV.argmax(-1, keepdim=True), 1.0)
    temperature = max(sampling.temperature, torch.finfo(logits_BV.dtype).tiny)  # one that rounds to 0 gives 0 / 0
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature  # at most 0, however cold
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[1]:
        least_B1 = logits_BV.topk(sampling.top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    if sampling.top_p is not None:
        ordered_BV, places_BV = logits_BV.sort(descending=True)
        before_BV = ordered_BV.softmax(-1).cumsum(-1) - ordered_BV.softmax(-1)  # probability of the likelier ones
        ordered_BV = ordered_BV.masked_fill(before_BV >= sampling.top_p, -torch.inf)
        logits_BV = torch.empty_like(ordered_BV).scatter_(1, places_BV, ordered_BV)
    return logits_BV.softmax(-1)
