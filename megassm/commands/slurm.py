"""Runs a configuration under SLURM: submit, status, logs, cancel, resume.

    submit --config X.yaml --nodes N --gpus-per-node M [section.key=value ...]
    status RUN_DIR           the job's state, and how far the run is
    logs   RUN_DIR           what it has printed; --follow stays
    cancel RUN_DIR           the ranks save, if they can within SLURM's KillWait
    resume RUN_DIR           submits the run again: what it asked for last, but for what is given

`submit` checks what the run would check, before anything is queued. It writes RUN_DIR/jobs/NNNN: config.yaml
(resolved), code/ (what the job runs, however long it waits in the queue), version.txt (commit and uncommitted changes),
job.sh, job.json; the job writes log.txt there. On a preemption, at its time limit, and where a node dies, the job is
requeued and continues from its newest complete checkpoint. `COMMAND --help` has an example.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megassm import __version__
from megassm.cli.arguments import Parser, path_argument, positive, print_line, print_table
from megassm.config.load import dump_config, load_config_or_exit
from megassm.config.schema import Config
from megassm.errors import UserError, redacted
from megassm.files import PRIVATE_MODE, write_atomically
from megassm.guarded import read_json
from megassm.run.directory import (
    CHECKPOINTS,
    CONFIG,
    JOB_CODE,
    JOB_FACTS,
    JOB_LOG,
    JOB_SCRIPT,
    JOB_VERSION,
    JOBS,
    METRICS,
    checkpoint_folders,
)
from megassm.run.fence import newest_number
from megassm.run.opening import load_run_config
from megassm.run.records import newest_record
from megassm.slurm import (
    JOB_BYTES,
    JobRequest,
    Submitted,
    add_request,
    asked_before,
    batch_script,
    given_request,
    seconds,
)

ROOT = Path(__file__).parents[2]
"""Of the checkout, or where the package is installed."""
ENDED = ("COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL", "GONE")
GONE = {"JobState": "GONE", "ExitCode": "?"}


def job_parser(name: str, description: str, example: str) -> Parser:
    parser = Parser(description, f"python launch/slurm.py {name} {example}")
    parser.prog = f"{parser.prog} {name}"
    return parser


def check_request(request: JobRequest, config: Config, path: Path, overrides: Sequence[str]) -> None:
    """Checks now what would end the job once it runs.

    Raises:
        UserError: naming the option.
    """
    for world_size in request.world_sizes():
        load_config_or_exit(path, overrides, world_size)
    if request.gpus_per_node and request.tasks_per_node > request.gpus_per_node and config.train.device != "cpu":
        raise UserError(
            f"--tasks-per-node {request.tasks_per_node}: more ranks than --gpus-per-node {request.gpus_per_node}; "
            "leave it out, or set train.device=cpu"
        )
    if not request.gpus_per_node and config.train.device == "cuda":
        raise UserError("--gpus-per-node 0: but train.device = cuda; ask for GPUs, or set train.device=cpu")
    if request.tasks_per_node % config.parallel.tensor:
        raise UserError(
            f"parallel.tensor = {config.parallel.tensor}: must divide the {request.tasks_per_node} ranks of a node; "
            "use a divisor, and parallel.sequence or ZeRO for the rest"
        )
    if (limit := seconds(request.time)) and limit < 2 * request.save_before_s:
        raise UserError(
            f"--time {request.time}: too short to train before --save-before-s {request.save_before_s}: the ranks "
            "would be told to save as they start. Ask for at least twice that, or for a smaller --save-before-s"
        )


def submit(arguments: argparse.Namespace, path: Path, before: JobRequest | None) -> None:
    """Writes and queues a job of the configuration at `path`, on top of what was asked for `before`."""
    request = given_request(arguments, before)
    config = load_run_config(path, arguments.overrides, request.world_sizes()[0])
    check_request(request, config, path, arguments.overrides)
    run_dir = Path(config.run.dir).absolute()
    if (busy := newest_job(run_dir)) and (state := job_facts(busy)["JobState"]) not in ENDED:
        raise UserError(
            f"{run_dir}: job {busy['job_id']} is {state}; wait for it, "
            f"end it with `python launch/slurm.py cancel {run_dir}`, or choose another directory with run.dir=DIR"
        )
    folder = run_dir / JOBS / f"{len(job_folders(run_dir)) + 1:04d}"
    script = batch_script(request, folder, Path(sys.executable), Path.cwd(), config.parallel.timeout_s)
    if arguments.print:
        print(script, end="")
        return
    if has_secrets(config):
        raise UserError(
            "data: a URL holds a password or signature, which is not written down: use MEGASSM_DATA_QUERY=HOST?QUERY"
        )
    folder.mkdir(parents=True)
    try:
        snapshot(folder, config, script)
        job_id = ask_slurm("sbatch", "--parsable", str(folder / JOB_SCRIPT)).partition(";")[0].strip()
    except UserError:
        shutil.rmtree(folder)  # nothing was queued
        raise
    facts = {
        "job_id": job_id,
        "command": [redacted(word) for word in sys.argv[1:]],
        "request": asdict(request),
        "folder": str(folder),
    }
    write_atomically(folder / JOB_FACTS, (json.dumps(facts, indent=1) + "\n").encode(), PRIVATE_MODE)
    print_line(f"job {job_id} trains in {run_dir}\nnext: python launch/slurm.py logs {run_dir} --follow")


def has_secrets(config: Config) -> bool:
    written = Config.model_validate_json(config.model_dump_json())
    return (written.data.path, written.data.sources) != (config.data.path, config.data.sources)


def snapshot(folder: Path, config: Config, script: str) -> None:
    """Configuration, code and script as they are now: what the job runs, also when it is requeued.

    A working tree may hold what nobody else may read, so what is copied of it is its owner's alone.
    """
    write_atomically(folder / CONFIG, dump_config(config).encode())
    (folder / JOB_CODE).mkdir(mode=0o700)
    for file in code_files():
        (folder / JOB_CODE / file.parent).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, folder / JOB_CODE / file)
    write_atomically(folder / JOB_VERSION, code_version().encode(errors="surrogateescape"), PRIVATE_MODE)
    write_atomically(folder / JOB_SCRIPT, script.encode(), PRIVATE_MODE)


def code_files() -> list[Path]:
    """What a job needs of megassm/, below ROOT: Python files, and what git tracks besides.

    An `.env` or a credential that lies there is neither. Without git: the files that a package is made of.
    """
    python = [path.relative_to(ROOT) for path in (ROOT / "megassm").rglob("*.py")]
    tracked = git("ls-files", "-z", "--", "megassm").split("\0")
    others = [Path(name) for name in tracked if name]
    if not others:
        others = [path.relative_to(ROOT) for path in (ROOT / "megassm").rglob("*")
                  if path.name == "py.typed" or path.match("eval/tasks/*.yaml")]  # fmt: skip
    return sorted({path for path in (*python, *others) if (ROOT / path).is_file() and not (ROOT / path).is_symlink()})


def code_version() -> str:
    """megassm's version; from a git checkout the commit and all that differs from it."""
    return f"megassm {__version__}\n" + "".join(
        git(*command) for command in (("rev-parse", "HEAD"), ("status", "--short"), ("diff", "HEAD"))
    )


