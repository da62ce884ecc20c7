"""Pretraining: the loop.

What happens in an update, in order: draw K, fetch, forward, backward for each micro-step; set the learning rate,
clip, update; tell the other ranks loss, K and batch; write the journal; validate over budgets; save.
"""

from __future__ import annotations

import gc
import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from megassm.budget import budget_at
from megassm.cli.arguments import STOPPED, error_text
from megassm.config.schema import Config
from megassm.cost import forward_flops_per_token, training_flops_per_token
from megassm.data.dataset import Dataset
from megassm.data.stream import MicroBatch
from megassm.data.task import Task
from megassm.errors import UserError
from megassm.eval.score import Score, by_sequence, ratio_error, sequence_scores, text_bytes
from megassm.optim import learning_rate
from megassm.parallel.device import to_device
from megassm.parallel.phases import StepPhase
from megassm.parallel.starting import told_until_first_update
from megassm.parallel.watchdog import RankProgress, Watchdog
from megassm.parallel.world import (
    World,
    any_rank,
    barrier,
    broadcast_array,
    gather_rows,
    is_lost_peer,
    join_world,
    leave_world,
)
from megassm.run.directory import FAILURE
from megassm.run.failures import job_begins, job_ends
from megassm.run.journal import Record
from megassm.run.stop import StopRequest
from megassm.train.agreement import Tally, Totals, agree, report_skip
from megassm.train.channels import gate_masses
from megassm.train.health import Health, channels, rewinds, without_effect
from megassm.train.saving import advance_save, finish_save, save
from megassm.train.setup import Run, set_up

STOP_CHECK_S = 10.0
"""Longest that a stop signal waits for the end of an update, seconds of computation."""

Rows = npt.NDArray[np.float64]
End = Literal["done", "stopped", "rewound"]
"""All updates are done; a signal came, and what was done is saved; the loss jumped, and an older checkpoint waits."""


def pretrain(config: Config, data: Dataset) -> None:
    """Trains, or continues, the run of `config`.

    Exits with code 1 after one message if there is an error; with `STOPPED` if it was told to stop, and has saved.
    """
    progress = RankProgress()
    with told_until_first_update(progress):
        _pretrain(config, data, progress)


def _pretrain(config: Config, data: Dataset, progress: RankProgress) -> None:
    try:
        progress.note("its set-up, meeting the other ranks")
        world = join_world(config, progress)
        progress.note("its set-up")
        watchdog = Watchdog(
            (world.rank, world.size),
            world.progress,
            config.parallel.timeout_s,
            Path(config.run.dir, FAILURE),
            world.secret,
        )
        try:
            done = set_up_and_train(config, data, world, watchdog)
        except (UserError, OSError) as error:
            watchdog.refuse(f"rank {world.rank}: {error_text(error)}")
            raise SystemExit(1) from None
        except Exception as error:
            if isinstance(error, RuntimeError) and is_lost_peer(error):
                what = str(error).rpartition("] ")[2].partition(". ")[0]
                watchdog.fail(f"{what}; parallel.timeout_s = {config.parallel.timeout_s}", error)
            watchdog.refuse(f"rank {world.rank} ended with {error!r}; its traceback follows")
            raise
        finally:
            if world.size == 1:
                watchdog.stop()  # the process may go on, as a notebook's does
        leave_world()
        watchdog.stop()
    finally:
        leave_world()
    if not done:
        raise SystemExit(STOPPED)


def set_up_and_train(config: Config, data: Dataset, world: World, watchdog: Watchdog) -> bool:
    """Returns whether all updates are done."""
    watchdog.start()
    request = StopRequest()
    while (end := continue_run(config, data, world, watchdog, request)) == "rewound":
        gc.collect()  # the engine that is left holds itself, and the device's memory
    barrier()  # some launchers end all ranks with the first that leaves: rank 0 has told wandb all by now
    return end == "done"


def continue_run(config: Config, data: Dataset, world: World, watchdog: Watchdog, request: StopRequest) -> End:
    """From the newest checkpoint, or the beginning, on."""
    run = set_up(config, data, world, request)
    watchdog.may_write = run.fence.holds
    try:
        if world.is_main:
            job_begins(Path(config.run.dir))
        end = train(run)
        if world.is_main:
            job_ends(Path(config.run.dir))
        if end == "rewound":
            run.engine.close()
        world.progress.note("end of the run")
    finally:
        run.close()
    return end


