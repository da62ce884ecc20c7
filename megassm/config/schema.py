"""Every knob of a run, in one place: frozen sections with type, unit and meaning; `megassm.config.rules` has the rest.

A run is one `Config`. It is read from YAML by `megassm.config.load`, which turns every violation into a message
with file and line. Nothing here imports torch: a validation error costs milliseconds.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_serializer

from megassm.config.fields import Budgets, Decay, Fraction, NonNegative, NonNegativeInt, Positive, PositiveInt, Section
from megassm.config.model import ModelConfig
from megassm.errors import without_secrets


class RunConfig(Section):
    """Where the run lives and what makes it reproducible."""

    dir: Annotated[str, Field(min_length=1)]
    """Run directory; everything the run writes is below it."""
    seed: NonNegativeInt = 0
    """Seeds the weights, the sample order and the budgets."""
    init_from: str | None = None
    """Exported model (tools/export.py) whose weights a new run starts from; null draws them from the seed."""


class BudgetConfig(Section):
    """How many channels K a micro-batch may use (budget dropout)."""

    strategy: Literal["fixed", "uniform", "log_uniform", "paper", "sandwich", "stratified"] = "paper"
    """fixed: always `k`; uniform, log_uniform: any K in [min_k, K_max]; paper: the listed ones; sandwich: K_max, min_k
    and one between in turn; stratified: every listed one once in each round of as many draws."""
    draws: PositiveInt | None = None
    """Budgets drawn an update, each for as many micro-steps; null: one a micro-step when the run began."""
    k: PositiveInt | None = None
    """The K of `fixed`; null is K_max, the static baseline."""
    min_k: PositiveInt = 1
    """Smallest K that `uniform`, `log_uniform` and `sandwich` draw."""
    min_k_steps: PositiveInt | None = None
    """Anneals the minimum K from K_max to 1 over so many updates, under every strategy; null disables it."""
    distill_weight: Fraction = 0.0
    """Share of the loss, at a K below K_max, that is the divergence from the model's own prediction at K_max."""
    distill_temperature: Positive = 1.0
    """Temperature of both predictions in that divergence."""
    sampler: Literal["weighted", "authors"] = "weighted"
    """`paper`: weighted draws K of the list with weight K^bias; authors is their notebook's: log-uniform, bent by bias
    towards large K and taken to the nearest of the list."""
    budgets: Budgets | None = None
    """The budgets of `paper` and `stratified`, increasing, at most K_max; null: those of 2, 3, 4, 6, 8, 12, 16, 24, 32
    below K_max, and K_max."""
    full_every: PositiveInt | None = 8
    """`paper`: every n-th update runs at K_max; null never."""
    full_steps: NonNegativeInt | None = None
    """`paper`, `stratified`: updates at the start that run at K_max; null means optim.warmup_steps."""
    bias: NonNegative = 0.5
    """`paper`: prefers large budgets. weighted: weight K^bias, 0 is log-uniform over the default list. authors: u of
    [0, 1) becomes 1 - (1 - u)^(1/bias), 1 is log-uniform, and the smaller the more it prefers them; theirs is 0.6."""


