"""How many filters does an eigensolver know? Those of `megassm.ops.hankel` against what public code computes.

    python -m tools.bench.filters --lengths 256,1024,2048

`float32 subspace` iterates Q = qr(Z Q) in float32 and diagonalises Q^T Z Q, as the paper's authors do, here until it no
longer changes; `float32` and `float64 eigh` are LAPACK's, the latter MiniSTU's and flash-stu's. The truth is ours,
checked in tests/test_hankel.py against 70 digits. Of filter k: the norm of the difference, both of norm 1 and of one
sign (1.4 is another filter altogether), and its weight sigma^(1/4), sigma clamped at 1e-12, over the true one.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from megassm.cli.arguments import Parser, budget_list, print_table, run_tool, tool_parser
from megassm.ops.bases import spectral_filters

Array = npt.NDArray[np.float64]
SHOWN = (1, 4, 8, 10, 12, 14, 16, 20, 24, 28, 32)
ITERATIONS = 30
SPARE = 8
"""Directions iterated beside those wanted."""
FLOOR = 1e-12
WRONG = 0.01
OTHER = 0.5


def hankel(seq_len: int) -> Array:
    """Z (L, L)."""
    place_L = np.arange(1, seq_len + 1, dtype=np.float64)
    sums_LL = place_L[:, None] + place_L
    matrix_LL: Array = 2 / (sums_LL**3 - sums_LL)
    return matrix_LL


def solvers(seq_len: int, count: int) -> Iterator[tuple[str, Array, Array]]:
    """(name, sigma (K,), phi (L, K)), the largest first."""
    exact_LL = torch.from_numpy(hankel(seq_len))
    single_LL = exact_LL.float()
    start_LX = torch.randn(seq_len, count + SPARE, generator=torch.Generator().manual_seed(0))
    basis_LX = torch.linalg.qr(start_LX).Q
    for _ in range(ITERATIONS):
        basis_LX = torch.linalg.qr(single_LL @ basis_LX).Q
    inner_XX = basis_LX.T @ single_LL @ basis_LX
    sigma_X, vectors_XX = torch.linalg.eigh((inner_XX + inner_XX.T) / 2)
    yield "float32 subspace", *_largest(sigma_X, basis_LX @ vectors_XX, count)
    for name, matrix_LL in (("float32 eigh", single_LL), ("float64 eigh", exact_LL)):
        sigma_L, phi_LL = torch.linalg.eigh(matrix_LL)
        yield name, *_largest(sigma_L, phi_LL, count)


def _largest(sigma_X: torch.Tensor, phi_LX: torch.Tensor, count: int) -> tuple[Array, Array]:
    return sigma_X.flip(0)[:count].double().numpy(), phi_LX.flip(1)[:, :count].double().numpy()


def rows(seq_len: int) -> Iterator[dict[str, str | int | None]]:
    """Of the printed table: two for each solver."""
    count = min(seq_len, max(SHOWN))
    true_sigma_K, true_LK = spectral_filters(seq_len, count)
    for name, sigma_K, phi_LK in solvers(seq_len, count):
        sign_K = np.sign((phi_LK * true_LK).sum(0))
        error_K = np.linalg.norm(phi_LK * sign_K - true_LK, axis=0)
        weight_K = (np.maximum(sigma_K, FLOOR) / true_sigma_K) ** 0.25
        for what, values_K, style in (("error", error_K, ".0e"), ("weight", weight_K, ".3g")):
            cells = {f"k={k}": format(values_K[k - 1], style) if k <= count else "-" for k in SHOWN}
            found = {"wrong from": _first(error_K, WRONG), "another from": _first(error_K, OTHER)}
            yield {"L": seq_len, "by": name, "what": what, **cells, **found}


def _first(error_K: Array, limit: float) -> int | None:
    """The first k whose error is above the limit."""
    above = np.flatnonzero(error_K > limit)
    return int(above[0]) + 1 if len(above) else None


def parser() -> Parser:
    result = tool_parser(__doc__ or "", "python -m tools.bench.filters --lengths 256,1024")
    what = "L, positions (default: 256,1024)"
    result.add_argument("--lengths", type=budget_list, default=[256, 1024], metavar="LIST", help=what)
    return result


def main() -> None:
    arguments = parser().parse_args()
    table = [row for length in arguments.lengths for row in rows(length)]
    print_table("filters of an eigensolver", table, arguments.json)


if __name__ == "__main__":
    run_tool(main)
