"""Runs a configuration under SLURM: submit, status, logs, cancel, resume.

    submit --config X.yaml --nodes N --gpus-per-node M [section.key=value ...]
    status RUN_DIR           the job's state, and how far the run is
    logs   RUN_DIR           what it has printed; --follow stays
    cancel RUN_DIR           the ranks save, if they can within SLURM's KillWait
    resume RUN_DIR           submits the run again: what it asked for last, but for what is given

`submit` checks what the run would check, before anything is queued. It writes RUN_DIR/jobs/NNNN: config.yaml
(resolved), code/ (what the job runs, however long it waits in the queue), version.txt (commit and uncommitted changes),
job.sh, job.json; the job writes log.txt there. On a preemption, at its time limit, and where a node dies, the job is
requeued and continues from its newest complete checkpoint; where that is forbidden, --chain N queues N jobs, each
after the one before. ~/.config/megassm/slurm.yaml holds a site's defaults: options of `submit` by their names.
`COMMAND --help` has an example.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megassm import __version__
from megassm.cli.arguments import Parser, path_argument, positive, print_line, print_table
from megassm.config.load import dump_config, load_config_or_exit
from megassm.config.schema import Config
from megassm.errors import UserError, redacted
from megassm.files import PRIVATE_MODE, write_atomically
from megassm.run.directory import (
    CHECKPOINTS,
    CONFIG,
    JOB_CODE,
    JOB_FACTS,
    JOB_LOG,
    JOB_RANK_LOG,
    JOB_SCRIPT,
    JOB_SETUP,
    JOB_VERSION,
    JOBS,
    METRICS,
    checkpoint_folders,
)
from megassm.run.fence import newest_number
from megassm.run.opening import load_run_config
from megassm.run.provenance import ROOT, git
from megassm.run.records import newest_record
from megassm.slurm.queue import (
    ENDED,
    KnownJob,
    ask_slurm,
    job_facts,
    job_folders,
    known_job,
    newest_job,
    rank_cpus,
)
from megassm.slurm.request import NOT_KEPT, JobRequest, add_request, count, for_file, given_request, seconds
from megassm.slurm.script import batch_script
from megassm.slurm.site import site_defaults


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
    if request.own_gpus is not None and request.own_gpus != request.gpus_per_node:
        raise UserError(
            f"--sbatch gres: asks for {request.own_gpus} GPUs a node, --gpus-per-node {request.gpus_per_node}; "
            "ask for as many in both"
        )
    if request.chain > 1 and request.option("dependency") is not None:
        raise UserError("--sbatch dependency: the jobs of a --chain depend on each other; leave one of the two out")
    if request.setup and not Path(request.setup).is_file():
        raise UserError(f"--setup {request.setup}: no such file; give a file of bash, or '' for none")
    if (limit := seconds(request.time)) and limit < 2 * request.save_before_s:
        raise UserError(
            f"--time {request.time}: too short to train before --save-before-s {request.save_before_s}: the ranks "
            "would be told to save as they start. Ask for at least twice that, or for a smaller --save-before-s"
        )


def submit(arguments: argparse.Namespace, path: Path, before: KnownJob | None) -> None:
    """Writes and queues a job of the configuration at `path`, on top of what was asked for `before`."""
    asked = request = given_request(arguments, before.request if before else None, site_defaults())
    config = load_run_config(path, arguments.overrides, request.world_sizes()[0])
    check_request(request, config, path, arguments.overrides)
    check_given_again(before, request, arguments)
    run_dir = Path(config.run.dir).absolute()
    if (busy := newest_job(run_dir)) and (facts := job_facts(busy))["JobState"] not in ENDED:
        raise UserError(
            f"{run_dir}: job {facts['JobId']} is {facts['JobState']}; wait for it, "
            f"end it with `python launch/slurm.py cancel {run_dir}`, or choose another directory with run.dir=DIR"
        )
    request = replace(asked, cpus_per_task=asked.cpus_per_task or rank_cpus(asked))
    folder = run_dir / JOBS / f"{len(job_folders(run_dir)) + 1:04d}"
    patience_s, data = config.parallel.timeout_s, data_folders(config)
    script = batch_script(request, folder, Path(sys.executable), Path.cwd(), patience_s, data)
    if arguments.print:
        print(script, end="")
        return
    if has_secrets(config):
        raise UserError(
            "data: a URL holds a password or signature, which is not written down: use MEGASSM_DATA_QUERY=HOST?QUERY"
        )
    folder.mkdir(parents=True)
    try:
        snapshot(folder, config, script, request.setup)
        ids = queue(folder / JOB_SCRIPT, request.chain)
    except (UserError, OSError):
        shutil.rmtree(folder)  # nothing was queued
        with contextlib.suppress(OSError):  # what this submission has made of the run directory goes too
            folder.parent.rmdir()
            run_dir.rmdir()
        raise
    values, again = for_file(asked)
    command = [redacted(word) for word in sys.argv[1:]]
    facts_of_job = {"job_id": ids[0], "chain_ids": ids[1:], "command": command, "request": values, "again": again,
                    "folder": str(folder)}  # fmt: skip
    write_atomically(folder / JOB_FACTS, (json.dumps(facts_of_job, indent=1) + "\n").encode(), PRIVATE_MODE)
    what = f"job {ids[0]} trains" if len(ids) == 1 else f"jobs {', '.join(ids)}, one after another, train"
    print_line(f"{what} in {run_dir}\nnext: python launch/slurm.py logs {run_dir} --follow")


def check_given_again(before: KnownJob | None, request: JobRequest, arguments: argparse.Namespace) -> None:
    """What decides what a job runs is not taken from a run directory, which may be another's."""
    missing: dict[str, str] = {}
    for option in before.again if before else ():
        name, _, value = option.removeprefix("--").partition(" ")
        if name in NOT_KEPT and not getattr(request, name) and getattr(arguments, name) is None:
            missing[name] = value
        if name not in NOT_KEPT and value not in getattr(request, name, ()):
            print_line(f"note: {option} was given before and is not taken over; give it again where it is wanted")
    if missing:
        before_it = " and ".join(f"--{name} {shlex.quote(value)}" for name, value in missing.items())
        names = " and ".join(f"--{name}" for name in missing)
        without = " ".join(f"--{name} ''" for name in missing)
        raise UserError(
            f"the run was submitted with {before_it}, which is not taken from its folder; give {names} again, or "
            f"{without} to do without"
        )


