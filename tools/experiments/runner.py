"""Runs an experiment: trains every arm at every seed that is not there yet, measures, collects.

A training is an ordinary run of `megassm.train.loop`, in a directory named after a hash of its configuration:
experiments that have an arm in common share its runs, and an interrupted experiment goes on where it was. What an
experiment without trainings of that kind measures is kept in such a directory too.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from megassm.checkpoint.format import newest_checkpoint
from megassm.config.schema import Config
from megassm.data.dataset import open_dataset
from megassm.errors import UserError
from megassm.files import write_atomically
from megassm.run.opening import open_run_directory, write_config
from megassm.train.loop import pretrain
from tools.experiments.arms import Arm
from tools.experiments.definitions import EXPERIMENTS
from tools.experiments.measure import BY_SIZE, Point, more_is_better, plain_points
from tools.experiments.results import Results, joined, refuse_others

LOG = "train.log"


@dataclass(frozen=True)
class Options:
    """How to run experiments."""

    seeds: Sequence[int]
    runs: Path
    """Where the trainings' run directories are."""
    config: Path | None = None
    """Instead of the experiment's own configuration file."""
    overrides: tuple[str, ...] = ()
    """`section.key=value` of every arm."""
    arms: tuple[str, ...] = ()
    """Whole names, or parts of names, of the arms to run; empty for all."""
    rates: tuple[float, ...] | None = None
    """Peak learning rates to choose from, instead of the experiment's own."""
    device: str | None = None
    """Where to train in the plain loop of `tools.experiments.plain`; None: ordinary runs, and peers on the CPU."""


class Job(NamedTuple):
    """One arm at one seed; what a worker process needs to know."""

    experiment: str
    arm: Arm
    seed: int
    config: Config
    device: str | None = None


def run_experiment(name: str, options: Options, command: str, pool: Executor, stored: Results | None = None) -> Results:
    """Trains, measures, and returns what to write down.

    Args:
        name: of `EXPERIMENTS`.
        options: how.
        command: what the user typed, kept with the results.
        pool: from `workers`; may serve several experiments.
        stored: results to which these are added.

    Raises:
        UserError: a training ended without its last checkpoint; `stored` is of other seeds or another configuration.
        ConfigError: a mistake in the configuration.
    """
    experiment = EXPERIMENTS[name]
    base = experiment.configuration(options.overrides, options.config)
    arms = _chosen(experiment.arms(base), options.arms)
    if not arms:
        raise UserError(f"no arm of {name} has {' or '.join(options.arms)} in its name; "
                        f"there are {', '.join(arm.name for arm in experiment.arms(base))}")  # fmt: skip
    results = Results(
        name=name,
        question=experiment.question,
        claim=experiment.claim,
        command=command,
        x_label=experiment.x_label,
        arms={},
        seeds=list(options.seeds),
        config=base.model_dump(mode="json"),
        points={},
    )
    if stored is not None:
        refuse_others(stored, results)
    rates = _tuned(name, arms, options, pool)
    arms = [arm.more(*rates.get(arm.name, ())) for arm in arms]
    jobs = [_job(name, options, arm, seed) for arm in arms for seed in options.seeds]
    points = _curves(jobs, _all_done(name, jobs, pool), options.seeds)
    results = replace(results, arms={arm.name: list(arm.overrides) for arm in arms}, points=points)
    return results if stored is None else joined(stored, results)


def _chosen(arms: Sequence[Arm], texts: Sequence[str]) -> list[Arm]:
    """Those with one of the texts in their name; of a text that is a whole name that arm alone. Without texts all."""
    names = {arm.name for arm in arms}

    def fits(arm: Arm, text: str) -> bool:
        return arm.name == text if text in names else text in arm.name

    return [arm for arm in arms if not texts or any(fits(arm, text) for text in texts)]


def _curves(jobs: Sequence[Job], found: Sequence[list[Point]], seeds: Sequence[int]) -> dict[str, list[list[Point]]]:
    """Points by curve and seed; an arm is a curve of its own or a part of one."""
    points: dict[str, list[list[Point]]] = {}
    for job, measured in zip(jobs, found, strict=True):
        arm, seed = job.arm, list(seeds).index(job.seed)
        for curve in arm.curves or (arm.name,):
            by_seed = points.setdefault(curve, [[] for _ in seeds])
            by_seed[seed] += (
                p._replace(x=arm.at) if arm.curves and not p.metric.endswith(BY_SIZE) else p for p in measured
            )
    return points


