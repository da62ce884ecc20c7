"""What a filter bank computes for a layer whose past fades by what it reads (`megassm.ops.selective`).

Shapes: those of `megassm.layers.filterbank`; X = K + 1, weights with the log decays behind them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from megassm.config.model import CHUNK
from megassm.layers.spectral_state import SpectralState, WindowState
from megassm.ops.documents import Segments
from megassm.ops.filterbank import chunk_features, chunked, copied_inputs
from megassm.ops.kernel_check import is_exporting
from megassm.ops.mixing import mix_rows
from megassm.ops.selective import (
    FadedRows,
    chunk_rows,
    dense_features,
    faded_states,
    parted,
    past_filters,
    past_rows,
    per_head,
)

if TYPE_CHECKING:
    from megassm.layers.filterbank import FilterBank


class _Product(NamedTuple):
    """Rows of positions, the filters for them, and the documents that cut these rows."""

    rows: FadedRows
    filters_CKI: Tensor
    segments: Segments | None


def _product(bank: FilterBank, u_BLD: Tensor, log_decay_BLH: Tensor, k: int, segments: Segments | None) -> _Product:
    """By chunks; where the filters have no state by rows of the whole past, of sequences without further documents."""
    if bank.way(u_BLD.shape[1]) == "chunked":
        tables = bank.tables(u_BLD.dtype, k)
        return _Product(chunk_rows(u_BLD, log_decay_BLH, tables, segments), tables.rows_CKI, segments)
    length = u_BLD.shape[1]
    chunk = min(CHUNK, length)
    filters_CKI = past_filters(bank.filters(u_BLD)[:length, :k], chunk)
    return _Product(past_rows(u_BLD, log_decay_BLH, chunk), filters_CKI, None)


def mix(
    bank: FilterBank, u_BLD: Tensor, weights_BLHX: Tensor, channels_KDE: Tensor, segments: Segments | None
) -> Tensor:
    """`FilterBank.mix`."""
    k, u_BLD = len(channels_KDE), _wide(u_BLD)
    weights_BLHK, log_decay_BLH = parted(weights_BLHX, k)
    assert log_decay_BLH is not None
    rows, filters_CKI, cut = _product(bank, u_BLD, log_decay_BLH, k, segments)
    weights_BLHK = weights_BLHK * rows.scale_BLH[..., None]
    mixed_BLE = mix_rows(rows.z_NID, filters_CKI, weights_BLHK, channels_KDE, cut)
    if cut is None and segments is not None and segments.has_copies:
        copies = segments.copies(u_BLD), weights_BLHX[segments.copied_X]
        return segments.join(mixed_BLE, mix(bank, *copies, channels_KDE, None))
    return mixed_BLE


def features(bank: FilterBank, u_BLD: Tensor, log_decay_BLH: Tensor, k: int, segments: Segments | None) -> Tensor:
    """`FilterBank.forward`, of inputs in at least float32."""
    if is_exporting():
        return dense_features(u_BLD, log_decay_BLH, bank.filters(u_BLD)[: u_BLD.shape[1], :k])
    batch, length, width = u_BLD.shape
    rows, filters_CKI, cut = _product(bank, u_BLD, log_decay_BLH, k, segments)
    features_NCKD = chunk_features(rows.z_NID, filters_CKI)
    if cut is not None and cut.has_copies:
        features_NCKD = cut.join(features_NCKD, chunk_features(copied_inputs(rows.z_NID, cut), filters_CKI))
    features_BLKD = features_NCKD.reshape(batch, -1, k, width)[:, :length]
    features_BLKD = per_head(features_BLKD, rows.scale_BLH[:, :, None])
    if cut is None and segments is not None and segments.has_copies:
        copies = segments.copies(u_BLD), log_decay_BLH[segments.copied_X]
        return segments.join(features_BLKD, features(bank, *copies, k, None))
    return features_BLKD


def mix_from(bank: FilterBank, u_BLD: Tensor, state_BSD: Tensor, weights_BLHX: Tensor, channels_KDE: Tensor) -> Tensor:
    """`FilterBank.mix_from`."""
    k, u_BLD = len(channels_KDE), _wide(u_BLD)
    weights_BLHK, log_decay_BLH = parted(weights_BLHX, k)
    assert log_decay_BLH is not None
    tables = bank.short_tables(u_BLD.dtype, k, u_BLD.shape[1])
    rows = chunk_rows(u_BLD, log_decay_BLH, tables, None, state_BSD)
    return mix_rows(rows.z_NID, tables.rows_CKI, weights_BLHK * rows.scale_BLH[..., None], channels_KDE, None)


def advance(bank: FilterBank, u_BLD: Tensor, state_BSD: Tensor, log_decay_BLH: Tensor) -> Tensor:
    """`FilterBank.advance`, from a state, of inputs in its dtype."""
    whole, length = u_BLD.shape[1] // CHUNK * CHUNK, u_BLD.shape[1]
    for first, last, positions in ((0, whole, CHUNK), (whole, length, length - whole)):
        if first == last:
            continue
        tables = bank.short_tables(u_BLD.dtype, 0, positions)
        inputs_BLD, faded_BNCH = u_BLD[:, first:last], chunked(log_decay_BLH[:, first:last], positions).cumsum(2)
        faded_BNCH = F.pad(faded_BNCH, (0, 0, 0, 0, 0, 1))  # the state at the end is that of one chunk more
        own_BSD = faded_states(inputs_BLD, faded_BNCH, tables)[:, -1]
        faded_BSD = per_head(state_BSD, log_decay_BLH[:, first:last].sum(1, keepdim=True).exp())
        state_BSD = bank.carried(faded_BSD, last - first) + own_BSD
    return state_BSD


def faded(state: SpectralState, log_decay_BH: Tensor) -> SpectralState:
    """A state at a position whose decay that is, before its input is read (`FilterBank.step`)."""
    factor_B1H = log_decay_BH[:, None].exp()
    if isinstance(state, Tensor):
        return per_head(state, factor_B1H)
    return WindowState(per_head(state.older_BSD, factor_B1H), per_head(state.newer_BSD, factor_B1H), state.lengths)


def _wide(u_BLD: Tensor) -> Tensor:
    """In a dtype that holds a chunk's factors, and on a CPU one with fast products."""
    if u_BLD.dtype == torch.float16 or u_BLD.device.type == "cpu":
        return u_BLD.to(torch.promote_types(u_BLD.dtype, torch.float32))
    return u_BLD
