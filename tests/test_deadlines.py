"""The experiments with deadlines: bursts of requests against the decoder, and controllers that must act in time."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from megassm.config.load import load_config
from megassm.eval.costs import Costs
from megassm.eval.policies import FixedBudget
from megassm.eval.session import open_session
from megassm.model import losses_at
from tests.conftest import ROOT, SMALL
from tests.test_decoding import model
from tools.experiments import control, deadline
from tools.experiments.control import Controller, Pilot, drive, driven, fixed, largest_in_time, seconds_available
from tools.experiments.deadline import DRAWN, PROMPT, Trace, burst, nats_at, pieces, replay, text_seconds
from tools.experiments.definitions import CONTROLLER
from tools.experiments.plants import PLANTS, CartPole, Plant, ReachingArm, Values


class SteppedClock:
    """A millisecond each time it is asked, so that what is late does not depend on the machine."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 1e-3
        return self.now_s

    def skip_to(self, at_s: float) -> None:
        self.now_s = max(self.now_s, at_s)


def test_a_replay_serves_every_request_after_it_came(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deadline, "ThreadClock", SteppedClock)
    network, rng = model("S"), np.random.default_rng(0)
    prompts = rng.integers(0, 50, (24, PROMPT)).tolist()
    arrivals_s = [*burst(23, 0.01, 0.3, rng), 1e4]
    served = replay(network, FixedBudget(4), Trace(arrivals_s, prompts), 0.5)
    for at_s, each in zip(arrivals_s, served, strict=True):
        assert each.budgets == [4] * DRAWN
        assert at_s < each.ended_s < 1e5
    alone_s = served[-1].ended_s - arrivals_s[-1]
    assert alone_s < max(each.ended_s - at_s for at_s, each in zip(arrivals_s[:-1], served, strict=False))
    assert text_seconds(network, prompts[:16]) < alone_s, "texts share the steps"


def test_a_burst_has_its_rate() -> None:
    gaps = np.diff([0, *burst(60_000, 1.0, 4.0, np.random.default_rng(0))])
    assert [part.mean() for part in (gaps[:10_000], gaps[10_000:50_000], gaps[50_000:])] == pytest.approx(
        [4, 1, 4], rel=0.05
    )


def test_a_course_of_budgets_is_scored_as_the_decoder_read_it(trained: Path) -> None:
    """At one K it is the parallel form's; where K changes, that of the steps."""
    session = open_session(trained, None, "cpu")
    network = session.model.eval()
    (ids, *_) = pieces(session)
    with torch.no_grad():
        expected = losses_at(network, torch.tensor([ids]), 2)[0, PROMPT - 1 :].sum().item()
    assert nats_at(network, ids, [2] * DRAWN) == pytest.approx(expected, rel=1e-5)
    budgets = [8] * 5 + [1] * 20 + [2] * 7
    logits, state = network.prefill(torch.tensor([ids[:PROMPT]]), 8)
    nats = 0.0
    for place, token in enumerate(ids[PROMPT:]):
        nats -= logits.log_softmax(-1)[0, token].item()
        if place + 1 < DRAWN:
            logits, state = network.step(torch.tensor([token]), state, budgets[place + 1])
    assert nats_at(network, ids, budgets) == pytest.approx(nats, rel=1e-5)


def test_plants_keep_their_energy() -> None:
    """Without forces and friction, in steps so small that their error does not show."""
    arm = ReachingArm(damping=0.0)
    state = np.array([[0.3, 1.2, 1.5, -2.0, 0, 0, 9]])

    def arm_energy(state_BX: Values) -> float:
        return float(state_BX[0, 2:4] @ arm.inertia(state_BX)[0] @ state_BX[0, 2:4] / 2)

    before = arm_energy(state)
    for _ in range(6_000):
        state = arm.moved(state, np.zeros((1, 2)), 1e-4)
    assert abs(state[0, :2] - [0.3, 1.2]).max() > 1
    assert arm_energy(state) == pytest.approx(before, rel=2e-3)

    cart = CartPole()
    state = np.array([[0.0, 0.4, 2.0, 0.0, 1]])

    def cart_energy(state_BX: Values) -> float:
        _, v, angle, speed, _ = state_BX[0]
        mass, length = cart.pole_kg, cart.half_m
        kinetic = (cart.cart_kg + mass) * v**2 / 2 + mass * v * length * speed * np.cos(angle)
        return float(kinetic + (4 / 3) * mass * length**2 * speed**2 / 2 + mass * cart.gravity * length * np.cos(angle))

    before = cart_energy(state)
    for _ in range(6_000):
        state = cart.moved(state, np.zeros(1), 1e-4)
    assert abs(state[0, 2] - 2.0) > 1
    assert cart_energy(state) == pytest.approx(before, abs=2e-3)


