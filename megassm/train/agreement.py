"""What all ranks tell each other after an update, and what warns of or stops a run: disagreement, and no numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass, field, fields, replace

import numpy as np
import torch

from megassm.data.order import splitmix64
from megassm.data.transport import DataCounters, total_counters
from megassm.errors import UserError
from megassm.eval.score import Score
from megassm.parallel.phases import COMPUTE
from megassm.parallel.world import gather_rows
from megassm.run.journal import peak_memory_bytes
from megassm.train.setup import Run

COUNTERS = len(fields(DataCounters))
BUDGETS_END = -COUNTERS - len(COMPUTE)


@dataclass
class Tally:
    """What one rank counts during an update."""

    nll: torch.Tensor
    tokens: int = 0
    text_bytes: int = 0
    data_wait_s: float = 0.0
    sample_ids: list[int] = field(default_factory=list)
    dropped: bool = False


@dataclass
class Totals:
    """What all ranks counted in an update."""

    score: Score
    grad_norm: float
    data: DataCounters
    peak_memory_bytes: int
    stop: bool
    seconds_RP: list[list[float]]
    """By rank and phase, what each did itself (`megassm.parallel.phases.COMPUTE`)."""
    dropped: bool
    """The loss was a spike, and health.spike_action is not report."""

    @property
    def finite(self) -> bool:
        return math.isfinite(self.score.loss) and math.isfinite(self.grad_norm)


def agree(run: Run, step: int, budgets: list[int], tally: Tally, grad_norm: float) -> Totals:
    """One small message between all ranks: sums the loss, and holds budgets, samples and start-up against each other.

    Raises:
        UserError: ranks drew different K, read other samples than this step's, or run something else.
    """
    mine = [tally.nll.item(), tally.tokens, tally.text_bytes, grad_norm, tally.data_wait_s]
    mine += [peak_memory_bytes(run.world.device), run.stop.received]
    phases = run.world.progress.phases()
    mine += [run.start_digest, sample_digest(tally.sample_ids), *budgets]
    mine += [*(phases[name] for name in COMPUTE), *astuple(run.stream.meter.take())]
    rows = gather_rows(mine)
    check_agreement(run, step, rows)
    norm = max((row[3] for row in rows), key=lambda norm: (not math.isfinite(norm), norm))
    wait, memory, stop = (max(row[column] for row in rows) for column in (4, 5, 6))
    # tensor ranks, which are neighbours, count the same tokens
    score = Score.total(row[:3] for row in rows[:: run.world.mesh.tensor])
    data = replace(total_counters([row[-COUNTERS:] for row in rows]), data_wait_s=wait)
    seconds_RP = [row[BUDGETS_END:-COUNTERS] for row in rows]
    return Totals(score, norm, data, int(memory), bool(stop), seconds_RP, tally.dropped)


def check_agreement(run: Run, step: int, rows: list[list[float]]) -> None:
    """Every rank's start-up, samples and budgets (columns 7, 8, 9.. up to the phases) are what they must be.

    Raises:
        UserError: naming the ranks and their values.
    """

    def per_rank(values: Iterable[float]) -> str:
        return ", ".join(f"rank {rank}: {int(value)}" for rank, value in enumerate(values))

    for micro_step, drawn in enumerate(zip(*(row[9:BUDGETS_END] for row in rows), strict=True)):
        if min(drawn) != max(drawn):
            raise UserError(
                f"step {step + 1}, micro-step {micro_step}: the ranks drew different budgets K ({per_rank(drawn)}). "
                "K is a function of the configuration: start all ranks with the same --config, overrides and version"
            )
    if len({row[7] for row in rows}) > 1:
        raise UserError(
            f"step {step + 1}: the ranks were started differently; digests of configuration, data and version are "
            f"{per_rank(row[7] for row in rows)}. Start all ranks with the same --config, overrides and version"
        )
    mesh = run.world.mesh
    readers = mesh.sequence * mesh.tensor
    first, last = run.sample_range(step)
    expected = sample_digest(range(first, last + 1))
    within = all(row[8] == rows[rank // readers * readers][8] for rank, row in enumerate(rows))
    if not within or sum(row[8] for row in rows[::readers]) % DIGEST_RANGE != expected:
        raise UserError(
            f"step {step + 1}: the ranks did not read samples {first}..{last} once each; "
            f"digests of what they read are {per_rank(row[8] for row in rows)}. This is a fault of megassm"
        )


DIGEST_RANGE = 2**40
"""Digests are below it, so that sums of many are exact in float64."""


def sample_digest(sample_ids: Iterable[int]) -> int:
    """A sum of hashes: that of a union of disjoint sets is the sum of theirs."""
    return int((splitmix64(np.array(list(sample_ids), dtype=np.uint64)) % np.uint64(DIGEST_RANGE)).sum()) % DIGEST_RANGE


def report_skip(run: Run, step: int, totals: Totals, in_a_row: int) -> None:
    """Names what was in the batch of an update that was dropped; of a loss spike `megassm.train.health` has told.

    Raises:
        UserError: `train.max_skipped` in a row.
    """
    first, last = run.sample_range(step)
    what = (
        f"step {step + 1}: the loss is {totals.score.loss:g}, the gradient norm {totals.grad_norm:g}: samples "
        f"{first}..{last} changed no weight"
    )
    if not totals.dropped:
        run.events.add("non-finite", step + 1, f"{what} ({in_a_row} in a row)", samples=[first, last])
    if in_a_row >= run.config.train.max_skipped:
        raise UserError(
            f"{what}, the last of train.max_skipped = {in_a_row} in a row: training diverged. Lower optim.lr, or "
            "lengthen optim.warmup_steps, and start again: the same command continues from the last checkpoint"
        )
