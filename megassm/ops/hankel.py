"""Eigenpairs of the Hankel matrices of spectral filtering, to high relative accuracy.

    Z[i, j] = 2 / ((i+j)^3 - (i+j)),   i, j = 1..L          (Spectral SSM, arXiv 2312.06837, Eq. 5)

Z's eigenvalues fall exponentially, below the rounding errors of any eigensolver that sees Z itself: in float64 its
eigenvectors are noise from about the 24th on. But Z is a Gram matrix in disguise,

    Z[i, j] = integral over b in [0, 1] of  b^2 (1-b)^(i-1) (1-b)^(j-1) db,

so a quadrature gives Z = V V^T with V[i, n] = b_n sqrt(w_n) (1-b_n)^(i-1). The filters are the left singular vectors
of V, the eigenvalues its squared singular values: the decay is halved, and what float64 can tell apart doubles.
Neither the L x L matrix nor, for long sequences, V is ever formed. A block of rows repeats the one before it,

    V[h:2h] = V[0:h] D^h,   D = diag(1 - b_n),

so that V = Q R with Q a tree of small orthogonal factors, built from the leaf up by one column-pivoted QR of
[R; R D^h] a doubling; a one-sided Jacobi SVD (Drmac & Veselic, LAPACK xGEJSV) of R then gives sigma, and phi is spread
down the tree. Time and memory are those of writing phi down: L * rank * K, rank about 100.

Two more matrices are of this kind: those of i - 1 = 2p and of i - 1 = 2p + 1 in the one for decays a of both signs,

    Z[i, j] = [(-1)^(i+j) + 1] 8 / ((i+j+3)(i+j-1)(i+j+1))
            = integral over a in [-1, 1] of  (1-a^2)^2 a^(i-1) a^(j-1) da,

which has zeros between. They are the families "even", V[p, n] = sqrt(2 w_n) (1-a_n^2) a_n^(2p) with a = 1 - b, and
"odd", the same times a_n: `megassm.ops.bases` makes the filters of the whole of them.

How far float64 reaches: the singular values of V are known to about 1e-18, so sigma_k is known while sqrt(sigma_k) is
well above that, and the error of phi_k is about 1e-18 / sqrt(sigma_k). Largest error of an entry, measured against 70
digits at L=96 and between two quadratures elsewhere:

           L =     96     256    2048    8192   65,536   1,048,576
    k =  24      5e-9    5e-10   4e-12   9e-13   2e-13     1e-13
    k =  32      5e-5    2e-7    3e-10   5e-11   7e-12     3e-12
    k =  48      none    none    2e-5    1e-7    6e-9      4e-10
    k =  64      none    none    none    2e-3    3e-6      5e-8

Filters past that point ("none") are orthonormal, but they are rounding noise and differ between machines. About
5 log2(L) filters are known (`ModelConfig.known_channels`).

What is equal bit for bit: on one machine a filter never depends on how many others were asked for, because every
product has a shape that only L decides: the tree keeps the same rank whatever K, and filters are spread GROUP columns
at a time. So truncating a model and building the smaller one give the same filters. BLAS rounds by the processor's
instructions: two kinds of machine agree as far as the table says, and not bit for bit.

Shapes: L rows of a matrix, K channels, N quadrature nodes, R rank of a block of V, C rows of a leaf, G a group.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.linalg import lapack, qr

from megassm.config.model import MAX_CHANNELS
from megassm.errors import UserError
from megassm.files import cache_folder, open_given
from megassm.guarded import load_arrays

Array = npt.NDArray[np.float64]

ALGORITHM = "gauss-legendre on dyadic panels, doubling by pivoted QR, one-sided Jacobi; version 3"
NODES_PER_PANEL = 20
LEAF_ROWS = 1024  # a sequence below this is one leaf; a leaf of a longer one has half to all of it
RANK_TOLERANCE = 1e-18  # of the largest row of R: below lies only rounding, of which MAX_CHANNELS rows stay in any case
GROUP = 32  # filters computed and cached together
DIGEST = "sha256"
CACHE_LIMIT_BYTES = 2**27  # reading and checking more than this takes as long as computing it


Family = Literal["plus", "even", "odd"]
"""Which matrix: the one of spectral filtering, or one of the two halves of that for decays of both signs."""


def eigenpairs(length: int, count: int, family: Family = "plus") -> tuple[Array, Array]:
    """The leading eigenpairs of a matrix of L rows, computed once per machine and cached on disk.

    Args:
        length: L, at least 1.
        count: K, from 1 to the smaller of L and MAX_CHANNELS.
        family: which matrix.

    Returns:
        `(sigma, phi)`: eigenvalues (K,), descending, and unit-norm eigenvectors (L, K) with phi[0, k] > 0, float64.
        The same numbers, bit for bit, as the leading ones of any larger K on this machine.
    """
    return _join((_cached_group(length, group, family) for group in _groups(length, count)), count)


def compute_eigenpairs(
    length: int, count: int, nodes_per_panel: int = NODES_PER_PANEL, family: Family = "plus"
) -> tuple[Array, Array]:
    """`eigenpairs` without the cache, on a quadrature with `nodes_per_panel` nodes a dyadic panel."""
    groups = _groups(length, count)
    return _join((_compute_group(length, group, nodes_per_panel, family) for group in groups), count)


def _groups(length: int, count: int) -> list[slice]:
    """The groups that hold the leading channels. How wide each is depends on L alone."""
    return [slice(first, min(first + GROUP, MAX_CHANNELS, length)) for first in range(0, count, GROUP)]


def _join(groups: Iterable[tuple[Array, Array]], count: int) -> tuple[Array, Array]:
    sigma_G, phi_LG = zip(*groups, strict=True)
    return np.concatenate(sigma_G)[:count], np.ascontiguousarray(np.hstack(phi_LG)[:, :count])


def _cached_group(length: int, group: slice, family: Family) -> tuple[Array, Array]:
    if 8 * length * (group.stop - group.start) > CACHE_LIMIT_BYTES:
        return _compute_group(length, group, NODES_PER_PANEL, family)
    path = cache_path(length, group.stop, "hankel" if family == "plus" else f"hankel-{family}")
    count = group.stop - group.start
    shapes = {"sigma": (count,), "phi": (length, count)}
    cached = read_arrays(path) or {}
    if {name: array.shape for name, array in cached.items()} == shapes:
        return cached["sigma"], cached["phi"]
    sigma_G, phi_LG = _compute_group(length, group, NODES_PER_PANEL, family)
    write_arrays(path, {"sigma": sigma_G, "phi": phi_LG})
    return sigma_G, phi_LG


def _compute_group(length: int, group: slice, nodes_per_panel: int, family: Family) -> tuple[Array, Array]:
    tree = _block_tree(length, nodes_per_panel, family)
    singular, _, right_RG = _signed_svd(tree, group)
    phi_LG = np.empty((length, group.stop - group.start))
    _spread(tree, right_RG, phi_LG)
    return singular**2, phi_LG


def continued_pairs(length: int, count: int, rows: int, family: Family = "plus") -> Array:
    """The eigenvectors of `eigenpairs` continued as the sums of exponentials they are, to any length.

        phi_k(i) = sum_n V[i, n] r_nk / sqrt(sigma_k),   r the right singular vectors of V

    Args:
        length: L, rows of the matrix.
        count: K.
        rows: how many to return, beyond L or not.
        family: which matrix.

    Returns:
        phi (rows, K), float64; the first L rows are exactly those of `eigenpairs`.

    Beyond L the error, relative to the largest value there, is below 1e-7 for the first 27 and 3e-5 for all 32 (L=96,
    against 110 digits). But the values are not small: nothing bounds phi_k where Z ends. Inside L no filter exceeds 1;
    beyond it the 16th, 24th, 32nd reach 2, 8e2, 1e6 at L=256; 0.03, 1, 80 at L=2048; 0.006, 0.05, 1.5 at L=8192.
    Expect no generalisation to longer sequences from channels that grow.
    """
    _, phi_LK = eigenpairs(length, count, family)
    if rows <= length:
        return phi_LK[:rows]
    beyond = [_continue_group(length, group, rows, family) for group in _groups(length, count)]
    return np.concatenate((phi_LK, np.hstack(beyond)[:, :count]))


def _continue_group(length: int, group: slice, rows: int, family: Family) -> Array:
    """Rows L.. to `rows` of a group of eigenvectors."""
    tree = _block_tree(length, NODES_PER_PANEL, family)
    singular, left_NG, _ = _signed_svd(tree, group)
    beyond = np.empty((rows - length, len(singular)))
    block_LG = np.empty((length, len(singular)))
    for begin in range(length, rows, length):
        # V's rows from `begin` on are Q R D^begin: the tree serves every block of L rows
        _spread(tree, (tree.factor_RN * np.exp(begin * tree.rate_N)) @ (left_NG / singular), block_LG)
        beyond[begin - length : begin] = block_LG[: rows - begin]
    return beyond


class _BlockTree(NamedTuple):
    """V = Q R with columns in pivoted order. Q is implicit: a leaf, and a small orthogonal factor for each doubling."""

    leaf_CR: Array
    doublings: list[tuple[int, Array]]  # (h, factor of [R; R D^h; row 2h if the block is odd]), the longest block first
    factor_RN: Array
    rate_N: Array  # log of what a column falls by from row to row


def _block_tree(length: int, nodes_per_panel: int, family: Family) -> _BlockTree:
    lengths = [length]
    while lengths[-1] >= LEAF_ROWS:
        lengths.append(lengths[-1] // 2)
    rate_N, start_N = _quadrature(length, nodes_per_panel, family)
    leaf_CN = np.exp(np.arange(lengths[-1])[:, None] * rate_N) * start_N
    leaf_CR, factor_RN, pivots = _truncated_qr(leaf_CN)
    rate_N, start_N = rate_N[pivots], start_N[pivots]
    doublings: list[tuple[int, Array]] = []
    for rows in reversed(lengths[:-1]):
        half = rows // 2
        blocks = [factor_RN, factor_RN * np.exp(half * rate_N)]
        if rows % 2:
            blocks.append((start_N * np.exp(2 * half * rate_N))[None])
        factor, factor_RN, pivots = _truncated_qr(np.concatenate(blocks))
        rate_N, start_N = rate_N[pivots], start_N[pivots]
        doublings.insert(0, (half, factor))
    return _BlockTree(leaf_CR, doublings, factor_RN, rate_N)


def _quadrature(length: int, nodes_per_panel: int, family: Family) -> tuple[Array, Array]:
    """log(V[i+1, n] / V[i, n]) and V[0, n]: Gauss-Legendre in b on [0, 2^-J], [2^-J, 2^-(J-1)], .., [1/2, 1]."""
    places = length if family == "plus" else 2 * length
    levels = math.ceil(math.log2(places)) + 4
    edges = np.concatenate(([0.0], 2.0 ** -np.arange(levels, -1, -1.0)))
    nodes, weights = np.polynomial.legendre.leggauss(nodes_per_panel)
    half_width = np.diff(edges)[:, None] / 2
    b_N = (edges[:-1, None] + half_width * (1 + nodes)).ravel()
    w_N = (half_width * weights).ravel()
    if family == "plus":
        return np.log1p(-b_N), b_N * np.sqrt(w_N)
    start_N = b_N * (2 - b_N) * np.sqrt(2 * w_N)  # a = 1 - b, of both signs
    return 2 * np.log1p(-b_N), start_N if family == "even" else start_N * (1 - b_N)


def _truncated_qr(matrix: Array) -> tuple[Array, Array, npt.NDArray[np.int32]]:
    """Column-pivoted QR less the rows of R that are rounding noise; at least MAX_CHANNELS are kept."""
    q, r, pivots = qr(matrix, mode="economic", pivoting=True, overwrite_a=True, check_finite=False)
    diagonal = np.abs(np.diag(r))
    kept = max(MAX_CHANNELS, int((diagonal > RANK_TOLERANCE * diagonal[0]).sum()))
    return np.ascontiguousarray(q[:, :kept]), r[:kept], pivots


def _signed_svd(tree: _BlockTree, group: slice) -> tuple[Array, Array, Array]:
    """Singular values of R (G,), left vectors (N, G) and right ones (R, G), signed so that phi[0] > 0."""
    singular, left_NR, right_RR = _jacobi_svd(tree.factor_RN.T)
    first_row = tree.leaf_CR[0]
    for _, factor in reversed(tree.doublings):
        first_row = first_row @ factor[: len(first_row)]
    sign_R = np.where(first_row @ right_RR < 0, -1.0, 1.0)
    return singular[group], (left_NR * sign_R)[:, group], (right_RR * sign_R)[:, group]


def _spread(tree: _BlockTree, weights_RK: Array, out_LK: Array, depth: int = 0) -> None:
    """out = Q weights, from the root of the tree down."""
    if depth == len(tree.doublings):
        np.matmul(tree.leaf_CR, weights_RK, out=out_LK)
        return
    half, factor = tree.doublings[depth]
    spread = factor @ weights_RK
    rank = len(spread) // 2
    _spread(tree, spread[:rank], out_LK[:half], depth + 1)
    _spread(tree, spread[rank : 2 * rank], out_LK[half : 2 * half], depth + 1)
    out_LK[2 * half :] = spread[2 * rank :]


def _jacobi_svd(matrix: Array) -> tuple[Array, Array, Array]:
    """Singular values (descending), left and right singular vectors by LAPACK's one-sided Jacobi method."""
    # joba=0: the columns are already graded by the pivoted QR; no singular value is declared negligible
    scaled, left, right, work, _, info = lapack.dgejsv(matrix, joba=0, jobu=0, jobv=0, jobr=0, jobt=0, jobp=0)
    if info != 0:
        raise RuntimeError(f"LAPACK dgejsv failed with info={info} on a {matrix.shape} matrix")
    return scaled * (work[0] / work[1]), left, right


