"""Loss spikes: an update whose loss is far above what the updates before it and its own K predict. Pure.

The loss depends on the K that was drawn, so that a small K must not pass for a spike. The last `WINDOW` losses are
explained by least squares,

    loss_t = a + b log t + c mean_m(log2 K_tm) + d mean_m(1 / K_tm) + noise,        m: the micro-steps of update t

and the robust z-score of a new loss is its distance above the prediction over 1.4826 times the median absolute
residual, wider where the prediction reaches beyond what was seen, and at least `FLOOR` of the prediction.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

WINDOW = 64
MIN_RECORDS = 16
"""Fewer say nothing."""
FLOOR = 0.005
"""A standard deviation below this share of the loss is taken for it: a flat curve makes no spike of a ripple."""
LEVEL = 5
"""This many spikes in a row are a new level: the estimate starts again."""

Floats = npt.NDArray[np.float64]


class Spikes:
    """What is known of the last losses."""

    def __init__(self, z: float, updates: int = 0) -> None:
        """`z` deviations make a spike; `updates` were made before the first that `add` will tell of."""
        self._z = z
        self._records: deque[tuple[list[float], float]] = deque(maxlen=WINDOW)
        self._updates, self._in_a_row = updates, 0

    def expected(self, budgets: Sequence[int]) -> tuple[float, float]:
        """(loss, its standard deviation) of the next update at these K; (inf, inf) where too little is known."""
        if len(self._records) < MIN_RECORDS:
            return float("inf"), float("inf")
        x_TC = np.array([columns for columns, _ in self._records])
        loss_T = np.array([loss for _, loss in self._records])
        x_C = np.array(self._columns(budgets))
        mean_C, scale_C = x_TC.mean(axis=0), x_TC.std(axis=0)
        mean_C[0], scale_C[0] = 0.0, 1.0
        usable_C = scale_C > 1e-9 * np.abs(mean_C) + 1e-12
        x_TC = (x_TC - mean_C)[:, usable_C] / scale_C[usable_C]
        x_C = (x_C - mean_C)[usable_C] / scale_C[usable_C]
        inverse_CC = np.linalg.pinv(x_TC.T @ x_TC)
        solution_C = inverse_CC @ (x_TC.T @ loss_T)
        prediction = float(x_C @ solution_C)
        deviation = 1.4826 * float(np.median(np.abs(loss_T - x_TC @ solution_C)))
        reach = float(np.sqrt(1 + x_C @ inverse_CC @ x_C))
        return prediction, max(deviation * reach, FLOOR * abs(prediction))

    def limit(self, budgets: Sequence[int]) -> float:
        """The loss above which the next update is a spike."""
        prediction, deviation = self.expected(budgets)
        return prediction + self._z * deviation

    def add(self, budgets: Sequence[int], loss: float | None, spike: bool) -> None:
        """An update, in order; None where the loss was not finite."""
        self._updates += 1
        if loss is None:
            return
        self._in_a_row = self._in_a_row + 1 if spike else 0
        if self._in_a_row >= LEVEL:
            self._records.clear()
            self._in_a_row = 0
        if not spike:
            self._records.append((self._columns(budgets, self._updates - 1), loss))

    def _columns(self, budgets: Sequence[int], update: int | None = None) -> list[float]:
        k = np.array(budgets, dtype=np.float64)
        at = self._updates if update is None else update
        return [1.0, float(np.log(at + 1)), float(np.log2(k).mean()), float((1 / k).mean())]
