"""Tensor parallelism: a finished model, split over the ranks of a tensor group from outside; its layers do not know.

Every large matrix is divided along the axis that leaves one sum per layer (arXiv 1909.08053, section 3, for attention
and feed-forward):

    spectral mixer     its input channels: rank r computes the convolutions of its own channels of u and holds rows
                       M_k[d_r, :], D[d_r, :]; its product is a part of the sum y. With several heads these are whole
                       heads, with their rows of the output projection. The spectral channels K are never divided: a
                       small budget would leave ranks idle. The gate is replicated
    attention          its heads. Keys and values are replicated where there are fewer key-value heads than ranks
    feed-forward       its hidden units; of an elastic width rank r holds every `ranks`-th from the r-th on, so that the
                       leading units of a budget are the same on every mesh, and equally many on each rank
    embedding, head    the vocabulary; the loss is computed from parts of the logits, which are never gathered

Forward, each layer sums its outputs once over the group; backward, the gradient of its input once. All ranks then hold
the same activations between layers, bit for bit, so replicated parameters get the same gradient on all of them.

Shapes: B batch, L length, D width, K budget, V vocabulary, N = B * L.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megassm.config.model import ModelConfig
from megassm.layers.attention import Attend, Attention, Mask
from megassm.layers.block import Block
from megassm.layers.spectral import SpectralMixer
from megassm.layers.vocabulary import Vocabulary
from megassm.model import LanguageModel, parameter_shapes
from megassm.parallel.collectives import (
    EnterMixer,
    all_reduce,
    spread,
    summed,
)
from megassm.parallel.link import Link
from megassm.parallel.world import Group

SPLIT_AXIS = {
    "embedding_VD": 0,
    "head_VD": 0,
    "mixer.channels_KDD": 1,
    "mixer.direct_DD": 0,
    "mixer.out_DD": 0,
    "mixer.query.weight": 0,
    "mixer.key.weight": 0,
    "mixer.value.weight": 0,
    "mixer.out.weight": 1,
    "ffn.gate.weight": 0,
    "ffn.up.weight": 0,
    "ffn.down.weight": 1,
}
"""By the end of a parameter's name; the others are replicated."""


class WeightSlice(NamedTuple):
    """What one rank holds of a parameter: every `step`-th of the indices [start, stop) of `axis`, or all of it where
    `axis` is None."""

    axis: int | None
    start: int
    stop: int
    step: int = 1

    @property
    def indices(self) -> range:
        return range(self.start, self.stop, self.step)

    def shape(self, whole: torch.Size) -> torch.Size:
        """Of the part."""
        if self.axis is None:
            return whole
        return torch.Size((*whole[: self.axis], len(self.indices), *whole[self.axis + 1 :]))

    def of(self, whole: Tensor) -> Tensor:
        """A view."""
        if self.axis is None:
            return whole
        return whole[(slice(None),) * self.axis + (slice(self.start, self.stop, self.step),)]


def bounds(size: int, ranks: int, rank: int) -> tuple[int, int]:
    """The rank's share [start, stop) of `size` things; shares differ by one at most."""
    return size * rank // ranks, size * (rank + 1) // ranks


def _slice(axis: int, size: int, ranks: int, rank: int, dealt: bool) -> WeightSlice:
    return WeightSlice(axis, rank, size, ranks) if dealt else WeightSlice(axis, *bounds(size, ranks, rank))


def weight_slices(config: ModelConfig, ranks: int, rank: int) -> dict[str, WeightSlice]:
    """What tensor rank `rank` of `ranks` holds of each parameter: a pure function."""
    parts = {}
    for name, shape in parameter_shapes(config).items():
        short = ".".join(name.split(".")[2:]) if name.startswith("blocks.") else name
        axis = SPLIT_AXIS.get(short)
        if short in ("mixer.key.weight", "mixer.value.weight") and config.kv_heads < ranks:
            axis = None
        dealt = config.ffn_elastic is not None and short.startswith("ffn.")
        parts[name] = WeightSlice(None, 0, 0) if axis is None else _slice(axis, shape[axis], ranks, rank, dealt)
    return parts


@torch.no_grad()
def build_split_model(
    config: ModelConfig, weights: Iterable[tuple[str, Tensor]], group: Group, recompute: bool = False
) -> LanguageModel:
    """This rank's part of a model, on the CPU; `weights` are (name, whole value), as `initial_weights` yields them."""
    model = split_model(config, group, recompute)
    parts = weight_slices(config, group.size(), group.rank())
    for name, whole in weights:
        set_parameter(model, name, parts[name].of(whole).clone())
    return model


def split_model(
    config: ModelConfig, group: Group, recompute: bool, dtype: torch.dtype = torch.float32
) -> LanguageModel:
    """This rank's part of a model, its filters on the CPU, its parameters in `dtype` on the meta device.

    Parameters that are parts are marked `tensor_model_parallel`, by which DeepSpeed counts the others once in the
    gradient's norm.
    """
    ranks, rank = group.size(), group.rank()
    with torch.device("meta"):
        model = LanguageModel(config, recompute)
    shapes = parameter_shapes(config)
    for name, part in weight_slices(config, ranks, rank).items():
        value = torch.empty(part.shape(shapes[name]), dtype=dtype, device="meta")
        set_parameter(model, name, value).tensor_model_parallel = part.axis is not None and ranks > 1  # type: ignore[attr-defined]
    if model.filterbank is not None:
        model.filterbank.to_empty(device="cpu")
    model.reset_filters()
    if ranks > 1:
        _connect(model, Link(group))
    return model