class OptimConfig(Section):
    """AdamW and its learning rate."""

    lr: Positive = 3e-4
    """Peak learning rate."""
    min_lr_ratio: Fraction = 0.1
    """Final learning rate over the peak."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the linear warm-up: cosine decay, or constant and a linear decay at the end (warm-up-stable-decay)."""
    warmup_steps: NonNegativeInt = 100
    """Updates of linear warm-up; in a run that is no longer, half of its train.steps."""
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
    ema: Decay | None = None
    """Decay an update of a running average of the weights, kept beside them, at most (1 + n) / (10 + n) after n
    updates; null keeps none. `--ema` of the tools takes it for the weights."""

    def warmup(self, steps: int) -> int:
        """Updates of warm-up in a run of `steps` updates; half of a trial that is no longer than the warm-up."""
        return self.warmup_steps if self.warmup_steps < steps else steps // 2


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
    compile: bool = False
    """Compile the blocks with torch.compile for training, a graph a budget when it is first drawn; needs a C++
    compiler, on CUDA Triton too."""
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
    sources: dict[str, Annotated[str, Field(min_length=1)]] = Field(default={})
    """Instead of path: data sets of one tokenizer, by name."""
    phases: tuple[PhaseConfig, ...] = ()
    """Weights of the sources over the run; required with sources."""
    max_epochs: Positive = 4.0
    """How often a text may be read over train.steps, each source by itself; tasks may be read more often."""
    on_repeats: Literal["refuse", "warn"] = "refuse"
    """What becomes of a run that would read more often."""
    tokenizer: str | None = None
    """"bytes" or a SentencePiece model; null is the one the data set was made with."""
    isolate_documents: bool = False
    """No position sees another document of its sequence; attention then holds a mask of B x L x L numbers,
    on CUDA one of its blocks of 128."""
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
    """Complete checkpoints kept; older ones are removed, or their weights stay: the next two."""
    keep_weights_every: PositiveInt | None = None
    """A checkpoint is also made at every multiple of it, and its weights are kept for good; null: of none."""
    keep_weights_at: tuple[PositiveInt, ...] = ()
    """The same after these updates."""
    asynchronous: bool = True
    """Training goes on while a checkpoint is written, from a copy in host memory: 12 bytes a parameter, divided by the
    ranks."""


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
    budgets: Budgets | None = None
    """The K at which validation runs, increasing; null: those of 2, 4, 8, 16, 32 below K_max, and K_max."""


class LogConfig(Section):
    """Where progress is reported, and how often. metrics.jsonl always has every update."""

    every_steps: PositiveInt = 10
    """Updates between printed lines."""
    wandb: Literal["online", "offline", "disabled"] = "offline"
    """offline needs no account; online falls back to offline, with one warning, where it cannot log in."""
    wandb_project: str = "megassm"
    """Project under which the run appears."""
    wandb_entity: str | None = None
    """Account or team that it belongs to; null is the one that is logged in."""
    wandb_group: str | None = None
    """Group of runs that it belongs to."""
    wandb_tags: tuple[str, ...] = ()
    """Tags of the run."""
    wandb_name: str | None = None
    """Name of the run; null is that of the run directory."""
    tensorboard: bool = False
    """Write TensorBoard's files to tensorboard/ in the run directory; needs the extra tensorboard."""
    peak_tflops: Positive | None = None
    """Peak rate of one device, TFLOP/s, for model FLOPs utilisation; null is looked up, and on a CPU there is none."""


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

    def is_milestone(self, step: int) -> bool:
        """Whether the weights after `step` updates are kept for good."""
        every = self.checkpoint.keep_weights_every
        return step in self.checkpoint.keep_weights_at or (every is not None and step % every == 0)

    def tokens_per_step(self) -> int:
        return self.train.batch_sequences * self.model.seq_len

    def data_ranks(self, world_size: int) -> int:
        """Data-parallel ranks of a job of `world_size`."""
        return world_size // (self.parallel.sequence * self.parallel.tensor)

    def micro_steps(self, data_ranks: int) -> int:
        """Micro-steps an update (gradient accumulation) on each of `data_ranks` ranks."""
        return self.train.batch_sequences // (self.train.micro_batch_sequences * data_ranks)

    def full_budget_steps(self) -> int:
        """Updates at the start that run at K_max under `paper` and `stratified`."""
        return self.optim.warmup(self.train.steps) if self.budget.full_steps is None else self.budget.full_steps

    def listed_budgets(self) -> tuple[int, ...]:
        """The budgets that `paper` and `stratified` draw from, increasing."""
        return self.budget.budgets or _up_to(self.model.num_channels, (2, 3, 4, 6, 8, 12, 16, 24, 32))

    def eval_budgets(self) -> tuple[int, ...]:
        """The budgets of a validation, increasing."""
        return self.eval.budgets or _up_to(self.model.num_channels, (2, 4, 8, 16, 32))


def _up_to(k_max: int, budgets: tuple[int, ...]) -> tuple[int, ...]:
    return (*(k for k in budgets if k < k_max), k_max)
