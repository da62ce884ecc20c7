"""Plants to control, many at a time, with experts that see their whole state: a cart-pole, and an arm that reaches.

A controller sees less: some numbers of the state, late and under noise. Rewards lie in 0..1 a step; actions in -1..1.

Shapes: B plants, X numbers of a state, O observed ones, A of an action.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from scipy.linalg import solve_discrete_are

Values = npt.NDArray[np.float64]
STEP_S = 0.02
"""Between two actions."""


class Plant(Protocol):
    """One kind of plant."""

    name: str
    observed: int
    """O."""
    actions: int
    """A."""
    delay: int
    """Steps after which an observation arrives."""
    noise: float
    """Standard deviation of what is added to each observed number."""

    def begin(self, count: int, rng: np.random.Generator) -> Values:
        """States (B, X) to start from."""

    def step(self, state_BX: Values, action_BA: Values, rng: np.random.Generator) -> Values:
        """The states after one step."""

    def observed_of(self, state_BX: Values) -> Values:
        """What a controller sees, without noise and delay (B, O)."""

    def expert(self, state_BX: Values) -> Values:
        """What to do, by the whole state (B, A)."""

    def reward(self, state_BX: Values) -> Values:
        """(B,)."""


@dataclass
class CartPole:
    """A pole on a cart (Barto, Sutton, Anderson 1983), with a force of any size and gusts; seen are cart and angle.

    A state is (x, v, angle, its speed, 1 while the pole stands). What has fallen stays down.
    """

    name: str = "cart-pole"
    observed: int = 2
    actions: int = 1
    delay: int = 3
    noise: float = 0.01
    gusts: float = 2.0
    """Standard deviation of a force beside that of the action, N."""

    gravity: float = 9.8
    cart_kg: float = 1.0
    pole_kg: float = 0.1
    half_m: float = 0.5
    """Half the pole's length."""
    force: float = 10.0
    """Of action 1, N."""
    track_m: float = 2.4
    lean: float = 0.21
    """Radians at which the pole has fallen."""

    def begin(self, count: int, rng: np.random.Generator) -> Values:
        return np.hstack((rng.uniform(-0.05, 0.05, (count, 4)), np.ones((count, 1))))

    def step(self, state_BX: Values, action_BA: Values, rng: np.random.Generator) -> Values:
        push_B = self.force * action_BA.clip(-1, 1)[:, 0] + self.gusts * rng.standard_normal(len(state_BX))
        moved_BX = self.moved(state_BX, push_B, STEP_S)
        stands_B = state_BX[:, 4] * (abs(moved_BX[:, 0]) < self.track_m) * (abs(moved_BX[:, 2]) < self.lean)
        moved_BX[:, 4] = stands_B
        return np.where(stands_B[:, None] > 0, moved_BX, state_BX * [1, 1, 1, 1, 0])

    def moved(self, state_BX: Values, push_B: Values, seconds: float) -> Values:
        """After so long under a force; semi-implicit Euler."""
        x_B, v_B, angle_B, speed_B, stands_B = state_BX.T
        sine_B, cosine_B, mass = np.sin(angle_B), np.cos(angle_B), self.cart_kg + self.pole_kg
        pulled_B = (push_B + self.pole_kg * self.half_m * speed_B**2 * sine_B) / mass
        turn_B = (self.gravity * sine_B - cosine_B * pulled_B) / (
            self.half_m * (4 / 3 - self.pole_kg * cosine_B**2 / mass)
        )
        v_B = v_B + seconds * (pulled_B - self.pole_kg * self.half_m * turn_B * cosine_B / mass)
        speed_B = speed_B + seconds * turn_B
        return np.stack((x_B + seconds * v_B, v_B, angle_B + seconds * speed_B, speed_B, stands_B), 1)

    def observed_of(self, state_BX: Values) -> Values:
        return state_BX[:, [0, 2]]

    def expert(self, state_BX: Values) -> Values:
        push_B1 = -state_BX[:, :4] @ self._gain[:, None] / self.force
        return np.asarray(push_B1.clip(-1, 1))

    @cached_property
    def _gain(self) -> Values:
        """Of the linear-quadratic regulator at the upright position."""
        return np.asarray(_regulator(lambda x, u: self.moved(np.append(x, 1.0)[None], u, STEP_S)[0, :4], 4, 1)[0])

    def reward(self, state_BX: Values) -> Values:
        return state_BX[:, 4]


def _regulator(moved: Callable[[Values, Values], Values], states: int, actions: int) -> Values:
    """u = -gain x that keeps x' = moved(x, u) at 0 at the least sum of |x|^2 + |u|^2 / 100."""
    tiny = 1e-5
    both = np.eye(states + actions) * tiny
    ends = [(moved(axis[:states], axis[states:]), moved(-axis[:states], -axis[states:])) for axis in both]
    slopes = np.stack([(after - before) / (2 * tiny) for after, before in ends], 1)
    change, effect, price = slopes[:, :states], slopes[:, states:], 0.01 * np.eye(actions)
    worth: Any = solve_discrete_are(change, effect, np.eye(states), price)
    return np.asarray(np.linalg.solve(price + effect.T @ worth @ effect, effect.T @ worth @ change))


