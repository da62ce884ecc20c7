"""SLURM: the ranks' coordinates as `srun` tells them, and the batch script of a run (see `megassm.commands.slurm`).

srun starts every rank itself, so nothing else has to reach the nodes: no ssh, no hostfile, no MPI.
"""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import Field

from megassm.cli.arguments import STOPPED, Parser, positive
from megassm.errors import UserError
from megassm.guarded import Described
from megassm.run.directory import CONFIG, JOB_CODE, JOB_LOG

MAX_NODES = 20_000
JOB_BYTES = 2**20
"""Of a job.json."""
CARRIED = frozenset(
    {
        "account", "clusters", "comment", "constraint", "cores-per-socket", "cpus-per-gpu", "cpus-per-task", "exclude",
        "exclusive", "gpu-bind", "gpu-freq", "gpus", "gpus-per-task", "gres", "hint", "licenses", "mail-type",
        "mem", "mem-per-cpu", "mem-per-gpu", "network", "nice", "nodelist", "partition", "priority", "qos",
        "reservation", "switches", "threads-per-core", "time-min", "tmp", "use-min-nodes", "wckey",
    }
)  # fmt: skip
"""Options of sbatch that `resume` takes from the run directory: what a job runs on. Not what it runs or writes."""
FIRST_PORT, PORTS = 15_000, 17_000
"""Below the ports that Linux gives to connections of its own."""
LAST_RESORT_S = 600
"""srun leaves the ranks this long, beyond parallel.timeout_s, after the first has left: the watchdog knows why."""


def rank_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have set, for a process that srun started; nothing where another launcher did, or none.

    Raises:
        UserError: a variable of srun is missing or makes no sense.
    """
    if "RANK" in environ or "SLURM_STEP_ID" not in environ:
        return {}
    try:
        node = int(environ["SLURM_NODEID"])
        tasks = environ.get("SLURM_STEP_NUM_TASKS") or environ["SLURM_NTASKS"]
        local = [*per_node(environ.get("SLURM_STEP_TASKS_PER_NODE") or environ["SLURM_TASKS_PER_NODE"])][node]
        # another port after every restart: a rank of the last one may live where SLURM cannot reach it
        port = int(environ["SLURM_JOB_ID"]) + 7919 * int(environ.get("SLURM_RESTART_COUNT", "0"))
        return {
            "RANK": str(int(environ["SLURM_PROCID"])),
            "LOCAL_RANK": str(int(environ["SLURM_LOCALID"])),
            "WORLD_SIZE": str(int(tasks)),
            "LOCAL_WORLD_SIZE": str(local),
            "MASTER_ADDR": first_host(environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]),
            "MASTER_PORT": environ.get("MASTER_PORT") or str(FIRST_PORT + port % PORTS),
        }
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"environment: srun's variables make no sense ({type(error).__name__}: {error}); start the ranks with srun "
            "itself, or unset SLURM_STEP_ID to run one process"
        ) from None


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list: "gpu[003-005,9],login1" is gpu003, gpu004, gpu005, gpu9, login1."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise ValueError(f"{nodes!r} is not a list of nodes")
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group())


def per_node(counts: str) -> Iterator[int]:
    """Tasks of every node: "4(x2),1" is 4, 4, 1."""
    for part in counts.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise ValueError(f"{counts!r} is not a list of counts")
        yield from [int(found[1])] * int(found[2] or 1)


@dataclass(frozen=True)
class JobRequest:
    """What a job asks SLURM for."""

    nodes: str
    """A number, or FIRST-LAST: as many as there are; a job that loses a node then goes on without."""
    gpus_per_node: int
    tasks_per_node: int
    time: str = "24:00:00"
    """SLURM's notation; after it the job is requeued, and goes on."""
    save_before_s: int = 180
    """The ranks are told to save at least this long before the time is over."""
    sbatch: tuple[str, ...] = ()
    """Further options, as in "partition=gpu"."""

    def world_sizes(self) -> list[int]:
        first, _, last = self.nodes.partition("-")
        return [nodes * self.tasks_per_node for nodes in range(int(first), int(last or first) + 1)]


