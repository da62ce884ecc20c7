"""What a job asks SLURM for: options of a command line, of a job.json and of a site's defaults alike."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pydantic import Field

from megassm.cli.arguments import Parser, positive
from megassm.errors import UserError
from megassm.guarded import Described

MAX_NODES = 20_000
JOB_BYTES = 2**20
"""Of a job.json."""
CARRIED = frozenset(
    {
        "account", "clusters", "comment", "constraint", "cores-per-socket", "cpus-per-gpu", "exclude",
        "exclusive", "gpu-bind", "gpu-freq", "gpus", "gpus-per-task", "gres", "hint", "licenses", "mail-type",
        "mem", "mem-per-cpu", "mem-per-gpu", "network", "nice", "nodelist", "partition", "priority", "qos",
        "reservation", "switches", "threads-per-core", "time-min", "tmp", "use-min-nodes", "wckey",
    }
)  # fmt: skip
"""Options of sbatch that `resume` takes from the run directory: what a job runs on. Not what it runs or writes."""


CARRIED_BY_SRUN = frozenset(
    {"cpu-bind", "cpu-freq", "distribution", "gpu-bind", "gpu-freq", "hint", "label", "mem-bind", "mpi", "network",
     "threads-per-core", "unbuffered"}
)  # fmt: skip
"""The same of srun's."""
OWNED = {
    "array": "a run is one job; submit each configuration by itself",
    "nodes": "use --nodes",
    "ntasks": "use --nodes and --tasks-per-node",
    "ntasks-per-node": "use --tasks-per-node",
    "mincpus": "use --cpus-per-task",
    "cpus-per-task": "use --cpus-per-task",
    "gpus-per-node": "use --gpus-per-node",
    "time": "use --time",
    "signal": "use --save-before-s",
    "chdir": "submit from the folder that the run shall see as its own",
    "output": "use --logs",
    "error": "use --logs",
    "open-mode": "the log is continued",
    "requeue": "it is, unless --chain asks for several jobs",
    "no-requeue": "use --chain",
    "wrap": "the script is this tool's",
    "test-only": "use --print",
    "parsable": "the number of the job is printed",
    "wait": "see `status`",
}
"""Options of sbatch that the tool sets itself, or that would break its script; and what to do instead."""
OWNED_BY_SRUN = {name: OWNED[name] for name in ("nodes", "ntasks", "ntasks-per-node", "cpus-per-task", "output",
                                                "error", "open-mode", "chdir")} | {
    "wait": "it is parallel.timeout_s and some minutes",
    "kill-on-bad-exit": "the other ranks say why one has left",
    "multi-prog": "every rank runs the same",
    "pty": "a batch job has no terminal",
    "jobid": "it is the job's",
    "test-only": "use --print",
}  # fmt: skip
MOST_JOBS = 100
LOGS = ("one", "label", "rank")
NOT_KEPT = ("setup", "container")
"""What a job runs in is not taken from a run directory, which may be another's."""


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
    cpus_per_task: int | None = None
    """CPUs of a rank; None: what the job gets on a node, divided by its ranks."""
    srun: tuple[str, ...] = ()
    """Further options of srun."""
    setup: str = ""
    """A bash file that the job reads before the ranks start."""
    container: str = ""
    """pyxis:IMAGE or apptainer:IMAGE that the ranks run in."""
    logs: str = "one"
    """Of `LOGS`: all ranks in one file; each line with its rank; a file a rank."""
    chain: int = 1
    """Jobs, each continuing the one before; 1: one that is requeued."""

    @property
    def own_gpus(self) -> int | None:
        """GPUs of a node where an option of sbatch's asks for them in its own words."""
        for option in self.sbatch:
            if found := re.fullmatch(r"gres=(?:.*,)?gpu(?::[^:,\d][^:,]*)?(?::(\d+))?(?:,.*)?", option):
                return int(found[1] or 1)
        return None

    def option(self, name: str) -> str | None:
        """The value of a further option of sbatch; "" where it has none, None where it is not given."""
        given = dict(option.partition("=")[::2] for option in self.sbatch)
        return given.get(name)

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


def further_option(program: str, owned: Mapping[str, str]) -> Callable[[str], str]:
    """For argparse's `type`: an option that is handed on."""

    def check(text: str) -> str:
        if not re.fullmatch(r"[a-z][a-z-]*(=[^\x00-\x1f\x7f]+)?", text):
            example = "partition=gpu" if program == "sbatch" else "mpi=none"
            raise argparse.ArgumentTypeError(f"{text!r}: must be an option of {program} without its dashes: {example}")
        if way := owned.get(text.partition("=")[0]):
            raise argparse.ArgumentTypeError(f"{text!r}: is not for {program} to be told: {way}")
        return text

    return check


def container(text: str) -> str:
    if text and not re.fullmatch(r"(pyxis|apptainer):[^\x00-\x1f\x7f]+", text):
        raise argparse.ArgumentTypeError(f"{text!r}: must be pyxis:IMAGE or apptainer:IMAGE, or '' for none")
    return text


def number_of_jobs(text: str) -> int:
    if (value := positive(text)) > MOST_JOBS:
        raise argparse.ArgumentTypeError(f"{text!r}: must be at most {MOST_JOBS} jobs")
    return value


SITE_OPTIONS = ("time", "save_before_s", "cpus_per_task", "sbatch", "srun", "setup", "container", "logs", "chain")
"""Those that a site's defaults may set."""


