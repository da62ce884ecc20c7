"""A run: everything its loop needs, built from a configuration and from where an earlier job stopped."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from megassm import __version__
from megassm.checkpoint.exported import open_model_folder
from megassm.checkpoint.format import Checkpoint
from megassm.checkpoint.save import Saver
from megassm.cli.arguments import print_line
from megassm.config.schema import Config
from megassm.cost import parameters
from megassm.data.dataset import Dataset, keep_tokenizer
from megassm.data.mixture import repeats_told
from megassm.data.skipped import batch_of
from megassm.data.stream import MicroBatch, StreamPlan, TokenStream, validation_batches
from megassm.errors import UserError
from megassm.files import PRIVATE_MODE, write_atomically
from megassm.parallel.engine import Engine
from megassm.parallel.start import WeightSource
from megassm.parallel.world import World, gather_rows, together
from megassm.run import provenance
from megassm.run.directory import CHECKPOINTS, ENVIRONMENT, ENVIRONMENTS, TOKENIZER, checkpoint_folders
from megassm.run.events import Events
from megassm.run.fence import Fence, take
from megassm.run.journal import Journal, peak_flops
from megassm.run.left_out import read_left_out
from megassm.run.opening import clear_partial, replace_config
from megassm.run.stop import StopRequest
from megassm.train.continuing import tell_changes
from megassm.train.preflight import preflight
from megassm.train.resuming import checkpoint_to_continue, restore


@dataclass
class Run:
    """Everything the loop needs."""

    config: Config
    data: Dataset
    world: World
    engine: Engine
    stream: TokenStream
    batches: Iterator[MicroBatch]
    valid: list[MicroBatch]
    token_bytes: npt.NDArray[np.int64]
    journal: Journal | None
    done_steps: int
    peak_flops: float | None
    """Of a rank's device; None on a CPU."""
    start_digest: int
    stop: StopRequest
    events: Events
    fence: Fence
    saver: Saver
    save_failure: str = ""
    """Why the last save failed, where it did."""
    saved_steps: int = field(init=False)
    """Updates that the newest checkpoint holds."""

    def __post_init__(self) -> None:
        self.saved_steps = self.done_steps

    def sample_range(self, step: int) -> tuple[int, int]:
        """First and last global sample of the batch of update `step` (from 0)."""
        size, batch = self.config.train.batch_sequences, batch_of(self.stream.plan.left_out, step)
        return batch * size, (batch + 1) * size - 1

    def close(self) -> None:
        """Writes what is still to be told of the run; its engine stays."""
        self.events.close()
        if self.journal is not None:
            self.journal.close()


def set_up(config: Config, data: Dataset, world: World, stop: StopRequest | None = None) -> Run:
    """Builds the run, and continues from its newest complete checkpoint where there is one.

    `stop` is the process's own stop request, if it has one already: a signal must survive a second set-up.
    """
    stop = stop or StopRequest()
    fence, left_over = enter(Path(config.run.dir), world)
    digest = start_digest(config, data)
    events = Events(Path(config.run.dir), world.is_main, fence)
    if left_over:
        events.add("left over", 0, f"removed what saves that did not end have left: {', '.join(left_over)}")
    weights = start_weights(config, data, world)
    checkpoint = checkpoint_to_continue(config, data.train.fingerprint, events, world)
    config = with_draws(config, checkpoint, world)
    engine = started(config, data, world, weights)
    done_steps = 0 if checkpoint is None else restore(engine, checkpoint, events)
    plan = stream_plan(config, world)
    stream = TokenStream(data.train, plan)
    peak, peak_source = peak_flops(config.log.peak_tflops, world.device)
    if done_steps < config.train.steps:
        if world.is_main:
            fence.check()
            replace_config(config, fence.number, done_steps)
            if checkpoint is not None:
                tell_changes(checkpoint.config, config, done_steps, events)
            write_environment(fence, world, peak, peak_source)
            write_tokenizer(Path(config.run.dir), data)
        introduce(config, data, world, done_steps)
        tell_peak_rate(world, peak, peak_source)
    place, mesh = world.coordinates, world.mesh
    valid = validation_batches(data.valid, plan, config.eval.sequences)
    return Run(
        config=config,
        data=data,
        world=world,
        engine=engine,
        stream=stream,
        batches=stream.batches(done_steps, config.train.steps),
        valid=[batch.span(place.sequence, mesh.sequence) for batch in valid],
        token_bytes=data.token_bytes(config.model.vocab_size),
        journal=Journal(config, done_steps, fence) if world.is_main else None,
        done_steps=done_steps,
        peak_flops=peak,
        start_digest=digest,
        stop=stop,
        events=events,
        fence=fence,
        saver=Saver(engine, config, data.train.fingerprint, fence),
    )


def enter(run_dir: Path, world: World) -> tuple[Fence, list[str]]:
    """Fences off every older start of the run, and what one of them may still be saving, whose names it returns."""

    def take_number() -> tuple[int, list[str]]:
        return (take(run_dir).number, clear_partial(run_dir)) if world.is_main else (0, [])

    number, left_over = together(take_number)
    return Fence(run_dir, int(gather_rows([number])[0][0])), left_over


