"""Online budgets: K chosen token by token, by how uncertain the model is; quality against the average K.

A spectral layer's state serves any budget, so a decoder may change K at every token. A policy decides, before the model
reads a token, whether that costs `LOW` or `HIGH` channels:

    entropy     of the prediction that the token was to settle: high means that the model did not know
    surprise    -log p of the token under that prediction: high means that it was wrong
    random      by chance, as often: what the average K alone is worth
    one K       the same for all tokens

The share of tokens at `HIGH` is set by a quantile of the entropy or surprise on other text at `LOW`, so that a policy
is causal: it looks at nothing that a decoder would not know.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megassm.data.stream import MicroBatch
from megassm.eval.score import Score, text_bytes
from megassm.eval.session import open_session
from megassm.model import LanguageModel
from tools.experiments.measure import BITS, Point

LOW, HIGH = 2, 16
SHARES = (0.1, 0.25, 0.5, 0.75)
ROWS = 64
"""Sequences scored, and as many others that thresholds are taken from."""

Choice = Callable[[Tensor, Tensor], Tensor]
"""(entropy (B,), surprise (B,)) in nats -> whether each row's next token gets `HIGH` (B,)."""


class Reading(NamedTuple):
    """What a text read token by token gave."""

    nll_BL: Tensor
    """Nats of every predicted token."""
    entropy_BL: Tensor
    """Nats, of every prediction."""
    mean_k: float


@dataclass(frozen=True)
class Policy:
    """A way to choose."""

    name: str
    signal: Callable[[Reading], Tensor] | None
    """What it goes by; None is chance."""

    def choice(self, calibration: Reading, share: float, generator: torch.Generator) -> Choice:
        """The rule under which about `share` of the tokens get `HIGH`."""
        if self.signal is None:
            return lambda entropy_B, _: torch.rand(len(entropy_B), generator=generator) < share
        threshold = float(torch.quantile(self.signal(calibration).flatten(), 1 - share))
        if self.name == "entropy":
            return lambda entropy_B, _: entropy_B > threshold
        return lambda _, surprise_B: surprise_B > threshold


POLICIES = (
    Policy("entropy", lambda reading: reading.entropy_BL),
    Policy("surprise", lambda reading: reading.nll_BL),
    Policy("random", None),
)


def online_points(run_dir: Path) -> list[Point]:
    """Bits per byte over the average K of one run: one K for all tokens, and each policy at every share."""
    session = open_session(run_dir, None, "cpu")
    config, model = session.config, session.model.eval()
    k_max = config.model.num_channels
    low, high = min(LOW, k_max), min(HIGH, k_max)
    rows = session.validation(2 * min(ROWS, config.eval.sequences))
    half = len(rows) // 2
    text, other = _joined(rows[: max(1, half)]), _joined(rows[half:])
    calibration = read(model, torch.from_numpy(other.ids_BT), lambda entropy_B, _: entropy_B < 0, (low, high))
    size = text_bytes(text, session.token_bytes)

    def point(series: str, choose: Choice, budgets: tuple[int, int]) -> Point:
        reading = read(model, torch.from_numpy(text.ids_BT), choose, budgets)
        nll = float((reading.nll_BL.double() * torch.from_numpy(text.mask_BL)).sum())
        return Point(BITS, series, reading.mean_k, Score(nll, float(text.mask_BL.sum()), size).bits_per_byte)

    fixed = sorted({k for k in config.eval_budgets() if low <= k <= high} | {low, high})
    points = [point("one K", lambda entropy_B, _: entropy_B < 0, (k, k)) for k in fixed]
    for policy in POLICIES:
        generator = torch.Generator().manual_seed(config.run.seed)
        points += [point(policy.name, policy.choice(calibration, share, generator), (low, high)) for share in SHARES]
    return points


@torch.no_grad()
def read(model: LanguageModel, ids_BT: Tensor, choose: Choice, budgets: tuple[int, int]) -> Reading:
    """Reads (B, T) ids token by token as a decoder would, each row's token at the budget that `choose` says."""
    low, high = budgets
    logits_BV, state = model.prefill(ids_BT[:, :1], high)
    spent = high * len(ids_BT)
    nlls, entropies = [], []
    for position in range(1, ids_BT.shape[1]):
        log_p_BV = logits_BV.float().log_softmax(-1)
        entropies.append(-(log_p_BV.exp() * log_p_BV).sum(-1))
        nlls.append(-log_p_BV.gather(1, ids_BT[:, position : position + 1])[:, 0])
        if position == ids_BT.shape[1] - 1:
            break  # nothing is predicted from the last token
        high_B = choose(entropies[-1], nlls[-1])
        token_B = ids_BT[:, position]
        cheap, dear = model.step(token_B, state, low), model.step(token_B, state, high)
        logits_BV = torch.where(high_B[:, None], dear[0], cheap[0])
        state = cheap[1].where(~high_B, dear[1])
        spent += int(high_B.sum()) * high + int((~high_B).sum()) * low
    read_tokens = len(ids_BT) * (ids_BT.shape[1] - 1)
    return Reading(torch.stack(nlls, 1), torch.stack(entropies, 1), spent / read_tokens)


def _joined(batches: list[MicroBatch]) -> MicroBatch:
    parts = zip(*((batch.ids_BT, batch.mask_BL, batch.sample_ids_B) for batch in batches), strict=True)
    return MicroBatch(*(np.concatenate(part) for part in parts))