def train(run: Run) -> End:
    """The loop; says how it came to its end."""
    config, engine, note = run.config, run.engine, run.world.progress.note
    if run.done_steps >= config.train.steps:
        text = f"nothing to do: {config.run.dir} has done {run.done_steps} of {config.train.steps} steps"
        run.events.add("end", run.done_steps, text)
        return "done"
    skipped, health, stride = 0, Health(run), 1
    for step in range(run.done_steps, config.train.steps):
        started = time.perf_counter()
        note("beginning", step + 1)
        budgets = step_budgets(config, step, engine.micro_steps)
        tally = accumulate(run, health, budgets, stride)
        if tally is None:
            return stop(run, step)
        rate = learning_rate(config.optim, config.train, step)
        note("update", phase=StepPhase.UPDATE)
        norm = engine.update(rate)
        note("agreement of all ranks", phase=StepPhase.UPDATE)
        totals = agree(run, step, budgets, tally, norm)
        stride = stop_stride(totals, engine.micro_steps)
        advance_save(run, totals.save_ready)
        note("looking at the update")
        skipped = 0 if totals.finite else skipped + 1
        record = journal_record(run, step, budgets, totals, time.perf_counter() - started) | {"lr": rate}
        if run.world.is_main:
            record |= health.look(record, totals)
        if skipped:
            report_skip(run, step, totals, skipped)
        last = step + 1 == config.train.steps
        if last or (config.eval.every_steps and (step + 1) % config.eval.every_steps == 0):
            record |= validation(run)
            if run.world.is_main:
                record |= health.look_inside(record)
        note("journal")
        if run.journal is not None:
            run.journal.write(record)
        run.events.retry()
        if tally.dropped and config.health.spike_action == "rewind" and goes_back(run, step):
            return "rewound"
        if last or (save_is_due(config, step + 1) and not skipped):  # a sick run replaces no good checkpoint
            save(run, step + 1, must=last)
        if totals.stop and not last:
            return stop(run, step + 1)
    run.events.add("end", config.train.steps, f"done: {config.train.steps} steps in {config.run.dir}\n"
                   f"next: python tools/sweep_budgets.py {config.run.dir}")  # fmt: skip
    return "done"


def accumulate(run: Run, health: Health, budgets: list[int], stride: int) -> Tally | None:
    """Forward and backward pass of every micro-step of an update; None if a stop signal came in between.

    The ranks ask each other about a signal before every `stride`-th micro-step.
    """
    engine, note = run.engine, run.world.progress.note
    tally = Tally(torch.zeros((), dtype=torch.float64, device=run.world.device))
    for micro_step, k in enumerate(budgets):
        if micro_step and micro_step % stride == 0 and told_to_stop(run):
            return None
        batch = next_batch(run, tally)
        ids_BT, mask_BL = torch.from_numpy(batch.ids_BT), to_device(batch.mask_BL, run.world.device)
        note("forward pass", phase=StepPhase.FORWARD)
        nll_BL, objective_BL = engine.training_losses(ids_BT, k)
        tally.nll += (nll_BL.detach() * mask_BL).sum()
        if micro_step + 1 == len(budgets) and health.drops(budgets, tally):
            tally.dropped, objective_BL = True, without_effect(objective_BL)
        note("backward pass", phase=StepPhase.BACKWARD)
        engine.backward(objective_BL, mask_BL)
    return tally


def save_is_due(config: Config, done_steps: int) -> bool:
    return done_steps % config.checkpoint.every_steps == 0 or config.is_milestone(done_steps)


def goes_back(run: Run, step: int) -> bool:
    """Whether the run goes back to its newest checkpoint, which may be on its way to the disk."""
    finish_save(run)
    return rewinds(run, step)


def stop_stride(totals: Totals, micro_steps: int) -> int:
    """Micro-steps between two checks for a stop signal, from the time that the last update took; alike on all ranks.

    `agree` carries the flag at the end of every update; only an update longer than `STOP_CHECK_S` is interrupted.
    """
    return max(1, int(STOP_CHECK_S * micro_steps / max(totals.slowest_s, 1e-9)))


def told_to_stop(run: Run) -> bool:
    run.world.progress.note("agreement to go on")
    return any_rank(run.stop.received)


def stop(run: Run, done_steps: int) -> End:
    """Leaves the loop with what `done_steps` whole updates have made: a part of the next one is dropped, and its
    samples are read again."""
    finish_save(run)
    if done_steps > run.saved_steps:
        save(run, done_steps, must=True)
    text = f"{run.stop.told(done_steps)}; the same command continues from there"
    run.events.add("stop", done_steps, text)
    return "stopped"


