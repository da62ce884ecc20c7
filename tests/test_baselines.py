"""Baselines: counts give distributions, know what they have seen, and agree with the formula written out."""

from __future__ import annotations

import gzip
import itertools
from collections import Counter

import numpy as np
import pytest

from megassm.data.tokenizer.base import BytesTokenizer
from megassm.eval.baselines import DISCOUNT, NGrams, baselines

V = 5
IDS = np.random.default_rng(0).integers(0, V, 60)
IDS[20:40] = IDS[:20]


def test_every_context_gives_a_distribution() -> None:
    counted = NGrams(IDS, V)
    every = np.arange(V)
    assert counted.unigram(every).sum() == pytest.approx(1)
    for b in range(V):
        assert counted.bigram(np.full(V, b), every).sum() == pytest.approx(1)
        for a in range(V):
            rows = [counted.trigram(np.array([a, b, c]))[1] for c in range(V)]
            assert sum(rows) == pytest.approx(1)
            assert min(rows) > 0


def test_a_trigram_is_the_formula() -> None:
    ids = IDS.tolist()
    triples = Counter(zip(ids, ids[1:], ids[2:], strict=False))
    kinds = set(triples)
    pairs = set(itertools.pairwise(ids))

    def one(c: int) -> float:
        return (sum(y == c for _, y in pairs) + 1) / (len(pairs) + V)

    def two(b: int, c: int) -> float:
        total = sum(y == b for _, y, _ in kinds)
        found = sum((y, z) == (b, c) for _, y, z in kinds)
        distinct = len({z for _, y, z in kinds if y == b})
        return (max(found - DISCOUNT, 0) + DISCOUNT * distinct * one(c)) / total

    def three(a: int, b: int, c: int) -> float:
        total = sum(count for (x, y, _), count in triples.items() if (x, y) == (a, b))
        distinct = len({z for x, y, z in kinds if (x, y) == (a, b)})
        if not total:
            return two(b, c)
        return (max(triples[a, b, c] - DISCOUNT, 0) + DISCOUNT * distinct * two(b, c)) / total

    counted = NGrams(IDS, V)
    for a in range(V):
        for b in range(V):
            for c in range(V):
                assert counted.trigram(np.array([a, b, c]))[1] == pytest.approx(three(a, b, c))


def test_bits_per_byte_are_of_the_text_after_the_first_id() -> None:
    tokenizer = BytesTokenizer()
    text = b"the cat sat on the mat; the dog sat on the cat; " * 400
    ids = np.frombuffer(text, dtype=np.uint8).astype(np.int64)
    ids = np.insert(ids, 500, tokenizer.eod)
    found = {baseline.name: baseline.bits_per_byte for baseline in baselines(ids, ids, tokenizer)}
    assert found["gzip -9"] == pytest.approx(8 * len(gzip.compress(text[1:], 9)) / len(text[1:]))
    assert found["trigram with backoff"] < found["bigram with backoff"] < found["unigram"] < 8
    letters = np.array(list(Counter(text[1:]).values()))
    entropy = -(letters / letters.sum() * np.log2(letters / letters.sum())).sum()
    assert found["unigram"] == pytest.approx(entropy, abs=0.05)