def set_parameter(model: LanguageModel, name: str, value: Tensor) -> nn.Parameter:
    """Puts a value in the place of a parameter, marked as that was."""
    module, _, attribute = name.rpartition(".")
    parameter = nn.Parameter(value)
    parameter.__dict__.update(model.get_parameter(name).__dict__)
    setattr(model.get_submodule(module), attribute, parameter)
    return parameter


def _connect(model: LanguageModel, link: Link) -> None:
    """Puts the collectives around the parts of a model."""
    model.vocabulary = SplitVocabulary(link, model.config)
    for block in cast(list[Block], model.blocks):
        match block.mixer:
            case SpectralMixer():
                block.mixer.split = SplitMixer(link, model.config)
            case Attention():
                _connect_attention(block.mixer, model.config, link)
            case other:
                raise AssertionError(f"no split is known for {type(other)}")
        block.ffn.width = SplitWidth(link, model.config)
        block.ffn.register_forward_pre_hook(_SpreadInput(link))
        block.ffn.register_forward_hook(_SumOutput(link))


def _connect_attention(attention: Attention, config: ModelConfig, link: Link) -> None:
    attention.out.register_forward_hook(_SumOutput(link))
    if config.kv_heads >= link.size:
        attention.register_forward_pre_hook(_SpreadInput(link))
        return
    # fewer key-value heads than ranks: all are computed everywhere, and each rank's queries use one of them
    attention.query.register_forward_pre_hook(_SpreadInput(link))
    attention.attend = OneHead(link, link.rank * config.kv_heads // link.size, attention.attend)


@dataclass(frozen=True)
class _SpreadInput:
    """A hook: the gradient of a module's input is summed over the group."""

    link: Link

    def __call__(self, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (spread(inputs[0], self.link.group), *inputs[1:])


@dataclass(frozen=True)
class _SumOutput:
    """A hook: a module's output is summed over the group."""

    link: Link

    def __call__(self, _module: nn.Module, _inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        return summed(output, self.link.group)


@dataclass(frozen=True)
class SplitWidth:
    """A `FeedForward.width`: the hidden units in use of those that this rank holds."""

    link: Link
    config: ModelConfig

    def __call__(self, k: int) -> int:
        dealt = self.config.ffn_elastic is not None
        mine = _slice(0, self.config.d_ffn, self.link.size, self.link.rank, dealt).indices
        return len(range(mine.start, min(mine.stop, self.config.ffn_width(k)), mine.step))


@dataclass(frozen=True)
class SplitMixer:
    """A `megassm.layers.spectral.MixerSplit`: this rank's channels of the input, and its heads."""

    link: Link
    config: ModelConfig

    def enter(self, u_BLD: Tensor, weights_BLHK: Tensor) -> tuple[Tensor, Tensor]:
        heads, place = self.config.mixer_heads, (self.link.size, self.link.rank)
        channels = slice(*bounds(self.config.d_model, *place))
        mine = slice(0, 1) if heads == 1 else slice(*bounds(heads, *place))
        both: tuple[Tensor, Tensor] = EnterMixer.apply(u_BLD, weights_BLHK, channels, mine, self.link.group)  # type: ignore[no-untyped-call]
        return both

    def leave(self, y_BLD: Tensor) -> Tensor:
        return summed(y_BLD, self.link.group)


@dataclass(frozen=True)
class OneHead:
    """An `Attention.attend` of queries that all use one of the key-value heads."""

    link: Link
    head: int
    whole: Attend

    def __call__(self, query_BHLP: Tensor, key_BGLP: Tensor, value_BGLP: Tensor, mask: Mask) -> Tensor:
        both_BGLQ = spread(torch.cat((key_BGLP, value_BGLP), dim=-1), self.link.group)
        key_B1LP, value_B1LP = both_BGLQ[:, self.head : self.head + 1].chunk(2, dim=-1)
        return self.whole(query_BHLP, key_B1LP, value_B1LP, mask)


@dataclass(frozen=True)
class _OverRanks:
    """A `megassm.ops.losses.Combine` over the group."""

    link: Link

    def __call__(self, sums: Tensor, of: Literal["max", "sum"]) -> Tensor:
        return all_reduce(sums.clone(), self.link.group, dist.ReduceOp.MAX if of == "max" else dist.ReduceOp.SUM)


class SplitVocabulary(Vocabulary):
    """This rank's rows of the embedding and the head; the logits of all ranks are never gathered."""

    def __init__(self, link: Link, config: ModelConfig) -> None:
        self.link = link
        self.ids = bounds(config.vocab_size, link.size, link.rank)
        self.first_output, _ = bounds(config.outputs, link.size, link.rank)
        self.combine = _OverRanks(link)

    def embed(self, ids: Tensor, embedding_VD: Tensor) -> Tensor:
        start, stop = self.ids
        mine = (ids >= start) & (ids < stop)
        rows = super().embed((ids - start).where(mine, 0), embedding_VD)
        return summed(rows * mine[..., None].to(rows.dtype), self.link.group)

    def logits(self, x: Tensor, head_VD: Tensor) -> Tensor:
        return super().logits(spread(x, self.link.group), head_VD)

    @torch.no_grad()
    def hits(self, logits_BLV: Tensor, targets_BL: Tensor) -> Tensor:
        group, start = self.link.group, self.first_output
        best_BLV = logits_BLV == all_reduce(logits_BLV.amax(-1, keepdim=True), group, dist.ReduceOp.MAX)
        mine_BL = (targets_BL >= start) & (targets_BL < start + logits_BLV.shape[-1])
        hit_BL1 = best_BLV.gather(-1, (targets_BL - start).where(mine_BL, 0)[..., None])
        hit_BL, count_BL = all_reduce(torch.stack((hit_BL1[..., 0] & mine_BL, best_BLV.sum(-1))).float(), group)
        hits_BL: Tensor = hit_BL / count_BL
        return hits_BL
