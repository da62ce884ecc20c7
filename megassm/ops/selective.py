"""The causal convolution with a past that fades: by how much, the input says at every position and head.

    f[t, k] = sum_{s=0..t} phi[t - s, k] exp(A[t] - A[s]) u[s]        A[t] = l[0] + .. + l[t],    -FASTEST <= l <= 0

l is the log decay of a head, one for all its channels of u and for all filters, so that the K features still have one
state. In a chunk, with A counted from its start, it leaves the products of `megassm.ops.filterbank` what they are:

    F_c = exp(A_c) [T | Q] [exp(-A_c) U_c ; x_c]          x_{c+1} = exp(A_C) A x_c + B exp(A_C - A_c) U_c

The first factor is multiplied into the features' weights, which are a head's and a position's too. exp(-A) grows with
the chunk; both factors are therefore taken from the middle of A, m = A_C / 2, as exp(m - A_c) and exp(A_c - m), which
stay within exp(+-FASTEST C / 2), 1e14: nothing overflows in float32 or bfloat16, and no gradient becomes too small for
them. What comes of m cancels, so it has no gradient. Logarithms and factors are float32 (or float64, as u is).

Shapes: B batch, L length, H heads, P = D/H, D channels of u, K filters, C chunk, N chunks of a sequence, S states,
I inputs and states of a chunk.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from megassm.ops.documents import Segments
from megassm.ops.filterbank import ChunkTables, chunked, toeplitz_rows

FASTEST = 1.0
"""Largest decay of a position: the past is multiplied by no less than 1/e, 0.37, so by 0.02 in four positions."""


class FadedRows(NamedTuple):
    """What `mix_rows` takes of rows of C positions, and what else its weights are to be multiplied with."""

    z_NID: Tensor
    scale_BLH: Tensor


def log_decays(scores_BLH: Tensor) -> Tensor:
    """l (B, L, H), in at least float32; near 0, where the past stays, for scores far below 0."""
    return -FASTEST * scores_BLH.to(torch.promote_types(scores_BLH.dtype, torch.float32)).sigmoid()


def with_decays(weights_BLHK: Tensor, log_decay_BLH: Tensor) -> Tensor:
    """(B, L, H, K + 1): both as one tensor, so that whatever takes heads or positions apart takes both."""
    return torch.cat((weights_BLHK, log_decay_BLH[..., None].to(weights_BLHK.dtype)), dim=-1)


def parted(weights_BLHX: Tensor, k: int) -> tuple[Tensor, Tensor | None]:
    """(weights (B, L, H, k), log decays (B, L, H) where there are any) of `with_decays`, or of weights alone."""
    if weights_BLHX.shape[-1] == k:
        return weights_BLHX, None
    return weights_BLHX[..., :k], weights_BLHX[..., k]


def taken(log_decay_BLH: Tensor | None, index: Any) -> Tensor | None:
    """Those of some texts and positions, where there are any."""
    return None if log_decay_BLH is None else log_decay_BLH[index]


def per_head(x_XD: Tensor, factor_XH: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """x (.., D), each head's P channels times its factor (.., H), in x's dtype or another."""
    scaled_XHP = torch.unflatten(x_XD, -1, (factor_XH.shape[-1], -1)) * factor_XH[..., None]
    return scaled_XHP.flatten(-2).to(x_XD.dtype if dtype is None else dtype)


def chunk_rows(
    u_BLD: Tensor,
    log_decay_BLH: Tensor,
    tables: ChunkTables,
    segments: Segments | None = None,
    before_BSD: Tensor | None = None,
) -> FadedRows:
    """For `tables.rows_CKI`; `before_BSD` is the state before the first position."""
    chunk, length = tables.input_SC.shape[1], u_BLD.shape[1]
    faded_BNCH = chunked(log_decay_BLH, chunk).cumsum(2)
    middle_BN1H = faded_BNCH[:, :, -1:].detach() / 2
    states_BNSD = faded_states(u_BLD, faded_BNCH, tables, segments, before_BSD)
    own_BLD = per_head(u_BLD, (middle_BN1H - faded_BNCH).exp().flatten(1, 2)[:, :length])
    states_BNSD = per_head(states_BNSD, middle_BN1H.exp(), u_BLD.dtype)
    z_BNID = torch.cat((chunked(own_BLD, chunk), states_BNSD), dim=2)
    return FadedRows(z_BNID.flatten(0, 1), (faded_BNCH - middle_BN1H).exp().flatten(1, 2)[:, :length])


def faded_states(
    u_BLD: Tensor,
    faded_BNCH: Tensor,
    tables: ChunkTables,
    segments: Segments | None = None,
    before_BSD: Tensor | None = None,
) -> Tensor:
    """x_c (B, N, S, D), the state that each chunk starts from, in at least float32; the first is `before_BSD`, or zero.

    `faded_BNCH` is A from each chunk's start, of as many chunks as states are asked for. `segments` keep documents
    apart as in `megassm.ops.filterbank.chunk_states`: a chunk adds what belongs to the document that it ends in.
    """
    (batch, length, width), chunk = u_BLD.shape, tables.input_SC.shape[1]
    dtype = torch.promote_types(u_BLD.dtype, torch.float32)
    end_BN1H = faded_BNCH[:, :, -1:]
    left_BLD = per_head(u_BLD, (end_BN1H - faded_BNCH).exp().flatten(1, 2)[:, :length], dtype)
    left_BNCD = chunked(left_BLD, chunk)
    fades_BN1H = F.pad(end_BN1H[:, :-1], (0, 0, 0, 0, 1, 0))  # from the chunk before
    if segments is not None:
        left_BNCD = left_BNCD.where(segments.tail_BNC[..., None], 0)
        ended_BN = segments.opening_BN[:, 1:] != segments.opening_BN[:, :-1]
        fades_BN1H = fades_BN1H.masked_fill(F.pad(ended_BN, (1, 0))[..., None, None], -torch.inf)
    added_BNSD = torch.matmul(tables.input_SC.to(dtype), left_BNCD[:, : faded_BNCH.shape[1] - 1])
    if segments is not None:
        goes_on_BN = segments.closing_BN[:, :-1] == segments.opening_BN[:, 1:]
        added_BNSD = added_BNSD.where(goes_on_BN[..., None, None], 0)
    if before_BSD is None:
        before_BSD = added_BNSD.new_zeros(batch, len(tables.input_SC), width)
    added_BNSD = torch.cat((before_BSD.to(dtype)[:, None], added_BNSD), dim=1)
    states_BNSD: Tensor = _FadedSums.apply(added_BNSD, fades_BN1H, tables.transition_SS)  # type: ignore[no-untyped-call]
    return states_BNSD


class _FadedSums(torch.autograd.Function):
    """x_c = exp(fades_c) A x_{c-1} + added_c; beside what is given, of all steps to it only x is kept."""

    @staticmethod
    def forward(ctx: Any, added_BNSD: Tensor, fades_BN1H: Tensor, transition_SS: Tensor) -> Tensor:
        sums_BNSD = _faded_sums(added_BNSD, fades_BN1H, transition_SS)
        ctx.save_for_backward(sums_BNSD, fades_BN1H, transition_SS)
        return sums_BNSD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """The same sums from the end on, of the transposed matrix."""
        sums_BNSD, fades_BN1H, transition_SS = ctx.saved_tensors
        later_BN1H = F.pad(fades_BN1H[:, 1:], (0, 0, 0, 0, 0, 1))
        dadded_BNSD = _faded_sums(grads[0].flip(1), later_BN1H.flip(1), transition_SS.t()).flip(1)
        carried = torch.matmul(transition_SS.to(sums_BNSD.dtype), sums_BNSD[:, :-1])
        products = per_head(carried, fades_BN1H[:, 1:].exp()) * dadded_BNSD[:, 1:]
        dfades_BNH = torch.unflatten(products, 3, (fades_BN1H.shape[3], -1)).sum((2, 4))
        return dadded_BNSD, F.pad(dfades_BNH, (0, 0, 1, 0))[:, :, None], None


def _faded_sums(added_BNSD: Tensor, fades_BN1H: Tensor, transition_SS: Tensor) -> Tensor:
    """By doubling: after step i a chunk has what its 2^i predecessors added, each faded by all that lies between.

    A's powers are squared in float64, as in `megassm.ops.filterbank.chunk_states`; and what fades over 2^i chunks is a
    sum of that many logarithms, not a difference of two sums that grow along the sequence.
    """
    power_SS, distance = transition_SS, 1
    while distance < added_BNSD.shape[1]:
        carried = torch.matmul(power_SS.to(added_BNSD.dtype), added_BNSD[:, :-distance])
        carried = per_head(carried, fades_BN1H[:, distance:].exp())
        added_BNSD = added_BNSD + F.pad(carried, (0, 0, 0, 0, distance, 0))
        fades_BN1H = fades_BN1H + F.pad(fades_BN1H[:, :-distance], (0, 0, 0, 0, distance, 0))
        power_SS, distance = power_SS @ power_SS, 2 * distance
    return added_BNSD


def past_rows(u_BLD: Tensor, log_decay_BLH: Tensor, chunk: int) -> FadedRows:
    """For `past_filters`: where there is no state, rows of C positions have the whole past as inputs, I of them."""
    u_BXD, length = chunked(u_BLD, chunk).flatten(1, 2), u_BLD.shape[1]
    past = u_BXD.shape[1] - chunk
    faded_BNCH = torch.unflatten(chunked(log_decay_BLH.double(), chunk).flatten(1, 2).cumsum(1), 1, (-1, chunk))
    ends_BNH = faded_BNCH[:, :, -1].detach()
    middle_BN1H = ((ends_BNH + F.pad(ends_BNH[:, :-1], (0, 0, 1, 0))) / 2)[:, :, None]
    windows_BNIH = _windows(faded_BNCH.flatten(1, 2), past, chunk)
    factor_BNIH = (middle_BN1H - windows_BNIH).to(log_decay_BLH.dtype).exp()
    z_BNID = per_head(_windows(u_BXD, past, chunk), factor_BNIH)
    scale_BNCH = (faded_BNCH - middle_BN1H).to(log_decay_BLH.dtype).exp()
    return FadedRows(z_BNID.flatten(0, 1), scale_BNCH.flatten(1, 2)[:, :length])


def past_filters(filters_LK: Tensor, chunk: int) -> Tensor:
    """(C, K, I): the last C rows of the filters' Toeplitz matrices, I being their length filled up to whole chunks."""
    filled = F.pad(filters_LK, (0, 0, 0, -len(filters_LK) % chunk))
    return toeplitz_rows(filled)[len(filled) - chunk :]


