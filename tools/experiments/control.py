"""Control under deadlines: an elastic model imitates an expert, and K is chosen at every step by the time there is.

The model sees late and noisy observations and its own last actions; it is trained to do what an expert does that sees
the whole state, on plants that are driven by the expert and by itself (DAgger, arXiv 1011.0686). It is then timed and
drives: each step has so much time, which falls for a while again and again, as where another process takes the machine.
An action that comes too late is not taken, and the last one is held. One K for all steps stands against the largest K
that is in time at each. Time is the CPU time of the thread that computes.

Shapes: B plants, L steps, I inputs (observations and last actions), A actions, D width.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megassm.budget import budget_at
from megassm.config.load import load_config
from megassm.config.schema import Config
from megassm.eval.costs import Costs
from megassm.layers.block import Block
from megassm.layers.state import LayerState
from megassm.model import build_model
from megassm.optim import LR_FACTOR, build_optimizer, learning_rate
from megassm.run.directory import CONFIG
from tools.experiments.measure import Point
from tools.experiments.plants import PLANTS, Plant, Values

STEPS = 200
"""Of an episode, at most: no more than the length that the filters are made for."""
GATHERED = 32
"""Episodes added at a time."""
TIMES_GATHERED = 8
"""Over a training."""
CAP = 8
"""The largest K of the policy that is to save compute."""
MARGIN = 1.3
"""A step may take so much longer than its median and still be in time."""
BUSY_STEPS, FREE_STEPS = 10, 40
"""Of the times when there is little time, and of those when there is enough, on average: a fifth of all is little."""

Act = Callable[[Values, Values], Values]
"""Inputs (B, I) of a step, and what the expert does (B, A) -> the actions taken (B, A)."""


class Controller(nn.Module):
    """The blocks of a language model between two linear layers."""

    def __init__(self, config: Config, inputs: int, actions: int) -> None:
        super().__init__()
        torch.manual_seed(config.run.seed)
        self.trunk = build_model(config.model, config.run.seed)
        self.enter, self.leave = nn.Linear(inputs, config.model.d_model), nn.Linear(config.model.d_model, actions)

    @property
    def steps(self) -> int:
        """Of an episode."""
        return min(STEPS, self.trunk.config.seq_len)

    @property
    def blocks(self) -> list[Block]:
        return cast(list[Block], self.trunk.blocks)

    def forward(self, x_BLI: Tensor, k: int) -> Tensor:
        """Actions (B, L, A) of all steps."""
        x_BLD, context = self.enter(x_BLI), self.trunk.context(0, x_BLI.shape[1], k)
        for block in self.blocks:
            x_BLD = block(x_BLD, context)
        return self._left(x_BLD)

    def begin(self, count: int) -> list[LayerState]:
        """What is known before the first step."""
        assert self.trunk.filterbank is not None
        return [torch.zeros(count, self.trunk.filterbank.state_size, self.enter.out_features) for _ in self.blocks]

    @torch.no_grad()
    def step(self, x_BI: Tensor, states: Sequence[LayerState], k: int) -> tuple[Tensor, list[LayerState]]:
        """(actions (B, A) of one step, what is known after it)."""
        x_BD, context = self.enter(x_BI), self.trunk.context(0, 1, k)
        after: list[LayerState] = []
        for block, state in zip(self.blocks, states, strict=True):
            x_BD, state_after = block.step(x_BD, state, context)
            after.append(state_after)
        return self._left(x_BD), after

    def _left(self, x: Tensor) -> Tensor:
        actions: Tensor = self.leave(self.trunk.head_norm(x)).tanh()
        return actions


class Episodes(NamedTuple):
    """What plants were driven through."""

    inputs_BLI: Values
    expert_BLA: Values
    """What the expert would have done."""
    rewards_BL: Values


def drive(plant: Plant, count: int, steps: int, act: Act, rng: np.random.Generator) -> Episodes:
    """Drives `count` plants together through an episode."""
    state_BX = plant.begin(count, rng)
    seen, action_BA = [state_BX] * plant.delay, np.zeros((count, plant.actions))
    inputs, expert, rewards = [], [], []
    for _ in range(steps):
        seen.append(state_BX)
        late_BO = plant.observed_of(seen[-1 - plant.delay])
        inputs.append(np.hstack((late_BO + plant.noise * rng.standard_normal(late_BO.shape), action_BA)))
        expert.append(plant.expert(state_BX))
        action_BA = act(inputs[-1], expert[-1])
        state_BX = plant.step(state_BX, action_BA, rng)
        rewards.append(plant.reward(state_BX))
    return Episodes(np.stack(inputs, 1), np.stack(expert, 1), np.stack(rewards, 1))


def imitate(plant: Plant, config: Config) -> Controller:
    """A controller trained at the budgets that the configuration draws."""
    net = Controller(config, plant.observed + plant.actions, plant.actions)
    optimizer = build_optimizer(net, 1.0, config.optim)
    rng = np.random.default_rng(config.run.seed)
    found: list[Episodes] = []
    every = max(1, config.train.steps // TIMES_GATHERED)
    for step in range(config.train.steps):
        if step % every == 0:
            found.append(gathered(plant, net, rng, own=0.8 * step / config.train.steps))
        inputs_NLI, expert_NLA = (np.concatenate(part) for part in list(zip(*found, strict=True))[:2])
        rows = rng.integers(0, len(inputs_NLI), config.train.batch_sequences)
        inputs_BLI, expert_BLA = (torch.from_numpy(part[rows]).float() for part in (inputs_NLI, expert_NLA))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, config.train, step) * group[LR_FACTOR]
        optimizer.zero_grad()
        F.mse_loss(net(inputs_BLI, budget_at(config, step, 0)), expert_BLA).backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return net.eval()


def gathered(plant: Plant, net: Controller, rng: np.random.Generator, own: float) -> Episodes:
    """Episodes in which the controller acts with probability `own`, else the expert, not always exactly."""
    k, states = net.trunk.config.num_channels, net.begin(GATHERED)
    shaken_B1 = rng.uniform(0, 0.5, (GATHERED, 1))

    def act(inputs_BI: Values, expert_BA: Values) -> Values:
        nonlocal states
        action_BA = expert_BA
        if own:
            own_BA, states = net.step(torch.from_numpy(inputs_BI).float(), states, k)
            mine_B1 = rng.random((GATHERED, 1)) < own
            action_BA = np.where(mine_B1, own_BA.double().numpy(), expert_BA)
        return action_BA + shaken_B1 * rng.standard_normal(expert_BA.shape)

    return drive(plant, GATHERED, net.steps, act, rng)


class Driven(NamedTuple):
    """What driving came to."""

    reward: float
    """Mean of a step."""
    missed_percent: float
    step_s: float
    """Mean time that the controller computed for a step."""


Choose = Callable[[float, Costs], int]
"""K by the seconds that there are and what steps take."""


class Pilot:
    """Drives one plant with a controller, in time or not."""

    def __init__(self, net: Controller, choose: Choose, costs: Costs, available: Iterator[float]) -> None:
        self._net, self._choose, self._costs, self._available = net, choose, costs, available
        self._states, self._held_1A = net.begin(1), np.zeros((1, net.leave.out_features))
        self.steps = net.steps
        self.late: list[bool] = []
        self.took_s: list[float] = []

    def __call__(self, inputs_1I: Values, expert_1A: Values) -> Values:
        """The action that is taken: of this step, or of the last one that was in time."""
        left_s = next(self._available)
        k, started = self._choose(left_s, self._costs), time.thread_time()
        action_1A, self._states = self._net.step(torch.from_numpy(inputs_1I).float(), self._states, k)
        took_s = time.thread_time() - started
        self._costs.add("step", k, 1, took_s)
        self.took_s.append(took_s)
        self.late.append(took_s > left_s)
        if not self.late[-1]:
            self._held_1A = action_1A.double().numpy()
        return self._held_1A


def driven(plant: Plant, pilots: Sequence[Pilot], seed: int) -> Driven:
    """One episode of each pilot: the same ones for equal seeds."""
    rewards = [drive(plant, 1, pilot.steps, pilot, _episode(seed, number)).rewards_BL.mean()
               for number, pilot in enumerate(pilots)]  # fmt: skip
    late = [each for pilot in pilots for each in pilot.late]
    took_s = [each for pilot in pilots for each in pilot.took_s]
    return Driven(float(np.mean(rewards)), 100 * float(np.mean(late)), float(np.mean(took_s)))


def _episode(seed: int, number: int) -> np.random.Generator:
    """What happens to the plant in one of the episodes that all policies are driven through."""
    return np.random.default_rng([seed, number])


def _as_the_expert(_: Values, expert_BA: Values) -> Values:
    return expert_BA


def seconds_available(least_s: float, full_s: float, rng: np.random.Generator) -> Iterator[float]:
    """Of each step: twice what full K takes, or for a while less than it takes, but more than the least K takes."""
    is_busy, low_s, high_s = False, 1.5 * least_s, 0.9 * full_s
    while True:
        is_busy = rng.random() >= 1 / BUSY_STEPS if is_busy else rng.random() < 1 / FREE_STEPS
        yield rng.uniform(min(low_s, high_s), high_s) if is_busy else 2 * full_s


def fixed(k: int) -> Choose:
    return lambda left_s, costs: k


def largest_in_time(budgets: Sequence[int]) -> Choose:
    """The largest K that is in time with a margin; the least where none is."""

    def choose(left_s: float, costs: Costs) -> int:
        return max((k for k in budgets if MARGIN * costs.seconds("step", k, 1) <= left_s), default=min(budgets))

    return choose


@torch.no_grad()
def step_costs(net: Controller, budgets: Sequence[int], inputs: int, repeats: int = 40) -> Costs:
    """What a step takes at each budget, by turns."""
    costs, states, x_1I = Costs(), net.begin(1), torch.zeros(1, inputs)
    for _ in range(repeats):
        for k in budgets:
            started = time.thread_time()
            net.step(x_1I, states, k)
            costs.add("step", k, 1, time.thread_time() - started)
    return costs


def control_points(run_dir: Path) -> list[Point]:
    """Return and missed deadlines of each policy over its mean compute, plant by plant."""
    config = load_config(run_dir / CONFIG)
    return [point for plant in PLANTS for point in plant_points(plant, config)]


def plant_points(plant: Plant, config: Config) -> list[Point]:
    """Of a controller that is trained for this plant."""
    net, budgets, seed = imitate(plant, config), sorted(config.eval_budgets()), config.run.seed
    episodes = range(max(1, config.eval.sequences // 8))
    costs = step_costs(net, budgets, plant.observed + plant.actions)
    least_s, full_s = (costs.seconds("step", k, 1) for k in (budgets[0], budgets[-1]))
    best = np.mean([drive(plant, 1, net.steps, _as_the_expert, _episode(seed, number)).rewards_BL
                    for number in episodes])  # fmt: skip

    def points(name: str, choose: Choose, in_time: bool) -> list[Point]:
        traces = (seconds_available(least_s, full_s, np.random.default_rng([seed, number, 1])) if in_time
                  else itertools.repeat(math.inf) for number in episodes)  # fmt: skip
        found = driven(plant, [Pilot(net, choose, costs, trace) for trace in traces], seed)
        compute = found.step_s / full_s
        reward = Point(f"{plant.name}: return, % of the expert's", name, compute, 100 * found.reward / float(best))
        missed = Point(f"{plant.name}: missed deadlines, % of steps", name, compute, found.missed_percent)
        return [reward, missed] if in_time else [reward]

    found = [point for k in budgets for point in points("one K, no deadlines", fixed(k), in_time=False)]
    found += [point for k in budgets for point in points("one K", fixed(k), in_time=True)]
    found += points("largest K in time", largest_in_time(budgets), in_time=True)
    small = [k for k in budgets if k <= CAP]
    return found + points(f"largest K in time, at most {small[-1]}", largest_in_time(small), in_time=True)
