"""Continuous batching: each text is what it is alone, at its own K; nothing is left of those that ended."""

from __future__ import annotations

import gc
import random
from collections.abc import Sequence

import pytest
import torch

from megassm.errors import UserError
from megassm.eval.costs import Costs
from megassm.eval.generate import generate
from megassm.eval.policies import FixedBudget, KeepDeadlines, Need, measured_costs
from megassm.eval.sampling import Sampling
from megassm.eval.scheduler import Limits, News, Request, Scheduler
from megassm.layers.state import DecodingState
from megassm.model import build_model
from tests.test_decoding import K_MAX, model
from tests.test_model import config


def requests(count: int, longest: int, seed: int = 0) -> list[Request]:
    """Prompts of 1 to `longest` tokens, as many short as long ones on a scale of ratios; K from 2 to full."""
    drawn = random.Random(seed)
    result = []
    for number in range(count):
        length = round(longest ** drawn.random())
        prompt = [drawn.randrange(50) for _ in range(length)]
        sampling = Sampling(drawn.randint(1, 10), temperature=0, seed=number, stop_ids={drawn.randrange(50)})
        result.append(Request(prompt, sampling, drawn.choice((2, 4, 8, 16, None))))
    return result


def run(scheduler: Scheduler, wanted: Sequence[Request], at_once: int = 5) -> dict[int, list[int]]:
    """All texts by the requests' places, which are submitted a few a step."""
    texts, places, left = {}, {}, list(enumerate(wanted))
    while left or scheduler.is_busy:
        for place, request in left[:at_once]:
            places[scheduler.submit(request)] = place
        left = left[at_once:]
        texts |= {places[news.number]: news.text for news in scheduler.step() if news.text is not None}
    return texts


@pytest.mark.parametrize(("pattern", "heads", "count", "longest"), [("SA", 1, 200, 2000), ("SA", 4, 60, 300)])
def test_mixed_requests_give_what_each_gives_alone(pattern: str, heads: int, count: int, longest: int) -> None:
    network, wanted = model(pattern, heads), requests(count, longest)
    scheduler = Scheduler(network, limits=Limits(texts=8, read_tokens=300))
    found = run(scheduler, wanted)
    alone = [generate(network, [request.prompt], request.k, request.sampling)[0] for request in wanted]
    assert [found[place] for place in range(count)] == alone
    assert scheduler.state_bytes == 0


def test_sampled_texts_do_not_depend_on_their_neighbours() -> None:
    network = model("SA")
    wanted = [Request([seed, 3], Sampling(6, 2.0, top_k=20, seed=seed), 8) for seed in range(12)]
    found = run(Scheduler(network), wanted)
    for place, request in enumerate(wanted):
        assert found[place] == generate(network, [request.prompt], 8, request.sampling)[0]


def test_news_tell_each_token_as_it_is_drawn() -> None:
    scheduler = Scheduler(model("S"), FixedBudget(4))
    number = scheduler.submit(Request([1, 2], Sampling(3, temperature=0), 8))
    told = [news for _ in range(3) for news in scheduler.step()]
    assert [news.k for news in told] == [4, 4, 4]
    assert [news.text for news in told[:2]] == [None, None]
    assert told[2] == News(number, told[2].token, 4, [news.token for news in told if news.token is not None])
    assert not scheduler.is_busy
    assert scheduler.step() == []


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(each), torch.Tensor) for each in gc.get_objects())


def test_memory_stays_flat_and_cancelled_texts_leave_nothing() -> None:
    network = model("SA", 4)
    scheduler = Scheduler(network, limits=Limits(texts=4))
    run(scheduler, requests(20, 40))
    before = live_tensors()
    run(scheduler, requests(60, 40, seed=1))
    assert live_tensors() == before
    numbers = [scheduler.submit(request) for request in requests(8, 40, seed=2)]
    scheduler.step()
    assert scheduler.state_bytes > 0
    for number in (*numbers, *numbers, 10**6):
        scheduler.cancel(number)
    assert not scheduler.is_busy
    assert scheduler.state_bytes == 0
    assert live_tensors() == before


def test_a_cancelled_text_does_not_change_the_others() -> None:
    network, wanted = model("SA"), [request._replace(k=8) for request in requests(6, 60)]
    wanted = [request._replace(sampling=Sampling(8, temperature=0)) for request in wanted]
    scheduler = Scheduler(network)
    numbers = [scheduler.submit(request) for request in wanted]
    texts = {}
    for turn in range(9):
        if turn == 3:
            scheduler.cancel(numbers[2])
        texts |= {news.number: news.text for news in scheduler.step() if news.text is not None}
    assert sorted(texts) == [number for number in numbers if number != numbers[2]]
    for number, text in texts.items():
        assert text == generate(network, [wanted[numbers.index(number)].prompt], 8, wanted[0].sampling)[0]


