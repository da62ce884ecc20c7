"""Kills a training job again and again, and holds what comes out against a run that nobody disturbed.

    python -m tests.torture --data data/demo_bytes --output /tmp/torture --kills 20

A job of 4 ranks, under torchrun or deepspeed, is ended at a random moment: a random rank, its launcher or everything by
`kill -9`, some of them while a checkpoint is written, or a rank by SIGSTOP. It is started again by the same command,
and so on; in the first half always on the same ranks, then each time on another mesh and ZeRO stage. Checkpoints are
written while training goes on. Most lives have a bad time before: a disk that is full, a run directory that is
read-only (root alone can make it so), data that is away, a second starter.

The journal must be one curve without a seam. It must equal the undisturbed run's bit for bit as long as the mesh stayed
what it was, and within 1e-5 after that. That every sample was read once is what `megassm.train.agreement` checks in
every update. No process and no file may be left over, and every end must be in events.jsonl with its cause.
"""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import signal
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from megassm.cli.arguments import print_table, run_tool, tool_parser
from megassm.errors import UserError
from megassm.run.directory import CHECKPOINTS
from megassm.run.events import ENDS as EVENT_ENDS
from megassm.run.events import read_events
from megassm.run.journal import Record, read_records
from tests.conftest import SMALL, run_python
from tests.jobs import Job, Launcher

BASE = (
    *SMALL, "model.seq_len=128", "model.pattern=SA", "model.n_kv_heads=2", "model.vocab_size=259",
    "budget.strategy=uniform", "budget.draws=2", "train.batch_sequences=8", "optim.grad_clip=0.3",
    "checkpoint.every_steps=5", "checkpoint.asynchronous=true", "eval.every_steps=null", "eval.budgets=[8]",
    "log.every_steps=1000", "parallel.timeout_s=45",
)  # fmt: skip
TOLERANCE = 1e-5
EXACT = ("loss", "bits_per_byte", "grad_norm", "k_micro", "lr", "tokens")


@dataclass(frozen=True)
class Shape:
    """A mesh and a ZeRO stage."""

    data: int
    sequence: int
    tensor: int
    zero_stage: int

    @property
    def ranks(self) -> int:
        return self.data * self.sequence * self.tensor

    def overrides(self) -> list[str]:
        knobs = [f"parallel.{name}={value}" for name, value in asdict(self).items()]
        return [*knobs, f"train.micro_batch_sequences={4 // self.data}"]


SHAPES = [
    Shape(4, 1, 1, 1),
    Shape(2, 1, 2, 2),
    Shape(1, 1, 2, 1),
    Shape(1, 1, 1, 0),
    Shape(2, 2, 1, 3),
    Shape(4, 1, 1, 3),
]


@dataclass
class Life:
    """One start of the job, from its beginning to the kill."""

    launcher: Launcher
    mesh: str
    bad_time: str
    ended_by: str
    continued_after: int
    killed_rank: int
    at_row: int
    named: bool
    """Whether the one message of the others named the killed rank, where there were others."""
    ended_s: float
    """From the kill to the end of the last rank."""
    told_s: float | None
    """From the beginning of a bad time until a second starter was refused, or an event told of the disk; None where
    there is nothing to tell: data that is away for so short is waited for."""


def shape_of(life: int, same_mesh: int) -> Shape:
    """The first `same_mesh` lives, and the one after, have the undisturbed run's."""
    later = life - same_mesh - 1
    return SHAPES[0] if later < 0 else SHAPES[1 + later % (len(SHAPES) - 1)]


ENDS = ("rank killed", "rank killed in a save", "all killed", "launcher killed", "rank killed", "all killed in a save",
        "rank stopped")  # fmt: skip
BAD_TIMES = ("full disk", "second starter", "data away", "read-only", "")
"""By turns; as two launchers, seven ends and five of these have no common divisor, each meets each."""
BAD_S = 4.0
FIRST_STEP = re.compile(r"^step +\d+/", re.MULTILINE)
CAUSES = {
    "rank killed": "no longer answer|without a word",
    "rank killed in a save": "no longer answer|without a word",
    "rank stopped": "no longer answer|without a word",
    "all killed": "ended without a word",
    "all killed in a save": "ended without a word",
    "launcher killed": "because its launcher ended|no longer answer|without a word",
}
"""What events.jsonl must say of an end; a single rank leaves no word."""


