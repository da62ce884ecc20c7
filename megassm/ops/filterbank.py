"""The causal convolution of every channel with the same K spectral filters, four ways.

    f[t, k] = sum_{s=0..t} phi[s, k] u[t - s]          for each of the D channels of u

`direct_filterbank` is the truth. `chunked_filterbank` is the way to train: the bank is, to rounding, a linear
state-space model with S states shared by all K filters (see `megassm.ops.realize`), so that chunks of C positions need

    x_{c+1} = A x_c + B U_c          F_c = [T | Q] [U_c ; x_c]

matrix products only, linear time, and an x that is all a later position needs to know of the past.

Every way takes u_BLD and the filters, or matrices made from them, and gives features (B, L, K, D) in u's dtype.
Shapes: B batch, L length, D channels, K filters, C chunk, S states, I = C + S, N = B * chunks.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from megassm.errors import UserError
from megassm.ops import states
from megassm.ops.documents import Segments
from megassm.ops.kernel_check import in_compiled_graph

FLASHFFT_TOLERANCE = 0.02
"""Of the result's norm; bfloat16 has 8 bits."""


class ChunkTables(NamedTuple):
    """The bank as matrices for one chunk, in the dtype to compute in but for A."""

    transition_SS: Tensor
    """A, float64: its powers are formed before they are rounded."""
    input_SC: Tensor
    """B."""
    rows_CKI: Tensor
    """[T | Q]: output position, filter; then input position or state."""
    change_SS: Tensor | None = None
    """A - 1 in float32, where it is wanted more than once."""


class MadeTables:
    """Tables made once for each dtype and budget, until they are asked of other filters or on another device."""

    def __init__(self) -> None:
        self._made: dict[tuple[torch.dtype, int], ChunkTables] = {}
        self._of: Tensor | None = None

    def get(self, of: Tensor, key: tuple[torch.dtype, int], make: Callable[[], ChunkTables]) -> ChunkTables:
        """Those of the filters whose transition is `of`, the very tensor."""
        if self._of is not of:
            self._made, self._of = {}, of
        if key not in self._made:
            with torch.inference_mode(False):  # they are used in training too
                self._made[key] = make()
        return self._made[key]


def direct_filterbank(u_BLD: Tensor, filters_LK: Tensor, k: int) -> Tensor:
    """One product with the filters' Toeplitz matrices: O(L^2), any dtype. `filters_LK` has at least L rows."""
    length = u_BLD.shape[1]
    rows = toeplitz_rows(filters_LK[:length, :k])
    features: Tensor = rows.flatten(0, 1) @ u_BLD
    return features.view(u_BLD.shape[0], length, k, -1)


def fft_filterbank(u_BLD: Tensor, filters_LK: Tensor, k: int) -> Tensor:
    """By FFT of twice the length: O(L log L), float32 or float64. `filters_LK` has at least L rows."""
    length = u_BLD.shape[1]
    size = 2 * length  # no wrap-around
    u_BFD = torch.fft.rfft(u_BLD, n=size, dim=1)
    filters_FK = torch.fft.rfft(filters_LK[:length, :k], n=size, dim=0)
    features_BSKD: Tensor = torch.fft.irfft(filters_FK[:, :, None] * u_BFD[:, :, None, :], n=size, dim=1)
    return features_BSKD[:, :length]


def flashfft_filterbank(u_BLD: Tensor, filters_LK: Tensor, k: int) -> Tensor:
    """By FlashFFTConv (arXiv 2311.05908): CUDA only, float16 or bfloat16 inside, result in u's dtype."""
    length = u_BLD.shape[1]
    size = max(256, 1 << (2 * length - 1).bit_length())  # it knows powers of two from 256
    conv = _flashfft_conv(size, torch.bfloat16)
    u_BDL = u_BLD.transpose(1, 2).to(torch.bfloat16).contiguous()
    width = u_BDL.shape[1]
    features = [
        conv(u_BDL, filters_LK[:length, i].float().expand(width, -1).contiguous()).transpose(1, 2) for i in range(k)
    ]
    return torch.stack(features, dim=2).to(u_BLD.dtype)


@lru_cache(maxsize=8)
def _flashfft_conv(size: int, dtype: torch.dtype) -> Any:
    from flashfftconv import FlashFFTConv

    return FlashFFTConv(size, dtype=dtype).cuda()


def check_flashfft(filters_LK: Tensor, length: int) -> None:
    """Compares FlashFFTConv with `fft_filterbank` on noise, once, before anything relies on it.

    Raises:
        UserError: not installed, no CUDA, or a result that is not the convolution.
    """
    way_out = "set model.filterbank: chunked, which needs nothing"
    if importlib.util.find_spec("flashfftconv") is None:
        raise UserError(f"model.filterbank = 'flashfft': the package flashfftconv is not installed; {way_out}")
    if filters_LK.device.type != "cuda":
        raise UserError(f"model.filterbank = 'flashfft': it runs on CUDA only, this is {filters_LK.device}; {way_out}")
    u_BLD = torch.randn(1, length, 16, device=filters_LK.device)
    expected = fft_filterbank(u_BLD, filters_LK.float(), filters_LK.shape[1])
    found = flashfft_filterbank(u_BLD, filters_LK, filters_LK.shape[1])
    error = float((found - expected).norm() / expected.norm())
    if not error < FLASHFFT_TOLERANCE:
        raise UserError(
            f"model.filterbank = 'flashfft': at length {length} it differs from torch.fft by {error:.1e} of the "
            f"result, more than {FLASHFFT_TOLERANCE}; {way_out}"
        )