@pytest.mark.parametrize("plant", PLANTS, ids=lambda plant: plant.name)
def test_experts_are_good_and_doing_nothing_is_not(plant: Plant) -> None:
    expert = drive(plant, 40, 200, lambda _, expert_BA: expert_BA, np.random.default_rng(0))
    nothing = drive(plant, 40, 200, lambda _, expert_BA: 0 * expert_BA, np.random.default_rng(0))
    assert expert.inputs_BLI.shape == (40, 200, plant.observed + plant.actions)
    assert abs(expert.expert_BLA).max() <= 1
    assert ((expert.rewards_BL >= 0) & (expert.rewards_BL <= 1)).all()
    assert expert.rewards_BL.mean() > 0.6
    assert nothing.rewards_BL.mean() < 0.6 * expert.rewards_BL.mean()


def test_observations_are_late_and_noisy() -> None:
    plant = ReachingArm(delay=5, noise=1e-9)
    seen: list[Values] = []
    states: list[Values] = []

    def act(inputs_BI: Values, expert_BA: Values) -> Values:
        seen.append(inputs_BI)
        return expert_BA

    class Watched(ReachingArm):
        def expert(self, state_BX: Values) -> Values:
            states.append(state_BX)
            return super().expert(state_BX)

    found = drive(Watched(delay=5, noise=1e-9), 3, 30, act, np.random.default_rng(0))
    for step in range(5, 30):
        assert seen[step][:, :4] == pytest.approx(plant.observed_of(states[step - 5]), abs=1e-6)
    assert found.inputs_BLI[:, 1:, 4:] == pytest.approx(found.expert_BLA[:, :-1])


@pytest.fixture(scope="module")
def controller() -> Controller:
    config = load_config(ROOT / "configs/experiment.yaml", (*CONTROLLER, *SMALL, "model.seq_len=256", "train.steps=1"))
    return Controller(config, inputs=3, actions=1).eval()


@torch.no_grad()
def test_a_controller_steps_as_it_was_trained(controller: Controller) -> None:
    x_BLI, states = torch.randn(2, 20, 3), controller.begin(2)
    for step in range(20):
        action_BA, states = controller.step(x_BLI[:, step], states, 2)
        torch.testing.assert_close(action_BA, controller(x_BLI, 2)[:, step], atol=1e-5, rtol=0)
    assert not torch.allclose(controller(x_BLI, 2), controller(x_BLI, 8))


def timed(step_s: dict[int, float]) -> Costs:
    costs = Costs()
    for k, seconds in step_s.items():
        for _ in range(20):
            costs.add("step", k, 1, seconds)
    return costs


def test_late_actions_are_not_taken(controller: Controller) -> None:
    """With no time at all the plant is left to itself; with all the time nothing is late."""
    costs = timed({2: 1.0, 8: 4.0})

    def pilot(left_s: Callable[[], float]) -> Pilot:
        return Pilot(controller, fixed(8), costs, iter(left_s, None))

    nothing = pilot(lambda: 0.0)
    late = driven(CartPole(), [nothing], 0)
    assert late.missed_percent == 100
    still = drive(CartPole(), 1, 200, lambda _, expert_1A: 0 * expert_1A, np.random.default_rng([0, 0]))
    assert late.reward == still.rewards_BL.mean()
    assert driven(CartPole(), [pilot(lambda: math.inf)], 0).missed_percent == 0


def test_the_largest_budget_in_time_is_chosen() -> None:
    choose, costs = largest_in_time([2, 8, 32]), timed({2: 1.0, 8: 2.0, 32: 4.0})
    assert [choose(left_s, costs) for left_s in (9.0, 5.0, 3.0, 1.35, 0.1)] == [32, 8, 8, 2, 2]


def test_a_fifth_of_the_steps_have_too_little_time() -> None:
    available = seconds_available(1.0, 4.0, np.random.default_rng(0))
    drawn = np.array([next(available) for _ in range(100_000)])
    assert float((drawn < 4).mean()) == pytest.approx(0.2, abs=0.02)
    assert drawn.min() >= 1.5
    assert control.MARGIN < 1.5, "the least K is always in time"
