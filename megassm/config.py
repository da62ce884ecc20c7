"""Every knob of a run, in one place: frozen sections with type, unit and meaning; `megassm.rules` has the rest.

A run is one `Config`. It is read from YAML by `megassm.configfile`, which turns every violation into a message
with file and line. Nothing here imports torch: a refusal costs milliseconds.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, field_serializer

from megassm.urls import without_secrets

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
UnitsPerChannel = Annotated[int, Field(ge=0, multiple_of=8)]
CHUNK = 64
"""Positions that the chunked filter bank computes at a time; near its number of states, so that neither half of the
product dominates."""

Budgets = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]
SigmaScale = Literal["quarter_power", "none"]


def _as_tuple(value: object) -> object:
    """One choice for several; a list is what JSON has."""
    return (value,) if isinstance(value, str) else tuple(value) if isinstance(value, list) else value


class Section(BaseModel):
    """A frozen group of knobs: no coercion, no unknown key."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True)


class RunConfig(Section):
    """Where the run lives and what makes it reproducible."""

    dir: Annotated[str, Field(min_length=1)]
    """Run directory; everything the run writes is below it."""
    seed: NonNegativeInt = 0
    """Seeds the weights, the sample order and the budgets."""
    init_from: str | None = None
    """Exported model (tools/export.py) whose weights a new run starts from; null draws them from the seed."""


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
        """What k channels bring."""
        return self.below * min(k, self.knee_k) + self.above * max(0, k - self.knee_k)


class ModelConfig(Section):
    """The network. Equations: `megassm.layers.spectral`."""

    vocab_size: PositiveInt
    """Rows of the embedding; at least the tokenizer's vocabulary."""
    d_model: PositiveInt
    """Width d of the residual stream."""
    n_layers: PositiveInt
    """Number of blocks."""
    pattern: Annotated[str, Field(pattern=r"^[SA]+$")] = "S"
    """Mixers, tiled over depth: S is an elastic spectral layer, A is causal attention ("SSSA")."""
    seq_len: PositiveInt
    """Training sequence length L, tokens; also the length the filters are derived for."""
    num_channels: PositiveInt = 32
    """Spectral channels K_max; every budget is K <= K_max."""
    sigma_scale: Annotated[tuple[SigmaScale, ...], BeforeValidator(_as_tuple), Field(min_length=1)] = ("quarter_power",)
    """Weight of channel k: sigma_k^(1/4) as in the paper, or 1 (none); a list is tiled over the spectral layers."""
    gate: bool = True
    """Input-adaptive gate; false is the ablation with equal weights 1/K."""
    gate_rescale: bool = True
    """RMS rescaling of the gate's scores (paper, Eq. 8b); false is the ablation."""
    filterbank: Literal["auto", "direct", "fft", "flashfft", "chunked"] = "auto"
    """How the causal filter bank is computed; the results agree to rounding. auto is chunked."""
    channel_init_std: Positive | None = None
    """Standard deviation of the channel matrices M_k at the start; null means 1/sqrt(d_model)."""
    n_heads: PositiveInt = 8
    """Query heads of an attention layer."""
    n_kv_heads: PositiveInt | None = None
    """Key-value heads (grouped-query attention); null means n_heads."""
    window: PositiveInt | None = None
    """Sliding attention window, tokens; null attends to the whole past."""
    rope_theta: Positive = 10_000.0
    """Base of the rotary position frequencies."""
    d_ffn: PositiveInt
    """Hidden width of the gated feed-forward layer, at K_max."""
    ffn_elastic: ElasticFfnConfig | None = None
    """How many of the d_ffn units a smaller budget uses, the leading ones; null: all at every K."""
    tie_embeddings: bool = True
    """Use the embedding matrix as the output head too."""
    classes: PositiveInt | None = None
    """Classes of a head on the mean over an example's positions, instead of the vocabulary's; null predicts tokens."""
    norm_eps: Positive = 1e-6
    """Epsilon of RMSNorm."""
    embed_init_std: Positive = 0.02
    """Standard deviation of the embeddings at the start. Other matrices start at 1/sqrt(inputs)."""
    base_width: PositiveInt | None = None
    """The d_model at which optim.lr was found, for muP (`megassm.optim`); null: one rate for all parameters."""

    @property
    def width_factor(self) -> float:
        """What muP multiplies the learning rate of matrices with; 1 without it."""
        return self.base_width / self.d_model if self.base_width else 1.0

    @property
    def kv_heads(self) -> int:
        return self.n_kv_heads or self.n_heads

    @property
    def outputs(self) -> int:
        """Rows of the head: what is predicted is one of so many."""
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

    def cut(self, k: int) -> ModelConfig:
        """The model that is left of this one at budget k."""
        return self.model_copy(update={"num_channels": k, "d_ffn": self.ffn_width(k)})

    @field_serializer("sigma_scale")
    def _one_sigma_scale_as_itself(self, scales: tuple[SigmaScale, ...]) -> SigmaScale | tuple[SigmaScale, ...]:
        return scales[0] if len(scales) == 1 else scales


