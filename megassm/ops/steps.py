"""One step of a filter bank as a state-space model, and the models of bases with signs made of one without.

    f_k = q_k x + phi_k(0) u            x' = A x + b u

A model of filters that are sums of decays a^t, a in [0, 1], comes from `megassm.ops.realize`. Of its A, b, q there are
made, with twice the states:

    alternating   phi_k(t) as it is, and (-1)^t phi_k(t) by -A, b, -q
    hankel_l      e_k(i) at ages t = 2 i and o_k(i) at 2 i + 1, of a model of pairs of positions for e_k(i) and
                  o_k(i - 1). With p its state for the pairs of this position, and r for those of the next,

                      p' = r          r' = A p + b u          e_k's feature: q_k p + e_k(0) u          o_k's: q_k r

                  In (p + r, p - r) / sqrt 2 the transition is [[1 + E, E], [-E, -1 - E]] with E = (A - 1) / 2.

Shapes: K channels, S states.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.linalg import block_diag

from megassm.ops.bases import family_rows
from megassm.ops.hankel import Array, continued_pairs


class Step(NamedTuple):
    """float64."""

    transition_SS: Array
    input_S: Array
    output_KS: Array
    signs_S: Array
    """The diagonal matrix of 1 and -1 that the transition is near to."""


def mirrored(plain: Step, num_channels: int) -> Step:
    """The K leading of phi_1, (-1)^t phi_1, phi_2, .., of a model of the first (K + 1) // 2 plain ones."""
    size = len(plain.input_S)
    output_KS = np.zeros((num_channels, 2 * size))
    output_KS[0::2, :size] = plain.output_KS
    output_KS[1::2, size:] = -plain.output_KS[: num_channels // 2]
    transition_SS = block_diag(plain.transition_SS, -plain.transition_SS)
    return Step(transition_SS, np.tile(plain.input_S, 2), output_KS, np.concatenate((plain.signs_S, -plain.signs_S)))


def interleaved(pairs: Step, num_channels: int) -> Step:
    """The K leading of e_1, o_1, e_2, .., of a model of `pair_responses`."""
    even = (num_channels + 1) // 2
    signs_S = np.concatenate((pairs.signs_S, -pairs.signs_S))
    output_KS = np.empty((num_channels, len(signs_S)))
    output_KS[0::2] = np.tile(pairs.output_KS[:even], 2)
    output_KS[1::2] = np.concatenate((pairs.output_KS[even:], -pairs.output_KS[even:]), axis=1)
    half_change_SS = (pairs.transition_SS - np.eye(len(pairs.input_S))) / 2
    transition_SS = np.diag(signs_S) + np.tile(half_change_SS, (2, 2)) * signs_S[:, None]
    input_S = np.concatenate((pairs.input_S, -pairs.input_S))
    return Step(transition_SS, input_S * 0.5**0.5, output_KS * 0.5**0.5, signs_S)


def pair_responses(seq_len: int, num_channels: int) -> Array:
    """e_k(i), then o_k(i - 1), of hankel_l's K leading channels, for i = 0 .. 2 ceil(L/2): (2 ceil(L/2) + 1, K).

    o_k(-1) is 0 here; a model's response from i = 1 on is what counts.
    """
    pairs = family_rows("even", seq_len)
    even = continued_pairs(pairs, (num_channels + 1) // 2, 2 * pairs + 1, "even")
    if num_channels == 1:
        return even
    odd = continued_pairs(family_rows("odd", seq_len), num_channels // 2, 2 * pairs, "odd")
    return np.hstack((even, np.concatenate((np.zeros_like(odd[:1]), odd))))