def _windows(x_BXD: Tensor, past: int, chunk: int) -> Tensor:
    """(B, N, past + C, D): of each chunk, itself and the `past` positions before it."""
    return F.pad(x_BXD, (0, 0, past, 0)).unfold(1, past + chunk, chunk).movedim(-1, 2)


def dense_features(u_BLD: Tensor, log_decay_BLH: Tensor, filters_LK: Tensor) -> Tensor:
    """Features (B, L, K, D) as they are defined, by L x L matrices of each head: for a graph of any length."""
    faded_BHL = log_decay_BLH.cumsum(1).transpose(1, 2)
    later_TL = torch.ones(u_BLD.shape[1], u_BLD.shape[1], dtype=torch.bool, device=u_BLD.device).triu(1)
    fades_BHTL = (faded_BHL[..., None] - faded_BHL[:, :, None]).masked_fill(later_TL, 0).exp()
    u_BHLP = torch.unflatten(u_BLD, 2, (log_decay_BLH.shape[2], -1)).transpose(1, 2)
    rows_TKL = toeplitz_rows(filters_LK).to(u_BLD.dtype)
    features = [(fades_BHTL.to(u_BLD.dtype) * rows_TL) @ u_BHLP for rows_TL in rows_TKL.unbind(1)]
    return torch.stack(features, dim=3).permute(0, 2, 3, 1, 4).flatten(3)
