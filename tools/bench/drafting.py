"""What self-speculative decoding costs and gains: the parts of a round at each draft budget and length, side by side.

Costs do not depend on the weights' values, gains do: acceptance comes from a trained model, and may be of another size.
What follows for a round is m steps at K', one reading of m + 1 tokens, and 1 + a + ... + a^m tokens in expectation.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch

from megassm.config.model import ModelConfig
from megassm.cost import parameters
from megassm.eval.drafting import Drafting, expected_tokens
from megassm.eval.generate import generate
from megassm.eval.measure import seconds_of
from megassm.eval.sampling import Sampling
from megassm.eval.speculate import speculate
from megassm.model import LanguageModel

SIZES = {
    "50m": ModelConfig(
        vocab_size=8192, d_model=384, n_layers=8, seq_len=2048, num_channels=32, d_ffn=1024, gate="sigmoid",
    ),
    "50m_heads": ModelConfig(
        vocab_size=8192, d_model=768, n_layers=8, seq_len=2048, num_channels=32, d_ffn=1536, mixer_heads=12,
        gate="sigmoid",
    ),
    "tiny": ModelConfig(vocab_size=257, d_model=64, n_layers=2, seq_len=256, num_channels=8, d_ffn=128),
}  # fmt: skip
"""Spectral stacks, by name."""
CONTEXT = 256
"""Tokens read before anything is timed."""


@dataclass(frozen=True)
class DraftRow:
    """One draft budget and length."""

    draft_k: int
    drafts: int
    plain_ms: float
    """A step at full K."""
    draft_ms: float
    """A step at the draft's."""
    read_ms: float
    """The last token and the drafts at full K, without what is kept of them."""
    keep_percent: float
    """Of a round: the state after what was accepted."""
    break_even: float | None
    """The acceptance at which a round is as fast as plain steps; None where no acceptance is enough."""
    acceptance: float | None
    """Of the trained model."""
    speed_up: float | None
    """That follows from it."""


@torch.no_grad()
def bench_drafting(
    model: LanguageModel, draft_ks: Sequence[int], lengths: Sequence[int], rates: dict[int, float], repeats: int
) -> Iterator[DraftRow]:
    """Rows by draft budget and length; all parts are timed in turn, so that what else the machine does meets them all.

    `rates` is the acceptance of a draft by its budget, where it is known.
    """
    k, device = model.config.num_channels, model.embedding_VD.device
    ids_1L = torch.randint(0, model.config.vocab_size, (1, CONTEXT), device=device)
    _, state = model.prefill(ids_1L, k)
    steps: dict[int, list[float]] = {budget: [] for budget in (*draft_ks, k)}
    reads: dict[int, list[float]] = {length: [] for length in lengths}
    keeps: dict[int, list[float]] = {length: [] for length in lengths}
    for _ in range(repeats + 1):
        for budget, seconds in steps.items():
            seconds.append(seconds_of(partial(model.step, ids_1L[:, 0], state, budget), device))
            state.rewind()
        for length in lengths:
            read_s, (_, extension) = timed(partial(model.extend, ids_1L[:, : length + 1], state, k), device)
            reads[length].append(read_s)
            keeps[length].append(seconds_of(partial(extension.keep, [max(1, length // 2)]), device))
            state.rewind()
    plain_s = statistics.median(steps[k][1:])
    for budget in draft_ks:
        for length in lengths:
            draft_s, read_s, keep_s = (statistics.median(found[1:])
                                       for found in (steps[budget], reads[length], keeps[length]))  # fmt: skip
            cost = (length * draft_s + read_s + keep_s) / plain_s
            rate = rates.get(budget)
            yield DraftRow(
                draft_k=budget,
                drafts=length,
                plain_ms=1e3 * plain_s,
                draft_ms=1e3 * draft_s,
                read_ms=1e3 * read_s,
                keep_percent=100 * keep_s / (cost * plain_s),
                break_even=break_even(cost, length),
                acceptance=rate,
                speed_up=None if rate is None else expected_tokens(rate, length) / cost,
            )


T = TypeVar("T")


def timed(compute: Callable[[], T], device: torch.device) -> tuple[float, T]:
    """(seconds, what it gives)."""
    results: list[T] = []
    return seconds_of(lambda: results.append(compute()), device), results[0]


def break_even(cost: float, drafts: int) -> float | None:
    """The acceptance at which a round of `cost` plain steps gives as many tokens."""
    if cost > drafts + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_tokens(middle, drafts) < cost else (low, middle)
    return high


def acceptance_rates(
    model: LanguageModel, prompts: Sequence[Sequence[int]], draft_ks: Sequence[int], temperature: float, tokens: int
) -> dict[int, float]:
    """The chance that a draft is accepted, by its budget: one draft a round, so that each stands for itself."""
    k, sampling = model.config.num_channels, Sampling(tokens, temperature)
    return {budget: speculate(model, prompts, k, sampling, Drafting(budget, 1)).acceptance for budget in draft_ks}


def real_speed_up(
    model: LanguageModel, prompts: Sequence[Sequence[int]], sampling: Sampling, drafting: Drafting
) -> tuple[float, float]:
    """(plain decoding's time over that of drafting, the acceptance): the medians of texts decoded both ways in turn."""
    k, device = model.config.num_channels, model.embedding_VD.device
    ratios, accepted = [], []
    for prompt in prompts:
        plain_s = seconds_of(partial(generate, model, [prompt], k, sampling), device)
        drafted_s, found = timed(partial(speculate, model, [prompt], k, sampling, drafting), device)
        ratios.append(plain_s / drafted_s)
        accepted.append(found.acceptance)
    return statistics.median(ratios), statistics.median(accepted)


def estimates(model: ModelConfig, rates: dict[int, float], lengths: Sequence[int]) -> list[dict[str, float]]:
    """Where a step takes the time in which its weights are read, as for one text on a GPU, and the reading of some
    drafts takes that of one step: caches of keys and values, and all else, are left out.

    `rates` is the acceptance of a draft by its budget.
    """
    unread = 0 if model.tie_embeddings else model.vocab_size * model.d_model
    full = parameters(model, model.num_channels) - unread
    rows = []
    for k in (k for k in rates if k < model.num_channels):
        draft = (parameters(model, k) - unread) / full
        for count in lengths:
            gain = expected_tokens(rates[k], count) / (count * draft + 1)
            rows.append({"draft_k": k, "drafts": count, "draft_over_step": draft, "speed_up": gain})
    return rows
