"""Continuing text: prefill by the parallel form, then one step a token from a state of constant size.

A spectral layer remembers S x D numbers whatever the context length, and serves any budget from them: K may change
from token to token (the online budgets that the paper leaves open).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megassm.data.tokenizer.base import Tokenizer
from megassm.errors import UserError
from megassm.eval.sampling import Sampling, probabilities
from megassm.eval.speculate import Drafting, speculate
from megassm.layers.state import DecodingState
from megassm.model import LanguageModel

Budget = int | Callable[[int], int]
"""K, or the K at which the token at a position (from 0) is processed."""


DEFAULT_SAMPLING = Sampling()


@torch.no_grad()
def generate(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    k: Budget | None = None,
    sampling: Sampling = DEFAULT_SAMPLING,
    drafting: Drafting | None = None,
) -> list[list[int]]:
    """Continues each prompt by at most `sampling.max_tokens` ids, without the stop id that ended it.

    Args:
        model: in evaluation mode.
        prompts: ids; they may differ in length, and a prompt's continuation does not depend on the others but through
            the random draws.
        k: the budget, or a function of the position; None: K_max.
        sampling: how to draw.
        drafting: draft at a smaller budget first (`megassm.eval.speculate`): the same texts, sooner.

    Raises:
        UserError: an empty prompt, a budget or a sampling value out of range, drafts for a budget that changes.
    """
    budget = model.config.num_channels if k is None else k
    if drafting is not None:
        if callable(budget):
            raise UserError("drafting needs one budget for the whole text; give a number, or no drafting")
        return speculate(model, prompts, budget, sampling, drafting).texts
    sampling.check()
    if not prompts or not all(prompts):
        raise UserError("the prompt is empty; give at least one character")
    return _step_by_step(model, prompts, budget, sampling)


def _step_by_step(
    model: LanguageModel, prompts: Sequence[Sequence[int]], budget: Budget, sampling: Sampling
) -> list[list[int]]:
    device = model.embedding_VD.device
    generator = torch.Generator().manual_seed(sampling.seed)
    logits_BV, state = _prefill(model, prompts, budget)
    texts: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    while True:
        drawn = torch.multinomial(probabilities(logits_BV, sampling), 1, generator=generator)[:, 0].tolist()
        ids = []
        for row, prompt in enumerate(prompts):
            if state.position < len(prompt):  # a longer prompt than the shortest: still being read
                ids.append(prompt[state.position])
                continue
            ids.append(drawn[row])
            if row in open_rows:
                stopped = drawn[row] in sampling.stop_ids
                texts[row] += [] if stopped else [drawn[row]]
                if stopped or sampling.ends(texts[row]):
                    open_rows.discard(row)
        if not open_rows:
            return texts
        logits_BV, state = model.step(torch.tensor(ids, device=device), state, _at(budget, state.position))


def sample_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    budget: Budget,
    sampling: Sampling,
    drafting: Drafting | None = None,
) -> str:
    """The prompt's continuation as text, up to the end of its document."""
    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError(f"the prompt {prompt!r} is not UTF-8; give text") from None
    prompt_ids = tokenizer.encode([prompt])[0].tolist()
    sampling = sampling._replace(stop_ids={*sampling.stop_ids, tokenizer.eod})
    drawn = generate(model, [prompt_ids], budget, sampling, drafting)[0]
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
