"""Quality and cost of one checkpoint over budgets: the curves that say how far a model may be truncated."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from megassm.cli.progress import SILENT, Progress
from megassm.cost import forward_flops_per_token, parameters
from megassm.data.stream import MicroBatch, StreamPlan
from megassm.errors import UserError
from megassm.eval.curve import Floats, Shape, interval, resample, shape
from megassm.eval.score import Score, best_unigram, sequence_scores, token_counts
from megassm.eval.speed import MeasuredCost, has_steps, measured_cost
from megassm.eval.text import EvalText
from megassm.model import LanguageModel, losses_at, truncate
from megassm.parallel.world import Peers, barrier, gather_rows, together


@dataclass(frozen=True)
class BudgetRow:
    """One budget's line in the table; `low` and `high` enclose the bootstrap's 95%, None for a single sequence."""

    k: int
    parameters: int
    bits_per_byte: float
    bits_per_byte_low: float | None
    bits_per_byte_high: float | None
    bits_per_token: float
    perplexity: float
    """Per token."""
    perplexity_low: float | None
    perplexity_high: float | None
    gap_percent: float
    """Bits per byte above those at full K, in percent of them."""
    gap_percent_low: float | None
    gap_percent_high: float | None
    """Of the same resamples at both: what all budgets find hard does not widen it."""
    forward_flops_per_token: float
    prefill_tokens_per_s: float
    """Of one rank alone, a micro-batch at a time."""
    decode_tokens_per_s: float | None
    """... one token of each of its sequences at a time, after them; None where the filters have no steps."""
    peak_memory_mib: float
    """Weights, and all that the prefill keeps besides."""
    accuracy: float | None = None
    """Of a task: share of the answers that are the most likely of all tokens or classes; None for text."""
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    prefill_tokens_per_s_low: float | None = None
    """The slowest of the runs that a speed is the median of, and the fastest; None where it was not measured."""
    prefill_tokens_per_s_high: float | None = None
    decode_tokens_per_s_low: float | None = None
    decode_tokens_per_s_high: float | None = None
    agreement: float | None = None
    """Share of the predictions whose most likely token is that at full K; None where it was not asked for."""
    overlap: float | None = None
    """What the predictions share of their probability with those at full K, on average."""


@dataclass(frozen=True)
class PositionRow:
    """One budget over the predictions at some positions of all sequences."""

    k: int
    first: int
    end: int
    """One more than the last position."""
    tokens: int
    bits_per_token: float
    agreement: float
    overlap: float


@dataclass(frozen=True)
class BudgetCurve:
    """One text at one sequence length."""

    data: str
    seq_len: int
    """Tokens."""
    sequences: int
    predicted_tokens: int
    best_unigram_bits_per_byte: float
    """Of a model that knows only this text's token frequencies."""
    shape: Shape
    rows: list[BudgetRow]
    positions: list[PositionRow] = field(default_factory=list)
    """Where agreement was asked for."""

    @property
    def is_task(self) -> bool:
        """What was scored are answers: bits per byte are then bits per answer."""
        return self.rows[0].accuracy is not None

    @property
    def bits(self) -> str:
        """The unit of its bits, in words."""
        return "bits per answer" if self.is_task else "bits per byte"


@dataclass(frozen=True)
class Sweep:
    """What one checkpoint gives."""

    run: str
    step: int
    trained_seq_len: int
    curves: list[BudgetCurve]

    @property
    def name(self) -> str:
        return f"{self.run}, step {self.step}"


@dataclass(frozen=True)
class SweepPlan:
    """What to measure."""

    budgets: Sequence[int]
    """K; K_max is added, for the gap."""
    seq_lens: Sequence[int]
    """Tokens."""
    sequences: int
    """Of the training length; at another length as many as hold the same text."""
    micro_batch_sequences: int
    """Of the training length; at another length as many as hold as many tokens."""
    document_end: int | None = None
    """The id that ends a document, for a model that keeps documents apart."""
    is_task: bool = False
    """What is scored are answers, whose accuracy is wanted."""


