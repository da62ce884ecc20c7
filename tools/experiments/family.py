"""Does one elastic run replace a family of models? Arms of equal parameters and equal tokens, where capacity matters.

A size is what the elastic model has at one of its budgets K. At each size stand beside it: the same model trained at
that size alone, a transformer, and what else claims to be many sizes in one training: a transformer with an elastic
feed-forward width (MatFormer, arXiv 2310.07707), one that may stop after any layer, and Mamba-2 at the full size. A
transformer has no taps, or the elastic model's; one with an elastic width draws one K an update, or sees all in turn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from megassm.config.schema import Config
from megassm.cost import parameters
from tools.experiments.arms import Arm, width_of_size
from tools.experiments.peers import build_peer, peer_parameters

EXIT_LAYERS = 4
STRATIFIED_ROWS = 2
"""Sequences a budget of an arm that draws several an update."""
ALONE, ALONE_CHANNELS = "each size trained alone", "each size trained alone, channels only"
CHANNELS, HYBRID = "elastic, channels only", "elastic hybrid (SA), channels only"


def family_arms(config: Config) -> list[Arm]:
    """The elastic models first, then what they are held against, the sizes in order of K.

    Two families: budgets cut the channels and the feed-forward width, as `config` says, or the channels alone. Either
    draws one K an update, as `config` says, or several: stratified ones, or log-uniform. The gate is another in some.
    """
    whole = _updated(config, ffn_elastic=None)
    sizes = {k: parameters(config.model, k) for k in config.eval_budgets()}
    sizes_channels = {k: parameters(whole, k) for k in sizes}
    *smaller, largest = sizes
    full = sizes[largest]
    elastic, mixed = Arm("elastic"), hybrid(config, full)
    channels, mixed_channels = _channels_only(Arm(CHANNELS)), _channels_only(hybrid(config, full, HYBRID))
    arms = [_stratified(arm) for arm in (channels, mixed_channels, elastic)]
    arms += [_stratified_over_three(config, channels), _log_uniform(config, channels)]
    arms += _other_gates(config, [_stratified(arm) for arm in (channels, mixed_channels)], list(sizes))
    arms += [channels, mixed_channels, elastic, mixed]
    arms += [paper_layer(config, full)]
    arms += [_alone(config, k) for k in smaller] + [_alone(config, k, channels_only=True) for k in smaller]
    arms += [_alone(config, largest)._replace(curves=(ALONE, ALONE_CHANNELS))]
    alone = hybrid(config, full, "hybrid (SA) alone")
    arms += [alone.more(*overridden(**fixed(largest)))]
    arms += [_transformer_of(config, k, size) for k, size in sizes.items()]
    taps = config.model.input_taps
    if taps > 1:
        ks = list(sizes)
        arms += [_transformer_of(config, k, sizes_channels[k], taps) for k in (ks[0], ks[len(ks) // 2], ks[-1])]
    arms += [_elastic_width(config, sizes), _stratified(_elastic_width(config, sizes_channels, taps))]
    return [*arms, _early_exit(config, full), _mamba2(config, full)]


def finalist_arms(config: Config) -> list[Arm]:
    """Of the family, those that the larger scale is worth: budgets of channels alone, beside what they are held to."""
    smallest, largest = min(config.eval_budgets()), max(config.eval_budgets())
    elastic = [stratified(CHANNELS), stratified(HYBRID)]
    arms = _named(
        config, CHANNELS, HYBRID, *elastic, *map(softmax_gate, elastic), *map(nearly_closed_gate, elastic),
        f"spectral K={smallest}, channels only alone", f"spectral K={largest} alone", "hybrid (SA) alone",
        f"transformer of K={largest}'s size", f"transformer with taps of K={largest}'s size, channels only",
    )  # fmt: skip
    return [arm._replace(curves=tuple(curve for curve in arm.curves if curve != ALONE)) for arm in arms]


def position_arms(config: Config) -> list[Arm]:
    """Of the family at full size: spectral, hybrid, transformer, whose trainings are the family's."""
    largest = f"transformer of K={max(config.eval_budgets())}'s size"
    return [arm._replace(curves=()) for arm in _named(config, CHANNELS, HYBRID, largest)]