class BudgetConfig(Section):
    """How many channels K a micro-batch may use (budget dropout)."""

    strategy: Literal["fixed", "uniform", "log_uniform", "paper", "sandwich"] = "paper"
    """fixed: always `k`; uniform, log_uniform: any K in [min_k, K_max]; paper: the listed ones; sandwich: K_max, min_k
    and one between in turn."""
    draws: PositiveInt | None = None
    """Budgets drawn an update, each for as many micro-steps; null: one a micro-step when the run began."""
    k: PositiveInt | None = None
    """The K of `fixed`; null is K_max, the static baseline."""
    min_k: PositiveInt = 1
    """Smallest K that `uniform`, `log_uniform` and `sandwich` draw."""
    min_k_steps: PositiveInt | None = None
    """Updates over which the smallest K allowed falls from K_max to 1, whatever the strategy; null: none."""
    distill_weight: Fraction = 0.0
    """Share of the loss, at a K below K_max, that is the divergence from the model's own prediction at K_max."""
    distill_temperature: Positive = 1.0
    """Temperature of both predictions in that divergence."""
    budgets: Budgets = (2, 3, 4, 6, 8, 12, 16, 24, 32)
    """The budgets of `paper`, increasing; those beyond K_max are a violation."""
    full_every: PositiveInt | None = 8
    """`paper`: every n-th update runs at K_max; null never."""
    full_steps: NonNegativeInt | None = None
    """`paper`: updates at the start that run at K_max; null means optim.warmup_steps."""
    bias: NonNegative = 0.5
    """`paper`: a listed budget K is drawn with weight K^bias; 0 is log-uniform over the default list."""


class OptimConfig(Section):
    """AdamW and its learning rate."""

    lr: Positive = 3e-4
    """Peak learning rate."""
    min_lr_ratio: Fraction = 0.1
    """Final learning rate over the peak."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the linear warm-up: cosine decay, or constant and a linear decay at the end (warm-up-stable-decay)."""
    warmup_steps: NonNegativeInt = 100
    """Updates of linear warm-up."""
    decay_steps: PositiveInt | None = None
    """wsd: updates of the final decay; null is a tenth of train.steps."""
    beta1: Fraction = 0.9
    """AdamW's decay of the first moment."""
    beta2: Fraction = 0.95
    """AdamW's decay of the second moment."""
    eps: Positive = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegative = 0.1
    """Decoupled weight decay of matrices; vectors (norms, biases) have none."""
    grad_clip: Positive | None = 1.0
    """Largest global gradient norm; null does not clip."""


class TrainConfig(Section):
    """How much to train, and in what arithmetic."""

    steps: PositiveInt
    """Optimizer updates."""
    batch_sequences: PositiveInt
    """Global batch, sequences an update."""
    micro_batch_sequences: PositiveInt
    """Sequences one rank processes at a time; one budget K is drawn for each micro-step."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Arithmetic of weights and activations; filters, gates' softmax and losses stay float32."""
    max_skipped: PositiveInt = 10
    """Updates in a row that may be dropped because loss or gradient is not finite, before the run stops."""
    recompute: bool = False
    """Recompute each block's activations in the backward pass."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto takes CUDA where torch finds it."""


class ParallelConfig(Section):
    """How the run is spread over ranks."""

    zero_stage: Literal[0, 1, 2, 3] = 1
    """DeepSpeed ZeRO stage."""
    tensor: PositiveInt = 1
    """Tensor-parallel ranks: each holds a part of every large matrix. Keep them inside a node."""
    sequence: PositiveInt = 1
    """Sequence-parallel ranks: each holds a part of every sequence."""
    data: PositiveInt | None = None
    """Data-parallel ranks; null is what tensor and sequence ranks leave of the world."""
    timeout_s: PositiveInt = 600
    """Seconds a collective may wait for a rank before the job fails."""