def step_budgets(config: Config, step: int, micro_steps: int) -> list[int]:
    """K of every micro-step of an update: the draws, each for as many micro-steps."""
    draws = config.budget.draws or micro_steps
    return [budget_at(config, step, micro_step * draws // micro_steps) for micro_step in range(micro_steps)]


def next_batch(run: Run, tally: Tally) -> MicroBatch:
    """This rank's part of the next micro-batch, its time and contents counted.

    One rank of a reader group reads, and hands what it read to the others.
    """
    started = time.perf_counter()
    run.world.progress.note("reading data", phase=StepPhase.DATA)
    own = next(run.batches) if run.world.readers.rank() == 0 else None
    run.world.progress.note("sharing data", phase=StepPhase.DATA)
    batch = share_batch(own, run.config, run.world)
    tally.data_wait_s += time.perf_counter() - started
    tally.sample_ids += batch.sample_ids_B.tolist()
    batch = batch.span(run.world.coordinates.sequence, run.world.mesh.sequence)
    tally.tokens += int(batch.mask_BL.sum())
    tally.text_bytes += text_bytes(batch, run.token_bytes)
    return batch


def share_batch(batch: MicroBatch | None, config: Config, world: World) -> MicroBatch:
    """The first rank of a reader group gives its batch, all of them get it."""
    if world.readers.size() == 1:
        assert batch is not None
        return batch
    size, length = config.train.micro_batch_sequences, config.model.seq_len
    rows = np.zeros((size, 2 * length + 2), dtype=np.int64)
    if batch is not None:
        rows[:] = np.concatenate((batch.ids_BT, batch.mask_BL, batch.sample_ids_B[:, None]), axis=1)
    rows = broadcast_array(rows, world.readers)
    return MicroBatch(rows[:, : length + 1], rows[:, length + 1 : -1].astype(np.bool_), rows[:, -1])


def journal_record(run: Run, step: int, budgets: list[int], totals: Totals, seconds: float) -> Record:
    """One update for the journal; units in the names."""
    config = run.config
    step_tokens = config.tokens_per_step()
    length = config.model.seq_len
    flops = step_tokens * sum(update_flops_per_token(config, k) for k in budgets) / len(budgets)
    static = step_tokens * training_flops_per_token(config.model, config.model.num_channels, length)
    return {
        "step": step + 1,
        "tokens": (step + 1) * step_tokens,
        "loss": totals.score.loss if math.isfinite(totals.score.loss) else None,
        "bits_per_byte": None if run.data.task or not math.isfinite(totals.score.loss) else totals.score.bits_per_byte,
        "grad_norm": totals.grad_norm if math.isfinite(totals.grad_norm) else None,
        "skipped": not totals.finite,
        "k": max(budgets),
        "k_micro": budgets,
        "step_s": seconds,
        "save_s": run.saver.take_waited_s(),
        "tokens_per_s": step_tokens / seconds,
        "mfu": None if run.peak_flops is None else flops / seconds / (run.peak_flops * run.world.size),
        "relative_cost": flops / static,
        "epochs": run.stream.epochs(step + 1),
        **asdict(totals.data),
        "peak_memory_bytes": totals.peak_memory_bytes,
    }


def update_flops_per_token(config: Config, k: int) -> float:
    """FLOPs of training at budget k, a teacher's forward pass included."""
    model, length = config.model, config.model.seq_len
    flops = training_flops_per_token(model, k, length)
    taught = config.budget.distill_weight > 0 and k < model.num_channels
    return flops + forward_flops_per_token(model, model.num_channels, length) if taught else flops


def validation(run: Run) -> Record:
    """The scores by K, and what the channels of the whole model do at the largest of these K."""
    *smaller, largest = run.config.eval_budgets()
    rows = {k: validate(run, k) for k in smaller}
    with gate_masses(run.engine.model) as masses:
        rows[largest] = validate(run, largest)
    return validation_record(rows, run.data.task) | channels(run, masses)


def validation_record(rows: dict[int, Rows], task: Task | None) -> Record:
    """What the journal has of a validation, by K."""
    scores = {str(k): Score.total(rank[:, 1:].sum(0).tolist() for rank in ranks_RN5) for k, ranks_RN5 in rows.items()}
    whole = {str(k): by_sequence(ranks_RN5.reshape(-1, 5)) for k, ranks_RN5 in rows.items()}
    if task is None:
        nats = {k: ratio_error(found[:, 1], found[:, 3]) for k, found in whole.items()}
        errors = {k: None if error is None else error / math.log(2) for k, error in nats.items()}
        return {"valid": {k: score.bits_per_byte for k, score in scores.items()}, "valid_error": errors}
    return {
        "valid_loss": {k: score.loss for k, score in scores.items()},
        "valid_accuracy": {k: score.accuracy for k, score in scores.items()},
        "valid_error": {k: ratio_error(found[:, 1], found[:, 2]) for k, found in whole.items()},
    }


def validate(run: Run, k: int) -> Rows:
    """What validation at budget k has found: (R, N, 5), the rows of `sequence_scores` of all ranks with texts or parts
    of texts of their own."""

    def losses(ids_BT: torch.Tensor, k: int) -> torch.Tensor:
        run.world.progress.note(f"validation at K={k}")
        return run.engine.eval_losses(ids_BT, k, hits=run.data.task is not None)

    mine_N5 = sequence_scores(losses, run.valid, k, run.token_bytes, run.world.device)
    run.world.progress.note("validation, all ranks' scores")
    all_R = gather_rows(mine_N5.ravel().tolist())[:: run.world.mesh.tensor]
    return np.array(all_R).reshape(len(all_R), -1, 5)