def _tuned(name: str, arms: Sequence[Arm], options: Options, pool: Executor) -> dict[str, tuple[str, ...]]:
    """By arm, the override of its best learning rate at the first seed: by the mean over the arm's first curve.

    Empty where there are no rates to choose from.
    """
    rates = EXPERIMENTS[name].rates if options.rates is None else options.rates
    trials = [(arm, f"optim.lr={rate!r}") for arm in arms for rate in rates]
    jobs = [_job(name, options, arm.more(rate), options.seeds[0]) for arm, rate in trials]
    best: dict[str, tuple[float, str]] = {}
    for (arm, rate), points in zip(trials, _all_done(f"{name}, learning rates", jobs, pool), strict=True):
        metric = points[0].metric
        curve = [-point.y if more_is_better(metric) else point.y for point in points if point.metric == metric]
        best[arm.name] = min(best.get(arm.name, (math.inf, "")), (sum(curve) / len(curve), rate))
    return {arm: (rate,) for arm, (_, rate) in best.items()}


def _all_done(what: str, jobs: Sequence[Job], pool: Executor) -> list[list[Point]]:
    """What was measured on each job, in order; says how far they are."""
    started = time.monotonic()
    running = [pool.submit(carry_out, job) for job in jobs]
    for done, future in enumerate(as_completed(running), 1):
        arm, seed, config = jobs[running.index(future)][1:4]
        elapsed = time.monotonic() - started
        left = f"about {elapsed / done * (len(jobs) - done) / 60:,.0f} min left" if done < len(jobs) else "done"
        future.result()
        print(f"{what}: {done} of {len(jobs)}, {left}: {arm.name}, seed {seed}: {config.run.dir}", flush=True)
    return [future.result() for future in running]


def _job(name: str, options: Options, arm: Arm, seed: int) -> Job:
    runs = options.runs
    if arm.is_plain or options.device:
        runs = runs / "plain" / (arm.peer or arm.basis or "") / ("" if arm.recipe is None else repr(arm.recipe))
    config = EXPERIMENTS[name].configuration((*options.overrides, *arm.overrides), options.config)
    return Job(name, arm, seed, placed(config, runs, seed), options.device)


def placed(config: Config, runs: Path, seed: int) -> Config:
    """`config` at a seed, in a directory below `runs` that is named after a hash of it."""
    run = {"dir": "", "seed": seed}
    config = config.model_copy(update={"run": config.run.model_copy(update=run)})
    digest = hashlib.sha256(config.model_dump_json().encode()).hexdigest()[:12]
    folder = {"dir": str(runs / digest)}
    return config.model_copy(update={"run": config.run.model_copy(update=folder)})


def workers(side_by_side: int) -> ProcessPoolExecutor:
    """The processes that carry jobs out, each one after another."""
    return ProcessPoolExecutor(side_by_side, multiprocessing.get_context("spawn"))


def carry_out(job: Job) -> list[Point]:
    """Trains a job, if that is not done yet, and measures it; what trains nothing is measured once."""
    experiment = EXPERIMENTS[job.experiment]
    run_dir = Path(job.config.run.dir)
    if experiment.trains and (job.arm.is_plain or job.device):
        return plain_points(job.config, job.arm, torch.device(job.device or "cpu"))
    if experiment.trains:
        train_to_end(job.config)
        return experiment.measure(run_dir)
    path = run_dir / f"{job.experiment}.json"
    if not path.exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        write_config(job.config)
        write_atomically(path, json.dumps(experiment.measure(run_dir)).encode())
    return [Point(*point) for point in json.loads(path.read_text(encoding="utf-8"))]


def train_to_end(config: Config) -> None:
    """Trains a run, if that is not done yet.

    Raises:
        UserError: it ended without its last checkpoint.
    """
    run_dir = Path(config.run.dir)
    if _done_steps(run_dir) < config.train.steps:
        data = open_dataset(config)
        lock = open_run_directory(config)
        with (run_dir / LOG).open("a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
            pretrain(config, data)
        if lock is not None:
            lock.close()
    if _done_steps(run_dir) < config.train.steps:
        raise UserError(f"{run_dir}: the training ended early, see {LOG} there; the same command continues it")


def _done_steps(run_dir: Path) -> int:
    checkpoint, _ = newest_checkpoint(run_dir)
    return 0 if checkpoint is None else checkpoint.manifest.step