@dataclass
class ReachingArm:
    """Two links in a plane, moved by torques, without gravity; the hand is to be where the target is, which jumps.

    A state is (two angles, their speeds, the angles that the target asks for, steps until it jumps). Seen are the
    angles, and where the target is.
    """

    name: str = "reaching arm"
    observed: int = 4
    actions: int = 2
    delay: int = 2
    noise: float = 0.01
    link_m: float = 0.5
    link_kg: float = 1.0
    """At the end of each link."""
    torque: float = 10.0
    """Of action 1, N m."""
    damping: float = 0.3
    """N m s."""
    stays: int = 75
    """Steps between two jumps of the target."""
    low: tuple[float, float] = (-1.0, 0.4)
    high: tuple[float, float] = (1.0, 2.2)
    """Angles of targets."""

    def begin(self, count: int, rng: np.random.Generator) -> Values:
        angles_B2, wanted_B2 = (rng.uniform(self.low, self.high, (count, 2)) for _ in range(2))
        left_B1 = rng.integers(1, self.stays + 1, (count, 1)).astype(np.float64)
        return np.hstack((angles_B2, np.zeros((count, 2)), wanted_B2, left_B1))

    def step(self, state_BX: Values, action_BA: Values, rng: np.random.Generator) -> Values:
        moved_BX = self.moved(state_BX, self.torque * action_BA.clip(-1, 1), STEP_S)
        left_B = state_BX[:, 6] - 1
        fresh_B2 = rng.uniform(self.low, self.high, (len(state_BX), 2))
        moved_BX[:, 4:6] = np.where(left_B[:, None] > 0, state_BX[:, 4:6], fresh_B2)
        moved_BX[:, 6] = np.where(left_B > 0, left_B, self.stays)
        return moved_BX

    def moved(self, state_BX: Values, torque_B2: Values, seconds: float) -> Values:
        """After so long under torques; semi-implicit Euler."""
        angles_B2, speeds_B2 = state_BX[:, 0:2], state_BX[:, 2:4]
        drag_B2 = torque_B2 - self.damping * speeds_B2 - self._coriolis(state_BX)
        speeds_B2 = speeds_B2 + seconds * np.linalg.solve(self.inertia(state_BX), drag_B2[..., None])[..., 0]
        return np.hstack((angles_B2 + seconds * speeds_B2, speeds_B2, state_BX[:, 4:]))

    def inertia(self, state_BX: Values) -> Values:
        """Matrices (B, 2, 2)."""
        unit, cosine_B = self.link_kg * self.link_m**2, np.cos(state_BX[:, 1])
        both_B, own_B = unit * (1 + cosine_B), np.full(len(state_BX), unit)
        return np.stack((np.stack((unit * (3 + 2 * cosine_B), both_B), 1), np.stack((both_B, own_B), 1)), 1)

    def _coriolis(self, state_BX: Values) -> Values:
        first_B, second_B = state_BX[:, 2], state_BX[:, 3]
        pull_B = self.link_kg * self.link_m**2 * np.sin(state_BX[:, 1])
        return np.stack((-pull_B * (2 * first_B * second_B + second_B**2), pull_B * first_B**2), 1)

    def hand(self, angles_B2: Values) -> Values:
        """Where it is (B, 2), metres."""
        first_B, both_B = angles_B2[:, 0], angles_B2.sum(1)
        return self.link_m * np.stack((np.cos(first_B) + np.cos(both_B), np.sin(first_B) + np.sin(both_B)), 1)

    def observed_of(self, state_BX: Values) -> Values:
        return np.hstack((state_BX[:, 0:2], self.hand(state_BX[:, 4:6])))

    def expert(self, state_BX: Values) -> Values:
        """Computed torque: as if each angle were a mass on a spring and in a damper."""
        wanted_B2 = 40.0 * (state_BX[:, 4:6] - state_BX[:, 0:2]) - 10.0 * state_BX[:, 2:4]
        torque_B2 = (self.inertia(state_BX) @ wanted_B2[..., None])[..., 0] + self._coriolis(state_BX)
        return np.asarray(((torque_B2 + self.damping * state_BX[:, 2:4]) / self.torque).clip(-1, 1))

    def reward(self, state_BX: Values) -> Values:
        """1 at the target, 0 from 20 cm on."""
        off_B = np.linalg.norm(self.hand(state_BX[:, 0:2]) - self.hand(state_BX[:, 4:6]), axis=1)
        return np.asarray((1 - off_B / 0.2).clip(0, 1))


PLANTS: tuple[Plant, ...] = (CartPole(), ReachingArm())
