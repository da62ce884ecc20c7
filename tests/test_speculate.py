"""Self-speculative decoding: greedy texts are the plain ones, sampled ones have the plain distribution."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from megassm.errors import UserError
from megassm.eval.drafting import SLOWER, Chooser, Drafting, chooser_of
from megassm.eval.generate import generate
from megassm.eval.sampling import Sampling, probabilities
from megassm.eval.speculate import accept, speculate
from megassm.model import LanguageModel, build_model
from tests.test_decoding import model
from tests.test_model import config

PROMPTS = [[7, 3, 9, 1, 4], [2], list(range(40))]


@settings(max_examples=25, deadline=None)
@given(
    pattern=st.sampled_from(("S", "SA")),
    draft_k=st.sampled_from((1, 4, 16)),
    tokens=st.integers(1, 9),
    batch=st.integers(1, 3),
    length=st.integers(1, 40),
    stop=st.sets(st.integers(0, 49), max_size=4),
)
def test_greedy_texts_are_the_plain_ones(
    pattern: str, draft_k: int, tokens: int, batch: int, length: int, stop: set[int]
) -> None:
    network, sampling = model(pattern, 4), Sampling(length, temperature=0, stop_ids=stop)
    plain = [generate(network, [prompt], 16, sampling)[0] for prompt in PROMPTS[:batch]]
    found = speculate(network, PROMPTS[:batch], 16, sampling, Drafting(draft_k, tokens))
    assert found.texts == plain
    assert 0 <= found.accepted <= found.drafted
    if draft_k == 16 and length > 2 and not stop:
        assert found.acceptance == 1.0


def small(temperature: float) -> tuple[LanguageModel, Sampling]:
    network = build_model(config(vocab_size=6, pattern="SA", embed_init_std=1.0, num_channels=6), 3).eval()
    return network, Sampling(3, temperature)


@pytest.mark.parametrize(("top_k", "top_p"), [(None, None), (4, None), (None, 0.8)])
def test_sampled_texts_have_the_plain_distribution(top_k: int | None, top_p: float | None) -> None:
    """Of three tokens the second is a draft that was accepted, or what came in its place: 8,000 texts."""
    network, sampling = small(20.0)
    sampling = sampling._replace(top_k=top_k, top_p=top_p)
    prompts = [[1, 2, 3]] * 8_000
    found = speculate(network, prompts, 6, sampling, Drafting(1, 1))
    pairs = torch.tensor(found.texts)
    counts = torch.bincount(pairs[:, 0] * 6 + pairs[:, 1], minlength=36)
    expected = torch.zeros(36, dtype=torch.float64)
    first_V = probabilities(network.prefill(torch.tensor([[1, 2, 3]]), 6)[0], sampling)[0].double()
    for token in range(6):
        second, _ = network.prefill(torch.tensor([[1, 2, 3, token]]), 6)
        expected[token * 6 : token * 6 + 6] = first_V[token] * probabilities(second, sampling)[0].double()
    possible = expected > 0
    assert not counts[~possible].any()
    assert 0.05 < found.acceptance < 0.999
    test = chisquare(counts[possible].double().numpy(), (expected[possible] / expected.sum() * 8_000).numpy())
    assert test.pvalue > 1e-4


def test_a_draft_that_is_too_likely_is_refused_as_often_as_it_must() -> None:
    count, generator = 100_000, torch.Generator().manual_seed(0)
    draft_V, full_V = torch.tensor([0.7, 0.2, 0.1, 0.0]), torch.tensor([0.2, 0.2, 0.1, 0.5])
    drafts_B1 = torch.multinomial(draft_V.expand(count, 4), 1, generator=generator)
    full_BLV = torch.stack((full_V, torch.tensor([0.0, 0.0, 1.0, 0.0]))).expand(count, 2, 4)
    accepted_B, next_B = accept(drafts_B1, [draft_V.expand(count, 4)], full_BLV, generator)
    first_B = torch.where(accepted_B == 1, drafts_B1[:, 0], next_B)
    share = torch.bincount(first_B, minlength=4) / count
    torch.testing.assert_close(share, full_V, atol=6e-3, rtol=0)
    assert (next_B[accepted_B == 1] == 2).all()
    assert float((accepted_B == 1).float().mean()) == pytest.approx(0.5, abs=6e-3)


@settings(max_examples=60, deadline=None)
@given(
    draft_s=st.floats(0.1, 1.2),
    reading_s=st.floats(0.02, 0.4),
    rate=st.floats(0.0, 0.98),
    texts=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_chosen_drafts_never_cost_more_than_plain_decoding_by_a_twentieth(
    draft_s: float, reading_s: float, rate: float, texts: int, seed: int
) -> None:
    """In a world of these costs, where a plain step takes 1 s: two texts, of which the second finds drafts worse."""
    drawn, chooser = random.Random(seed), Chooser(16)
    for rate_now in (rate, rate / 4):
        chooser.begin()
        spent, tokens = 0.0, 0.0
        while tokens < 400:
            made = chooser.choose(texts, 8)
            if made.tokens == 0:
                spent, tokens = spent + 1.0, tokens + 1.0
                chooser.stepped(texts, 1.0)
                continue
            chance = rate_now * (1 - 1 / made.k)
            accepted = [next((place for place in range(made.tokens) if drawn.random() > chance), made.tokens)
                        for _ in range(texts)]  # fmt: skip
            costs = draft_s * made.tokens, 1.0 + reading_s * made.tokens
            chooser.drafted(made, accepted, *costs)
            spent, tokens = spent + sum(costs), tokens + 1.0 + sum(accepted) / texts
        assert spent <= (1.01 + SLOWER) * tokens + 4 * sum(costs if made.tokens else (0.0,))
        assert chooser.speed_up == pytest.approx(tokens / spent)


def test_a_world_in_which_drafts_pay_is_found_and_used() -> None:
    chooser, spent, tokens = Chooser(32), 0.0, 0.0
    for _ in range(2000):
        made = chooser.choose(1, 8)
        if made.tokens:
            good = {2: 0, 4: 8, 8: 8, 16: 8}[made.k]  # of the drafts at K = 2 none is accepted
            accepted, costs = min(good, made.tokens), (made.tokens * made.k / 32, 1.2)
            chooser.drafted(made, [accepted], *costs)
            spent, tokens = spent + sum(costs), tokens + 1 + accepted
        else:
            chooser.stepped(1, 1.0)
            spent, tokens = spent + 1, tokens + 1
    assert tokens / spent > 3.0  # nine tokens for 8/8 + 1.2 are 4.1
    assert (made.k, made.tokens) in ((4, 8), (32, 0))


@pytest.mark.parametrize("pattern", ["S", "SA"])
def test_chosen_drafts_give_the_plain_greedy_texts(pattern: str) -> None:
    """By real times: whatever is chosen, the texts are the same; drafts are made in some of them."""
    network, sampling = model(pattern, 4), Sampling(250, temperature=0)
    plain = [generate(network, [prompt], 16, sampling)[0] for prompt in PROMPTS]
    found = speculate(network, PROMPTS, 16, sampling, Drafting.auto())
    assert found.texts == plain
    assert found.speed_up is not None
    learnt = chooser_of(network, 16)
    assert learnt is chooser_of(network, 16)
    assert learnt._costs.count("step", 16, 3) > 4


@pytest.mark.parametrize(("drafting", "said"), [(Drafting(17), "draft_k = 17"), (Drafting(0), "draft_k = 0"),
                                                (Drafting(1, 0), "draft_tokens = 0")])  # fmt: skip
def test_wrong_values_are_named(drafting: Drafting, said: str) -> None:
    with pytest.raises(UserError, match=said):
        speculate(model("S", 4), PROMPTS, 16, Sampling(3), drafting)


def test_a_budget_that_changes_cannot_be_drafted_for() -> None:
    network, sampling = model("S", 4), Sampling(3, temperature=0)
    with pytest.raises(UserError, match="drafting needs one budget"):
        generate(network, PROMPTS, lambda _: 4, sampling, Drafting(1))
    assert generate(network, PROMPTS[:1], 16, sampling, Drafting(2)) == generate(network, PROMPTS[:1], 16, sampling)
