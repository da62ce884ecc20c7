"""Which rank is named slow, from its own time in each phase."""

from __future__ import annotations

import time
from dataclasses import fields, replace

import numpy as np
import pytest

from megassm.data.transport import DataCounters
from megassm.parallel.phases import COMPUTE, StepPhase, Waits
from megassm.parallel.watchdog import RankProgress
from megassm.train.agreement import Message, _answer
from megassm.train.stragglers import WINDOW, Straggler, Stragglers

USUAL = (0.01, 0.20, 0.40, 0.05)


def watch(
    ranks: int, slow: dict[tuple[int, str], float], updates: int = WINDOW, readers: int = 1
) -> dict[str, Straggler]:
    """What is found where ranks take their usual times and 5% of chance, but for factors of `slow`."""
    rng, stragglers = np.random.default_rng(0), Stragglers(readers)
    found: dict[str, Straggler] = {}
    for _ in range(updates):
        seconds_RP = np.array(USUAL) * rng.normal(1, 0.05, (ranks, len(COMPUTE)))
        for (rank, phase), factor in slow.items():
            seconds_RP[rank, COMPUTE.index(phase)] *= factor
        found = stragglers.add(seconds_RP.tolist())
    return found


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_a_slow_rank_is_named_with_its_phase(ranks: int) -> None:
    found = watch(ranks, {(1, "backward"): 3.0})
    assert list(found) == ["backward"]
    assert found["backward"].rank == 1
    assert found["backward"].s / found["backward"].median_s == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize("ranks", [1, 2, 8, 64])
def test_equal_ranks_are_not_named(ranks: int) -> None:
    assert watch(ranks, {}) == {}


def test_what_is_short_or_fast_is_not_named() -> None:
    assert watch(4, {(2, "data"): 4.0}) == {}, "30 ms of an update of 660 ms"
    assert watch(4, {(2, "forward"): 0.1}) == {}
    assert watch(4, {(2, "forward"): 3.0}, updates=WINDOW - 1) == {}, "too few to tell from chance"


def test_one_slow_update_is_no_straggler() -> None:
    stragglers = Stragglers(1)
    for update in range(2 * WINDOW):
        assert stragglers.add([[0, 50.0 if update == 25 else 1.0, 1, 1], [0, 1, 1, 1]]) == {}


def test_data_is_compared_among_the_ranks_that_read() -> None:
    stragglers = Stragglers(readers=2)
    for _ in range(WINDOW):
        equal = stragglers.add([[0.5, 1, 1, 1], [0, 1, 1, 1]] * 3)
    assert equal == {}
    for _ in range(WINDOW):
        found = stragglers.add([[0.5, 1, 1, 1], [0, 1, 1, 1], [0.5, 1, 1, 1], [0, 1, 1, 1], [2, 1, 1, 1], [0, 1, 1, 1]])
    assert found == {"data": Straggler(4, 2.0, 0.5)}


def test_waiting_for_others_is_communication(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    progress = RankProgress()
    progress.note("checkpoint", 3)
    noted = ((StepPhase.DATA, 1, 0), (StepPhase.DATA, 0, 2), (StepPhase.FORWARD, 4, 0),
             (StepPhase.DATA, 1, 0), (StepPhase.BACKWARD, 5, 7), (StepPhase.UPDATE, 1, 1))  # fmt: skip
    for phase, own_s, waited_s in noted:
        progress.note("somewhere", phase=phase)
        now[0] += own_s + waited_s
        monkeypatch.setattr(Waits, "seconds", Waits.seconds + waited_s)
    assert progress.phases() == {"data": 2, "forward": 4, "backward": 5, "update": 1, "communication": 10}
    progress.note("journal")
    now[0] += 50
    progress.note("beginning", 4)
    assert set(progress.phases().values()) == {0}


def test_what_a_rank_tells_the_others_comes_out_as_it_went_in() -> None:
    counters = DataCounters(*map(float, range(20, 20 + len(fields(DataCounters)))))
    message = Message(1.5, 2.0, 3.0, float("inf"), 0.25, 2.0**40, 1.0, 0.0, 2.0**40 - 1, 7.0, (0.1, 0.2, 0.3, 0.4),
                      counters, (8.0, 2.0, 4.0))  # fmt: skip
    numbers = message.packed()
    assert all(isinstance(number, float) for number in numbers)
    assert Message.unpacked(numbers) == message
    slower = replace(message, seconds=(1.0, 2.0, 0.0, 0.0), grad_norm=2.0, tokens=5.0)
    answer, data = _answer([message, message, slower, slower], tensor=2)
    assert (answer.tokens, answer.slowest_s, answer.grad_norm, answer.stop) == (7.0, 3.0, float("inf"), 1.0)
    assert (data.data_wait_s, data.data_fetched_bytes) == (0.25, 4 * counters.data_fetched_bytes)
