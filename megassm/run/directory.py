"""The names of the files in a run directory, each said here and nowhere else.

RUN_DIR/config.yaml         the resolved configuration, itself valid as --config
RUN_DIR/config-history/     what config.yaml was, each time that a start has replaced it by another
RUN_DIR/environment.json    versions, commit, devices, the peak rate that utilisation is measured against
RUN_DIR/environments/       the same of every start, and its uncommitted changes (see `megassm.run.provenance`)
RUN_DIR/metrics.jsonl       one object an update
RUN_DIR/events.jsonl        what happened to the run (see `megassm.run.events`)
RUN_DIR/failures.jsonl      the job that trains, and those before that failed at its step (see `megassm.run.failures`)
RUN_DIR/failure.txt         why the last job ended, where something was wrong (see `megassm.parallel.watchdog`)
RUN_DIR/tokenizer/          that of the data, so that the model can be used where its data is gone
RUN_DIR/left_out.json       batches that the run passes over (see `megassm.run.left_out`)
RUN_DIR/checkpoints/        step-NNNNNNNN/, see `megassm.checkpoint.format`
RUN_DIR/incarnations/       one file a start of the run, see `megassm.run.fence`
RUN_DIR/jobs/NNNN/          what was submitted to SLURM, see `megassm.commands.slurm`
RUN_DIR/.lock               held by the job that trains here
RUN_DIR/sweep.*             tools/sweep_budgets.py: the newest of the run's own data
RUN_DIR/sweeps/             ... every sweep, DATA-LENGTH-step-NNNNNNNN.*; --watch: step-NNNNNNNN.json, steps.png
RUN_DIR/ema/                sweep.* and sweeps/ with --ema
RUN_DIR/wandb/              wandb's own files
RUN_DIR/wandb.json          which run of wandb's this is (see `megassm.run.wandb_log`)
RUN_DIR/tensorboard/        TensorBoard's files (see `megassm.run.tensorboard_log`)
"""

import re
from pathlib import Path

CONFIG = "config.yaml"
CONFIG_HISTORY = "config-history"
ENVIRONMENT = "environment.json"
ENVIRONMENTS = "environments"
METRICS = "metrics.jsonl"
EVENTS = "events.jsonl"
FAILURES = "failures.jsonl"
FAILURE = "failure.txt"
LEFT_OUT = "left_out.json"
CHECKPOINTS = "checkpoints"
TOKENIZER = "tokenizer"
INCARNATIONS = "incarnations"
JOBS = "jobs"
JOB_FACTS, JOB_SCRIPT, JOB_LOG, JOB_VERSION, JOB_CODE = "job.json", "job.sh", "log.txt", "version.txt", "code"
JOB_SETUP, JOB_ENDED, JOB_RANK_LOG = "setup.sh", "ended.txt", "log.{}.txt"
"""In a folder of `JOBS`, beside `CONFIG`."""
LOCK = ".lock"
WANDB_RUN = "wandb.json"
TENSORBOARD = "tensorboard"
SWEEP = "sweep"
"""And a suffix."""
SWEEPS = "sweeps"
EMA = "ema"
"""The same of the weights' running average."""
STEPS_PLOT = "steps.png"
"""In `SWEEPS`."""
STEP_NAME = re.compile("step-([0-9]{8,18})")


def step_name(step: int) -> str:
    """A checkpoint's folder in `CHECKPOINTS`, and with a suffix its file in `SWEEPS`."""
    return f"step-{step:08d}"


def checkpoint_folders(checkpoints: Path) -> list[Path]:
    """Those in a folder of them, complete or not, oldest first."""
    return sorted(checkpoints.glob("step-*"))


def step_of(folder: Path) -> int | None:
    """The updates after which a checkpoint's folder was made; None where its name is no `step_name`."""
    found = STEP_NAME.fullmatch(folder.name)
    return int(found[1]) if found else None
