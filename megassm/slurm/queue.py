"""What SLURM is asked, and what a run directory says of its jobs."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from megassm.errors import UserError
from megassm.guarded import read_json
from megassm.run.directory import JOB_FACTS, JOBS
from megassm.slurm.request import JOB_BYTES, JobRequest, Submitted, asked_before

ENDED = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL",
         "PREEMPTED", "GONE")  # fmt: skip
GONE = {"JobState": "GONE", "ExitCode": "?"}
PATIENCE_S = 60
"""A controller that says nothing for so long is taken for one that fails."""


class KnownJob(NamedTuple):
    """A submission that a run directory knows of."""

    ids: tuple[str, ...]
    """One, or those of a chain in their order."""
    request: JobRequest
    folder: Path
    again: tuple[str, ...]
    """Options that have to be given again."""


def ask_slurm(*command: str) -> str:
    """What one of SLURM's commands prints.

    Raises:
        UserError: it is not installed, or fails.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=PATIENCE_S)
    except FileNotFoundError:
        raise UserError(f"{command[0]}: not found; run this where SLURM's commands are, or use torchrun") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{command[0]}: no answer within {PATIENCE_S} s; ask squeue what there is, try again") from None
    if done.returncode:
        raise UserError(f"{command[0]}: {done.stderr.strip() or f'code {done.returncode}'}; nothing was changed")
    return done.stdout


def job_folders(run_dir: Path) -> list[Path]:
    return sorted(path for path in (run_dir / JOBS).glob("*") if path.name.isdecimal())


def newest_job(run_dir: Path) -> KnownJob | None:
    """The last submission; None before the first."""
    folders = [folder for folder in job_folders(run_dir) if (folder / JOB_FACTS).exists()]
    if not folders:
        return None
    path = folders[-1] / JOB_FACTS
    found = read_json(path, Submitted, "submit the run again", JOB_BYTES)
    return KnownJob((found.job_id, *found.chain_ids), asked_before(found.request, path), folders[-1], found.again)


def known_job(run_dir: Path) -> KnownJob:
    job = newest_job(run_dir)
    if job is None:
        raise UserError(f"{run_dir}: no job of it was submitted with launch/slurm.py; give a run directory (run.dir)")
    return job


def job_facts(job: KnownJob) -> dict[str, str]:
    """SLURM's facts about a job; of a chain about the first that has not ended, else about the last that ran."""
    facts = GONE
    for job_id in job.ids:
        one = {"JobId": job_id} | _facts(job_id)
        if one["JobState"] not in ENDED:
            return one
        facts = one if one["JobState"] != "GONE" or facts is GONE else facts
    return facts


def _facts(job_id: str) -> dict[str, str]:
    """From the controller; from the accounting, where there is one, once the controller has forgotten the job."""
    try:
        text = ask_slurm("scontrol", "show", "job", "-o", job_id)
        return dict(part.split("=", 1) for part in text.split() if "=" in part)
    except UserError as error:
        if "Invalid job id" not in str(error):
            raise
    try:
        rows = ask_slurm("sacct", "-j", job_id, "-X", "-n", "-P", "-o", "State,ExitCode").splitlines()
    except UserError:
        rows = []
    if not rows:
        return GONE
    state, code = rows[-1].split("|")
    return GONE | {"JobState": state.split()[0], "ExitCode": code}  # "CANCELLED by 1000"


def rank_cpus(request: JobRequest) -> int | None:
    """CPUs of a rank where none were asked for: a node's CPUs by its GPUs, of a node without by the ranks.

    None where SLURM does not say, and where another option does.
    """
    if request.option("cpus-per-gpu") is not None or request.option("exclusive") is not None:
        return None
    partition = request.option("partition")
    try:
        said = ask_slurm("sinfo", "-h", "-N", "-o", "%c %G", *([f"--partition={partition}"] if partition else []))
    except UserError:
        return None
    shares = []
    for line in said.splitlines():
        cpus, _, resources = line.partition(" ")
        gpus = sum(
            int(found or 1) for found in re.findall(r"\bgpu(?::[^\d,(:][^,(:]*)?(?::(\d+))?(?=[,(]|$)", resources)
        )
        if not cpus.isdecimal() or gpus < request.gpus_per_node:
            continue  # a node that cannot run it
        own = int(cpus) * request.gpus_per_node // gpus if request.gpus_per_node else int(cpus)
        if own >= request.tasks_per_node:
            shares.append(own // request.tasks_per_node)
    return min(shares, default=None)