def live(number: int, run_dir: Path, shape: Shape, overrides: list[str], dice: random.Random) -> Life:
    """Starts the job, gives it a bad time, ends it, and waits until all its processes have ended."""
    launcher: Launcher = "deepspeed" if number % 2 else "torchrun"
    end, bad_time = ENDS[number % len(ENDS)], BAD_TIMES[number % len(BAD_TIMES)]
    with Job(run_dir, shape.ranks, [*overrides, *shape.overrides()], launcher=launcher) as job:
        job.wait_until(lambda: "parameters at K=" in job.said)
        before = re.search(r"continuing after step (\d+)", job.said)
        start, told_s = int(before.group(1)) if before else 0, None
        if not bad_time:  # while it sets up, reads the checkpoint, makes the first steps
            time.sleep(dice.random() * 2)
        else:
            target = start + dice.randint(4, 12)
            job.wait_until(lambda: FIRST_STEP.search(job.said) is not None)  # rows of the life before are cut
            job.wait_until(lambda: job.rows >= target)
            told_s = give_a_bad_time(bad_time, job, overrides)
            time.sleep(dice.random() * 0.3)
        if end.endswith("in a save"):
            job.wait_until(lambda: any((run_dir / CHECKPOINTS).glob(".partial-*")), poll_s=0.001)
        rank, row = dice.randrange(shape.ranks), job.rows
        ended_s, code = end_job(job, end, rank)
        errors = [line for line in job.said.splitlines() if line.startswith("error: ")]
    named = shape.ranks > 1 and len(errors) == 1 and errors[0].startswith(f"error: rank {rank} ")
    told = code != 0 and (not end.startswith("rank ") or len(errors) == (shape.ranks > 1))
    if not told or (living := processes_of(run_dir)):
        what = errors if not told else f"processes {living} live on"
        raise UserError(f"life {number}, {end} ({rank} of {shape} at row {row}): code {code}, {what}:\n{job.said}")
    mesh = f"{shape.data}x{shape.sequence}x{shape.tensor}, ZeRO {shape.zero_stage}"
    return Life(launcher, mesh, bad_time, end, start, rank, row, named, ended_s, told_s)