def seconds(time: str) -> int:
    """Of a limit in SLURM's notation: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises:
        ValueError: the text is not a valid value.
    """
    if not re.fullmatch(r"\d+-\d+(:\d+){0,2}|\d+(:\d+){0,2}", time):
        raise ValueError(time)
    days, dash, rest = time.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash or len(parts) == 3:
        hours, minutes, secs = (*parts, 0, 0)[:3]
    else:
        hours, (minutes, secs) = 0, (*parts, 0)[:2]
    return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + secs


def node_range(text: str) -> str:
    if not re.fullmatch(r"[1-9]\d*(-[1-9]\d*)?", text) or (
        "-" in text and int(text.split("-")[0]) > int(text.split("-")[1])
    ):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number of nodes, or FIRST-LAST such as 2-4")
    if int(text.split("-")[-1]) > MAX_NODES:
        raise argparse.ArgumentTypeError(f"{text!r}: must be at most {MAX_NODES:,} nodes")
    return text


def count(text: str) -> int:
    return 0 if text == "0" else positive(text)


def time_limit(text: str) -> str:
    try:
        seconds(text)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r}: must be a time of SLURM's, such as 90 (minutes), 12:00:00 or 2-00:00:00"
        ) from None
    return text


def sbatch_option(text: str) -> str:
    if not re.fullmatch(r"[a-z][a-z-]*(=[^\x00-\x1f\x7f]+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be an option of sbatch without its dashes: partition=gpu")
    return text


def add_request(parser: Parser, required: bool) -> None:
    parser.add_argument("--nodes", type=node_range, required=required, metavar="N",
                        help="nodes; 2-4 takes what there is, and after the loss of a node what is left")  # fmt: skip
    parser.add_argument("--gpus-per-node", type=count, required=required, metavar="M", help="0: CPUs only")
    parser.add_argument("--tasks-per-node", type=positive, metavar="T", help="ranks a node; default: its GPUs, or 1")
    parser.add_argument("--time", type=time_limit, help="limit, after which the job is requeued; default 24:00:00")
    parser.add_argument("--save-before-s", type=positive, metavar="S",
                        help="save at least so many seconds before the limit; default 180")  # fmt: skip
    parser.add_argument("--sbatch", action="append", type=sbatch_option, metavar="OPTION=VALUE",
                        help="further option of sbatch, such as partition=gpu; may be repeated")  # fmt: skip
    parser.add_argument("--print", action="store_true", help="print the script; write and submit nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace values of the file")


def given_request(arguments: argparse.Namespace, before: JobRequest | None) -> JobRequest:
    """What the command line asks for, on top of what the run asked for before."""
    given: dict[str, Any] = {
        name: getattr(arguments, name)
        for name in ("nodes", "gpus_per_node", "tasks_per_node", "time", "save_before_s", "sbatch")
        if getattr(arguments, name) is not None
    }
    if "sbatch" in given:
        given["sbatch"] = tuple(given["sbatch"])
    if "gpus_per_node" in given:
        given.setdefault("tasks_per_node", given["gpus_per_node"] or 1)
    return JobRequest(**given) if before is None else replace(before, **given)


class Asked(Described):
    """What was asked of SLURM: values of a command line, checked where they are read as one."""

    nodes: str
    gpus_per_node: int
    tasks_per_node: int
    time: str
    save_before_s: int
    sbatch: tuple[str, ...]


class Submitted(Described):
    """job.json: what was submitted. The run directory may be another's, or have been moved: no path is read there."""

    job_id: Annotated[str, Field(pattern="^[1-9][0-9]{0,18}$")]
    request: Asked


