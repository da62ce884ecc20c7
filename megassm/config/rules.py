"""The rules that span knobs: what a valid value of each makes an invalid configuration. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from megassm.config.model import CHUNK, MAX_CHANNELS, ModelConfig
from megassm.config.schema import Config, DataConfig, ParallelConfig


class Violation(NamedTuple):
    """A broken rule: the knobs it is about, the first being the one to point at."""

    knobs: tuple[str, ...]
    rule: str


def violations(config: Config, world_size: int) -> Iterator[Violation]:
    """Every rule that spans knobs and is broken by `config` on `world_size` ranks."""
    yield from _model_violations(config.model)
    yield from _budget_violations(config)
    yield from _schedule_violations(config)
    yield from _data_violations(config.data)
    if config.health.spike_action != "report" and config.health.spike_z is None:
        yield Violation(("health.spike_action", "health.spike_z"), "report where health.spike_z is null")
    yield from _rank_violations(config, world_size)


def _model_violations(model: ModelConfig) -> Iterator[Violation]:
    if model.num_channels > model.seq_len:
        yield Violation(
            ("model.num_channels", "model.seq_len"),
            f"at most model.seq_len = {model.seq_len}: a Hankel matrix of that size has no more eigenvectors",
        )
    elif model.num_channels > MAX_CHANNELS:
        yield Violation(("model.num_channels",), f"at most {MAX_CHANNELS}: float64 knows fewer filters at any length")
    if model.n_layers % len(model.pattern):
        yield Violation(
            ("model.n_layers", "model.pattern"),
            f"a multiple of the pattern's length, {len(model.pattern)} for {model.pattern!r}",
        )
    own = model.layer_channels
    if own is not None and (len(own) != model.n_layers or max(own) != model.num_channels):
        yield Violation(
            ("model.layer_channels", "model.n_layers", "model.num_channels"),
            f"null, or one number for each of the {model.n_layers} layers, the largest of them model.num_channels = "
            f"{model.num_channels}",
        )
    if model.ffn_width(1) < 1:
        yield Violation(
            ("model.ffn_elastic", "model.d_ffn", "model.num_channels"),
            f"such that hidden units are left at K = 1: the other channels bring {model.d_ffn - model.ffn_width(1)}, "
            f"and model.d_ffn = {model.d_ffn} is all of them",
        )
    if (spectral := model.mixers.count("S")) % len(model.sigma_scale) or (len(model.sigma_scale) > 1 and not spectral):
        yield Violation(
            ("model.sigma_scale", "model.pattern", "model.n_layers"),
            f"one choice, or as many as divide the model's {spectral} spectral layers",
        )
    yield from _mixer_violations(model)
    if "A" not in model.pattern:
        return
    if model.d_model % model.n_heads:
        yield Violation(("model.d_model", "model.n_heads"), f"divisible by model.n_heads = {model.n_heads}")
    elif (model.d_model // model.n_heads) % 2:
        yield Violation(
            ("model.d_model", "model.n_heads"),
            f"an even number of dimensions a head, for rotary positions; model.n_heads = {model.n_heads} "
            f"gives {model.d_model // model.n_heads}",
        )
    if model.n_heads % model.kv_heads:
        yield Violation(("model.n_kv_heads", "model.n_heads"), f"a divisor of model.n_heads = {model.n_heads}")


def _mixer_violations(model: ModelConfig) -> Iterator[Violation]:
    """Rules of spectral layers."""
    if model.d_model % model.mixer_heads:
        yield Violation(("model.mixer_heads", "model.d_model"), f"a divisor of model.d_model = {model.d_model}")
    if not model.gate_rescale and model.gate == "sigmoid":
        yield Violation(
            ("model.gate_rescale", "model.gate"), "true with model.gate = 'sigmoid': only a softmax has a temperature"
        )
    if model.gate_bias_init and not model.has_gate:
        yield Violation(
            ("model.gate_bias_init", "model.gate"), f"0 with model.gate = {model.gate!r}: there are no scores"
        )
    if model.selective and model.filterbank in ("fft", "flashfft"):
        yield Violation(
            ("model.filterbank", "model.selective"),
            "auto, chunked or direct with model.selective = true: a Fourier transform has one decay for all positions",
        )


def _budget_violations(config: Config) -> Iterator[Violation]:
    limit, budget = config.model.num_channels, config.budget
    rule = f"at most model.num_channels = {limit}, the K_max of this model"
    listed = [("eval.budgets", config.eval_budgets())]
    if budget.strategy in ("paper", "stratified"):
        listed.append(("budget.budgets", config.listed_budgets()))
    for name, budgets in listed:
        if max(budgets) > limit:
            yield Violation((name, "model.num_channels"), rule)
        if list(budgets) != sorted(set(budgets)):
            yield Violation((name,), "increasing, each once")
    if budget.k is not None and budget.k > limit:
        yield Violation(("budget.k", "model.num_channels"), rule)
    if budget.k is not None and budget.strategy != "fixed":
        yield Violation(
            ("budget.k", "budget.strategy"),
            f"null: budget.strategy = {budget.strategy!r} draws K; set budget.strategy: fixed to use it",
        )
    if budget.sampler == "authors" and budget.bias == 0:
        yield Violation(("budget.bias", "budget.sampler"), "greater than 0 with budget.sampler = 'authors'")
    if budget.min_k > limit:
        yield Violation(("budget.min_k", "model.num_channels"), rule)


def _schedule_violations(config: Config) -> Iterator[Violation]:
    optim, steps = config.optim, config.train.steps
    left = steps - optim.warmup(steps)
    if optim.decay_steps is not None and optim.decay_steps > left:
        yield Violation(
            ("optim.decay_steps", "optim.warmup_steps", "train.steps"),
            f"at most the {left} updates of train.steps that the warm-up leaves",
        )
    if optim.decay_steps is not None and optim.schedule != "wsd":
        yield Violation(
            ("optim.decay_steps", "optim.schedule"),
            f"null: optim.schedule = {optim.schedule!r} has no decay phase; set optim.schedule: wsd to use it",
        )
    for name in ("beta1", "beta2"):
        if getattr(optim, name) == 1:
            yield Violation((f"optim.{name}",), "less than 1")


def _rank_violations(config: Config, world_size: int) -> Iterator[Violation]:
    train, parallel = config.train, config.parallel
    if config.parallel.zero_stage == 0 and train.precision == "bf16":
        yield Violation(
            ("parallel.zero_stage", "train.precision"),
            "1, 2 or 3 with train.precision = bf16: at stage 0 DeepSpeed's bf16 optimizer makes a wrong first "
            "update. Stage 1 is the same on one rank",
        )
    yield from _split_violations(config.model, config.parallel)
    yield from _compile_violations(config)
    if config.data.isolate_documents and parallel.sequence > 1:
        yield Violation(
            ("data.isolate_documents", "parallel.sequence"),
            "false with parallel.sequence above 1: the state is handed from part to part whatever documents they hold",
        )
    data_ranks = parallel.data or max(1, config.data_ranks(world_size))
    product = data_ranks * parallel.sequence * parallel.tensor
    if product != world_size:
        yield Violation(
            ("parallel.tensor", "parallel.sequence", "parallel.data"),
            f"such that parallel.data x parallel.sequence x parallel.tensor is the number of ranks: "
            f"{data_ranks} x {parallel.sequence} x {parallel.tensor} = {product}, but {world_size} were started",
        )
        return
    share = train.micro_batch_sequences * data_ranks
    if train.batch_sequences % share:
        yield Violation(
            ("train.batch_sequences", "train.micro_batch_sequences"),
            f"a multiple of train.micro_batch_sequences x data-parallel ranks = "
            f"{train.micro_batch_sequences} x {data_ranks} = {share}",
        )
    elif config.budget.draws is not None and config.micro_steps(data_ranks) % config.budget.draws:
        yield Violation(
            ("budget.draws", "train.micro_batch_sequences"),
            f"a divisor of the {config.micro_steps(data_ranks)} micro-steps of a rank",
        )
    if config.eval.sequences % data_ranks:
        yield Violation(("eval.sequences",), f"a multiple of the {data_ranks} data-parallel ranks")


def _compile_violations(config: Config) -> Iterator[Violation]:
    if not config.train.compile:
        return
    if config.parallel.sequence > 1:
        yield Violation(
            ("train.compile", "parallel.sequence"),
            "false with parallel.sequence above 1: a message between the parts of a sequence ends in the middle of a "
            "block's graph",
        )
    if config.model.filterbank == "flashfft":
        yield Violation(
            ("train.compile", "model.filterbank"),
            "false with model.filterbank = 'flashfft', which the compiler cannot read; chunked can be compiled",
        )


def _split_violations(model: ModelConfig, parallel: ParallelConfig) -> Iterator[Violation]:
    """Rules about what one rank holds of a model and of a sequence."""
    tensor, sequence = parallel.tensor, parallel.sequence
    heads = tensor * sequence
    if "A" in model.pattern and model.n_heads % heads:
        yield Violation(
            ("model.n_heads", "parallel.tensor", "parallel.sequence"),
            f"divisible by parallel.tensor x parallel.sequence = {tensor} x {sequence} = {heads}: they share the heads",
        )
    if "S" in model.pattern and model.mixer_heads > 1 and model.mixer_heads % tensor:
        yield Violation(
            ("model.mixer_heads", "parallel.tensor"),
            f"1, or divisible by parallel.tensor = {tensor}: the ranks share the heads",
        )
    if "A" in model.pattern and model.kv_heads % tensor and tensor % model.kv_heads:
        yield Violation(
            ("model.n_kv_heads", "parallel.tensor"), f"a divisor or a multiple of parallel.tensor = {tensor}"
        )
    for name in ("d_model", "d_ffn", "vocab_size", "classes"):
        if (getattr(model, name) or tensor) < tensor:
            yield Violation((f"model.{name}", "parallel.tensor"), f"at least parallel.tensor = {tensor}")
    if model.ffn_elastic is not None and 1 <= model.ffn_width(1) < tensor:
        yield Violation(
            ("model.ffn_elastic", "model.d_ffn", "model.num_channels", "parallel.tensor"),
            f"such that each of parallel.tensor = {tensor} ranks has a hidden unit at K = 1: there are "
            f"{model.ffn_width(1)}",
        )
    if sequence == 1:
        return
    if model.selective and "S" in model.pattern:
        yield Violation(
            ("model.selective", "parallel.sequence"),
            "false with parallel.sequence above 1: what a part hands on fades by what the next one reads",
        )
    if model.classes is not None:
        yield Violation(
            ("model.classes", "parallel.sequence"),
            "null with parallel.sequence above 1: a rank has not all positions to take the mean over",
        )
    if model.seq_len % (sequence * CHUNK):
        yield Violation(
            ("model.seq_len", "parallel.sequence"),
            f"a multiple of {CHUNK} x parallel.sequence = {CHUNK * sequence}: every rank holds whole chunks of {CHUNK}",
        )
    if "S" in model.pattern and model.filterbank not in ("auto", "chunked"):
        yield Violation(
            ("model.filterbank", "parallel.sequence"),
            f"chunked with parallel.sequence = {sequence}: only its state can be handed from rank to rank",
        )


def _data_violations(data: DataConfig) -> Iterator[Violation]:
    if (data.path is None) == (not data.sources):
        rule = "given" if data.path is None else "null where data.sources has the data sets"
        yield Violation(("data.path", "data.sources"), rule)
    if bool(data.sources) != bool(data.phases):
        yield Violation(("data.phases", "data.sources"), "given with data.sources, and only then")
    if not (data.sources and data.phases):
        return
    starts = [phase.start_step for phase in data.phases]
    if starts[0] != 0 or starts != sorted(set(starts)):
        yield Violation(("data.phases",), "in order, the first with start_step: 0, each start_step once")
    read = {name for phase in data.phases for name in phase.sources}
    if not all(phase.sources for phase in data.phases) or read - set(data.sources):
        yield Violation(("data.phases", "data.sources"), f"weights of {', '.join(data.sources)}, at least one a phase")
    if unread := set(data.sources) - read:
        yield Violation(("data.sources", "data.phases"), f"in a phase each; {', '.join(sorted(unread))} is in none")
