"""Quality and cost of one checkpoint over budgets: the curves that say how far a model may be truncated."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from megassm.cli.mixtures import Limit
from megassm.cli.progress import SILENT, Progress
from megassm.cost import forward_flops_per_token, parameters
from megassm.data.stream import MicroBatch, StreamPlan
from megassm.errors import UserError
from megassm.eval.curve import Floats, interval, resample, shape
from megassm.eval.mix import Mixture, cost_function, search, shared_timings
from megassm.eval.score import Score, best_unigram, sequence_scores, token_counts
from megassm.eval.speed import MeasuredCost, has_steps, measured_cost
from megassm.eval.swept import BudgetCurve, BudgetRow
from megassm.eval.text import EvalText
from megassm.model import LanguageModel, losses_at, truncate
from megassm.parallel.world import Peers, barrier, gather_rows, together


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
    mixtures: Sequence[Mixture | Limit] = ()
    """One K a layer to measure besides, or a limit to search one under (`megassm.eval.mix`), with the budgets as the K
    that a layer may have."""


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
    scores: list[dict[Key, Floats]] = [{} for _ in keys]
    costs: list[dict[Key, MeasuredCost]] = [{} for _ in keys]
    mixtures = _mixtures(model, (*keys[0], plan), batches[0], peers, progress)
    every: list[Key] = [*budgets, *mixtures]
    counted = _counter(progress, len(every) * sum(len(of_text) for of_text in batches))
    for k in every:
        small = truncate(model, k).to(peers.device).eval()
        for place in range(len(keys)):
            mine = _scores(small, counted(batches[place]), token_bytes, peers, plan)
            scores[place][k] = _gathered(mine)
            costs[place][k] = costs[place - 1][k] if place % len(texts) else _cost(small, batches[place][0], peers)
    curves = []
    for place, (text, length) in enumerate(keys):
        rows = _rows(model, (length, plan), scores[place], costs[place])
        unigram = _unigram(batches[place], token_bytes)
        curves.append(_curve((text.name, length, unigram), scores[place], rows, mixtures))
    return curves


def _mixtures(
    model: LanguageModel,
    key: tuple[EvalText, int, SweepPlan],
    scored: Sequence[MicroBatch],
    peers: Peers,
    progress: Progress,
) -> dict[Mixture, str | None]:
    """One K a layer, as given or as found for the limits, and what limit it was found under. Searched on the sequences
    that follow those to be scored, or on these where the text has no more."""
    text, length, plan = key
    config = model.config
    given: dict[Mixture, str | None] = {}
    searched: Sequence[MicroBatch] = scored
    if any(isinstance(mixture, Limit) for mixture in plan.mixtures):
        model.to(peers.device).eval()
        more = replace(plan, sequences=2 * plan.sequences)
        read = together(lambda: list(read_text(text, length, model, more, peers)))
        searched = read[len(scored) :] or scored

    def loss(layers: Mixture) -> float:
        def losses(ids_BT: Tensor, k: int) -> Tensor:
            return losses_at(model, ids_BT, layers, plan.document_end)

        uncounted = np.zeros(config.vocab_size, dtype=np.int64)  # bytes
        mine_N5 = sequence_scores(losses, searched, config.num_channels, uncounted, peers.device)
        nll, tokens = _gathered(mine_N5)[:, :2].sum(0).tolist()
        return float(nll / max(1.0, tokens))

    for mixture in plan.mixtures:
        if isinstance(mixture, Limit):
            with progress.busy(f"search for one K a layer under {mixture}"):
                table = shared_timings(model, plan.budgets, peers) if mixture.what == "ms" else {}
                found = search(config, mixture.most, plan.budgets, cost_function(config, mixture, table), loss)
            earlier = given.get(found.layers)
            given[found.layers] = str(mixture) if earlier is None else f"{earlier}, {mixture}"
        else:
            given[config.layer_budgets(mixture)] = None
    return given


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


def _cost(small: LanguageModel, batch: MicroBatch, peers: Peers) -> MeasuredCost:
    """Measured by rank 0 while the others wait."""
    cost = measured_cost(small, small.config.num_channels, batch, peers.device) if peers.is_main else MeasuredCost()
    barrier()
    return cost


def _unigram(batches: Sequence[MicroBatch], token_bytes: npt.NDArray[np.int64]) -> float:
    mine = token_counts(batches, len(token_bytes))
    counts = np.array(gather_rows(mine.tolist())).sum(0).astype(np.int64)
    return best_unigram(counts, token_bytes).bits_per_byte


Key = int | Mixture
_FIGURES = ("bits_per_byte", "perplexity", "gap_percent", "accuracy")
_INTERVALS = [f"{name}_{end}" for name in _FIGURES for end in ("low", "high")]


def _rows(
    model: LanguageModel,
    what: tuple[int, SweepPlan],
    scores: Mapping[Key, Floats],
    costs: Mapping[Key, MeasuredCost],
) -> dict[Key, BudgetRow]:
    """By budget, one number or one K a layer."""
    length, plan = what
    config, k_max = model.config, model.config.num_channels
    totals = {k: Score(*found_N4.sum(0).tolist()) for k, found_N4 in scores.items()}
    resampled = {k: resample(found_N4) for k, found_N4 in scores.items()} if len(scores[k_max]) > 1 else None
    rows = {}
    for k, total in totals.items():
        intervals: dict[str, Any] = dict.fromkeys(_INTERVALS)
        if resampled:
            bits_R, full_R = _bits_per_byte(resampled[k]), _bits_per_byte(resampled[k_max])
            perplexity_R = np.exp(np.minimum(resampled[k][:, 0] / resampled[k][:, 1], 700.0))
            values = [bits_R, perplexity_R, 100 * (bits_R / full_R - 1)]
            values += [resampled[k][:, 3] / resampled[k][:, 1]] if plan.is_task else []
            intervals |= dict(zip(_INTERVALS, (end for value_R in values for end in interval(value_R)), strict=False))
        rows[k] = BudgetRow(
            k=k if isinstance(k, int) else max(k),
            layers=None if isinstance(k, int) else k,
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
    return rows


def _curve(
    what: tuple[str, int, float],
    scores: Mapping[Key, Floats],
    rows: Mapping[Key, BudgetRow],
    mixtures: Mapping[Mixture, str | None],
) -> BudgetCurve:
    data, length, unigram = what
    single = {k: scores_N4 for k, scores_N4 in scores.items() if isinstance(k, int)}
    full_N4 = single[max(single)]
    bits = {k: _bits_per_byte(resample(scores_N4)) for k, scores_N4 in single.items()} if len(full_N4) > 1 else None
    found = shape({k: rows[k].bits_per_byte for k in single}, bits)
    mixed = [replace(rows[layers], limit=limit) for layers, limit in mixtures.items()]
    tokens = int(full_N4[:, 1].sum())
    return BudgetCurve(data, length, len(full_N4), tokens, unigram, found, [rows[k] for k in single], mixed=mixed)


def _bits_per_byte(sums_R4: Floats) -> Floats:
    bits_R: Floats = sums_R4[:, 0] / np.log(2) / np.maximum(1.0, sums_R4[:, 2])
    return bits_R