def git(*command: str) -> str:
    """What git prints about this checkout; empty where there is none."""
    with contextlib.suppress(OSError):
        asked = ["git", "-C", str(ROOT), *command]
        done = subprocess.run(asked, capture_output=True, text=True, errors="surrogateescape", check=False)
        return done.stdout if done.returncode == 0 else ""
    return ""


def ask_slurm(*command: str) -> str:
    """What one of SLURM's commands prints.

    Raises:
        UserError: it is not installed, or fails.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise UserError(f"{command[0]}: not found; run this where SLURM's commands are, or use torchrun") from None
    if done.returncode:
        raise UserError(f"{command[0]}: {done.stderr.strip() or f'code {done.returncode}'}; nothing was changed")
    return done.stdout


def job_folders(run_dir: Path) -> list[Path]:
    return sorted(path for path in (run_dir / JOBS).glob("*") if path.name.isdecimal())


def newest_job(run_dir: Path) -> dict[str, Any] | None:
    """job.json of the last submission; None before the first."""
    folders = [folder for folder in job_folders(run_dir) if (folder / JOB_FACTS).exists()]
    if not folders:
        return None
    path = folders[-1] / JOB_FACTS
    submitted = read_json(path, Submitted, "submit the run again", JOB_BYTES)
    return {"job_id": submitted.job_id, "request": asked_before(submitted.request, path), "folder": str(folders[-1])}


def known_job(run_dir: Path) -> dict[str, Any]:
    job = newest_job(run_dir)
    if job is None:
        raise UserError(f"{run_dir}: no job of it was submitted with launch/slurm.py; give a run directory (run.dir)")
    return job


def job_facts(job: dict[str, Any]) -> dict[str, str]:
    """SLURM's facts about a job; from its accounting, where there is one, once the controller has forgotten it."""
    try:
        text = ask_slurm("scontrol", "show", "job", "-o", job["job_id"])
        return dict(part.split("=", 1) for part in text.split() if "=" in part)
    except UserError as error:
        if "Invalid job id" not in str(error):
            raise
    try:
        rows = ask_slurm("sacct", "-j", job["job_id"], "-X", "-n", "-P", "-o", "State,ExitCode").splitlines()
    except UserError:
        rows = []
    if not rows:
        return GONE
    state, code = rows[-1].split("|")
    return GONE | {"JobState": state.split()[0], "ExitCode": code}  # "CANCELLED by 1000"


