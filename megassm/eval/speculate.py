"""Self-speculative decoding: an elastic model drafts for itself at a small budget, and loses nothing.

A round drafts m tokens at the draft's budget, one step each, from the full model's own state: a draft needs no prompt
read, no cache and no weights of its own. The full budget then reads the last token and the drafts at once, by
`LanguageModel.extend`, and keeps the longest run of drafts that it accepts (Leviathan et al., arXiv 2211.17192; Chen et
al., arXiv 2302.01318): draft d is accepted with probability min(1, p(d)/q(d)), p and q being what the full budget and
the draft give after sampling's temperature, top-k and top-p; after the first that is not, a token is drawn from
max(0, p - q), normalised; after m accepted ones, from p. So texts have the distribution of plain sampling, and greedy
texts are the plain ones (to rounding: where two tokens tie, either may win). What was not accepted is taken back from
the state at no cost: it was never kept.

Shapes: B texts, m drafts, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from megassm.errors import UserError
from megassm.eval.sampling import Sampling, Text, check_prompts, draw, probabilities, read_prompts
from megassm.layers.state import DecodingState
from megassm.model import LanguageModel


class Drafting(NamedTuple):
    """How to draft."""

    k: int
    """Budget of the drafts."""
    tokens: int = 4
    """Drafts a round."""

    def check(self, k: int) -> None:
        """UserError naming the value and the rule; `k` is the budget that texts are to have."""
        if not 1 <= self.k <= k:
            raise UserError(f"draft_k = {self.k}: must be between 1 and the budget K = {k} of the text")
        if self.tokens < 1:
            raise UserError(f"draft_tokens = {self.tokens}: must be at least 1")


class Speculated(NamedTuple):
    """Texts, and how well the drafts did."""

    texts: list[list[int]]
    rounds: int
    """Times that the full budget read drafts, over all texts."""
    drafted: int
    accepted: int

    @property
    def acceptance(self) -> float:
        """Share of the drafts that were accepted."""
        return self.accepted / self.drafted if self.drafted else 0.0


@torch.no_grad()
def speculate(
    model: LanguageModel, prompts: Sequence[Sequence[int]], k: int, sampling: Sampling, drafting: Drafting
) -> Speculated:
    """`generate` at budget k with drafts at a smaller one.

    Args:
        model: in evaluation mode.
        prompts: ids; they may differ in length.
        k: the budget that texts have the distribution of.
        sampling: how to draw.
        drafting: how to draft.

    Raises:
        UserError: an empty prompt, a budget or a value out of range.
    """
    sampling.check()
    drafting.check(k)
    check_prompts(prompts)
    generator = torch.Generator().manual_seed(sampling.seed)
    logits_BV, state = read_prompts(model, prompts, k)
    last_B = draw(logits_BV, sampling, generator)
    texts = [Text(sampling) for _ in prompts]
    for text, token in zip(texts, last_B.tolist(), strict=True):
        text.add([token])
    rounds = drafted = accepted = 0
    growing = list(range(len(prompts)))
    while True:
        still = [place for place, row in enumerate(growing) if texts[row].is_open]
        if not still:
            return Speculated([text.ids for text in texts], rounds, drafted, accepted)
        if len(still) < len(growing):
            rows = torch.tensor(still, device=model.embedding_VD.device)
            state, last_B = state.take(rows), last_B[still]
            growing = [growing[place] for place in still]
        longest = max(sampling.max_tokens - len(texts[row].ids) for row in growing)
        chosen = drafting._replace(tokens=min(drafting.tokens, longest - 1))
        last_B, state, news = _round(model, last_B, state, k, sampling, chosen, generator)
        for row, tokens in zip(growing, news, strict=True):
            texts[row].add(tokens)
            rounds, drafted, accepted = rounds + 1, drafted + chosen.tokens, accepted + len(tokens) - 1


def _round(  # noqa: PLR0913
    model: LanguageModel,
    last_B: Tensor,
    state: DecodingState,
    k: int,
    sampling: Sampling,
    drafting: Drafting,
    generator: torch.Generator,
) -> tuple[Tensor, DecodingState, list[list[int]]]:
    """(the last tokens, the state before them, the tokens that each text gained), from the ones before."""
    device, drafts, chances = model.embedding_VD.device, [last_B], []
    ahead = state
    for _ in range(drafting.tokens):
        logits_BV, ahead = model.step(drafts[-1].to(device), ahead, drafting.k)
        chances.append(probabilities(logits_BV, sampling))
        drafts.append(torch.multinomial(chances[-1], 1, generator=generator)[:, 0])
    state.rewind()
    ids_BL = torch.stack(drafts, 1)
    logits_BLV, extension = model.extend(ids_BL.to(device), state, k)
    full_BLV = probabilities(logits_BLV.flatten(0, 1), sampling).view(*ids_BL.shape, -1)
    accepted_B, next_B = accept(ids_BL[:, 1:], chances, full_BLV, generator)
    counts = accepted_B.tolist()
    news = [[*ids_BL[row, 1 : 1 + count].tolist(), int(next_B[row])] for row, count in enumerate(counts)]
    return next_B, extension.keep([1 + count for count in counts]), news


def accept(
    drafts_Bm: Tensor, chances: Sequence[Tensor], full_BLV: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """(how many drafts are accepted (B,), the token after them (B,)).

    Args:
        drafts_Bm: drawn from `chances`, q (B, V) of each draft.
        full_BLV: p (B, m + 1, V) at each draft and after the last.
        generator: of the random draws.
    """
    batch, count = drafts_Bm.shape
    nothing_B1V = torch.zeros_like(full_BLV[:, :1])
    draft_BLV = torch.cat((torch.stack(list(chances), 1), nothing_B1V), 1) if count else nothing_B1V
    own_Bm, theirs_Bm = (
        chance_BLV[:, :count].gather(2, drafts_Bm[..., None])[..., 0] for chance_BLV in (full_BLV, draft_BLV)
    )
    draws_Bm = torch.rand(batch, count, generator=generator, dtype=full_BLV.dtype)
    accepted_B = (draws_Bm * theirs_Bm < own_Bm).long().cumprod(1).sum(1)
    rows = torch.arange(batch)
    left_BV = (full_BLV[rows, accepted_B] - draft_BLV[rows, accepted_B]).clamp_min(0)
    # rounding may leave nothing where p and q are equal: such a draft is refused with probability 0
    left_BV = torch.where(left_BV.sum(1, keepdim=True) > 0, left_BV, full_BLV[rows, accepted_B])
    return accepted_B, torch.multinomial(left_BV, 1, generator=generator)[:, 0]
