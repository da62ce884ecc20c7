"""The network's knobs: sizes, pattern, filters, initialisation. Equations: `megassm.layers.spectral`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_serializer

from megassm.config.fields import Positive, PositiveInt, Section, Size, UnitsPerChannel, _as_tuple, _gate_by_name
from megassm.errors import UserError

CHUNK = 64
"""Positions that the chunked filter bank computes at a time; near its number of states, so that neither half of the
product dominates."""
FUSED_HEAD_WIDTH, FUSED_INPUTS = 128, 128
"""Widest head, and most inputs and states of a chunk, that a GPU mixes without writing features
(`megassm.ops.head_mixing`). At twice the width, which kernels can hold too, an H100 took longer for 8 channels so
(2.48 ms, and 2.02 with features written)."""
MAX_LAYERS = 10_000
MAX_SEQ_LEN = 2**22
"""Its 32 filters take a minute and 8 GB to derive, those of 2^20 positions 18 s and 2 GB."""
MAX_CHANNELS = 128
"""Most spectral channels of a model: float64 knows fewer filters at any length."""
SigmaScale = Literal["quarter_power", "none"]
Gate = Literal["softmax", "sigmoid", "none", "equal"]
Basis = Literal["plus", "alternating", "hankel_l"]
Budget = int | Sequence[int]
"""Channels K in use: one number for all layers, or one a layer."""


class ElasticFfnConfig(Section):
    """Hidden units of the feed-forward layers that come with the channels, at two rates.

    The map counts units a channel, not shares of a width: a model cut to K keeps it, and so every width below K.
    """

    knee_k: PositiveInt
    """Budget up to which the first rate holds."""
    below: UnitsPerChannel
    """Hidden units that each channel up to knee_k brings; a multiple of 8, so that widths suit matrix products."""
    above: UnitsPerChannel
    """Hidden units that each channel beyond knee_k brings; a multiple of 8."""

    def units(self, k: int) -> int:
        """Hidden units that k channels bring."""
        return self.below * min(k, self.knee_k) + self.above * max(0, k - self.knee_k)


class ModelConfig(Section):
    """The network. Equations: `megassm.layers.spectral`."""

    vocab_size: Size
    """Rows of the embedding; at least the tokenizer's vocabulary."""
    d_model: Size
    """Width d of the residual stream."""
    n_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)]
    """Number of blocks."""
    pattern: Annotated[str, Field(pattern=r"^[SA]+$", max_length=MAX_LAYERS)] = "S"
    """Mixers, tiled over depth: S is an elastic spectral layer, A is causal attention ("SSSA")."""
    seq_len: Annotated[int, Field(ge=1, le=MAX_SEQ_LEN)]
    """Training sequence length L, tokens; also the length the filters are derived for."""
    num_channels: Size = 32
    """Spectral channels K_max; every budget is K <= K_max."""
    basis: Basis = "plus"
    """Filters of the channels: plus: the paper's, of decays without sign; alternating: by turns one of them and the
    same times (-1)^t, for what alternates; hankel_l: of the Hankel matrix for decays of both signs, by turns for even
    and odd ages. Both kinds with signs know slow decays less well at the same K."""
    layer_channels: (
        Annotated[tuple[Size, ...], BeforeValidator(_as_tuple), Field(min_length=1, max_length=MAX_LAYERS)] | None
    ) = None
    """Channels of each layer, the largest being num_channels, of a model that was cut to one K a layer; null:
    num_channels in every layer. A layer uses no more than it has at any budget."""
    sigma_scale: Annotated[tuple[SigmaScale, ...], BeforeValidator(_as_tuple), Field(min_length=1)] = ("quarter_power",)
    """Weight of channel k: sigma_k^(1/4) as in the paper, or 1 (none); a list is tiled over the spectral layers."""
    input_taps: Annotated[int, Field(ge=1, le=CHUNK)] = 1
    """Length of a causal convolution of each channel by itself before every mixer, spectral or attention; 1: none."""
    mixer_heads: Size = 1
    """Heads H of a spectral layer: M_k is H blocks of d/H, each with a gate of its own, then an output projection; 1 is
    the paper's dense M_k without a projection."""
    gate: Annotated[Gate, BeforeValidator(_gate_by_name)] = "softmax"
    """Weights alpha_k of the channels: softmax of input-dependent scores over the budget (the paper's); 2 sigmoid of
    each score, so that a smaller budget leaves out summands and changes no other; none: 1 each; equal: 1/K each."""
    gate_rescale: bool = True
    """RMS rescaling of the softmax gate's scores (paper, Eq. 8b); false: none, the paper's ablation, which lost nothing
    where it was tried."""
    gate_bias_init: Annotated[float, Field(allow_inf_nan=False)] = 0.0
    """Bias of the gate's scores at the start; the authors' -2 makes a rescaled softmax nearly uniform there, -2.7
    begins each weight of a sigmoid gate at 1/8."""
    gate_init_scale: Positive = 1.0
    """Standard deviation of the gate's matrices at the start times sqrt(inputs); the authors' is 0.577."""
    selective: bool = False
    """Whether the past of a spectral layer fades by what is read: its state is multiplied at each position by a number
    of each head, between 1/e and 1, that depends on the input there; it starts near 1 - 1/seq_len."""
    filterbank: Literal["auto", "direct", "fft", "flashfft", "chunked"] = "auto"
    """How the causal filter bank is computed; the results agree to rounding. auto is chunked."""
    beyond: Literal["continue", "window"] = "continue"
    """What is read in texts longer than seq_len: continue: the whole past, by the filters' continuation, in which high
    ones grow without bound; window: the last seq_len / 2 to seq_len positions, as in training, by two states."""
    channel_init_std: Positive | None = None
    """Standard deviation of the channel matrices M_k at the start (the authors': 1e-3); null means 1/sqrt(inputs of a
    head), divided by sqrt(num_channels) where the weights do not add up to 1 (gate: sigmoid or none), and with one head
    by sqrt(2 n_layers)."""
    n_heads: Size = 8
    """Query heads of an attention layer."""
    n_kv_heads: Size | None = None
    """Key-value heads (grouped-query attention); null means n_heads."""
    window: PositiveInt | None = None
    """Sliding attention window, tokens; null attends to the whole past."""
    rope_theta: Positive = 10_000.0
    """Base of the rotary position frequencies."""
    d_ffn: Size
    """Hidden width of the gated feed-forward layer, at K_max."""
    ffn_elastic: ElasticFfnConfig | None = None
    """How many of the d_ffn units a smaller budget uses, the leading ones; null: all at every K."""
    tie_embeddings: bool = True
    """Use the embedding matrix as the output head too."""
    classes: Size | None = None
    """Classes of a head on the mean over an example's positions, instead of the vocabulary's; null predicts tokens."""
    norm_eps: Positive = 1e-6
    """Epsilon of RMSNorm."""
    embed_init_std: Positive = 0.02
    """Standard deviation of the embeddings at the start. Other matrices start at 1/sqrt(inputs)."""
    base_width: Size | None = None
    """The d_model at which optim.lr was found, for muP (`megassm.optim`); null: one rate for all parameters."""

    @property
    def known_channels(self) -> int:
        """Leading channels whose filters float64 can compute (`megassm.ops.hankel`); those beyond are rounding noise.

        Filter k has an error of about 1e-18 / sqrt(sigma_k). It reaches 1e-3 to 2e-2 at k = 5 log2(seq_len), from 16 to
        2^20, and all of the filter five to fifteen channels later. Of a basis with signs so many of either sign are
        known, of hankel_l as many as at half the length.
        """
        signs = 1 if self.basis == "plus" else 2
        length = self.seq_len / 2 if self.basis == "hankel_l" else self.seq_len
        return min(self.seq_len, MAX_CHANNELS, signs * max(1, round(5 * math.log2(length))))

    @property
    def decay_start(self) -> float:
        """Bias of a selective layer's decays at the start: the log decay is then about -1/seq_len a position."""
        return -math.log(self.seq_len)

    @property
    def has_gate(self) -> bool:
        """Whether the channels' weights depend on the input."""
        return self.gate in ("softmax", "sigmoid")

    @property
    def width_factor(self) -> float:
        """What muP multiplies the learning rate of matrices with; 1 without it."""
        return self.base_width / self.d_model if self.base_width else 1.0

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def outputs(self) -> int:
        """Rows of the head: the number of things of which one is predicted."""
        return self.classes or self.vocab_size

    @property
    def has_head(self) -> bool:
        """Whether the head is a matrix of its own."""
        return self.classes is not None or not self.tie_embeddings

    @property
    def mixers(self) -> str:
        """One letter a layer: the pattern tiled over the depth."""
        return (self.pattern * self.n_layers)[: self.n_layers]

    @property
    def sigma_scales(self) -> tuple[SigmaScale | None, ...]:
        """One choice a layer, None where it is attention: sigma_scale tiled over the spectral layers."""
        choices = itertools.cycle(self.sigma_scale)
        return tuple(next(choices) if mixer == "S" else None for mixer in self.mixers)

    def ffn_width(self, k: int) -> int:
        """Hidden units of a feed-forward layer that budget k uses."""
        if self.ffn_elastic is None:
            return self.d_ffn
        return self.d_ffn - self.ffn_elastic.units(self.num_channels) + self.ffn_elastic.units(k)

    @property
    def channels_of_layers(self) -> tuple[int, ...]:
        """K_max of each layer.

        Raises:
            UserError: layer_channels is not such a list; in a configuration that was not loaded by its rules.
        """
        own = self.layer_channels or (self.num_channels,) * self.n_layers
        if len(own) != self.n_layers or max(own) != self.num_channels:
            raise UserError(
                f"model.layer_channels = {list(own)[:9]}: must be one number for each of the {self.n_layers} layers, "
                f"the largest of them model.num_channels = {self.num_channels}"
            )
        return own

    def layer(self, number: int) -> ModelConfig:
        """What the layer of that number, from 0, is built by: a model of its channels alone."""
        k = self.channels_of_layers[number]
        return self.model_copy(update={"num_channels": k, "d_ffn": self.ffn_width(k), "layer_channels": None})

    def layer_budgets(self, k: Budget | None) -> tuple[int, ...]:
        """K of each layer at budget k; None is all there is.

        Raises:
            UserError: out of range, or a list of another length than the model's.
        """
        own = self.channels_of_layers
        if k is None:
            return own
        if isinstance(k, int):
            if not 1 <= k <= self.num_channels:
                raise UserError(f"budget K = {k}: must be between 1 and this model's K_max = {self.num_channels}")
            return tuple(min(k, most) for most in own)
        if len(k) != len(own):
            raise UserError(f"a budget of {len(k)} numbers, one K a layer: this model has {len(own)} layers")
        wrong = [number for number, (each, most) in enumerate(zip(k, own, strict=True)) if not 1 <= each <= most]
        if wrong:
            first = wrong[0]
            raise UserError(
                f"budget K = {k[first]} of layer {first}: must be between 1 and that layer's {own[first]} channels"
            )
        return tuple(k)

    def is_elastic_layer(self, number: int) -> bool:
        """Whether the layer of that number changes with K."""
        return self.mixers[number] == "S" or self.ffn_elastic is not None

    def cut(self, k: Budget | None) -> ModelConfig:
        """The model that is left of this one at budget k; None leaves it whole.

        Raises:
            UserError: k is out of range.
        """
        budgets = self.layer_budgets(k)
        elastic = [each for number, each in enumerate(budgets) if self.is_elastic_layer(number)]
        most = max(elastic or budgets)
        budgets = tuple(min(most, each) for each in budgets)
        mixed = any(each != most for number, each in enumerate(budgets) if self.is_elastic_layer(number))
        update = {"num_channels": most, "d_ffn": self.ffn_width(most), "layer_channels": budgets if mixed else None}
        return self.model_copy(update=update)

    @field_serializer("sigma_scale")
    def _one_sigma_scale_as_itself(self, scales: tuple[SigmaScale, ...]) -> SigmaScale | tuple[SigmaScale, ...]:
        return scales[0] if len(scales) == 1 else scales