def asked_before(request: Asked, path: Path) -> JobRequest:
    """The `JobRequest` of a job.json, every value checked as if it were typed.

    Raises:
        UserError: naming the file and the value.
    """
    words = [f"--{name.replace('_', '-')}={value}" for name, value in request if name != "sbatch"]
    words += [f"--sbatch={option}" for option in request.sbatch]
    parser = FileParser(path)
    add_request(parser, required=True)
    asked = given_request(parser.parse_args(words), None)
    for option in asked.sbatch:
        if option.partition("=")[0] not in CARRIED:
            raise UserError(
                f"{path}: asks sbatch for {option!r}, which is not taken from a file; give it with --sbatch"
            )
    return asked


class FileParser(Parser):
    """Reads what a file asks for."""

    def __init__(self, path: Path) -> None:
        super().__init__("", "")
        self._path = path

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self._path}: {message}; submit the run again")


def batch_script(request: JobRequest, folder: Path, python: Path, cwd: Path, patience_s: int) -> str:
    """The script of a job whose configuration and code are in `folder`; `patience_s` is parallel.timeout_s."""
    # of a range, sbatch would fix the number of tasks at that of the first start: a smaller one would never come
    share = "mincpus" if "-" in request.nodes else "ntasks-per-node"
    options = {
        "job-name": f"megassm-{folder.parents[1].name}",
        "nodes": request.nodes,
        share: request.tasks_per_node,
        "gpus-per-node": request.gpus_per_node or None,
        "time": request.time,
        "signal": f"USR1@{request.save_before_s}",
        "chdir": cwd,
        "output": str(folder / JOB_LOG).replace("%", "%%"),
        "open-mode": "append",
    }
    given = [f"--{name}={shlex.quote(str(value))}" for name, value in options.items() if value is not None]
    head = "\n".join(f"#SBATCH {option}" for option in [*given, "--requeue", *(f"--{own}" for own in request.sbatch)])
    return SCRIPT.format(
        head=head,
        folder=shlex.quote(str(folder)),
        code=JOB_CODE,
        config=CONFIG,
        python=shlex.quote(str(python)),
        tasks=request.tasks_per_node,
        wait_s=patience_s + LAST_RESORT_S,
        stopped=STOPPED,
        save_before_s=request.save_before_s,
    )


SCRIPT = """\
#!/usr/bin/env bash
# Made by `megassm slurm`. SIGUSR1 comes to every rank {save_before_s} s before the time is over: all finish the
# micro-batch, save, and exit with {stopped}; the job is then requeued, and continues from that checkpoint.
{head}

JOB={folder}
export PYTHONPATH="$JOB/{code}"
echo "--- job $SLURM_JOB_ID, restart ${{SLURM_RESTART_COUNT:-0}}, on $SLURM_JOB_NODELIST, $(date -u +%FT%TZ)"

# srun would give each rank one core, and takes --cpus-per-task from no batch job since 22.05: all that the job has here
cores=${{SLURM_CPUS_PER_TASK:-$((${{SLURM_CPUS_ON_NODE:-0}} / {tasks}))}}

# in the background, because bash runs a trap only between commands
srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node={tasks} --ntasks=$((SLURM_JOB_NUM_NODES * {tasks})) \\
  --cpus-per-task=$((cores > 0 ? cores : 1)) \\
  --kill-on-bad-exit=0 --wait={wait_s} {python} -P -m megassm train --config "$JOB/{config}" &
ranks=$!
trap 'again=1; kill -USR1 $ranks' USR1   # scancel --batch --signal=USR1: srun hands it to the ranks
trap again=1 TERM                        # preemption, scancel: SLURM tells the ranks itself; wait for them
again=1
while [ $again = 1 ]; do again=0; wait $ranks; code=$?; done   # a signal ends `wait` early
echo "--- job $SLURM_JOB_ID: the ranks ended with code $code, $(date -u +%FT%TZ)"

# not where SLURM is ending the job anyway (scancel, preemption), nor where it has started it elsewhere since
if [ "$code" = {stopped} ]; then
  job=$(scontrol show job -o "$SLURM_JOB_ID")
  if [[ $job == *" JobState=RUNNING "* && $job == *" Restarts=${{SLURM_RESTART_COUNT:-0}} "* ]]; then
    scontrol requeue "$SLURM_JOB_ID" && exit 0
  fi
fi
exit "$code"
"""