def sweep(
    model: LanguageModel,
    texts: Sequence[EvalText],
    plan: SweepPlan,
    token_bytes: npt.NDArray[np.int64],
    peers: Peers,
    progress: Progress = SILENT,
) -> list[BudgetCurve]:
    """Cuts `model` to each budget and to K_max in turn, and measures the smaller model.

    Every rank must call it and gets the same curves; the text is divided among them, and rank 0 alone is timed.

    Args:
        model: at full capacity, on any device.
        texts: what to score.
        plan: budgets and lengths.
        token_bytes: (V,) UTF-8 bytes of each token.
        peers: the ranks, and where to compute.
        progress: advanced by this rank's batches, at every budget.

    Raises:
        UserError: a budget beyond K_max, a length the filters cannot be continued to, or no text.
    """
    _check(model, plan)
    budgets = sorted({*plan.budgets, model.config.num_channels})
    beyond = model.beyond_trained(max(plan.seq_lens), budgets[-1])
    if beyond and peers.is_main:
        warnings.warn(beyond, stacklevel=2)
    keys = [(text, length) for length in plan.seq_lens for text in texts]
    batches = together(lambda: [list(read_text(text, length, model, plan, peers)) for text, length in keys])
    scores: list[dict[int, Floats]] = [{} for _ in keys]
    costs: list[dict[int, MeasuredCost]] = [{} for _ in keys]
    counted = _counter(progress, len(budgets) * sum(len(of_text) for of_text in batches))
    for k in budgets:
        small = truncate(model, k).to(peers.device).eval()
        for place in range(len(keys)):
            mine = _scores(small, counted(batches[place]), token_bytes, peers, plan)
            scores[place][k] = _gathered(mine)
            first = place % len(texts) == 0
            costs[place][k] = _cost(small, k, batches[place][0], peers) if first else costs[place - 1][k]
    return [
        _curve(model, (text.name, length, plan), scores[place], costs[place], _unigram(batches[place], token_bytes))
        for place, (text, length) in enumerate(keys)
    ]


def _counter(progress: Progress, total: int) -> Callable[[Sequence[MicroBatch]], Iterator[MicroBatch]]:
    """Counts the batches that go through, of `total` in all."""
    progress.start("sweep", total, "batches")
    done = 0

    def counted(batches: Sequence[MicroBatch]) -> Iterator[MicroBatch]:
        nonlocal done
        for batch in batches:
            yield batch
            done += 1
            progress.update(done)

    return counted


def _check(model: LanguageModel, plan: SweepPlan) -> None:
    k_max, trained = model.config.num_channels, model.config.seq_len
    beyond = [k for k in plan.budgets if not 1 <= k <= k_max]
    if beyond:
        raise UserError(f"budgets {beyond}: must be between 1 and this model's K_max = {k_max}")
    if max(plan.seq_lens) > trained and not has_steps(model):
        raise UserError(
            f"sequence length {max(plan.seq_lens)}: this model's {k_max} filters of length {trained} cannot be "
            f"continued; measure up to {trained}"
        )


