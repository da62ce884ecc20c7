"""Arms of experiments, and arms of equal size."""

from __future__ import annotations

from typing import NamedTuple

from megassm.config.model import ModelConfig
from megassm.cost import parameters
from tools.experiments.peers import Peer


class Arm(NamedTuple):
    """One of the things compared; the first of an experiment is what the others are held against."""

    name: str
    overrides: tuple[str, ...] = ()
    peer: Peer | None = None
    """Instead of the package's own model, one of `tools.experiments.peers` of the configured width and depth."""


def width_of_size(model: ModelConfig, wanted: int) -> int:
    """The feed-forward width at which `model` has nearest to `wanted` parameters at its K_max."""

    def count(width: int) -> int:
        return parameters(model.model_copy(update={"d_ffn": width, "ffn_elastic": None}), model.num_channels)

    return max(1, round((wanted - count(0)) / (count(1) - count(0))))
