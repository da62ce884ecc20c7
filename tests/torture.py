"""Kills a training job again and again, and holds what comes out against a run that nobody disturbed.

    python -m tests.torture --data data/demo_bytes --output /tmp/torture --kills 20

A job of 4 ranks loses a random rank to `kill -9` at a random moment, is started again by the same command, and so on;
in the first half always on the same ranks, then each time on another mesh and ZeRO stage. The journal must be one curve
without a seam. It must equal the undisturbed run's bit for bit as long as the mesh stayed what it was, and within
1e-5 after that. That every sample was read once is what `megassm.train.agreement` checks in every update.
"""

from __future__ import annotations

import random
import re
import shutil
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from megassm.cli.arguments import print_table, run_tool, tool_parser
from megassm.errors import UserError
from megassm.run.journal import Record, read_records
from tests.conftest import SMALL
from tests.jobs import Job

BASE = (
    *SMALL, "model.seq_len=128", "model.pattern=SA", "model.n_kv_heads=2", "model.vocab_size=259",
    "budget.strategy=uniform", "budget.draws=2", "train.batch_sequences=8", "optim.grad_clip=0.3",
    "checkpoint.every_steps=5", "eval.every_steps=null", "eval.budgets=[8]", "log.every_steps=1000",
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

    mesh: str
    continued_after: int
    killed_rank: int
    at_row: int
    named: bool
    """Whether the one message of the others named the killed rank."""
    ended_s: float
    """From the kill to the end of the last rank."""


def shape_of(life: int, kills: int) -> Shape:
    later = life - kills // 2 - 1
    return SHAPES[0] if later < 0 else SHAPES[1 + later % (len(SHAPES) - 1)]


def live(number: int, run_dir: Path, shape: Shape, overrides: list[str], dice: random.Random) -> Life:
    """Starts the job, kills one of its ranks, and waits until all have ended."""
    with Job(run_dir, shape.ranks, [*overrides, *shape.overrides()]) as job:
        job.wait_until(lambda: "parameters at K=" in job.said)
        before = re.search(r"continuing after step (\d+)", job.said)
        start = int(before.group(1)) if before else 0
        if number % 5 == 4:  # while it sets up, reads the checkpoint, makes the first steps
            time.sleep(dice.random() * 2)
        else:
            target = start + dice.randint(6, 18)
            job.wait_until(lambda: job.rows >= target)
            time.sleep(dice.random() * 0.3)
        rank, killed, row = dice.randrange(shape.ranks), time.monotonic(), job.rows
        job.send(rank, signal.SIGKILL)
        code = job.wait_for_ranks(but=None, within_s=60)
        ended_s = time.monotonic() - killed
        errors = [line for line in job.said.splitlines() if line.startswith("error: ")]
        if code == 0 or len(errors) != (shape.ranks > 1):
            raise UserError(f"rank {rank} of {shape} was killed at row {row}: code {code}, messages {errors}")
        named = shape.ranks > 1 and errors[0].startswith(f"error: rank {rank} ")
    return Life(
        f"{shape.data}x{shape.sequence}x{shape.tensor}, ZeRO {shape.zero_stage}", start, rank, row, named, ended_s
    )


def torture(output: Path, data: Path, kills: int, steps: int, seed: int) -> tuple[list[Life], Record]:
    """The lives of the disturbed run, and how far it is from the other.

    Raises:
        UserError: a job ended otherwise than it must, or the curves differ.
    """
    dice = random.Random(seed)
    overrides = [*BASE, f"data.path={data}", f"train.steps={steps}"]
    calm, broken = output / "calm", output / "broken"
    for folder in (calm, broken):
        shutil.rmtree(folder, ignore_errors=True)
    with Job(calm, SHAPES[0].ranks, [*overrides, *SHAPES[0].overrides()]) as job:
        job.finish()
    lives = []
    for number in range(kills):
        lives.append(live(number, broken, shape_of(number, kills), overrides, dice))
        print(f"kill {number + 1}: {lives[-1]}", flush=True)
    last = shape_of(kills, kills)
    with Job(broken, last.ranks, [*overrides, *last.overrides()]) as job:
        job.finish()
        found = re.search(r"continuing after step (\d+)", job.said)
    starts = [*(life.continued_after for life in lives), int(found.group(1)) if found else 0]
    same_mesh = min(start for number, start in enumerate(starts) if shape_of(number, kills) != SHAPES[0])
    return lives, compare(read_records(calm), read_records(broken), same_mesh) | {"kills": kills}


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
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0, help="of the ranks and moments")
    arguments = parser.parse_args()
    lives, summary = torture(arguments.output, arguments.data, arguments.kills, arguments.steps, arguments.seed)
    print_table("lives", [asdict(life) for life in lives])
    print_table("against the undisturbed run", [summary], arguments.json)


if __name__ == "__main__":
    run_tool(main)