def read_text(text: EvalText, length: int, model: LanguageModel, plan: SweepPlan, peers: Peers) -> Iterator[MicroBatch]:
    """This rank's share of a text in sequences of `length`."""
    trained = model.config.seq_len
    rows = max(1, plan.micro_batch_sequences * trained // length)
    stream = StreamPlan(length, rows * peers.size, rows, seed=0, rank=peers.rank, world_size=peers.size)
    empty = True
    for batch in text.read(stream, -(-plan.sequences * trained // length)):
        empty = False
        yield batch
    if empty:
        raise UserError(f"{text.name}: no text to score; give more, or prepare the data with a --valid-fraction")


def _scores(
    small: LanguageModel,
    batches: Iterable[MicroBatch],
    token_bytes: npt.NDArray[np.int64],
    peers: Peers,
    plan: SweepPlan,
) -> Floats:
    """This rank's (N, 5) as `sequence_scores`, of a model at its own full budget."""

    def losses(ids_BT: Tensor, k: int) -> Tensor:
        return losses_at(small, ids_BT, k, plan.document_end, hits=plan.is_task)

    return sequence_scores(losses, batches, small.config.num_channels, token_bytes, peers.device)


def _gathered(mine_N5: Floats) -> Floats:
    """(N, 4) nll, tokens, bytes and hits of every sequence, from all ranks, in the order of the text."""
    rows = np.array(gather_rows(mine_N5.ravel().tolist())).reshape(-1, 5)
    rows = rows[rows[:, 0] >= 0]
    return np.asarray(rows[np.argsort(rows[:, 0], kind="stable"), 1:])


def _cost(small: LanguageModel, k: int, batch: MicroBatch, peers: Peers) -> MeasuredCost:
    """Measured by rank 0 while the others wait."""
    cost = measured_cost(small, k, batch, peers.device) if peers.is_main else MeasuredCost()
    barrier()
    return cost


def _unigram(batches: Sequence[MicroBatch], token_bytes: npt.NDArray[np.int64]) -> float:
    mine = token_counts(batches, len(token_bytes))
    counts = np.array(gather_rows(mine.tolist())).sum(0).astype(np.int64)
    return best_unigram(counts, token_bytes).bits_per_byte


_FIGURES = ("bits_per_byte", "perplexity", "gap_percent", "accuracy")
_INTERVALS = [f"{name}_{end}" for name in _FIGURES for end in ("low", "high")]


def _curve(
    model: LanguageModel,
    key: tuple[str, int, SweepPlan],
    scores: dict[int, Floats],
    costs: dict[int, MeasuredCost],
    unigram: float,
) -> BudgetCurve:
    data, length, plan = key
    config, k_max = model.config, model.config.num_channels
    totals = {k: Score(*found_N4.sum(0).tolist()) for k, found_N4 in scores.items()}
    sequences = len(scores[k_max])
    resampled = {k: resample(found_N4) for k, found_N4 in scores.items()} if sequences > 1 else None
    bits = {k: _bits_per_byte(sums_R4) for k, sums_R4 in resampled.items()} if resampled else None
    rows = []
    for k, total in totals.items():
        intervals: dict[str, Any] = dict.fromkeys(_INTERVALS)
        if resampled and bits:
            perplexity_R = np.exp(np.minimum(resampled[k][:, 0] / resampled[k][:, 1], 700.0))
            values = [bits[k], perplexity_R, 100 * (bits[k] / bits[k_max] - 1)]
            values += [resampled[k][:, 3] / resampled[k][:, 1]] if plan.is_task else []
            intervals |= dict(zip(_INTERVALS, (end for value_R in values for end in interval(value_R)), strict=False))
        rows.append(
            BudgetRow(
                k=k,
                parameters=parameters(config, k),
                bits_per_byte=total.bits_per_byte,
                bits_per_token=total.loss / np.log(2).item(),
                perplexity=total.perplexity,
                gap_percent=100 * (total.bits_per_byte / totals[k_max].bits_per_byte - 1),
                accuracy=total.accuracy if plan.is_task else None,
                forward_flops_per_token=forward_flops_per_token(config, k, length),
                **intervals,
                **vars(costs[k]),
            )
        )
    found = shape({k: total.bits_per_byte for k, total in totals.items()}, bits)
    return BudgetCurve(data, length, sequences, int(totals[k_max].tokens), unigram, found, rows)


def _bits_per_byte(sums_R4: Floats) -> Floats:
    bits_R: Floats = sums_R4[:, 0] / np.log(2) / np.maximum(1.0, sums_R4[:, 2])
    return bits_R