def give_a_bad_time(kind: str, job: Job, overrides: list[str]) -> float | None:
    """For `BAD_S` seconds, in which the job trains on or waits, and must not end; returns `Life.told_s`."""
    began, began_at = time.monotonic(), time.time()
    data = Path(next(text for text in overrides if text.startswith("data.path=")).partition("=")[2])
    checkpoints, away = job.run_dir / "checkpoints", data.with_name(f"{data.name}.away")
    match kind:
        case "full disk":  # no file may grow, as on one; a limit of this machine's kernel, for these processes
            for process in job.ranks:
                process.rlimit(psutil.RLIMIT_FSIZE, (64, resource.RLIM_INFINITY))
        case "read-only":
            subprocess.run(["chattr", "+i", checkpoints], check=True)
        case "data away":
            data.rename(away)
        case "second starter":
            one = [*overrides, *Shape(1, 1, 1, 0).overrides(), f"run.dir={job.run_dir}"]
            second = run_python("launch/pretrain.py", "--config", "configs/tiny.yaml", *one, check=False)
            if second.returncode != 1 or "another job is training there" not in second.stderr:
                raise UserError(f"a second starter was not refused: {second.returncode}, {second.stderr}")
            return time.monotonic() - began
    time.sleep(BAD_S)
    match kind:
        case "full disk":
            for process in job.ranks:
                process.rlimit(psutil.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        case "read-only":
            subprocess.run(["chattr", "-i", checkpoints], check=True)
        case "data away":
            away.rename(data)
    done = job.rows
    job.wait_until(lambda: job.rows > done)
    told = (event["time"] - began_at for event in read_events(job.run_dir) if event["kind"] == "disk")
    return next((seconds for seconds in told if seconds > 0), None)


def end_job(job: Job, end: str, rank: int) -> tuple[float, int]:
    """(seconds until all had ended, the launcher's code)."""
    family, began = job.ranks, time.monotonic()
    match end:
        case "all killed" | "all killed in a save":
            job.end(signal.SIGKILL, whole=True)
        case "launcher killed":
            job.end(signal.SIGKILL, whole=False)
        case "rank stopped":
            job.send(rank, signal.SIGSTOP)
        case _:
            job.send(rank, signal.SIGKILL)
    stopped = rank if end == "rank stopped" and len(family) > 1 else None
    if end == "rank stopped" and stopped is None:
        job.end(signal.SIGKILL, whole=True)  # alone, nobody notices
    code = job.wait_for_ranks(but=stopped, within_s=120)
    return time.monotonic() - began, code


def processes_of(run_dir: Path) -> list[int]:
    """Those that still train there."""
    deadline = time.monotonic() + 30  # a launcher may take a while to follow its ranks
    while found := [process.pid for process in psutil.process_iter(["cmdline", "status"])
                    if f"run.dir={run_dir}" in (process.info["cmdline"] or ())
                    and process.info["status"] != psutil.STATUS_ZOMBIE]:  # fmt: skip
        if time.monotonic() > deadline:
            return found
        time.sleep(0.2)
    return []


def check_left(run_dir: Path, lives: Sequence[Life]) -> Record:
    """Nothing lies about in the run directory, and every end has its cause in events.jsonl.

    Raises:
        UserError: something does, or one has not.
    """
    patterns = ("checkpoints/.*", "**/*.tmp", "failure.txt", "failures.jsonl", "incarnations/.*")
    if left := [str(path) for pattern in patterns for path in run_dir.glob(pattern)]:
        raise UserError(f"files are left over: {left}")
    ends: list[str] = []
    for event in read_events(run_dir):
        if event["kind"] in EVENT_ENDS:
            ends.append(f"{event['kind']}: {event['text']}")
    if len(ends) != len(lives) + 1:
        raise UserError(f"{len(lives) + 1} starts have {len(ends)} ends: {ends}")
    for life, text in zip(lives, ends, strict=False):
        if not re.search(CAUSES[life.ended_by], text):
            raise UserError(f"the end of {life} has no cause in events.jsonl: {text}")
    return {"ends_with_a_cause": len(ends)}


@dataclass(frozen=True)
class Plan:
    """How much is done to a run."""

    kills: int
    steps: int
    same_mesh: int
    """Lives on one mesh, before it changes with each."""
    seed: int = 0


def torture(output: Path, data: Path, plan: Plan) -> tuple[list[Life], Record]:
    """The lives of the disturbed run, and how far it is from the other.

    Raises:
        UserError: a job ended otherwise than it must, or the curves differ.
    """
    dice = random.Random(plan.seed)
    calm, broken, own_data = output / "calm", output / "broken", output / "data"
    overrides = [*BASE, f"data.path={own_data}", f"train.steps={plan.steps}"]
    for folder in (calm, broken, own_data):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(data, own_data)
    with Job(calm, SHAPES[0].ranks, [*overrides, *SHAPES[0].overrides()]) as job:
        job.finish()
    lives = []
    for number in range(plan.kills):
        lives.append(live(number, broken, shape_of(number, plan.same_mesh), overrides, dice))
        print(f"kill {number + 1}: {lives[-1]}", flush=True)
    last = shape_of(plan.kills, plan.same_mesh)
    with Job(broken, last.ranks, [*overrides, *last.overrides()]) as job:
        job.finish()
        found = re.search(r"continuing after step (\d+)", job.said)
    starts = [*(life.continued_after for life in lives), int(found.group(1)) if found else 0]
    same_mesh = min(start for number, start in enumerate(starts) if shape_of(number, plan.same_mesh) != SHAPES[0])
    found_left = check_left(broken, lives)
    return lives, compare(read_records(calm), read_records(broken), same_mesh) | found_left | {"kills": plan.kills}


def times(lives: Sequence[Life]) -> list[Record]:
    """Seconds until what was done to a life was noticed: until its last process had ended, or the job said so."""
    ends = {end: [life.ended_s for life in lives if life.ended_by == end] for end in dict.fromkeys(ENDS)}
    bad = {kind: [life.told_s for life in lives if life.bad_time == kind] for kind in BAD_TIMES if kind}
    table = []
    for what, found in [*ends.items(), *bad.items()]:
        known = [seconds for seconds in found if seconds is not None]
        figures = {"median_s": statistics.median(known), "longest_s": max(known)} if known else dict.fromkeys(
            ("median_s", "longest_s"))  # fmt: skip
        table.append({"done": what, "lives": len(found), "noticed": len(known), **figures})
    return [row for row in table if row["lives"]]


def compare(calm: list[Record], broken: list[Record], same_mesh: int) -> Record:
    """How two journals differ; the first `same_mesh` rows must not.

    Raises:
        UserError: where they differ more than they may.
    """
    steps = [row["step"] for row in broken]
    if steps != list(range(1, len(calm) + 1)):
        raise UserError(f"the journal has a seam: its steps are {steps}")
    for mine, true in zip(broken[:same_mesh], calm, strict=False):
        if different := [name for name in EXACT if mine[name] != true[name]]:
            raise UserError(f"step {mine['step']}: {different} differ though the mesh was the same: {mine}, {true}")
    worst = max(abs(mine["loss"] - true["loss"]) for mine, true in zip(broken, calm, strict=True))
    if worst > TOLERANCE:
        raise UserError(f"the loss differs by {worst:.2g} from the undisturbed run's, more than {TOLERANCE:g}")
    return {"steps": len(calm), "steps_equal_bit_for_bit": same_mesh, "largest_difference_of_loss": worst,
            "first_loss": calm[0]["loss"], "last_loss": calm[-1]["loss"]}  # fmt: skip


def main() -> None:
    parser = tool_parser(__doc__ or "", "python -m tests.torture --data data/demo --output /tmp/torture --kills 20")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="data set of bytes")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="gets both run directories")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--steps", type=int, help="default: 30 a kill")
    parser.add_argument("--same-mesh", type=int, metavar="N", help="kills before the mesh changes (default: half)")
    parser.add_argument("--seed", type=int, default=0, help="of the ranks and moments")
    arguments = parser.parse_args()
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    kills = arguments.kills
    same_mesh = kills // 2 if arguments.same_mesh is None else arguments.same_mesh
    plan = Plan(kills, arguments.steps or 30 * kills, same_mesh, arguments.seed)
    lives, summary = torture(arguments.output, arguments.data, plan)
    print_table("lives", [asdict(life) for life in lives])
    print_table("until it was noticed: the last process had ended, or the job said so", times(lives))
    print_table("against the undisturbed run", [summary], arguments.json)


if __name__ == "__main__":
    run_tool(main)
