"""Pretraining: the loop, and its set-up.

What happens in an update, in order: draw K, fetch, forward, backward for each micro-step; set the learning rate,
clip, update; tell the other ranks loss and K; write the journal; validate over budgets; save.
"""

from __future__ import annotations

import json
import math
import platform
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from types import FrameType

import numpy as np
import numpy.typing as npt
import torch

from megassm import __version__
from megassm.budget import budget_at
from megassm.checkpoint import check_identity, newest_checkpoint, run_identity, save_checkpoint
from megassm.cli import refusal_text
from megassm.config import Config
from megassm.cost import parameters, training_flops_per_token
from megassm.data.dataset import Dataset
from megassm.data.stream import MicroBatch, StreamPlan, TokenStream, validation_batches
from megassm.data.transport import DataCounters, total_counters
from megassm.errors import UserError
from megassm.eval.score import Score, score, text_bytes
from megassm.metrics import Journal, Row, peak_flops, peak_memory_bytes
from megassm.model import build_model
from megassm.optim import learning_rate
from megassm.parallel.engine import Engine
from megassm.parallel.launcher import launcher_is_gone, launcher_pids
from megassm.parallel.world import World, gather_rows, is_first_to_refuse, is_lost_peer, join_world, leave_world
from megassm.rundir import write_config


class StopRequest:
    """SIGTERM, SIGINT, or the launcher's end: finish the update, save, leave. A second signal acts at once."""

    def __init__(self) -> None:
        self._signalled = False
        self._launcher = launcher_pids()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True
        signal.signal(number, signal.SIG_DFL)

    @property
    def received(self) -> bool:
        return self._signalled or launcher_is_gone(self._launcher)


@dataclass
class Tally:
    """What one rank counts during an update."""

    nll: torch.Tensor
    tokens: int = 0
    text_bytes: int = 0


@dataclass
class Totals:
    """What all ranks counted in an update."""

    score: Score
    data: DataCounters
    peak_memory_bytes: int
    stop: bool


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
    peak_flops: float
    stop: StopRequest