def queue(script: Path, jobs: int) -> list[str]:
    """Numbers of the jobs of a script, each to begin when the one before has ended.

    Raises:
        UserError: one was refused; none is then queued.
    """
    ids: list[str] = []
    try:
        for _ in range(jobs):
            after = [f"--dependency=afterany:{ids[-1]}"] if ids else []
            ids.append(ask_slurm("sbatch", "--parsable", *after, str(script)).partition(";")[0].strip())
    except UserError:
        if ids:
            ask_slurm("scancel", *ids)
        raise
    return ids


def data_folders(config: Config) -> list[Path]:
    """Folders on this file system that the run reads."""
    named = [config.data.path, *config.data.sources.values()]
    return [Path(path).absolute() for path in named if path and "://" not in path]


def has_secrets(config: Config) -> bool:
    written = Config.model_validate_json(config.model_dump_json())
    return (written.data.path, written.data.sources) != (config.data.path, config.data.sources)


def snapshot(folder: Path, config: Config, script: str, setup: str) -> None:
    """Configuration, code and script as they are now: what the job runs, also when it is requeued.

    A working tree may hold what nobody else may read, so what is copied of it is its owner's alone.
    """
    write_atomically(folder / CONFIG, dump_config(config).encode())
    (folder / JOB_CODE).mkdir(mode=0o700)
    for file in code_files():
        (folder / JOB_CODE / file.parent).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, folder / JOB_CODE / file)
    write_atomically(folder / JOB_VERSION, code_version().encode(errors="surrogateescape"), PRIVATE_MODE)
    if setup:
        write_atomically(folder / JOB_SETUP, Path(setup).read_bytes(), PRIVATE_MODE)
    write_atomically(folder / JOB_SCRIPT, script.encode(), PRIVATE_MODE)


def code_files() -> list[Path]:
    """What a job needs of megassm/, below ROOT: Python files, and what git tracks besides.

    An `.env` or a credential that lies there is neither. Without git: the files that a package is made of.
    """
    python = [path.relative_to(ROOT) for path in (ROOT / "megassm").rglob("*.py")]
    tracked = exact_git("ls-files", "-z", "--", "megassm").split("\0")
    others = [Path(name) for name in tracked if name]
    if not others:
        others = [path.relative_to(ROOT) for path in (ROOT / "megassm").rglob("*")
                  if path.name == "py.typed" or path.match("eval/tasks/*.yaml")]  # fmt: skip
    return sorted({path for path in (*python, *others) if (ROOT / path).is_file() and not (ROOT / path).is_symlink()})


def code_version() -> str:
    """megassm's version; from a git checkout the commit and all that differs from it."""
    return f"megassm {__version__}\n" + "".join(
        exact_git(*command) for command in (("rev-parse", "HEAD"), ("status", "--short"), ("diff", "HEAD"))
    )


def exact_git(*command: str) -> str:
    """What git prints about this checkout, names that are no UTF-8 as they are, however long it takes."""
    return git(*command, errors="surrogateescape", timeout_s=None)


def status(run_dir: Path, json_path: Path | None) -> None:
    job = known_job(run_dir)
    facts = job_facts(job)
    last = newest_record(run_dir / METRICS) or {}
    checkpoints = [path.name for path in checkpoint_folders(run_dir / CHECKPOINTS)]
    row = {
        "job": facts["JobId"] + (f" of {len(job.ids)}" if len(job.ids) > 1 else ""),
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


def logs(run_dir: Path, lines: int, follow: bool, rank: int | None) -> None:
    folder = known_job(run_dir).folder
    log = folder / (JOB_LOG if rank is None else JOB_RANK_LOG.format(rank))
    if rank is not None and not log.exists() and (folder / JOB_LOG).exists():
        raise UserError(f"{log}: not there; ranks have logs of their own where the job was submitted with --logs rank")
    if not log.exists() and not follow:
        way_out = f"`python launch/slurm.py status {run_dir}` says its state"
        raise UserError(f"{log}: not there yet: the job has not started; {way_out}")
    sys.stdout.flush()
    os.execvp("tail", ["tail", "-n", str(lines), *(["-F"] if follow else []), "--", str(log)])


def cancel(run_dir: Path) -> None:
    job = known_job(run_dir)
    ask_slurm("scancel", *job.ids)
    print_line(f"job {', '.join(job.ids)} is told to end; `python launch/slurm.py resume {run_dir}` continues the run")


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
        parser.add_argument("--rank", type=count, metavar="R", help="of a job with --logs rank: that rank's own")
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
            logs(arguments.run_dir, arguments.lines, arguments.follow, arguments.rank)
        case "cancel":
            cancel(arguments.run_dir)
        case "resume":
            job = known_job(arguments.run_dir)
            arguments.overrides.insert(0, f"run.dir={json.dumps(str(arguments.run_dir))}")  # whatever the file says
            submit(arguments, job.folder / CONFIG, job)
