"""Continuing text: prefill by the parallel form, then one step a token from a state of constant size.

A spectral layer remembers S x D numbers whatever the context length, and serves any budget from them: K may change
from token to token (the online budgets that the paper leaves open).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megassm.data.tokenizer.base import Tokenizer
from megassm.errors import UserError
from megassm.layers.state import DecodingState
from megassm.model import LanguageModel

Budget = int | Callable[[int], int]
"""K, or the K at which the token at a position (from 0) is processed."""


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


DEFAULT_SAMPLING = Sampling()


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    k: Budget | None = None,
    sampling: Sampling = DEFAULT_SAMPLING,
) -> list[list[int]]:
    """Continues each prompt by at most `sampling.max_tokens` ids, without the stop id that ended it.

    Args:
        model: in evaluation mode.
        prompts: ids; they may differ in length, and a prompt's continuation does not depend on the others but through
            the random draws.
        k: the budget, or a function of the position; None: K_max.
        sampling: how to draw.

    Raises:
        UserError: an empty prompt, a budget or a sampling value out of range.
    """
    sampling.check()
    if not prompts or not all(prompts):
        raise UserError("the prompt is empty; give at least one character")
    budget = model.config.num_channels if k is None else k
    device = model.embedding_VD.device
    generator = torch.Generator().manual_seed(sampling.seed)
    logits_BV, state = _prefill(model, prompts, budget)
    texts: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    while True:
        drawn = _draw(logits_BV.float().cpu(), sampling, generator)
        ids = []
        for row, prompt in enumerate(prompts):
            if state.position < len(prompt):  # a longer prompt than the shortest: still being read
                ids.append(prompt[state.position])
                continue
            ids.append(drawn[row])
            if row in open_rows:
                if drawn[row] in sampling.stop_ids:
                    open_rows.discard(row)
                    continue
                texts[row].append(drawn[row])
                if len(texts[row]) == sampling.max_tokens or (sampling.ended and sampling.ended(texts[row])):
                    open_rows.discard(row)
        if not open_rows:
            return texts
        logits_BV, state = model.step(torch.tensor(ids, device=device), state, _at(budget, state.position))


def sample_text(model: LanguageModel, tokenizer: Tokenizer, prompt: str, budget: Budget, sampling: Sampling) -> str:
    """The prompt's continuation as text, up to the end of its document."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(f"the prompt {prompt!r} is not UTF-8; give text") from None
    prompt_ids = tokenizer.encode([prompt])[0].tolist()
    sampling = sampling._replace(stop_ids={*sampling.stop_ids, tokenizer.eod})
    drawn = generate(model, [prompt_ids], budget, sampling)[0]
    return tokenizer.decode([token for token in drawn if token < tokenizer.vocab_size])


def _at(budget: Budget, position: int) -> int:
    return budget(position) if callable(budget) else budget


def _prefill(model: LanguageModel, prompts: Sequence[Sequence[int]], budget: Budget) -> tuple[Tensor, DecodingState]:
    """Reads the part that all prompts have: in parallel at a fixed budget, step by step at a changing one."""
    device = model.embedding_VD.device
    common = min(len(prompt) for prompt in prompts)
    ids_BL = torch.tensor([list(prompt[:common]) for prompt in prompts], device=device)
    if not callable(budget):
        return model.prefill(ids_BL, budget)
    logits_BV, state = model.prefill(ids_BL[:, :1], budget(0))
    for position in range(1, common):
        logits_BV, state = model.step(ids_BL[:, position], state, budget(position))
    return logits_BV, state


def _draw(logits_BV: Tensor, sampling: Sampling, generator: torch.Generator) -> list[int]:
    """One id a row."""
    if sampling.temperature == 0:
        likeliest: list[int] = logits_BV.argmax(-1).tolist()
        return likeliest
    logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / sampling.temperature  # at most 0, however cold
    if sampling.top_k is not None and sampling.top_k < logits_BV.shape[1]:
        least_B1 = logits_BV.topk(sampling.top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    if sampling.top_p is not None:
        ordered_BV, places_BV = logits_BV.sort(descending=True)
        before_BV = ordered_BV.softmax(-1).cumsum(-1) - ordered_BV.softmax(-1)  # probability of the likelier ones
        ordered_BV = ordered_BV.masked_fill(before_BV >= sampling.top_p, -torch.inf)
        logits_BV = torch.empty_like(ordered_BV).scatter_(1, places_BV, ordered_BV)
    ids: list[int] = torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)[:, 0].tolist()
    return ids
