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

import time
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from megassm.config.model import Budget
from megassm.eval.drafting import Chooser, Drafting, Round, chooser_of
from megassm.eval.sampling import Sampling, Text, check_prompts, draw, probabilities, read_prompts
from megassm.layers.state import DecodingState
from megassm.model import LanguageModel


class Speculated(NamedTuple):
    """Texts, and how well the drafts did."""

    texts: list[list[int]]
    rounds: int
    """Times that the full budget read drafts, over all texts."""
    drafted: int
    accepted: int
    speed_up: float | None = None
    """Over plain decoding, by the time that its steps take; where budgets are chosen, which times them."""

    @property
    def acceptance(self) -> float:
        """Share of the drafts that were accepted."""
        return self.accepted / self.drafted if self.drafted else 0.0


class _Batch:
    """Texts that still grow."""

    def __init__(self, model: LanguageModel, k: Budget, sampling: Sampling) -> None:
        self.model, self.k, self.sampling = model, k, sampling
        self.generator = torch.Generator().manual_seed(sampling.seed)
        self.last_B = torch.empty(0, dtype=torch.long)
        """Drawn last, not yet read."""
        self.state: DecodingState

    def begin(self, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        """The first token of each text."""
        logits_BV, self.state = read_prompts(self.model, prompts, self.k)
        self.last_B = draw(logits_BV, self.sampling, self.generator)
        return [[token] for token in self.last_B.tolist()]

    def take(self, rows: list[int]) -> None:
        """Goes on with some of the texts."""
        self.state = self.state.take(torch.tensor(rows, device=self._device))
        self.last_B = self.last_B[rows]

    def step(self) -> list[list[int]]:
        """The next token of each text, without drafts."""
        logits_BV, self.state = self.model.step(self.last_B.to(self._device), self.state, self.k)
        self.last_B = draw(logits_BV, self.sampling, self.generator)
        return [[token] for token in self.last_B.tolist()]

    def draft(self, made: Round) -> list[Tensor]:
        """What each draft was drawn from, q (B, V); `drafts_BL` are then the last tokens and the drafts."""
        drafts, chances, ahead = [self.last_B], [], self.state
        for _ in range(made.tokens):
            logits_BV, ahead = self.model.step(drafts[-1].to(self._device), ahead, made.k)
            chances.append(probabilities(logits_BV, self.sampling))
            drafts.append(torch.multinomial(chances[-1], 1, generator=self.generator)[:, 0])
        self.state.rewind()
        self.drafts_BL = torch.stack(drafts, 1)
        return chances

    def verify(self, chances: Sequence[Tensor]) -> list[list[int]]:
        """The tokens that each text gains by its drafts."""
        ids_BL = self.drafts_BL
        logits_BLV, extension = self.model.extend(ids_BL.to(self._device), self.state, self.k)
        full_BLV = probabilities(logits_BLV.flatten(0, 1), self.sampling).view(*ids_BL.shape, -1)
        accepted_B, self.last_B = accept(ids_BL[:, 1:], chances, full_BLV, self.generator)
        counts = accepted_B.tolist()
        self.state = extension.keep([1 + count for count in counts])
        return [[*ids_BL[row, 1 : 1 + count].tolist(), int(self.last_B[row])] for row, count in enumerate(counts)]

    @property
    def _device(self) -> torch.device:
        return self.model.embedding_VD.device


@torch.no_grad()
def speculate(
    model: LanguageModel, prompts: Sequence[Sequence[int]], k: Budget, sampling: Sampling, drafting: Drafting
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
    chooser = chooser_of(model, cast(int, k)) if drafting.k == "auto" else None
    batch, texts = _Batch(model, k, sampling), [Text(sampling) for _ in prompts]
    for text, tokens in zip(texts, batch.begin(prompts), strict=True):
        text.add(tokens)
    rounds = drafted = accepted = 0
    growing = list(range(len(prompts)))
    while True:
        still = [place for place, row in enumerate(growing) if texts[row].is_open]
        if not still:
            speed_up = None if chooser is None else chooser.speed_up
            return Speculated([text.ids for text in texts], rounds, drafted, accepted, speed_up)
        if len(still) < len(growing):
            batch.take(still)
            growing = [growing[place] for place in still]
        most = min(drafting.tokens, max(sampling.max_tokens - len(texts[row].ids) for row in growing) - 1)
        made = Round(cast(int, drafting.k), most) if chooser is None else chooser.choose(len(growing), most)
        news = _made(batch, made, chooser)
        for row, tokens in zip(growing, news, strict=True):
            texts[row].add(tokens)
            if made.tokens:
                rounds, drafted, accepted = rounds + 1, drafted + made.tokens, accepted + len(tokens) - 1


def _made(batch: _Batch, made: Round, chooser: Chooser | None) -> list[list[int]]:
    """The tokens that a round, or a plain step, gives each text; the chooser is told."""
    started = time.perf_counter()
    if made.tokens == 0:
        news = batch.step()
        if chooser is not None:
            chooser.stepped(len(news), time.perf_counter() - started)
        return news
    chances = batch.draft(made)
    drafted = time.perf_counter()
    news = batch.verify(chances)
    if chooser is not None:
        accepted = [len(tokens) - 1 for tokens in news]
        chooser.drafted(made, accepted, drafted - started, time.perf_counter() - drafted)
    return news


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
