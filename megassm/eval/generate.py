"""Sampling text from a model at a budget K, by the parallel form over the last `seq_len` tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megassm.data.tokenizer import Tokenizer
from megassm.errors import UserError
from megassm.model import LanguageModel


class Sampling(NamedTuple):
    """How to draw."""

    max_tokens: int
    temperature: float = 0.8
    """0 takes the likeliest token."""
    seed: int = 0


@torch.no_grad()
def generate(model: LanguageModel, prompt_ids: list[int], k: int, sampling: Sampling) -> list[int]:
    """The `sampling.max_tokens` ids drawn after `prompt_ids` at budget k.

    Args:
        model: in evaluation mode.
        prompt_ids: at least one id.
        k: the budget.
        sampling: how to draw.

    Raises:
        UserError: an empty prompt, a budget out of range, a negative temperature.
    """
    if not prompt_ids:
        raise UserError("the prompt is empty; give at least one character")
    if sampling.temperature < 0 or sampling.max_tokens < 1:
        raise UserError(f"{sampling}: temperature must be at least 0, max_tokens at least 1")
    device = model.embedding_VD.device
    generator = torch.Generator().manual_seed(sampling.seed)
    ids = list(prompt_ids)
    for _ in range(sampling.max_tokens):
        context = torch.tensor([ids[-model.config.seq_len :]], device=device)
        ids.append(_draw(model(context, k)[0, -1].float().cpu(), sampling.temperature, generator))
    return ids[len(prompt_ids) :]


def _draw(logits_V: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    return int(torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator))


def sample_text(model: LanguageModel, tokenizer: Tokenizer, prompt: str, k: int, sampling: Sampling) -> str:
    """The prompt's continuation as text, up to the end of its document."""
    prompt_ids = tokenizer.encode([prompt])[0].tolist()
    drawn = generate(model, prompt_ids, k, sampling)
    end = drawn.index(tokenizer.eod) if tokenizer.eod in drawn else len(drawn)
    return tokenizer.decode([token for token in drawn[:end] if token < tokenizer.vocab_size])
