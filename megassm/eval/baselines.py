"""What a text costs without a network: counts of tokens, and compressors. The bars a language model has to clear.

The trigram is interpolated Kneser-Ney (Chen & Goodman 1999, Eq. 20): with c(a b c) occurrences in the training text,

    p(c | a b) = max(c(a b c) - D, 0) / c(a b)  +  D N(a b .) / c(a b)  p(c | b)

where N counts distinct continuations, and p(c | b) is the same with distinct predecessors N(. b c) in place of
occurrences, and so on down to a uniform share for what never occurred. It backs off to the shorter context as far as
the longer one is unsure, and counts the ids that the model is trained on. Compressors see the scored text alone.

Shapes: N tokens, V vocabulary.
"""

from __future__ import annotations

import gzip
import lzma
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megassm.data.blocks import local_fetch, read_block
from megassm.data.index import ShardSet
from megassm.data.tokenizer.base import Tokenizer

Ids = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

DISCOUNT = 0.75
"""D; between 0.6 and 0.9 nothing changes by a percent."""
TRAINING_TOKENS = 20_000_000
"""Most that the counts are made of: a few GB of memory."""


class Baseline(NamedTuple):
    """One way to predict the text."""

    name: str
    bits_per_byte: float


def read_ids(shards: ShardSet, limit: int) -> Ids:
    """The first ids of a data set as stored, at most `limit`."""
    fetch, parts, count = local_fetch(shards.directory), [np.empty(0, dtype=np.int64)], 0
    for block in range(len(shards.blocks)):
        if count >= limit:
            break
        parts.append(np.asarray(read_block(shards, block, fetch), dtype=np.int64))
        count += len(parts[-1])
    return np.concatenate(parts)[:limit]


def baselines(train_N: Ids, valid_N: Ids, tokenizer: Tokenizer) -> list[Baseline]:
    """Bits per byte of `valid_N` after its first id, by each way.

    Args:
        train_N: ids to count.
        valid_N: ids to predict, at least two.
        tokenizer: of both.
    """
    ends = np.flatnonzero(valid_N[1:] == tokenizer.eod) + 1
    text = b"".join(_text(part_N, tokenizer) for part_N in np.split(valid_N[1:], ends))
    counted = NGrams(train_N, tokenizer.vocab_size)
    found = {
        "unigram": counted.unigram(valid_N[1:]),
        "bigram with backoff": counted.bigram(valid_N[:-1], valid_N[1:]),
        "trigram with backoff": counted.trigram(valid_N),
    }
    by_counts = {name: float(-np.log2(p_N).sum()) for name, p_N in found.items()}
    packed = {"gzip -9": gzip.compress(text, 9), "xz -9e": lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)}
    bits = by_counts | {name: 8.0 * len(content) for name, content in packed.items()}
    return [Baseline(name, value / max(1, len(text))) for name, value in bits.items()]


def _text(ids_N: Ids, tokenizer: Tokenizer) -> bytes:
    return tokenizer.decode(ids_N[ids_N != tokenizer.eod].tolist()).encode()


class NGrams:
    """Counts of a training text, and the probabilities they give."""

    def __init__(self, ids_N: Ids, vocab_size: int) -> None:
        self._size = vocab_size
        self._frequency_V = np.bincount(ids_N, minlength=vocab_size)
        pairs_N = ids_N[:-1] * vocab_size + ids_N[1:]
        triples_N = pairs_N[:-1] * vocab_size + ids_N[2:]
        self._triples = _Counts.of(triples_N)
        self._contexts = _Counts.of(pairs_N[:-1])
        self._followers = _Counts.of(self._triples.keys // vocab_size)  # N(a b .)
        self._predecessors = _Counts.of(self._triples.keys % vocab_size**2)  # N(. b c)
        tokens_V = self._predecessors.keys // vocab_size
        self._predecessors_V = np.bincount(tokens_V, self._predecessors.values, minlength=vocab_size)  # N(. b .)
        self._followers_V = np.bincount(tokens_V, minlength=vocab_size)
        seen_V = np.bincount(np.unique(pairs_N) % vocab_size, minlength=vocab_size)  # N(. c)
        self._share_V = _smoothed(seen_V)

    def unigram(self, ids_N: Ids) -> Floats:
        """p(c) of each id, by its frequency."""
        return np.asarray(_smoothed(self._frequency_V)[ids_N])

    def bigram(self, before_N: Ids, ids_N: Ids) -> Floats:
        """p(c | b) of each id after the one before it."""
        total_N, shorter_N = self._predecessors_V[before_N], self._share_V[ids_N]
        found_N = self._predecessors.look_up(before_N * self._size + ids_N)
        return _interpolated(found_N, total_N, self._followers_V[before_N], shorter_N)

    def trigram(self, ids_N: Ids) -> Floats:
        """p(c | a b) of each id after the first, of the second p(c | b)."""
        first = self.bigram(ids_N[:1], ids_N[1:2])
        context_N = ids_N[:-2] * self._size + ids_N[1:-1]
        found_N = self._triples.look_up(context_N * self._size + ids_N[2:])
        shorter_N = self.bigram(ids_N[1:-1], ids_N[2:])
        total_N, followers_N = self._contexts.look_up(context_N), self._followers.look_up(context_N)
        return np.concatenate((first, _interpolated(found_N, total_N, followers_N, shorter_N)))


class _Counts(NamedTuple):
    """How often each key occurs; keys ascending."""

    keys: Ids
    values: Ids

    @classmethod
    def of(cls, keys_N: Ids) -> _Counts:
        return cls(*np.unique(keys_N, return_counts=True))

    def look_up(self, keys_N: Ids) -> Ids:
        """0 for a key that never occurred."""
        if not len(self.keys):
            return np.zeros(len(keys_N), dtype=np.int64)
        places_N = np.minimum(np.searchsorted(self.keys, keys_N), len(self.keys) - 1)
        return np.where(self.keys[places_N] == keys_N, self.values[places_N], 0)


def _smoothed(counts_V: Ids) -> Floats:
    """Shares, with one more of each, so that nothing is impossible."""
    return np.asarray((counts_V + 1.0) / (counts_V + 1.0).sum())


def _interpolated(found_N: Ids, total_N: Ids, distinct_N: Ids, shorter_N: Floats) -> Floats:
    """The discounted share of each, and the rest by the shorter context; all by it where the context never occurred."""
    share_N = (np.maximum(found_N - DISCOUNT, 0) + DISCOUNT * distinct_N * shorter_N) / np.maximum(total_N, 1)
    return np.where(total_N > 0, share_N, shorter_N)
