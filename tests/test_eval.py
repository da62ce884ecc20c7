"""Scores, baselines, memory and sampling."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from megassm.data.stream import MicroBatch
from megassm.data.tokenizer.base import load_tokenizer
from megassm.errors import UserError
from megassm.eval.generate import generate, sample_text
from megassm.eval.measure import peak_tensor_bytes
from megassm.eval.sampling import Sampling, probabilities
from megassm.eval.score import Score, best_unigram, by_sequence, ratio_error, score, sequence_scores, token_counts
from megassm.model import build_model, losses_at
from tests.test_model import config

CPU = torch.device("cpu")
TOKEN_BYTES = np.arange(50, dtype=np.int64) % 3  # 0, 1 or 2 bytes a token


def batches() -> list[MicroBatch]:
    generator = np.random.default_rng(0)
    ids = generator.integers(0, 50, (3, 2, 25))
    mask = generator.random((3, 2, 24)) < 0.8
    return [MicroBatch(ids[i], mask[i], np.arange(2)) for i in range(3)]


def test_score_sums_only_what_the_mask_keeps() -> None:
    model = build_model(config(), 0)
    found = score(lambda ids, k: losses_at(model, ids, k), batches(), 3, TOKEN_BYTES, CPU)
    nll = tokens = text = 0.0
    for batch in batches():
        log_p = model(torch.from_numpy(batch.ids_BT[:, :-1]), 3).log_softmax(-1)
        for row in range(2):
            for t in range(24):
                if batch.mask_BL[row, t]:
                    target = batch.ids_BT[row, t + 1]
                    nll -= log_p[row, t, target].item()
                    tokens += 1
                    text += target % 3
    assert found.nll == pytest.approx(nll, rel=1e-5)
    assert (found.tokens, found.text_bytes) == (tokens, text)
    assert found.bits_per_byte == pytest.approx(nll / math.log(2) / text, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(nll / tokens), rel=1e-5)


def test_scores_of_sequences_add_up_to_the_score() -> None:
    model = build_model(config(), 0)
    rows = sequence_scores(lambda ids, k: losses_at(model, ids, k), batches(), 3, TOKEN_BYTES, CPU)
    assert rows.shape == (6, 5)
    assert rows[:, 0].tolist() == [0, 1] * 3
    whole = score(lambda ids, k: losses_at(model, ids, k), batches(), 3, TOKEN_BYTES, CPU)
    assert Score.total(rows[:, 1:].tolist()) == pytest.approx(whole)
    for i, batch in enumerate(batches()):
        assert rows[2 * i : 2 * i + 2, 2].tolist() == batch.mask_BL.sum(1).tolist()


def test_scores_add_up() -> None:
    assert Score.total([Score(1, 2, 3), (10, 20, 30, 4)]) == Score(11, 22, 33, 4)


def test_the_standard_error_of_a_ratio_is_that_of_drawing_again() -> None:
    generator = np.random.default_rng(0)
    bottom_N = generator.integers(50, 500, 400).astype(np.float64)
    top_N = bottom_N * (1.5 + generator.normal(0, 0.3, 400))
    drawn = [generator.integers(0, 400, 400) for _ in range(4000)]
    again = [top_N[places].sum() / bottom_N[places].sum() for places in drawn]
    assert ratio_error(top_N, bottom_N) == pytest.approx(np.std(again), rel=0.05)
    alike = np.full(400, 2.0)
    assert ratio_error(top_N, alike) == pytest.approx(np.std(top_N, ddof=1) / 20 / 2)
    assert ratio_error(2 * bottom_N, bottom_N) == 0
    assert ratio_error(top_N[:1], alike[:1]) is ratio_error(top_N[:0], alike[:0]) is None


def test_parts_of_a_sequence_are_added_up() -> None:
    rows = np.array([[7, 1, 2, 3, 0], [-1, 9, 9, 9, 9], [3, 1, 1, 1, 1], [7, 10, 20, 30, 0]], dtype=np.float64)
    assert by_sequence(rows).tolist() == [[3, 1, 1, 1, 1], [7, 11, 22, 33, 0]]


def test_best_unigram_is_the_entropy_of_the_tokens() -> None:
    ids = np.array([[0, 1, 1, 1, 2]])
    batch = MicroBatch(ids, np.ones((1, 4), dtype=bool), np.zeros(1, dtype=np.int64))
    found = best_unigram(token_counts([batch], 3), np.array([1, 1, 4]))
    assert found.bits_per_byte == pytest.approx((3 * math.log2(4 / 3) + math.log2(4)) / 7)


def test_peak_memory_counts_live_tensors() -> None:
    def compute() -> None:
        first = torch.zeros(1000)
        second = first + 1
        del first
        third = second * 2
        third.add_(1)  # in place: nothing new
        third.view(10, 100)

    assert peak_tensor_bytes([torch.zeros(100)], compute, CPU) == 400 + 2 * 4000


def test_sampling() -> None:
    model = build_model(config(vocab_size=257, pattern="S"), 0).eval()
    (drawn,) = generate(model, [[1]], 4, Sampling(10, 1.0, seed=1))
    assert [drawn] == generate(model, [[1]], 4, Sampling(10, 1.0, seed=1))
    assert [drawn] != generate(model, [[1]], 4, Sampling(10, 1.0, seed=2))
    assert generate(model, [[1]], 4, Sampling(10, 1.0, seed=1, stop_ids=[drawn[4]])) == [drawn[: drawn.index(drawn[4])]]
    for prompts in ([], [[]], [[1], []]):
        with pytest.raises(UserError, match="prompt is empty"):
            generate(model, prompts, 4, Sampling(1))
    for wrong in ({"temperature": -1.0}, {"max_tokens": 0}, {"top_k": 0}, {"top_p": 1.5}):
        with pytest.raises(UserError, match=f"{next(iter(wrong))} = "):
            generate(model, [[1]], 4, Sampling(1)._replace(**wrong))


@pytest.mark.parametrize("pattern", ["S", "SA"])
def test_greedy_decoding_equals_the_parallel_form_beyond_the_training_length(pattern: str) -> None:
    model = build_model(config(pattern=pattern, window=7), 0).eval()
    prompts = [[1, 2, 3], [7] * 9]
    for prompt, text in zip(prompts, generate(model, prompts, 4, Sampling(40, temperature=0)), strict=True):
        ids = list(prompt)
        for _ in range(40):  # 24 is the length the filters were made for
            ids.append(int(model(torch.tensor([ids]), 4)[0, -1].argmax()))
        assert text == ids[len(prompt) :]


def test_top_k_and_top_p_restrict_the_draws() -> None:
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0], [3.0, 0.0, 1.0, 2.0]])
    likelier = torch.tensor([[0.7, 0.2, 0.06, 0.04], [0.04, 0.06, 0.2, 0.7]]).log()
    generator = torch.Generator().manual_seed(0)

    def seen(values: torch.Tensor, sampling: Sampling) -> list[set[int]]:
        draws_BN = torch.multinomial(probabilities(values, sampling), 300, replacement=True, generator=generator)
        return [set(row) for row in draws_BN.tolist()]

    assert seen(logits, Sampling(1, 1.0, top_k=2)) == [{1, 2}, {0, 3}]
    assert seen(logits, Sampling(1, 5.0)) == [{0, 1, 2, 3}, {0, 1, 2, 3}]
    assert seen(likelier, Sampling(1, 1.0, top_p=0.8)) == [{0, 1}, {2, 3}]
    assert seen(likelier, Sampling(1, 1.0, top_p=0.1)) == [{0}, {3}]


def test_text_ends_with_its_document(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer("bytes")
    model = build_model(config(vocab_size=300), 0).eval()
    drawn = [ord("o"), 299, ord("k"), tokenizer.eod, ord("!")]  # 299 is an id of the model that stands for nothing
    monkeypatch.setattr("megassm.eval.generate.generate", lambda *_: [drawn[:3]])
    assert sample_text(model, tokenizer, "x", 2, Sampling(5)) == "ok"