def add_site_options(parser: Parser) -> None:
    add = parser.add_argument
    add("--time", type=time_limit, help="limit, after which the job is requeued; default 24:00:00")
    add("--save-before-s", type=positive, metavar="S", help="save at least so many seconds before it; default 180")
    add("--cpus-per-task", type=positive, metavar="C", help="CPUs of a rank; default: the node's CPUs by its GPUs")
    add("--sbatch", action="append", type=further_option("sbatch", OWNED), metavar="OPTION=VALUE",
        help="further option of sbatch, such as partition=gpu or gres=gpu:a100:8; may be repeated")  # fmt: skip
    add("--srun", action="append", type=further_option("srun", OWNED_BY_SRUN), metavar="OPTION=VALUE",
        help="further option of srun, such as mpi=none, cpu-bind=cores or label; may be repeated")  # fmt: skip
    add("--setup", metavar="FILE", help="bash that the job reads before its ranks start: modules, conda, NCCL_*")
    add("--container", type=container, metavar="KIND:IMAGE", help="pyxis:IMAGE or apptainer:IMAGE, with Python in it")
    add("--logs", choices=LOGS, help="all ranks in one file (default); each line with its rank; a file a rank")
    add("--chain", type=number_of_jobs, metavar="N",
        help="N jobs, each after the one before, where a site forbids to requeue; default 1, requeued")  # fmt: skip


def add_request(parser: Parser, required: bool) -> None:
    parser.add_argument("--nodes", type=node_range, required=required, metavar="N",
                        help="nodes; 2-4 takes what there is, and after the loss of a node what is left")  # fmt: skip
    parser.add_argument("--gpus-per-node", type=count, required=required, metavar="M", help="0: CPUs only")
    parser.add_argument("--tasks-per-node", type=positive, metavar="T", help="ranks a node; default: its GPUs, or 1")
    add_site_options(parser)
    parser.add_argument("--print", action="store_true", help="print the script; write and submit nothing")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace values of the file")


def given_request(
    arguments: argparse.Namespace, before: JobRequest | None, site: Mapping[str, Any] | None = None
) -> JobRequest:
    """What the command line asks for, on top of what the run asked for before, on top of the site's defaults."""
    given: dict[str, Any] = {
        name: getattr(arguments, name)
        for name in ("nodes", "gpus_per_node", "tasks_per_node", *SITE_OPTIONS)
        if getattr(arguments, name) is not None
    }
    if "gpus_per_node" in given:
        given.setdefault("tasks_per_node", given["gpus_per_node"] or 1)
    defaults = dict(site or {})
    kept = {name: value for name, value in (asdict(before) if before else {}).items()
            if value is not None and name not in NOT_KEPT}  # fmt: skip
    asked = kept | given
    for name in ("sbatch", "srun"):  # lists add up: a partition from the site, an account from the command line
        own = asked.get(name, ())
        named = {option.partition("=")[0] for option in own}
        others = [option for option in defaults.get(name, ()) if option.partition("=")[0] not in named]
        asked[name] = (*others, *own)
    return JobRequest(**(defaults | asked))


class Asked(Described):
    """What was asked of SLURM: values of a command line, checked where they are read as one."""

    nodes: str
    gpus_per_node: int
    tasks_per_node: int
    time: str
    save_before_s: int
    sbatch: tuple[str, ...]
    cpus_per_task: int | None = None
    srun: tuple[str, ...] = ()
    logs: str = "one"
    chain: int = 1


class Submitted(Described):
    """job.json: what was submitted. The run directory may be another's, or have been moved: no path is read there."""

    job_id: Annotated[str, Field(pattern="^[1-9][0-9]{0,18}$")]
    chain_ids: Annotated[
        tuple[Annotated[str, Field(pattern="^[1-9][0-9]{0,18}$")], ...], Field(max_length=MOST_JOBS)
    ] = ()
    """Of a chain's further jobs."""
    request: Asked
    again: Annotated[tuple[str, ...], Field(max_length=1000)] = ()
    """Options that were given and are not taken from here: they decide what the job runs."""


def for_file(request: JobRequest) -> tuple[dict[str, Any], list[str]]:
    """(what a job.json keeps of a request, the options that have to be given again)."""
    kept = {"sbatch": CARRIED, "srun": CARRIED_BY_SRUN}
    words = {name: [option for option in getattr(request, name) if option.partition("=")[0] not in kept[name]]
             for name in kept}  # fmt: skip
    again = [f"--{name} {option}" for name, options in words.items() for option in options]
    again += [f"--{name} {value}" for name in NOT_KEPT if (value := getattr(request, name))]
    values = {name: value for name, value in asdict(request).items() if name not in NOT_KEPT}
    return values | {name: [o for o in getattr(request, name) if o not in words[name]] for name in kept}, again


def asked_before(request: Asked, path: Path) -> JobRequest:
    """The `JobRequest` of a job.json, every value checked as if it were typed.

    Raises:
        UserError: naming the file and the value.
    """
    lists = ("sbatch", "srun")
    words = [
        f"--{name.replace('_', '-')}={value}" for name, value in request if name not in lists and value is not None
    ]
    words += [f"--{name}={option}" for name in lists for option in getattr(request, name)]
    parser = FileParser(path, "submit the run again")
    add_request(parser, required=True)
    asked = given_request(parser.parse_args(words), None)
    for name, carried in (("sbatch", CARRIED), ("srun", CARRIED_BY_SRUN)):
        for option in getattr(asked, name):
            if option.partition("=")[0] not in carried:
                raise UserError(
                    f"{path}: asks {name} for {option!r}, which is not taken from a file; give it with --{name}"
                )
    return asked


class FileParser(Parser):
    """Reads what a file asks for."""

    def __init__(self, path: Path, way_out: str) -> None:
        super().__init__("", "")
        self._path, self._way_out = path, way_out

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self._path}: {message}; {self._way_out}")
