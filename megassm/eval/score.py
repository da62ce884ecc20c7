"""How well a model predicts text, at a budget K: bits per byte, whatever the tokenizer.

    bits per byte = sum of -log2 p(token) / UTF-8 bytes of text

An end-of-document token costs its bits and stands for no bytes. Perplexity is per token, so it compares only models
with the same tokenizer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megassm.data.stream import MicroBatch

Losses = Callable[[Tensor, int], Tensor]
"""(ids (B, T) in host memory, K) -> negative log-likelihood in nats (B, T - 1) of the tokens after the first; (2, B,
T - 1) with what of each was predicted right."""


class Score(NamedTuple):
    """Sums over text; scores of parts add up."""

    nll: float
    """Negative log-likelihood, nats."""
    tokens: float
    """Predicted tokens."""
    text_bytes: float
    """UTF-8 bytes that these tokens stand for."""
    hits: float = 0.0
    """Tokens that were the most likely of all, where that was asked for."""

    @property
    def accuracy(self) -> float:
        return self.hits / max(1.0, self.tokens)

    @property
    def loss(self) -> float:
        """Nats a token."""
        return self.nll / max(1.0, self.tokens)

    @property
    def bits_per_byte(self) -> float:
        return self.nll / math.log(2) / max(1.0, self.text_bytes)

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(min(self.loss, 700.0))

    @staticmethod
    def total(parts: Iterable[Iterable[float]]) -> Score:
        """The score of all parts together."""
        return Score(*(sum(column) for column in zip(*parts, strict=True)))


def text_bytes(batch: MicroBatch, token_bytes: npt.NDArray[np.int64]) -> int:
    """UTF-8 bytes of the batch's predicted tokens."""
    return int(token_bytes[batch.ids_BT[:, 1:]][batch.mask_BL].sum())


def token_counts(batches: Iterable[MicroBatch], vocab_size: int) -> npt.NDArray[np.int64]:
    """(V,) how often each id is to be predicted."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for batch in batches:
        counts += np.bincount(batch.ids_BT[:, 1:][batch.mask_BL], minlength=vocab_size)
    return counts


def best_unigram(counts: npt.NDArray[np.int64], token_bytes: npt.NDArray[np.int64]) -> Score:
    """What a model that knows only each token's frequency in this very text would score: the bar to clear.

    `counts` (V,) is from `token_counts`, `token_bytes` (V,) the tokenizer's.
    """
    tokens = float(counts.sum())
    seen = counts[counts > 0]
    nll = -float((seen * np.log(seen / tokens)).sum())
    return Score(nll, tokens, float((counts * token_bytes).sum()))


def ratio_error(top_N: npt.NDArray[np.float64], bottom_N: npt.NDArray[np.float64]) -> float | None:
    """The standard error of `top_N.sum() / bottom_N.sum()` over N sequences that were drawn alike, such as of nats a
    byte; None for fewer than two."""
    count, bottom = len(top_N), bottom_N.sum()
    if count < 2 or bottom <= 0:
        return None
    off_N = top_N - bottom_N * (top_N.sum() / bottom)
    return float(math.sqrt(count / (count - 1) * np.square(off_N).sum()) / bottom)


def by_sequence(rows_N5: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Rows of `sequence_scores` with the parts of each sequence added up, and those without one left out."""
    known_N5 = rows_N5[rows_N5[:, 0] >= 0]
    numbers, place_N = np.unique(known_N5[:, 0], return_inverse=True)
    whole = np.zeros((len(numbers), 5))
    np.add.at(whole, place_N, known_N5)
    whole[:, 0] = numbers
    return whole


@torch.no_grad()
def sequence_scores(
    losses: Losses,
    batches: Iterable[MicroBatch],
    k: int,
    token_bytes: npt.NDArray[np.int64],
    device: torch.device,
) -> npt.NDArray[np.float64]:
    """(N, 5): the sample number and the `Score` of every row of `batches` at budget k, rows without a sample included.

    `token_bytes` (V,) is the tokenizer's.
    """
    parts = [np.empty((0, 5))]
    for batch in batches:
        found = losses(torch.from_numpy(batch.ids_BT), k)
        sums = (found.double() * torch.from_numpy(batch.mask_BL).to(device)).sum(-1).cpu().numpy()
        nll_B, hits_B = sums if found.dim() == 3 else (sums, np.zeros(len(sums)))
        bytes_B = (token_bytes[batch.ids_BT[:, 1:]] * batch.mask_BL).sum(1)
        parts.append(np.stack((batch.sample_ids_B, nll_B, batch.mask_BL.sum(1), bytes_B, hits_B), axis=1))
    return np.concatenate(parts)


def score(
    losses: Losses,
    batches: Iterable[MicroBatch],
    k: int,
    token_bytes: npt.NDArray[np.int64],
    device: torch.device,
) -> Score:
    """The score of `batches` at budget k. `token_bytes` (V,) is the tokenizer's."""
    return Score(*sequence_scores(losses, batches, k, token_bytes, device)[:, 1:].sum(0).tolist())