def pretrain(config: Config, data: Dataset) -> None:
    """Trains, or continues, the run of `config`. Leaves with code 1 where it must refuse, after one message."""
    world = join_world(config.train.device, config.parallel.timeout_s)
    try:
        run = set_up(config, data, world)
        try:
            train(run)
        finally:
            if run.journal is not None:
                run.journal.close()
    except (UserError, OSError) as error:
        if is_first_to_refuse():
            print(f"error: rank {world.rank}: {refusal_text(error)}", file=sys.stderr, flush=True)
        raise SystemExit(1) from None
    except RuntimeError as error:
        if not is_lost_peer(error):
            raise
        if is_first_to_refuse():
            print(
                f"error: rank {world.rank} lost another rank, or waited longer than parallel.timeout_s = "
                f"{config.parallel.timeout_s} for it ({error}). The same command continues from the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
        raise SystemExit(1) from None
    finally:
        leave_world()


def train(run: Run) -> None:
    """The loop."""
    config, engine = run.config, run.engine
    if run.done_steps >= config.train.steps:
        say(run.world, f"nothing to do: {config.run.dir} has done {run.done_steps} of {config.train.steps} steps")
        return
    for step in range(run.done_steps, config.train.steps):
        started = time.perf_counter()
        budgets = [budget_at(config, step, micro_step) for micro_step in range(engine.micro_steps)]
        tally = Tally(torch.zeros((), dtype=torch.float64, device=run.world.device))
        for k in budgets:
            batch = next_batch(run, tally)
            ids_BT, mask_BL = (torch.from_numpy(x).to(run.world.device) for x in (batch.ids_BT, batch.mask_BL))
            nll_BL = engine.losses(ids_BT, k)
            engine.backward(nll_BL, mask_BL)
            tally.nll += (nll_BL.detach() * mask_BL).sum()
        rate = learning_rate(config.optim, config.train, step)
        grad_norm = engine.update(rate)
        totals = agree(run, step, budgets, tally)
        check_finite(step, totals.score.loss, grad_norm)
        row = journal_row(run, step, budgets, totals, time.perf_counter() - started)
        row |= {"lr": rate, "grad_norm": grad_norm}
        last = step + 1 == config.train.steps
        if last or (config.eval.every_steps and (step + 1) % config.eval.every_steps == 0):
            row["valid"] = {str(k): validate(run, k).bits_per_byte for k in config.eval.budgets}
        if run.journal is not None:
            run.journal.write(row)
        if last or totals.stop or (step + 1) % config.checkpoint.every_steps == 0:
            save_checkpoint(engine, config, step + 1, run.data.train.fingerprint)
        if totals.stop:
            say(run.world, f"stopped by a signal after step {step + 1}; the same command continues from there")
            return
    say(run.world, f"done: {config.train.steps} steps in {config.run.dir}\n"
        f"next: python tools/sweep_budgets.py {config.run.dir}")  # fmt: skip


def next_batch(run: Run, tally: Tally) -> MicroBatch:
    """This rank's next micro-batch, its contents counted."""
    batch = next(run.batches)
    tally.tokens += int(batch.mask_BL.sum())
    tally.text_bytes += text_bytes(batch, run.token_bytes)
    return batch


def agree(run: Run, step: int, budgets: list[int], tally: Tally) -> Totals:
    """One small message between all ranks: sums the loss, and holds the budgets against each other.

    Raises:
        UserError: ranks drew different K.
    """
    data = astuple(run.stream.meter.take())
    mine = [tally.nll.item(), tally.tokens, tally.text_bytes]
    mine += [peak_memory_bytes(run.world.device), run.stop.received, *budgets, *data]
    rows = gather_rows(mine, run.world)
    for micro_step, drawn in enumerate(zip(*(row[5 : -len(data)] for row in rows), strict=True)):
        if min(drawn) != max(drawn):
            per_rank = ", ".join(f"rank {rank}: {int(k)}" for rank, k in enumerate(drawn))
            raise UserError(
                f"step {step + 1}, micro-step {micro_step}: the ranks drew different budgets K ({per_rank}). K is a "
                "function of the configuration alone: start all ranks with the same --config, overrides and version"
            )
    memory, stop = (max(row[column] for row in rows) for column in (3, 4))
    counted = total_counters([row[-len(data) :] for row in rows])
    return Totals(Score.total(row[:3] for row in rows), counted, int(memory), bool(stop))


def check_finite(step: int, loss: float, grad_norm: float) -> None:
    """Stops a run that has diverged before its weights reach a checkpoint.

    Raises:
        UserError: the loss or the gradient is not finite.
    """
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise UserError(
            f"step {step + 1}: the loss is {loss:g}, the gradient norm {grad_norm:g}: training diverged. "
            "Lower optim.lr, or lengthen optim.warmup_steps, and start again: the same command continues from the last "
            "checkpoint"
        )


def journal_row(run: Run, step: int, budgets: list[int], totals: Totals, seconds: float) -> Row:
    """One update for the journal; units in the names."""
    config = run.config
    step_tokens = config.tokens_per_step()
    length = config.model.seq_len
    flops = sum(training_flops_per_token(config.model, k, length) for k in budgets) * step_tokens / len(budgets)
    return {
        "step": step + 1,
        "tokens": (step + 1) * step_tokens,
        "loss": totals.score.loss,
        "bits_per_byte": totals.score.bits_per_byte,
        "k": max(budgets),
        "k_micro": budgets,
        "step_s": seconds,
        "tokens_per_s": step_tokens / seconds,
        "mfu": flops / seconds / (run.peak_flops * run.world.size),
        "peak_memory_bytes": totals.peak_memory_bytes,
        "epochs": run.stream.epochs(step + 1),
        **asdict(totals.data),
    }


def validate(run: Run, k: int) -> Score:
    """The validation score at budget k, over all ranks."""
    mine = score(run.engine.eval_losses, run.valid, k, run.token_bytes, run.world.device)
    return Score.total(gather_rows(mine, run.world))


def set_up(config: Config, data: Dataset, world: World) -> Run:
    """Builds the run, and continues from its newest complete checkpoint where there is one."""
    stop = StopRequest()
    engine = Engine(build_model(config.model, config.run.seed, config.train.recompute), config, world)
    done_steps = resume(engine, config, data)
    plan = stream_plan(config, world)
    stream = TokenStream(data.train, plan)
    peak, peak_source = peak_flops(config, world.device)
    if done_steps < config.train.steps:
        if world.is_main:
            write_config(config)
            write_environment(Path(config.run.dir), world, peak, peak_source)
        introduce(config, data, world, done_steps)
    return Run(
        config=config,
        data=data,
        world=world,
        engine=engine,
        stream=stream,
        batches=stream.batches(done_steps, config.train.steps),
        valid=list(validation_batches(data.valid, plan, config.eval.sequences)),
        token_bytes=data.token_bytes(config.model.vocab_size),
        journal=Journal(config, done_steps) if world.is_main else None,
        done_steps=done_steps,
        peak_flops=peak,
        stop=stop,
    )


def resume(engine: Engine, config: Config, data: Dataset) -> int:
    """Loads the newest complete checkpoint of the run; returns how many updates are done."""
    checkpoint, skipped = newest_checkpoint(Path(config.run.dir))
    for reason in skipped:
        say(engine.world, f"passed over a checkpoint: {reason}")
    if checkpoint is None and skipped:
        raise UserError(
            f"{config.run.dir}: has checkpoints, but none that can be continued; move them away to start from the "
            "beginning, or choose another run.dir"
        )
    if checkpoint is None:
        return 0
    check_identity(checkpoint, run_identity(config, engine.world.size, data.train.fingerprint))
    engine.load_shards(checkpoint.folder)
    say(engine.world, f"continuing after step {checkpoint.manifest.step} from {checkpoint.folder}")
    return checkpoint.manifest.step


def stream_plan(config: Config, world: World) -> StreamPlan:
    """How this rank reads its share of every global batch."""
    return StreamPlan(
        seq_len=config.model.seq_len,
        batch_sequences=config.train.batch_sequences,
        micro_batch_sequences=config.train.micro_batch_sequences,
        seed=config.run.seed,
        rank=world.rank,
        world_size=world.size,
    )


def introduce(config: Config, data: Dataset, world: World, done_steps: int) -> None:
    """Says what is about to run."""
    full = parameters(config.model, config.model.num_channels)
    epochs = config.train.steps * config.tokens_per_step() / data.train.tokens
    say(
        world,
        f"{full:,} parameters at K={config.model.num_channels}, {parameters(config.model, 1):,} at K=1; "
        f"layers {config.model.mixers}; {world.size} rank(s) on {world.device.type}, ZeRO "
        f"{config.parallel.zero_stage}, {config.train.precision}\n"
        f"{data.train.tokens:,} training tokens, {data.valid.tokens:,} for validation; "
        f"steps {done_steps + 1}..{config.train.steps} of {config.tokens_per_step():,} tokens ({epochs:.2f} epochs)",
    )


def write_environment(run_dir: Path, world: World, peak: float, peak_source: str) -> None:
    """What the figures of this run were measured on."""
    facts = {
        "megassm": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "world_size": world.size,
        "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.machine(),
        "threads_per_rank": torch.get_num_threads(),
        "peak_flops_per_rank": peak,
        "peak_flops_source": peak_source,
    }
    (run_dir / "environment.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def say(world: World, message: str) -> None:
    if world.is_main:
        print(message, flush=True)
