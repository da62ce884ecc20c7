"""Other filters than the spectral ones, for the experiments `filters`: from which K on does it matter which they are?

    true           those of `megassm.ops.bases`
    float32        what a float32 subspace iteration returns for them, and its eigenvalues clamped at 1e-12: the paper's
                   code (docs/results/filters.md); beyond about the 10th they are an orthonormal basis of nothing
    random         orthonormal, white
    random_tail    the first 8 right, the others random, all orthonormal: what float32 leaves of them at 4,096 positions
    exponentials   r^t of norm 1, time constants from 1 to L: a leading few spread over them all, as evenly as they can
    learned        free, from the true ones on
    alternating, hankel_l      `model.basis` of these names (`megassm.ops.bases`), for decays of both signs

The weights sigma^(1/4), where a model has them, are the true ones but for `float32`. All but `learned` go through one
Toeplitz product, and have no steps and nothing beyond the trained length.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import nn

from megassm.errors import UserError
from megassm.model import LanguageModel
from megassm.ops.bases import spectral_filters
from megassm.ops.hankel import Array
from tools.bench.filters import FLOOR, solvers

Basis = Literal["true", "float32", "random", "random_tail", "exponentials", "learned", "alternating", "hankel_l"]
SEED = 0
"""One random basis for all trainings, as there is one of each other kind."""
RIGHT = 8
"""True filters before a random tail."""


def basis(name: Basis, seq_len: int, count: int) -> tuple[Array, Array]:
    """(sigma (K,), phi (L, K)), every filter of norm 1."""
    sigma_K, phi_LK = spectral_filters(seq_len, count)
    match name:
        case "float32":
            _, sigma_K, phi_LK = next(solvers(seq_len, count))
            return np.maximum(sigma_K, FLOOR), phi_LK
        case "random":
            return sigma_K, _white(seq_len, count)
        case "random_tail":
            basis_LK = np.linalg.qr(np.hstack((phi_LK[:, :RIGHT], _white(seq_len, max(0, count - RIGHT)))))[0]
            basis_LK[:, :RIGHT] = phi_LK[:, :RIGHT]  # not those with the other sign
            return sigma_K, basis_LK
        case "exponentials":
            time_K = float(seq_len) ** _spread(count)
            decay_LK = np.exp(-np.arange(seq_len)[:, None] / time_K)
            return sigma_K, decay_LK / np.linalg.norm(decay_LK, axis=0)
        case "alternating" | "hankel_l":
            return spectral_filters(seq_len, count, name)
        case "true" | "learned":
            return sigma_K, phi_LK


def _white(seq_len: int, count: int) -> Array:
    found: Array = np.linalg.qr(np.random.default_rng(SEED).standard_normal((seq_len, count)))[0]
    return found


def _spread(count: int) -> Array:
    """Numbers of [0, 1], each far from those before it: 1, 0, 1/2, 1/4, 3/4, 1/8, .."""
    found = [1.0, 0.0]
    parts = 2
    while len(found) < count:
        found += [odd / parts for odd in range(1, parts, 2)]
        parts *= 2
    return np.array(found[:count])


@torch.no_grad()
def use_basis(model: LanguageModel, name: Basis) -> None:
    """Gives a model these filters, before its optimizer is made: learned ones are a parameter from here on.

    Raises:
        UserError: it has no spectral layer.
    """
    bank = model.filterbank
    if bank is None:
        raise UserError(f"filters {name!r}: the model has no spectral layer, pattern {model.config.pattern!r}")
    sigma_K, phi_LK = basis(name, bank.seq_len, bank.num_channels)
    bank.reset()
    bank.scale_K = torch.from_numpy(sigma_K**0.25).to(bank.scale_K.device)
    filters_LK = torch.from_numpy(phi_LK).to(bank.filters_LK.device)
    bank.transition_SS = torch.empty(0, 0, dtype=torch.float64)  # no state of the true ones
    if name == "learned":
        bank.method = "fft"  # the only way that hands filters a gradient
        del bank.filters_LK
        bank.filters_LK = nn.Parameter(filters_LK.float())
    else:
        bank.method = "direct"
        bank.filters_LK = filters_LK