def start_weights(config: Config, data: Dataset, world: World) -> WeightSource | None:
    """Those of run.init_from, for a run that has no checkpoint yet; None where the seed decides.

    Raises:
        UserError: another model, or another tokenizer than the data's.
    """
    path = config.run.init_from
    if path is None or checkpoint_folders(Path(config.run.dir) / CHECKPOINTS):
        return None
    folder = open_model_folder(Path(path))
    folder.check_origin(config.model, data.tokenizer)
    together(lambda: folder.check_weights() if world.is_main else None)
    others = folder.differences(config.model)
    say(world, f"starting from the weights of {path}{'; there ' + ', '.join(others) if others else ''}")
    return folder.rows


def with_draws(config: Config, checkpoint: Checkpoint | None, world: World) -> Config:
    """The configuration with the number of budgets that the run draws an update.

    Raises:
        UserError: it does not divide the micro-steps that this mesh makes of an update.
    """
    micro_steps = config.micro_steps(world.mesh.data)
    began_with = None if checkpoint is None else checkpoint.config.budget.draws
    draws = config.budget.draws or began_with or micro_steps
    if checkpoint is not None and micro_steps % draws:
        raise UserError(
            f"{checkpoint.folder}: the run draws {draws} budgets a step, but {world.mesh.data} data-parallel "
            f"ranks with train.micro_batch_sequences = {config.train.micro_batch_sequences} make {micro_steps} "
            f"micro-steps of it. Choose them so that the micro-steps are a multiple of {draws}, or set budget.draws"
        )
    return config.model_copy(update={"budget": config.budget.model_copy(update={"draws": draws})})


def stream_plan(config: Config, world: World) -> StreamPlan:
    """How this rank reads its share of every global batch."""
    return StreamPlan(
        seq_len=config.model.seq_len,
        batch_sequences=config.train.batch_sequences,
        micro_batch_sequences=config.train.micro_batch_sequences,
        seed=config.run.seed,
        rank=world.coordinates.data,
        world_size=world.mesh.data,
        left_out=read_left_out(Path(config.run.dir)),
    )


def introduce(config: Config, data: Dataset, world: World, done_steps: int) -> None:
    """Says what is about to run."""
    full = parameters(config.model, config.model.num_channels)
    epochs = config.train.steps * config.tokens_per_step() / data.train.tokens
    say(
        world,
        f"{full:,} parameters at K={config.model.num_channels}, {parameters(config.model, 1):,} at K=1; "
        f"layers {config.model.mixers}; {world.size} rank(s) on {world.device.type}, ZeRO "
        f"{config.parallel.zero_stage}, {config.train.precision}"
        f"{', compiled when a budget is first drawn' if config.train.compile else ''}\n"
        f"{data.train.tokens:,} training tokens, {data.valid.tokens:,} for validation; "
        f"steps {done_steps + 1}..{config.train.steps} of {config.tokens_per_step():,} tokens ({epochs:.2f} epochs)",
    )
    if data.task is None and (told := repeats_told(data.train, config)):
        say(world, f"warning: {told}; a model learns little from a text it has seen so often")
    model = config.model
    if "S" in model.mixers and (known := model.known_channels) < model.num_channels:
        say(
            world,
            f"warning: float64 knows about {known} filters at model.seq_len = {model.seq_len}. Channels {known + 1} "
            f"to {model.num_channels} are rounding noise, other noise on another kind of processor, and so this "
            f"run's checkpoints are good on machines of this kind only; model.num_channels={known} avoids it",
        )


def started(config: Config, data: Dataset, world: World, weights: WeightSource | None) -> Engine:
    """The engine; what the kernel may end the job for without a word is said before its work begins."""
    if why := preflight(config, world):
        say(world, f"warning: {why}")
    return Engine(config, world, data.document_end(config), weights, data.task.asked if data.task else None)


def tell_peak_rate(world: World, peak: float | None, source: str) -> None:
    """What model FLOPs utilisation is of, where there is such a rate."""
    if peak is not None:
        say(world, f"MFU is of {peak / 1e12:,.4g} TFLOP/s a rank ({source}), with the FLOPs of the K in use")


def write_environment(fence: Fence, world: World, peak: float | None, peak_source: str) -> None:
    """What this start was made of, and what the figures of the run were measured on."""
    code, run_dir = provenance.source(), fence.run_dir
    own = {
        **provenance.facts(code),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "world_size": world.size,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.machine(),
        "threads_per_rank": torch.get_num_threads(),
        "peak_flops_per_rank": peak,
        "peak_flops_source": peak_source,
    }
    text = (json.dumps(own, indent=2) + "\n").encode()
    (run_dir / ENVIRONMENTS).mkdir(exist_ok=True)
    write_atomically(run_dir / ENVIRONMENTS / f"{fence.number:04d}.json", text)
    if code.patch:
        patch = code.patch.encode(errors="replace")
        write_atomically(run_dir / ENVIRONMENTS / f"{fence.number:04d}.patch", patch, PRIVATE_MODE)
    write_atomically(run_dir / ENVIRONMENT, text)


def write_tokenizer(run_dir: Path, data: Dataset) -> None:
    """That of the data, so that the model can be used where the data is gone."""
    (run_dir / TOKENIZER).mkdir(exist_ok=True)
    keep_tokenizer(data.tokenizer, run_dir / TOKENIZER)


def start_digest(config: Config, data: Dataset) -> int:
    """Of what all ranks must be started with."""
    text = f"{__version__} {torch.__version__} {config.model_dump_json()} {data.train.fingerprint}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:5], "little")


def say(world: World, message: str) -> None:
    if world.is_main:
        print_line(message)
