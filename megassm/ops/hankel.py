"""Spectral filters: eigenpairs of the Hankel matrix of spectral filtering, to high relative accuracy.

    Z[i, j] = 2 / ((i+j)^3 - (i+j)),   i, j = 1..L          (Spectral SSM, arXiv 2312.06837, Eq. 5)

Z's eigenvalues fall exponentially, below the rounding errors of any eigensolver that sees Z itself: in float64 its
eigenvectors are noise from about the 24th on. But Z is a Gram matrix in disguise,

    Z[i, j] = integral over b in [0, 1] of  b^2 (1-b)^(i-1) (1-b)^(j-1) db,

so a quadrature gives Z = V V^T with V[i, n] = b_n sqrt(w_n) (1-b_n)^(i-1). The filters are the left singular vectors
of V, the eigenvalues its squared singular values, and a column-pivoted QR followed by a one-sided Jacobi SVD finds
both to high RELATIVE accuracy (Drmac & Veselic, LAPACK xGEJSV). The L x L matrix is never formed.

Shapes: L sequence length, K channels, N quadrature nodes.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import tempfile
from pathlib import Path

import numpy as np
import numpy.typing as npt
from scipy.linalg import lapack, qr

from megassm.errors import UserError

Array = npt.NDArray[np.float64]

ALGORITHM = "gauss-legendre on dyadic panels, pivoted QR, one-sided Jacobi; version 1"
NODES_PER_PANEL = 20
CACHE_VARIABLE = "MEGASSM_CACHE"


def spectral_filters(seq_len: int, num_channels: int) -> tuple[Array, Array]:
    """The leading eigenpairs of the L x L Hankel matrix, computed once per machine and cached on disk.

    Args:
        seq_len: L, the length the filters are derived for.
        num_channels: K <= L, how many to return.

    Returns:
        `(sigma, phi)`: eigenvalues (K,), descending, and unit-norm eigenvectors (L, K) with phi[0, k] > 0, float64.

    Raises:
        UserError: K > L, or either not positive.
    """
    if not 1 <= num_channels <= seq_len:
        raise UserError(
            f"num_channels = {num_channels} for seq_len = {seq_len}: must be between 1 and seq_len, "
            "for an L x L matrix has L eigenvectors; lower num_channels or raise seq_len"
        )
    path = cache_path(seq_len, num_channels)
    cached = _read_cache(path, seq_len, num_channels)
    if cached is None:
        cached = compute_filters(seq_len, num_channels)
        _write_cache(path, *cached)
    return cached


def compute_filters(seq_len: int, num_channels: int, nodes_per_panel: int = NODES_PER_PANEL) -> tuple[Array, Array]:
    """`spectral_filters` without the cache, on a quadrature with `nodes_per_panel` nodes a dyadic panel."""
    factor_LN = _hankel_factor(seq_len, nodes_per_panel)
    q_LR, r_RN, pivots = qr(factor_LN, mode="economic", pivoting=True, overwrite_a=True, check_finite=False)
    del factor_LN, pivots  # a permutation of V's columns changes neither Z nor its left singular vectors
    singular, _, right_RR = _jacobi_svd(r_RN.T)
    phi_LK = q_LR @ right_RR[:, :num_channels]
    phi_LK *= np.where(phi_LK[0] < 0, -1.0, 1.0)
    return singular[:num_channels] ** 2, np.ascontiguousarray(phi_LK)


def _hankel_factor(seq_len: int, nodes_per_panel: int) -> Array:
    """V (L, N) with Z = V V^T: Gauss-Legendre on the panels [0, 2^-J], [2^-J, 2^-(J-1)], .., [1/2, 1]."""
    levels = math.ceil(math.log2(seq_len)) + 4
    edges = np.concatenate(([0.0], 2.0 ** -np.arange(levels, -1, -1.0)))
    nodes, weights = np.polynomial.legendre.leggauss(nodes_per_panel)
    half_width = np.diff(edges)[:, None] / 2
    b_N = (edges[:-1, None] + half_width * (1 + nodes)).ravel()
    w_N = (half_width * weights).ravel()
    powers_LN = np.exp(np.arange(seq_len)[:, None] * np.log1p(-b_N))
    return np.asarray(powers_LN * (b_N * np.sqrt(w_N)))


def _jacobi_svd(matrix: Array) -> tuple[Array, Array, Array]:
    """Singular values (descending), left and right singular vectors by LAPACK's one-sided Jacobi method."""
    # joba=0: the columns are already graded by the pivoted QR; no singular value is declared negligible.
    scaled, left, right, work, _, info = lapack.dgejsv(matrix, joba=0, jobu=0, jobv=0, jobr=0, jobt=0, jobp=0)
    if info != 0:
        raise RuntimeError(f"LAPACK dgejsv failed with info={info} on a {matrix.shape} matrix")
    return scaled * (work[0] / work[1]), left, right


def cache_path(seq_len: int, num_channels: int) -> Path:
    """Where the filters are cached: below $MEGASSM_CACHE, or the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megassm"
    key = f"{ALGORITHM}; nodes={NODES_PER_PANEL}; L={seq_len}; K={num_channels}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    return Path(os.environ.get(CACHE_VARIABLE) or default) / f"hankel-L{seq_len}-K{num_channels}-{digest}.npz"


def _digest(sigma: Array, phi: Array) -> str:
    return hashlib.sha256(sigma.tobytes() + phi.tobytes()).hexdigest()


def _read_cache(path: Path, seq_len: int, num_channels: int) -> tuple[Array, Array] | None:
    """The cached pair, or None where there is none or it is damaged: filters can always be computed again."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            sigma, phi, digest = archive["sigma"], archive["phi"], str(archive["sha256"])
    except Exception:  # numpy and zipfile raise a dozen types for a damaged archive
        return None
    intact = (
        sigma.shape == (num_channels,)
        and phi.shape == (seq_len, num_channels)
        and sigma.dtype == phi.dtype == np.float64
        and _digest(sigma, phi) == digest
    )
    return (sigma, phi) if intact else None


def _write_cache(path: Path, sigma: Array, phi: Array) -> None:
    """Publishes atomically, so that many ranks may do so at once; a read-only home only costs the time again."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                np.savez(file, sigma=sigma, phi=phi, sha256=_digest(sigma, phi))
            os.replace(name, path)
        except OSError:
            os.unlink(name)
            raise