def chunked_filterbank(u_BLD: Tensor, tables: ChunkTables, segments: Segments | None = None) -> Tensor:
    """By chunks and a shared state: O(L), matrix products only; also beyond the length the filters were made for.

    With `segments`, of rows of C positions, no position sees another document.
    """
    batch, length, width = u_BLD.shape
    z_NID = chunk_inputs(u_BLD, tables, segments)
    features_NCKD = chunk_features(z_NID, tables.rows_CKI)
    if segments is not None and segments.has_copies:
        features_NCKD = segments.join(features_NCKD, chunk_features(copied_inputs(z_NID, segments), tables.rows_CKI))
    return features_NCKD.reshape(batch, -1, features_NCKD.shape[2], width)[:, :length]


def chunk_features(z_NID: Tensor, rows_CKI: Tensor) -> Tensor:
    """rows @ z, (N, C, K, D)."""
    rows_XI = rows_CKI.flatten(0, 1).to(z_NID.dtype)
    features_NXD = torch.bmm(rows_XI.expand(z_NID.shape[0], -1, -1), z_NID)
    return features_NXD.view(z_NID.shape[0], *rows_CKI.shape[:2], -1)


def toeplitz_rows(filters_LK: Tensor) -> Tensor:
    """T (L, K, L) with T[t, k, s] = filters[t - s, k], and 0 for s > t."""
    length = filters_LK.shape[0]
    padded_SK = F.pad(filters_LK, (0, 0, length - 1, 0))  # entry t - s + L - 1; zero for the future
    time = torch.arange(length, device=filters_LK.device)
    return padded_SK[time[:, None] - time + length - 1].transpose(1, 2)


def chunk_inputs(
    u_BLD: Tensor, tables: ChunkTables, segments: Segments | None = None, states_BNSD: Tensor | None = None
) -> Tensor:
    """[U_c ; x_c] (N, I, D) of every chunk: its own inputs, zero beyond the end, and the state it starts from."""
    if segments is None and states_BNSD is None:
        if in_compiled_graph() and states.kernel_fits(u_BLD, tables.input_SC):
            assert tables.change_SS is not None
            inputs: Tensor = inputs_node(u_BLD, tables.transition_SS, tables.input_SC, tables.change_SS)
            return inputs
        if states.kernel_serves(u_BLD, tables.input_SC):
            return states.chunk_inputs(u_BLD, tables.transition_SS, tables.input_SC, tables.change_SS)
    u_BNCD = chunked(u_BLD, tables.input_SC.shape[1])
    if states_BNSD is None:
        states_BNSD = chunk_states(u_BNCD, tables, segments)
    return torch.cat((u_BNCD, states_BNSD.to(u_BNCD.dtype)), dim=2).flatten(0, 1)


@torch.library.custom_op("megassm::chunk_inputs", mutates_args=())
def inputs_node(u_BLD: Tensor, transition_SS: Tensor, input_SC: Tensor, change_SS: Tensor) -> Tensor:
    """`chunk_inputs` of whole sequences as one node of a compiled graph, which can neither ask whether the kernel is
    right nor make the recurrence in one pass."""
    return chunk_inputs(u_BLD, ChunkTables(transition_SS, input_SC, input_SC, change_SS))


@torch.library.custom_op("megassm::chunk_inputs_backward", mutates_args=())
def _inputs_backward_node(
    dz_NID: Tensor, length: int, transition_SS: Tensor, input_SC: Tensor, change_SS: Tensor
) -> Tensor:
    """The gradient of u (B, L, D); z is linear in it, whatever it is."""
    shape = torch.Size((_batch(dz_NID, length, input_SC), length, dz_NID.shape[2]))
    if states.kernel_serves(dz_NID, input_SC):
        return states.chunk_inputs_backward(dz_NID, change_SS, input_SC, shape)
    return _gradient_by_products(dz_NID, transition_SS, input_SC, shape)