def _named(config: Config, *names: str) -> list[Arm]:
    return [arm for arm in family_arms(config) if arm.name in names]


def _channels_only(arm: Arm) -> Arm:
    return arm.more("model.ffn_elastic=null")


def stratified(name: str) -> str:
    """What an arm is called whose budgets come in turn."""
    return f"{name}, stratified"


def _stratified(arm: Arm) -> Arm:
    """Every budget in every update, or nearly."""
    return _several(arm, stratified(arm.name), budget__strategy="stratified")


def _log_uniform(config: Config, arm: Arm) -> Arm:
    """Any budget from the smallest of the list on, the small ones more often."""
    least = min(config.listed_budgets())
    return _several(arm, f"{arm.name}, log-uniform", budget__strategy="log_uniform", budget__min_k=least)


def softmax_gate(name: str) -> str:
    """What an arm is called whose gate's weights sum to 1 over the budget."""
    return f"{name}, softmax gate"


def _softmax(arm: Arm) -> Arm:
    """Without the paper's rescaling of the gate's scores (Eq. 8b)."""
    settings = overridden(model__gate="softmax", model__gate_rescale="false")
    return arm.more(*settings, name=softmax_gate(arm.name))._replace(curves=())


def nearly_closed_gate(name: str) -> str:
    """What an arm or a curve is called whose gate's sigmoids start at 1/K_max."""
    return f"{name}, gate from 1/K_max"


def _nearly_closed(config: Config, arm: Arm) -> Arm:
    """A gate of sigmoids that start where a softmax over all channels does, at 1/K_max, and need not sum to 1."""
    k_max = config.model.num_channels
    bias = round(-math.log(k_max - 1), 1) if k_max > 1 else 0.0
    return arm.more(*overridden(model__gate_bias_init=bias), name=nearly_closed_gate(arm.name))


def _other_gates(config: Config, elastic: Sequence[Arm], ks: Sequence[int]) -> list[Arm]:
    """With a softmax, and with nearly closed sigmoids: the elastic arms, and models of one size, whose sigmoids start
    where the elastic model's do, whatever their K. With a softmax the smallest size only."""
    alone = [_alone(config, k, channels_only=True) for k in ks]
    by_size = (nearly_closed_gate(ALONE_CHANNELS),)
    return [
        *map(_softmax, [*elastic, alone[0]]),
        *(_nearly_closed(config, arm) for arm in elastic),
        *(_nearly_closed(config, arm)._replace(curves=by_size) for arm in alone),
    ]


def _several(arm: Arm, name: str, **draws: Any) -> Arm:
    """Several budgets an update instead of one: on as many parts of the batch."""
    return arm.more(*overridden(**draws, train__micro_batch_sequences=STRATIFIED_ROWS), name=name)


def _stratified_over_three(config: Config, arm: Arm) -> Arm:
    """The two smallest budgets and the largest alone."""
    listed, all_ = config.listed_budgets(), _stratified(arm)
    few = overridden(budget__budgets=sorted({*listed[:2], listed[-1]}))
    return all_.more(*few, name=f"{all_.name} over three")


def overridden(**values: Any) -> tuple[str, ...]:
    return tuple(f"{name.replace('__', '.')}={value}" for name, value in values.items())


def _updated(config: Config, **values: Any) -> Any:
    return config.model.model_copy(update=values)


def hybrid(config: Config, size: int, name: str = "elastic hybrid (SA)") -> Arm:
    width = width_of_size(_updated(config, pattern="SA"), size)
    return Arm(name, overridden(model__pattern="SA", model__d_ffn=width))


