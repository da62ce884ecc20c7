"""How well smaller budgets stand in for the full one, over a text: whether they would draw the same tokens.

A text is read once; each of its batches is scored at every budget, by the whole model.

    agreement   share of the predictions whose most likely token is that of the full budget: greedy drafts accepted
    overlap     mean of sum_v min(p(v), q(v)), p of the full budget and q of the smaller: sampled drafts accepted

Shapes: B batch, L length, P ranges of positions, K budgets.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from megassm.eval.curve import Floats
from megassm.eval.sweep import SweepPlan, read_text
from megassm.eval.swept import BudgetCurve, PositionRow
from megassm.eval.text import EvalText
from megassm.model import LanguageModel
from megassm.ops.documents import document_numbers
from megassm.parallel.world import Peers, sum_rows

FIRST_RANGE = 16
"""Positions of the first range; each further one reaches to twice the end of the one before."""


def with_overlap(
    curves: Sequence[BudgetCurve], model: LanguageModel, texts: Sequence[EvalText], plan: SweepPlan, peers: Peers
) -> list[BudgetCurve]:
    """The curves that `sweep` gave for the same texts and plan, with agreement, overlap and their ranges of positions.

    Every rank must call it and gets the same.
    """
    model = model.to(peers.device).eval()
    keys = [(text, length) for length in plan.seq_lens for text in texts]
    return [_with_overlap(curve, model, key, plan, peers) for curve, key in zip(curves, keys, strict=True)]


def _with_overlap(
    curve: BudgetCurve, model: LanguageModel, key: tuple[EvalText, int], plan: SweepPlan, peers: Peers
) -> BudgetCurve:
    text, length = key
    budgets = [row.k for row in curve.rows]
    sums_KP4 = np.zeros((len(budgets), len(list(_ranges(length))), 4))
    for batch in read_text(text, length, model, plan, peers):
        ids_BT = torch.from_numpy(batch.ids_BT).to(peers.device)
        counted_BL = torch.from_numpy(batch.mask_BL).to(peers.device)
        sums_KP4 += _sums(model, ids_BT, counted_BL, budgets, plan.document_end)
    sums_KP4 = np.array(sum_rows(sums_KP4.ravel().tolist())).reshape(sums_KP4.shape)
    tokens, _, agreed, shared = sums_KP4.sum(1).T
    rows = [replace(row, agreement=float(agreed[place] / tokens[place]), overlap=float(shared[place] / tokens[place]))
            for place, row in enumerate(curve.rows)]  # fmt: skip
    positions = [
        PositionRow(k, first, end, int(found[0]), float(found[1] / math.log(2) / found[0]),
                    float(found[2] / found[0]), float(found[3] / found[0]))
        for k, of_budget in zip(budgets, sums_KP4, strict=True)
        for (first, end), found in zip(_ranges(length), of_budget, strict=True)
        if found[0]
    ]  # fmt: skip
    return replace(curve, rows=rows, positions=positions)


@torch.no_grad()
def _sums(
    model: LanguageModel, ids_BT: Tensor, counted_BL: Tensor, budgets: Sequence[int], document_end: int | None
) -> Floats:
    """(K, P, 4): tokens, nats, agreements and overlap of a batch's predictions."""
    ids_BL, targets_BL = ids_BT[:, :-1], ids_BT[:, 1:]
    documents_BL = document_numbers(ids_BL, document_end)
    full_BLV = model(ids_BL, model.config.num_channels, documents_BL).float().softmax(-1)
    best_BL = full_BLV.argmax(-1)
    found = []
    for k in budgets:
        logits_BLV = model(ids_BL, k, documents_BL)
        nats_BL = model.losses(ids_BL, logits_BLV, targets_BL)
        shared_BL = torch.minimum(logits_BLV.float().softmax(-1), full_BLV).sum(-1)
        values = (torch.ones_like(nats_BL), nats_BL, logits_BLV.argmax(-1) == best_BL, shared_BL)
        by_position_4L = torch.stack([(value.double() * counted_BL).sum(0) for value in values])
        found.append(torch.stack([by_position_4L[:, first:end].sum(1) for first, end in _ranges(ids_BL.shape[1])]))
    return np.asarray(torch.stack(found).cpu().numpy())


def _ranges(length: int) -> Iterator[tuple[int, int]]:
    """(first, end) of ranges of positions, each as long as all before it."""
    first, end = 0, FIRST_RANGE
    while first < length:
        yield first, min(end, length)
        first, end = end, 2 * end