def _gradient_by_products(dz_NID: Tensor, transition_SS: Tensor, input_SC: Tensor, shape: torch.Size) -> Tensor:
    """dU_j + B^T sum_{c>j} (A^T)^(c-1-j) dx_c: the states' recurrence from the end on, of the transposed matrices."""
    size, chunk = input_SC.shape
    wide = torch.promote_types(dz_NID.dtype, torch.float32)
    dz_BNID = torch.unflatten(dz_NID.to(wide), 0, (shape[0], -1))
    identity_SS = torch.eye(size, dtype=wide, device=dz_NID.device)
    back = ChunkTables(transition_SS.t(), identity_SS, identity_SS)
    sums_BNSD = chunk_states(dz_BNID[:, :, chunk:].flip(1), back).flip(1)
    du_BNCD: Tensor = dz_BNID[:, :, :chunk] + input_SC.t().to(wide) @ sums_BNSD
    return du_BNCD.flatten(1, 2)[:, : shape[1]].to(dz_NID.dtype).contiguous()


def _batch(z_NID: Tensor, length: int, input_SC: Tensor) -> int:
    return z_NID.shape[0] // -(-length // input_SC.shape[1])


@inputs_node.register_fake
def _(u_BLD: Tensor, transition_SS: Tensor, input_SC: Tensor, change_SS: Tensor) -> Tensor:
    states, chunk = input_SC.shape
    return u_BLD.new_empty(u_BLD.shape[0] * -(-u_BLD.shape[1] // chunk), chunk + states, u_BLD.shape[2])


@_inputs_backward_node.register_fake
def _(dz_NID: Tensor, length: int, transition_SS: Tensor, input_SC: Tensor, change_SS: Tensor) -> Tensor:
    return dz_NID.new_empty(_batch(dz_NID, length, input_SC), length, dz_NID.shape[2])


def _keep_tables(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    u_BLD, *tables = inputs
    ctx.length = u_BLD.shape[1]
    ctx.save_for_backward(*tables)


def _inputs_gradient(ctx: Any, dz_NID: Tensor) -> tuple[Tensor, None, None, None]:
    return _inputs_backward_node(dz_NID, ctx.length, *ctx.saved_tensors), None, None, None


inputs_node.register_autograd(_inputs_gradient, setup_context=_keep_tables)


def copied_inputs(z_NID: Tensor, segments: Segments) -> Tensor:
    """`chunk_inputs` (X, I, D) of the copies: the inputs of one document, and no state."""
    chunk = segments.own_XC.shape[1]
    return F.pad(segments.copies(z_NID[:, :chunk]), (0, 0, 0, z_NID.shape[1] - chunk))


def chunk_states(u_BNCD: Tensor, tables: ChunkTables, segments: Segments | None = None) -> Tensor:
    """x_c (B, chunks, S, D): the state each chunk starts from, the first from zero.

    x_c = sum_{j<c} A^(c-1-j) B U_j by doubling: after step i a chunk holds the sum over its 2^i predecessors. The
    recurrence runs in at least float32, whatever u is: its errors would add up along the sequence. A's powers are
    squared in float64 and then rounded: A has eigenvalues so near 1 that the errors of squaring a rounded one would
    show (at L = 1,048,576 2e-5 of the features, against 6e-7).

    With `segments` a chunk adds the inputs of the document it ends in, and its state goes on only through chunks of
    that document: as the documents' numbers do not fall, two chunks that open with the same one have no other between.
    """
    dtype = torch.promote_types(u_BNCD.dtype, torch.float32)
    if segments is not None:
        opening_BN, goes_on_BN = segments.opening_BN, segments.closing_BN[:, :-1] == segments.opening_BN[:, 1:]
        u_BNCD = u_BNCD.where(segments.tail_BNC[..., None], 0)
    added_BNSD = torch.matmul(tables.input_SC.to(dtype), u_BNCD[:, :-1].to(dtype))
    if segments is not None:
        added_BNSD = added_BNSD.where(goes_on_BN[..., None, None], 0)
    states_BNSD = F.pad(added_BNSD, (0, 0, 0, 0, 1, 0))
    power_SS, distance = tables.transition_SS, 1
    while distance < states_BNSD.shape[1]:
        carried = torch.matmul(power_SS.to(dtype), states_BNSD[:, :-distance])
        if segments is not None:
            carried = carried.where((opening_BN[:, distance:] == opening_BN[:, :-distance])[..., None, None], 0)
        states_BNSD = states_BNSD + F.pad(carried, (0, 0, 0, 0, distance, 0))
        power_SS, distance = power_SS @ power_SS, 2 * distance
    return states_BNSD.to(u_BNCD.dtype)


def chunk_powers(transition_SS: Tensor, count: int) -> Tensor:
    """A^n for n = 0 .. count-1, (count, S, S)."""
    powers_MSS = torch.eye(len(transition_SS), dtype=transition_SS.dtype, device=transition_SS.device)[None]
    power_SS = transition_SS
    while len(powers_MSS) < count:
        powers_MSS = torch.cat((powers_MSS, power_SS @ powers_MSS))
        power_SS = power_SS @ power_SS
    return powers_MSS[:count]


def chunked(u_BLD: Tensor, chunk: int) -> Tensor:
    """(B, N, C, D), zero beyond the end."""
    batch, length, width = u_BLD.shape
    return F.pad(u_BLD, (0, 0, 0, -length % chunk)).reshape(batch, -1, chunk, width)