class PhaseConfig(Section):
    """What is read from an update on."""

    start_step: NonNegativeInt
    """Update it begins at; the first begins at 0."""
    sources: dict[str, Positive]
    """Weights of the sources in tokens, by name; a source left out is not read."""


class DataConfig(Section):
    """What is read: one data set, or a mixture of several."""

    path: Annotated[str, Field(min_length=1)] | None = None
    """Data set made by tools/prepare_data.py, holds train/ and valid/: a folder, or a URL (https, s3, gs, ...)."""
    sources: dict[str, Annotated[str, Field(min_length=1)]] = {}
    """Instead of path: data sets of one tokenizer, by name."""
    phases: tuple[PhaseConfig, ...] = ()
    """Weights of the sources over the run; required with sources."""
    max_epochs: Positive = 4.0
    """With sources: a run that would read one of them more often over train.steps is refused."""
    tokenizer: str | None = None
    """"bytes" or a SentencePiece model; null is the one the data set was made with."""
    isolate_documents: bool = False
    """No position sees another document of its sequence; attention then holds a mask of B x L x L numbers."""
    cache_dir: str | None = None
    """Folder on a local disk where fetched blocks are kept for all ranks of the node; null keeps none."""
    cache_gib: Positive = 50.0
    """Most that cache_dir may hold, GiB; the least recently used goes first."""
    on_bad_block: Literal["raise", "mask"] = "raise"
    """A damaged block ends the run, or its sequences train nothing and are counted."""

    @field_serializer("path")
    def _path_without_secrets(self, path: str | None) -> str | None:
        # what is written down (run directory, checkpoints, wandb) must not hold a signature or a password
        return None if path is None else without_secrets(path)

    @field_serializer("sources")
    def _sources_without_secrets(self, sources: dict[str, str]) -> dict[str, str]:
        return {name: without_secrets(path) for name, path in sources.items()}


class CheckpointConfig(Section):
    """What is kept."""

    every_steps: PositiveInt = 1000
    """Updates between checkpoints; the last update always saves."""
    keep: PositiveInt = 3
    """Complete checkpoints kept; older ones are removed."""


class HealthConfig(Section):
    """What is watched while training, and what follows from it. What happened is in events.jsonl."""

    spike_z: Positive | None = 8.0
    """A loss that is so many robust standard deviations above what is expected is a spike; null looks for none."""
    spike_action: Literal["report", "skip", "rewind"] = "report"
    """A spike is reported and keeps the checkpoint before it; skip: its batch changes no weight either; rewind: the run
    goes back to that checkpoint, and on with the batches after the spike."""
    max_failures: PositiveInt | None = 3
    """Jobs in a row that may fail at the same step before the next one is refused; null: any number."""


class EvalConfig(Section):
    """Validation over budgets while training."""

    every_steps: PositiveInt | None = 1000
    """Updates between validations; null validates after the last update only."""
    sequences: PositiveInt = 64
    """Validation sequences, global; every K sees the same ones."""
    budgets: Budgets = (2, 4, 8, 16, 32)
    """The K at which validation runs."""


class LogConfig(Section):
    """Who is told, and how often. metrics.jsonl always has every update."""

    every_steps: PositiveInt = 10
    """Updates between printed lines."""
    wandb: Literal["online", "offline", "disabled"] = "offline"
    """offline needs no account; online falls back to offline, with one warning, where it cannot log in."""
    wandb_project: str = "megassm"
    """Project under which the run appears."""
    peak_tflops: Positive | None = None
    """Peak rate of one device, TFLOP/s, for model FLOPs utilisation; null is looked up, or measured on a CPU."""


class Config(Section):
    """One run."""

    run: RunConfig
    model: ModelConfig
    budget: BudgetConfig = BudgetConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    checkpoint: CheckpointConfig = CheckpointConfig()
    health: HealthConfig = HealthConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()

    def tokens_per_step(self) -> int:
        return self.train.batch_sequences * self.model.seq_len

    def data_ranks(self, world_size: int) -> int:
        """Data-parallel ranks of a job of `world_size`."""
        return world_size // (self.parallel.sequence * self.parallel.tensor)

    def micro_steps(self, data_ranks: int) -> int:
        """Micro-steps an update (gradient accumulation) on each of `data_ranks` ranks."""
        return self.train.batch_sequences // (self.train.micro_batch_sequences * data_ranks)

    def full_budget_steps(self) -> int:
        """Updates at the start that run at K_max under the paper's recipe."""
        return self.optim.warmup_steps if self.budget.full_steps is None else self.budget.full_steps
