"""One K a layer under a limit, without training: a greedy search by measured loss (Mix'n'Match of arXiv 2310.07707).

From K_max in every layer, the layer whose next smaller K costs least loss for what it saves is lowered, until the
limit holds. A layer is measured again only when its last figure, of an earlier mixture, makes it the next to be
lowered: a few measurements a step instead of one for each layer. The largest single K under the limit is measured too,
and taken where it is as good: a mixture is never worse than it on the text of the search.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from megassm.cli.mixtures import Limit
from megassm.config.model import ModelConfig
from megassm.cost import forward_flops_per_token, parameters
from megassm.errors import UserError
from megassm.eval.speed import decoding_seconds, has_steps
from megassm.model import LanguageModel, truncate
from megassm.parallel.world import Peers, gather_rows, together

Mixture = tuple[int, ...]
"""K of each layer."""


@dataclass(frozen=True)
class Found:
    """What a search ends with; losses are those of the function it was given."""

    layers: Mixture
    loss: float
    cost: float
    """In the limit's unit."""
    single_k: int | None
    """The largest K of the ladder that is under the limit in all layers alike; None: none is."""
    single_loss: float | None
    measured: int
    """Mixtures whose loss was measured."""


def search(
    config: ModelConfig,
    limit: float,
    ladder: Sequence[int],
    cost: Callable[[Mixture], float],
    loss: Callable[[Mixture], float],
) -> Found:
    """The mixture under `limit` that greedy lowering leads to.

    Args:
        config: the model's.
        limit: the largest cost, above 0.
        ladder: the K that a layer may have, at most K_max; K_max is added.
        cost: of a mixture; must not rise where a layer's K falls.
        loss: of a mixture; measured once each.

    Raises:
        UserError: the smallest of the ladder in every layer is above the limit.
    """
    steps = sorted({*ladder, config.num_channels})
    losses: dict[Mixture, float] = {}

    def measured(layers: Mixture) -> float:
        if layers not in losses:
            losses[layers] = loss(layers)
        return losses[layers]

    least = config.layer_budgets(steps[0])
    if cost(least) > limit:
        raise UserError(f"no K a layer is within {limit:,.6g}: K = {steps[0]} in every layer takes {cost(least):,.6g}")
    layers = config.layer_budgets(None)
    scores: dict[int, tuple[float, Mixture]] = {}
    while cost(layers) > limit:
        moves = {number: lower for number in range(len(layers)) if (lower := _lowered(layers, number, steps, cost))}
        while True:
            number = min(moves, key=lambda each: scores[each][0] if each in scores else -float("inf"))
            if number in scores and scores[number][1] == layers:
                break
            lower = moves[number]
            price = (measured(lower) - measured(layers)) / (cost(layers) - cost(lower))
            scores[number] = (price, layers)
        layers = moves[number]
        del scores[number]  # it was of the K that the layer now has
    single = max((k for k in steps if cost(config.layer_budgets(k)) <= limit), default=None)
    single_loss = None if single is None else measured(config.layer_budgets(single))
    if single is not None and single_loss is not None and single_loss <= measured(layers):
        layers = config.layer_budgets(single)
    return Found(layers, measured(layers), cost(layers), single, single_loss, len(losses))


def _lowered(layers: Mixture, number: int, steps: Sequence[int], cost: Callable[[Mixture], float]) -> Mixture | None:
    """The mixture with a layer at its next smaller K that saves anything; None where nothing does."""
    for k in reversed([k for k in steps if k < layers[number]]):
        lower = (*layers[:number], k, *layers[number + 1 :])
        if cost(lower) < cost(layers):
            return lower
    return None


Timings = Mapping[tuple[str, int], float]
"""Milliseconds a token with the layers of one kind of mixer at one K, and the others at K_max."""


def cost_function(config: ModelConfig, limit: Limit, table: Timings) -> Callable[[Mixture], float]:
    """What a limit is about, as a function of the mixture: parameters; forward MFLOPs a token, at the trained length;
    milliseconds of decoding a token of one text, from the `table` of `timings`."""
    match limit.what:
        case "parameters":
            return lambda layers: float(parameters(config, layers))
        case "mflops":
            return lambda layers: forward_flops_per_token(config, layers, config.seq_len) / 1e6
        case "ms":
            return decoding_time(config, table)


def timing_keys(config: ModelConfig, ladder: Sequence[int]) -> list[tuple[str, int]]:
    """Of `timings`: every K that a layer may have, and those that layers have."""
    return [(kind, k) for kind in sorted(set(config.mixers)) for k in sorted({*ladder, *config.channels_of_layers})]


@torch.no_grad()
def timings(model: LanguageModel, ladder: Sequence[int]) -> dict[tuple[str, int], float]:
    """Of decoding one text, on the model's device, for every K of the ladder.

    Raises:
        UserError: the model's filters have no steps, or it predicts classes.
    """
    if not has_steps(model):
        raise UserError("ms: this model cannot decode token by token; give a limit of parameters or mflops")
    config, found = model.config, {}
    for kind, k in timing_keys(config, ladder):
        both = zip(config.mixers, config.channels_of_layers, strict=True)
        layers = tuple(min(k, most) if mixer == kind else most for mixer, most in both)
        found[kind, k] = 1e3 * decoding_seconds(truncate(model, layers).eval())
    return found


def shared_timings(model: LanguageModel, ladder: Sequence[int], peers: Peers) -> Timings:
    """Those of rank 0, on every rank; all call it."""
    names = timing_keys(model.config, ladder)
    table = together(lambda: timings(model, ladder) if peers.is_main else dict.fromkeys(names, 0.0))
    return dict(zip(names, gather_rows([table[name] for name in names])[0], strict=True))


def decoding_time(config: ModelConfig, table: Timings) -> Callable[[Mixture], float]:
    """Each layer's share of what its kind saved at its K, off the time at K_max; noise that makes a smaller K slower
    is taken for no saving."""
    full = max(table[kind, config.num_channels] for kind in set(config.mixers))
    saved: dict[tuple[str, int], float] = {}
    for kind in sorted(set(config.mixers)):
        count, most = config.mixers.count(kind), 0.0
        for k in sorted((k for name, k in table if name == kind), reverse=True):
            most = max(most, table[kind, config.num_channels] - table[kind, k])
            saved[kind, k] = most / count

    def cost(layers: Mixture) -> float:
        return full - sum(saved[kind, k] for kind, k in zip(config.mixers, layers, strict=True))

    return cost
