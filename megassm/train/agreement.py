"""What all ranks tell each other after an update, and what warns of or stops a run: disagreement, and no numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, field, fields, replace
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from megassm.data.order import splitmix64
from megassm.data.transport import DataCounters, total_counters
from megassm.errors import UserError
from megassm.eval.score import Score
from megassm.parallel.phases import COMPUTE
from megassm.parallel.world import from_first, gather_at_first
from megassm.run.journal import peak_memory_bytes
from megassm.train.setup import Run


@dataclass(frozen=True)
class Message:
    """What one rank tells the first after an update. Packed as float64, which holds whole numbers up to 2^53."""

    nll: float
    tokens: float
    text_bytes: float
    grad_norm: float
    data_wait_s: float
    peak_memory_bytes: float
    stop: float
    save_ready: float
    start_digest: float
    sample_digest: float
    seconds: tuple[float, ...]
    """By phase of `COMPUTE`."""
    counters: DataCounters
    budgets: tuple[float, ...]
    """K of every micro-step."""

    def packed(self) -> list[float]:
        *single, seconds, counters, budgets = (getattr(self, part.name) for part in fields(self))
        return [*single, *seconds, *astuple(counters), *budgets]

    @classmethod
    def unpacked(cls, numbers: Iterable[float]) -> Message:
        rest = iter(numbers)
        single, seconds, counters = (
            tuple(islice(rest, count)) for count in (len(fields(cls)) - 3, len(COMPUTE), len(fields(DataCounters)))
        )
        return cls(*single, seconds, DataCounters(*counters), tuple(rest))  # type: ignore[arg-type, call-arg]


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
    save_ready: bool
    """All ranks have done their part of the save that is under way."""
    slowest_s: float
    """What the slowest rank has computed in the update."""
    seconds_RP: list[list[float]]
    """By rank and phase, what each did itself (`megassm.parallel.phases.COMPUTE`); the first rank alone knows."""
    dropped: bool
    """The loss was a spike, and health.spike_action is not report."""

    @property
    def finite(self) -> bool:
        return math.isfinite(self.score.loss) and math.isfinite(self.grad_norm)


class Answer(NamedTuple):
    """What the first rank tells all of their messages."""

    nll: float = 0.0
    tokens: float = 0.0
    text_bytes: float = 0.0
    grad_norm: float = 0.0
    peak_memory_bytes: float = 0.0
    stop: float = 0.0
    save_ready: float = 0.0
    slowest_s: float = 0.0
    refusal: float = 0.0
    """Bytes of the message that follows, where the ranks do not agree."""


def agree(run: Run, step: int, budgets: list[int], tally: Tally, grad_norm: float) -> Totals:
    """Sums the loss over all ranks, and holds budgets, samples and start-up against each other: every rank's numbers
    go to the first by a tree, and what they come to goes back by one.

    Raises:
        UserError: ranks drew different K, read other samples than this step's, or run something else.
    """
    phases = run.world.progress.phases()
    mine = Message(
        nll=tally.nll.item(),
        tokens=tally.tokens,
        text_bytes=tally.text_bytes,
        grad_norm=grad_norm,
        data_wait_s=tally.data_wait_s,
        peak_memory_bytes=peak_memory_bytes(run.world.device),
        stop=run.stop.received,
        save_ready=run.saver.ready,
        start_digest=run.start_digest,
        sample_digest=sample_digest(tally.sample_ids),
        seconds=tuple(phases[phase] for phase in COMPUTE),
        counters=run.stream.meter.take(),
        budgets=tuple(budgets),
    )
    rows = gather_at_first(mine.packed())
    ranks = [] if rows is None else [Message.unpacked(row) for row in rows]
    refusal = _refusal(run, step, ranks) if ranks else ""
    answer, counters = _answer(ranks, run.world.mesh.tensor) if ranks and not refusal else (Answer(), DataCounters())
    sent = [*answer._replace(refusal=len(refusal.encode())), *astuple(counters)]
    received = from_first(sent if run.world.is_main else None, len(sent))
    answer, counts = Answer(*received[: len(answer)]), received[len(answer) :]
    if answer.refusal:
        text = from_first([*refusal.encode()] if run.world.is_main else None, int(answer.refusal))
        raise UserError(bytes(map(int, text)).decode())
    return Totals(
        score=Score(answer.nll, answer.tokens, answer.text_bytes),
        grad_norm=answer.grad_norm,
        data=DataCounters(counts[0], *map(int, counts[1:])),
        peak_memory_bytes=int(answer.peak_memory_bytes),
        stop=bool(answer.stop),
        save_ready=bool(answer.save_ready),
        slowest_s=answer.slowest_s,
        seconds_RP=[list(rank.seconds) for rank in ranks],
        dropped=tally.dropped,
    )


def _answer(ranks: Sequence[Message], tensor: int) -> tuple[Answer, DataCounters]:
    readers = ranks[::tensor]  # tensor ranks, which are neighbours, count the same tokens
    score = Score.total((rank.nll, rank.tokens, rank.text_bytes) for rank in readers)
    answer = Answer(
        *score[:3],
        grad_norm=max((rank.grad_norm for rank in ranks), key=lambda norm: (not math.isfinite(norm), norm)),
        peak_memory_bytes=max(rank.peak_memory_bytes for rank in ranks),
        stop=any(rank.stop for rank in ranks),
        save_ready=all(rank.save_ready for rank in ranks),
        slowest_s=max(sum(rank.seconds) for rank in ranks),
    )
    data = total_counters([astuple(rank.counters) for rank in ranks])
    return answer, replace(data, data_wait_s=max(rank.data_wait_s for rank in ranks))


def _refusal(run: Run, step: int, ranks: Sequence[Message]) -> str:
    try:
        check_agreement(run, step, ranks)
    except UserError as error:
        return str(error)
    return ""


def check_agreement(run: Run, step: int, ranks: Sequence[Message]) -> None:
    """Every rank's start-up, samples and budgets are what they must be.

    Raises:
        UserError: naming the ranks and their values.
    """

    def per_rank(values: Iterable[float]) -> str:
        return ", ".join(f"rank {rank}: {int(value)}" for rank, value in enumerate(values))

    for micro_step, drawn in enumerate(zip(*(rank.budgets for rank in ranks), strict=True)):
        if min(drawn) != max(drawn):
            raise UserError(
                f"step {step + 1}, micro-step {micro_step}: the ranks drew different budgets K ({per_rank(drawn)}). "
                "K is a function of the configuration: start all ranks with the same --config, overrides and version"
            )
    if len({rank.start_digest for rank in ranks}) > 1:
        raise UserError(
            f"step {step + 1}: the ranks were started differently; digests of configuration, data and version are "
            f"{per_rank(rank.start_digest for rank in ranks)}. Start all ranks with the same --config, overrides and "
            "version"
        )
    mesh = run.world.mesh
    readers = mesh.sequence * mesh.tensor
    first, last = run.sample_range(step)
    expected = sample_digest(range(first, last + 1))
    found = [rank.sample_digest for rank in ranks]
    within = all(digest == found[rank // readers * readers] for rank, digest in enumerate(found))
    if not within or sum(found[::readers]) % DIGEST_RANGE != expected:
        raise UserError(
            f"step {step + 1}: the ranks did not read samples {first}..{last} once each; "
            f"digests of what they read are {per_rank(found)}. This is a fault of megassm"
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