def cache_path(seq_len: int, num_channels: int, what: str = "hankel") -> Path:
    """Where something made from filters up to channel K is cached: below $MEGASSM_CACHE, or the user's cache folder."""
    key = f"{what}; {ALGORITHM}; nodes={NODES_PER_PANEL}; L={seq_len}; K={num_channels}"
    digest = hashlib.sha256(key.encode()).hexdigest()[:16]
    name = f"{what.partition(';')[0]}-L{seq_len}-K{num_channels}-{digest}.npz"
    return cache_folder() / name


def _digest(arrays: Mapping[str, Array]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].shape} {arrays[name].dtype}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def read_arrays(path: Path) -> dict[str, Array] | None:
    """What `write_arrays` wrote, or None where there is nothing or it is damaged: it can always be computed again."""
    try:
        with open_given(path) as file:
            arrays = load_arrays(file, os.fstat(file.fileno()).st_size, path)
    except (OSError, UserError):
        return None
    digest = str(arrays.pop(DIGEST, ""))
    return arrays if _digest(arrays) == digest else None


def write_arrays(path: Path, arrays: Mapping[str, Array]) -> None:
    """Publishes atomically, so that many ranks may do so at once; a read-only home only costs the time again."""
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                content: dict[str, Any] = {**arrays, DIGEST: np.array(_digest(arrays))}
                np.savez(file, **content)
            os.replace(name, path)
        except OSError:
            os.unlink(name)
            raise