@torch.no_grad()
def test_states_are_put_together_and_taken_apart() -> None:
    network, ids = model("SA", 4), torch.arange(40)
    states = [network.prefill(ids[None, :length], 8)[1] for length in (3, 30, 1)]
    joined = DecodingState.joined(states)
    logits_BV, after = network.step(torch.tensor([7, 8, 9]), joined, 8)
    assert after.lengths == (4, 31, 2)
    assert joined.nbytes == sum(state.nbytes for state in states)
    again = DecodingState.joined([joined.take(torch.tensor([row, row])) for row in range(3)])
    twice_BV, _ = network.step(torch.tensor([7, 7, 8, 8, 9, 9]), again, 8)
    torch.testing.assert_close(twice_BV, logits_BV.repeat_interleave(2, 0))
    for part, token, row_V in zip(after.parts(), (1, 2, 3), logits_BV, strict=True):
        alone = network.prefill(ids[None, : part.lengths[0] - 1], 8)[1]
        expected_BV, alone = network.step(torch.tensor([6 + token]), alone, 8)
        torch.testing.assert_close(row_V, expected_BV[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(*(network.step(torch.tensor([token]), s, 8)[0] for s in (part, alone)))


def timed(step_ms: dict[int, float], read_ms: float = 0.0) -> Costs:
    costs = Costs()
    for k, milliseconds in step_ms.items():
        costs.add("step", k, 1, milliseconds / 1e3)
        costs.add("read", k, 256, read_ms / 1e3)
    return costs


def test_the_largest_budget_that_keeps_every_deadline() -> None:
    policy = KeepDeadlines((2, 8, 32), timed({2: 1, 8: 2, 32: 4}, read_ms=10), margin=1.0)

    def chosen(*needs: Need, waiting: tuple[Need, ...] = (), places: int = 4) -> list[int]:
        return policy.choose(needs, waiting, places)

    assert chosen() == []
    assert chosen(Need(32, 0, 100, float("inf")), Need(16, 0, 100, 0.5)) == [32, 16]
    assert chosen(Need(32, 0, 100, float("inf")), Need(32, 0, 100, 0.3)) == [8, 8]
    # one that waits for a place begins 50 steps later: 150 steps of 2 ms
    assert chosen(Need(32, 0, 50, 1.0), waiting=(Need(32, 0, 100, 0.31),), places=1) == [8]
    assert chosen(Need(32, 0, 50, 1.0), waiting=(Need(32, 0, 100, 0.31),), places=2) == [8]
    assert chosen(Need(32, 0, 50, 1.0), waiting=(Need(32, 0, 100, 0.41),), places=2) == [32]
    # prompts ahead are read first: 2,560 tokens take 100 ms
    assert chosen(Need(32, 2560, 10, 1.0), Need(32, 0, 100, 0.41)) == [8, 8]
    # one that is late at any budget costs the others nothing
    assert chosen(Need(32, 0, 100, 0.05), Need(32, 0, 100, 0.5)) == [32, 32]


def test_newest_timings_count() -> None:
    policy = KeepDeadlines((2, 32), timed({2: 1, 32: 4}), margin=1.0)
    need = Need(32, 0, 100, 0.5)
    assert policy.choose([need], [], 1) == [32]
    for _ in range(3):
        policy.stepped(32, 1, 0.02)
    assert policy.choose([need], [], 1) == [2]


def test_a_deadline_lowers_the_budget_and_the_text_is_that_of_the_budgets_told() -> None:
    """By a clock that goes on 1 ms a step: at K = 32 there would be no time."""
    network, now_s = build_model(config(pattern="S", n_layers=1, seq_len=2048, num_channels=K_MAX), 0).eval(), [0.0]
    costs = timed({2: 1, 32: 5})
    scheduler = Scheduler(network, KeepDeadlines((2, 32), costs), clock=lambda: now_s[0])
    scheduler.submit(Request([1, 2, 3], Sampling(20, temperature=0), deadline_s=0.06))
    told: list[News] = []
    while scheduler.is_busy:
        told += scheduler.step()
        costs.add("step", 2, 1, 1e-3)
        for _ in range(20):
            costs.add("step", 32, 1, 5e-3)
        now_s[0] += 1e-3
    budgets = [news.k for news in told]
    assert budgets[0] == 2
    assert budgets[-1] == 32
    changing = generate(network, [[1, 2, 3]], lambda position: budgets[max(0, position - 2)], Sampling(20, 0.0))
    assert told[-1].text == changing[0]


def test_costs_are_measured_at_each_budget() -> None:
    costs = measured_costs(model("S"), (2, 8), places=3, repeats=2)
    for k in (2, 8):
        assert [costs.count("step", k, size) for size in (1, 2, 4)] == [2, 2, 2]
        assert costs.seconds("read", k, 200) > 0
    with pytest.raises(KeyError, match="no step at K = 5"):
        costs.seconds("step", 5, 1)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (Request([]), "prompt is empty"),
        (Request([3, 50]), "id 50: must be between 0 and 49"),
        (Request([1], k=33), "K = 33"),
        (Request([1], deadline_s=0), "deadline_s = 0"),
        (Request([1], Sampling(0)), "max_tokens = 0"),
    ],
)
def test_what_cannot_be_run_is_refused_before_it_waits(request_: Request, said: str) -> None:
    scheduler = Scheduler(model("S"))
    with pytest.raises(UserError, match=said):
        scheduler.submit(request_)
    assert not scheduler.is_busy


def test_wrong_settings_are_named() -> None:
    with pytest.raises(UserError, match="texts=0"):
        Scheduler(model("S"), limits=Limits(0))
    with pytest.raises(UserError, match=r"budgets \[\]"):
        KeepDeadlines((), Costs())
    with pytest.raises(UserError, match="margin = 2"):
        KeepDeadlines((2,), Costs(), margin=2)
    with pytest.raises(UserError, match="k = 0"):
        FixedBudget(0)
