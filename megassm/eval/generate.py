"""Continuing text: prefill by the parallel form, then one step a token from a state of constant size.

A spectral layer remembers S x D numbers whatever the context length, and serves any budget from them: K may change
from token to token (the online budgets that the paper leaves open).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megassm.config.model import Budget
from megassm.data.tokenizer.base import Tokenizer
from megassm.errors import UserError
from megassm.eval.drafting import Drafting
from megassm.eval.sampling import Sampling, Text, check_prompts, draw, read_prompts
from megassm.eval.speculate import Speculated, speculate
from megassm.layers.state import DecodingState
from megassm.model import LanguageModel

Budgets = Budget | Callable[[int], Budget]
"""K, or the K at which the token at a position (from 0) is processed; K is one number, or one a layer."""


UNFINISHED = "\ufffd"
"""What a decoder writes for a character whose last bytes are still to be drawn."""
DEFAULT_SAMPLING = Sampling()


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    k: Budgets | None = None,
    sampling: Sampling = DEFAULT_SAMPLING,
    drafting: Drafting | None = None,
) -> list[list[int]]:
    """Continues each prompt by at most `sampling.max_tokens` ids, without the stop id that ended it.

    Args:
        model: in evaluation mode.
        prompts: ids; they may differ in length, and a prompt's continuation does not depend on the others but through
            the random draws.
        k: the budget, one number or one for each layer, or a function of the position; None: K_max.
        sampling: how to draw.
        drafting: draft at a smaller budget first (`megassm.eval.speculate`): the same texts, sooner. What came of it
            `megassm.eval.speculate.speculate` tells.

    Raises:
        UserError: an empty prompt, a budget or a sampling value out of range, drafts for a budget that changes.
    """
    budget = model.config.num_channels if k is None else k
    if not callable(budget):
        _warn_beyond(model, prompts, budget, sampling)
    if drafting is not None:
        if callable(budget):
            raise UserError("drafting needs one budget for the whole text; give a number, or no drafting")
        return speculate(model, prompts, budget, sampling, drafting).texts
    sampling.check()
    check_prompts(prompts)
    return _step_by_step(model, prompts, budget, sampling)


def _step_by_step(
    model: LanguageModel, prompts: Sequence[Sequence[int]], budget: Budgets, sampling: Sampling
) -> list[list[int]]:
    device = model.embedding_VD.device
    generator = torch.Generator().manual_seed(sampling.seed)
    if callable(budget):
        logits_BV, state = _read_step_by_step(model, prompts, budget)
    else:
        logits_BV, state = read_prompts(model, prompts, budget)
    texts = [Text(sampling) for _ in prompts]
    while True:
        ids_B = draw(logits_BV, sampling, generator)
        for row, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            if state.lengths[row] < len(prompt):  # longer than the shortest, at a changing budget: still being read
                ids_B[row] = prompt[state.lengths[row]]
            else:
                text.add([int(ids_B[row])])
        if not any(text.is_open for text in texts):
            return [text.ids for text in texts]
        logits_BV, state = model.step(ids_B.to(device), state, budget(state.position) if callable(budget) else budget)


def sample_text(model: LanguageModel, tokenizer: Tokenizer, prompt: str, budget: Budgets, sampling: Sampling) -> str:
    """The prompt's continuation as text, up to the end of its document; `sampling.ended` sees it grow."""
    prompt_ids, sampling = _for_text(tokenizer, prompt, sampling)
    return _decoded(tokenizer, generate(model, [prompt_ids], budget, sampling)[0])


def draft_text(
    model: LanguageModel, tokenizer: Tokenizer, prompt: str, k: Budget, sampling: Sampling, drafting: Drafting
) -> tuple[str, Speculated]:
    """`sample_text`, with drafts at a smaller budget, and how well they did."""
    prompt_ids, sampling = _for_text(tokenizer, prompt, sampling)
    _warn_beyond(model, [prompt_ids], k, sampling)
    found = speculate(model, [prompt_ids], k, sampling, drafting)
    return _decoded(tokenizer, found.texts[0]), found


def _warn_beyond(model: LanguageModel, prompts: Sequence[Sequence[int]], k: Budget, sampling: Sampling) -> None:
    """A warning to the caller's caller where the texts become longer than the filters carry."""
    if sampling.max_tokens > 0 and prompts:
        warning = model.beyond_trained(max(map(len, prompts)) + sampling.max_tokens, k)
        if warning:
            warnings.warn(warning, stacklevel=3)


def _for_text(tokenizer: Tokenizer, prompt: str, sampling: Sampling) -> tuple[list[int], Sampling]:
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(f"the prompt {prompt!r} is not UTF-8; give text") from None
    prompt_ids: list[int] = tokenizer.encode([prompt])[0].tolist()
    return prompt_ids, sampling._replace(stop_ids={*sampling.stop_ids, tokenizer.eod})


def _decoded(tokenizer: Tokenizer, drawn: Sequence[int]) -> str:
    return tokenizer.decode([token for token in drawn if token < tokenizer.vocab_size])


class TextStream:
    """Hands on a text while it is drawn, as `Sampling.ended`: each time what has come to it, in whole characters."""

    def __init__(self, tokenizer: Tokenizer, tell: Callable[[str], None]) -> None:
        self._tokenizer, self._tell = tokenizer, tell
        self._told = 0
        """Characters."""

    def __call__(self, ids: Sequence[int]) -> bool:
        text = self._tokenizer.decode([token for token in ids if token < self._tokenizer.vocab_size])
        self._tell_to(text, len(text.rstrip(UNFINISHED)))
        return False

    def finish(self, text: str) -> None:
        """Hands on the rest of the whole text."""
        self._tell_to(text, len(text))

    def _tell_to(self, text: str, end: int) -> None:
        if end > self._told:
            self._tell(text[self._told : end])
            self._told = end


def _read_step_by_step(
    model: LanguageModel, prompts: Sequence[Sequence[int]], budget: Callable[[int], Budget]
) -> tuple[Tensor, DecodingState]:
    """`read_prompts` at a budget that changes, of what all prompts have: their tokens up to the end of the shortest."""
    common = min(len(prompt) for prompt in prompts)
    ids_BL = torch.tensor([list(prompt[:common]) for prompt in prompts], device=model.embedding_VD.device)
    logits_BV, state = model.prefill(ids_BL[:, :1], budget(0))
    for position in range(1, common):
        logits_BV, state = model.step(ids_BL[:, position], state, budget(position))
    return logits_BV, state