def status(run_dir: Path, json_path: Path | None) -> None:
    job = known_job(run_dir)
    facts = job_facts(job)
    last = newest_record(run_dir / METRICS) or {}
    checkpoints = [path.name for path in checkpoint_folders(run_dir / CHECKPOINTS)]
    row = {
        "job": job["job_id"],
        "state": facts["JobState"],
        "exit": facts["ExitCode"],
        "nodes": facts.get("NodeList", "?"),
        "restarts": facts.get("Restarts", "?"),
        "time": f"{facts.get('RunTime', '?')} of {facts.get('TimeLimit', '?')}",
        "starts": newest_number(run_dir),
        "step": last.get("step", 0),
        "loss": last.get("loss"),
        "checkpoint": checkpoints[-1] if checkpoints else None,
    }
    print_table(str(run_dir), [row], json_path)


def logs(run_dir: Path, lines: int, follow: bool) -> None:
    log = Path(known_job(run_dir)["folder"]) / JOB_LOG
    if not log.exists() and not follow:
        way_out = f"`python launch/slurm.py status {run_dir}` says its state"
        raise UserError(f"{log}: not there yet: the job has not started; {way_out}")
    sys.stdout.flush()
    os.execvp("tail", ["tail", "-n", str(lines), *(["-F"] if follow else []), "--", str(log)])


def cancel(run_dir: Path) -> None:
    job = known_job(run_dir)
    ask_slurm("scancel", job["job_id"])
    print_line(f"job {job['job_id']} is told to end; `python launch/slurm.py resume {run_dir}` continues the run")


def parse(name: str, words: list[str]) -> argparse.Namespace:
    if name == "submit":
        parser = job_parser(name, "Queue a run.", "--config configs/1b_hybrid.yaml --nodes 4 --gpus-per-node 8")
        parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML, see configs/")
        add_request(parser, required=True)
        return parser.parse_intermixed_args(words)
    descriptions = {
        "status": "Say what a run's job does.",
        "logs": "Print what a run's job has printed.",
        "cancel": "End a run's job.",
        "resume": "Queue a run again.",
    }
    parser = job_parser(name, descriptions[name], f"runs/1b{' --nodes 2 train.steps=20000' * (name == 'resume')}")
    parser.add_argument("run_dir", type=path_argument, metavar="RUN_DIR", help="run.dir of the configuration")
    if name == "status":
        parser.add_argument("--json", type=path_argument, metavar="FILE", help="write the printed table there, as JSON")
    elif name == "logs":
        parser.add_argument("--follow", action="store_true", help="stay, and print what comes")
        parser.add_argument("--lines", type=positive, default=50, help="of the end")
    elif name == "resume":
        add_request(parser, required=False)
    return parser.parse_intermixed_args(words)


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    top = Parser(__doc__ or "", "python launch/slurm.py submit --config configs/125m.yaml --nodes 1 --gpus-per-node 8")
    top.add_argument("command", choices=("submit", "status", "logs", "cancel", "resume"))
    top.parse_args(sys.argv[1:2])
    arguments = parse(name, sys.argv[2:])
    match name:
        case "submit":
            submit(arguments, arguments.config, None)
        case "status":
            status(arguments.run_dir, arguments.json)
        case "logs":
            logs(arguments.run_dir, arguments.lines, arguments.follow)
        case "cancel":
            cancel(arguments.run_dir)
        case "resume":
            job = known_job(arguments.run_dir)
            arguments.overrides.insert(0, f"run.dir={json.dumps(str(arguments.run_dir))}")  # whatever the file says
            submit(arguments, Path(job["folder"]) / CONFIG, job["request"])
