"""Arms of experiments, and arms of equal size."""

from __future__ import annotations

from typing import NamedTuple

from megassm.config.model import ModelConfig
from megassm.cost import parameters
from tools.experiments.bases import Basis
from tools.experiments.peers import Peer


class Recipe(NamedTuple):
    """What an update does besides one pass of the whole batch at K_max."""

    extras: tuple[tuple[float, float], ...]
    """Further passes: the share of the batch's rows, and the weight of their mean loss."""
    distill: float = 0.0
    """Share of that loss which is the divergence from the prediction at K_max."""


class Arm(NamedTuple):
    """One of the things compared; the first of an experiment is what the others are held against."""

    name: str
    overrides: tuple[str, ...] = ()
    peer: Peer | None = None
    """Instead of the package's own model, one of `tools.experiments.peers` of the configured width and depth."""
    recipe: Recipe | None = None
    """Instead of the configuration's draws; trainings in the plain loop only."""
    basis: Basis | None = None
    """Other filters than the configuration's; trainings in the plain loop only."""
    curves: tuple[str, ...] = ()
    """The curves that this arm is one point of, beside other arms: each a model of one size; empty: one of its own."""
    at: float = 0.0
    """Its x on those curves."""

    def more(self, *overrides: str, name: str | None = None) -> Arm:
        """With these after its own overrides."""
        return self._replace(name=name or self.name, overrides=(*self.overrides, *overrides))

    @property
    def is_plain(self) -> bool:
        """Whether only the plain loop of `tools.experiments.plain` trains it."""
        return bool(self.peer or self.recipe or self.basis)


def width_of_size(model: ModelConfig, wanted: int) -> int:
    """The feed-forward width at which `model` has nearest to `wanted` parameters at its K_max."""

    def count(width: int) -> int:
        return parameters(model.model_copy(update={"d_ffn": width, "ffn_elastic": None}), model.num_channels)

    return max(1, round((wanted - count(0)) / (count(1) - count(0))))