def paper_layer(config: Config, size: int) -> Arm:
    """The paper's layer: K dense matrices, a softmax gate, sigma^(1/4); so much narrower that the size is the same."""
    paper = {"mixer_heads": 1, "gate": "softmax", "sigma_scale": ("quarter_power",), "input_taps": 1}

    def width(d_model: int) -> int:
        return width_of_size(_updated(config, d_model=d_model, **paper), size)

    # the widest whose feed-forward layer still has twice its width
    d_model = max((d for d in range(8, config.model.d_model + 1, 8) if width(d) >= 2 * d), default=8)
    settings = overridden(
        model__mixer_heads=1, model__gate="softmax", model__sigma_scale="quarter_power", model__input_taps=1,
        model__d_model=d_model, model__d_ffn=width(d_model),
    )  # fmt: skip
    return Arm("elastic, the paper's layer", settings)


def _alone(config: Config, k: int, channels_only: bool = False) -> Arm:
    """The model that is left at K, trained at K; with `channels_only` of the family whose width stays."""
    width = config.model.d_ffn if channels_only else config.model.cut(k).d_ffn
    of = ", channels only" if channels_only else ""
    overrides = overridden(model__num_channels=k, model__d_ffn=width, model__ffn_elastic="null", **fixed(k))
    return Arm(f"spectral K={k}{of} alone", overrides, curves=(ALONE_CHANNELS if channels_only else ALONE,), at=k)


def fixed(k: int) -> Mapping[str, Any]:
    return {"budget__strategy": "fixed", "budget__budgets": f"[{k}]", "eval__budgets": f"[{k}]"}


def transformer(config: Config, name: str, size: int, **more: Any) -> Arm:
    update = {"pattern": "A", "num_channels": 1, "input_taps": 1, **more}
    width = width_of_size(_updated(config, **update), size)
    settings = {f"model__{key}": value for key, value in {**update, "d_ffn": width, "ffn_elastic": "null"}.items()}
    return Arm(name, overridden(**settings, **fixed(1)))


def _transformer_of(config: Config, k: int, size: int, taps: int = 1) -> Arm:
    """Of the size that the elastic model has at K; with taps the sizes are those of the family whose width stays."""
    kind, of = _transformer_with(taps), ", channels only" if taps > 1 else ""
    arm = transformer(config, f"{kind} of K={k}'s size{of}", size, input_taps=taps)
    return arm._replace(curves=(f"{kind} of each size",), at=k)


def _transformer_with(taps: int) -> str:
    return "transformer with taps" if taps > 1 else "transformer"


def _elastic_width(config: Config, sizes: Mapping[int, int], taps: int = 1) -> Arm:
    """A transformer whose budgets cut the feed-forward width alone, from the smallest of `sizes` to the largest."""
    k_max, k_min = max(sizes), min(sizes)
    attention = _updated(config, pattern="A", input_taps=taps)
    widest = width_of_size(attention, sizes[k_max])
    narrowest = max(8, width_of_size(attention, sizes[k_min]))
    units = max(8, round((widest - narrowest) / (k_max - k_min) / 8) * 8)
    widest = max(widest, units * k_max)
    elastic = f"{{knee_k: {k_max}, below: {units}, above: {units}}}"
    overrides = overridden(model__pattern="A", model__input_taps=taps, model__d_ffn=widest, model__ffn_elastic=elastic)
    return Arm(f"{_transformer_with(taps)}, elastic width", overrides)


def _early_exit(config: Config, size: int) -> Arm:
    arm = transformer(config, "transformer, early exit", size, n_layers=EXIT_LAYERS)
    return arm._replace(peer="early_exit")


def _mamba2(config: Config, size: int) -> Arm:
    """Of the configured depth; the width makes the size."""

    def count(d_model: int) -> int:
        model = _updated(config, d_model=d_model, pattern="A", n_heads=1)
        return peer_parameters(build_peer("mamba2", model, 0), 1)

    d_model = min(range(16, 2 * config.model.d_model, 8), key=lambda d: abs(count(d) - size))
    width = {"model__d_model": d_model, "model__pattern": "A", "model__n_heads": 1, "model__mixer_heads": 1,
             "model__num_channels": 1, "model__input_taps": 1, "model__ffn_elastic": "null"}  # fmt: skip
    return Arm("Mamba-2", overridden(**width, **fixed(1)), peer="mamba2")
