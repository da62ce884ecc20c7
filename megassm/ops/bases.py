"""The filters of a model, channel by channel, by its `basis`.

    plus           phi_1, phi_2, ..: eigenvectors of spectral filtering's Hankel matrix (arXiv 2312.06837, Eq. 5), made
                   of decays a^t with a in [0, 1]: smooth, slow to say anything of what alternates
    alternating    phi_1, (-1)^t phi_1, phi_2, (-1)^t phi_2, ..: each and its mirror image, made of a in [-1, 0]. The
                   convolution with a mirror image is (-1)^t times the plain filter's of (-1)^t u
    hankel_l       eigenvectors of the Hankel matrix for decays a in [-1, 1] (`megassm.ops.hankel` has it): the
                   channels by turns live on even and on odd ages t alone

Both kinds with signs have half as many degrees of freedom for either sign: at the same K slow decays are known less
well, and nothing is gained for what oscillates slower than at every other position.

The order is by eigenvalue, largest first, and by pairs: a leading cut has both signs as equally as its K allows.
hankel_l's channels are in that order exactly. With V_e and V_o the factors of its halves for even and odd ages,
V_o = V_e diag(a), and V_e without its first row is V_o diag(a). As a <= 1, and a row taken away lets at most one
singular value pass,

    sigma(e_1) >= sigma(o_1) >= sigma(e_2) >= sigma(o_2) >= ..

Shapes: L sequence length, K channels.
"""

from __future__ import annotations

import numpy as np

from megassm.config.model import MAX_CHANNELS, Basis
from megassm.errors import UserError
from megassm.ops.hankel import Array, Family, continued_pairs, eigenpairs


def spectral_filters(seq_len: int, num_channels: int, basis: Basis = "plus") -> tuple[Array, Array]:
    """The K leading filters of a basis and their eigenvalues, found once per machine and cached on disk.

    Args:
        seq_len: L, the length the filters are derived for.
        num_channels: K <= L, how many to return.
        basis: which filters.

    Returns:
        `(sigma, phi)`: eigenvalues (K,), descending, and unit-norm filters (L, K), float64, the first entry of each
        that is not 0 by its basis positive. The same numbers, bit for bit, as the leading ones of any larger K on this
        machine.

    Raises:
        UserError: K > L, K > 128, or either not positive.
    """
    if not 1 <= num_channels <= seq_len:
        raise UserError(
            f"num_channels = {num_channels} for seq_len = {seq_len}: must be between 1 and seq_len, "
            "for an L x L matrix has L eigenvectors; lower num_channels or raise seq_len"
        )
    if num_channels > MAX_CHANNELS:
        raise UserError(
            f"num_channels = {num_channels}: must be at most {MAX_CHANNELS}, for float64 knows no more filters "
            "at any length; lower num_channels"
        )
    sigma_K = np.empty(num_channels)
    for family, channels in _parts(basis, num_channels):
        sigma_K[channels] = eigenpairs(family_rows(family, seq_len), len(sigma_K[channels]), family)[0]
    return sigma_K, extended_filters(seq_len, num_channels, seq_len, basis)


def extended_filters(seq_len: int, num_channels: int, length: int, basis: Basis = "plus") -> Array:
    """The filters of `spectral_filters` continued as the sums of exponentials they are, (length, K), to any length.

    The first L rows are exactly those of `spectral_filters`; `continued_pairs` says how large the others become.
    """
    if basis == "plus":
        return continued_pairs(seq_len, num_channels, length)
    phi_LK = np.zeros((length, num_channels))
    for place, (family, channels) in enumerate(_parts(basis, num_channels)):
        count, rows = phi_LK[:1, channels].shape[1], family_rows(family, length)
        own = continued_pairs(family_rows(family, seq_len), count, rows, family)
        if family == "plus":
            phi_LK[:, channels] = own
            phi_LK[1::2, channels] *= (-1) ** place
        else:
            phi_LK[place::2, channels] = own
    return phi_LK


def family_rows(family: Family, length: int) -> int:
    """How many of `length` ages a family's eigenvectors have entries for."""
    return {"plus": length, "even": (length + 1) // 2, "odd": length // 2}[family]


def _parts(basis: Basis, num_channels: int) -> list[tuple[Family, slice]]:
    """Whose eigenvectors the channels are, by turns where there are two families."""
    made_of: dict[Basis, tuple[Family, ...]] = {
        "plus": ("plus",), "alternating": ("plus", "plus"), "hankel_l": ("even", "odd")
    }  # fmt: skip
    each = made_of[basis]
    return [(family, slice(first, None, len(each))) for first, family in enumerate(each[:num_channels])]
