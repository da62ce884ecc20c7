"""Triton kernels of the mixer's product that write no feature; `head_mixing` has the truth and calls them.

    y_h   = sum_k diag(w_hk) (R_k z_h) M_kh
    dG_hk = dy_h M_kh^T                                 the gated features' gradient
    dw_hk = rowwise <R_k z_h, dG_hk>,   dz_h = sum_k R_k^T diag(w_hk) dG_hk
    dM_kh = sum over chunks of (diag(w_hk) R_k z_h)^T dy_h

A chunk's features of one channel, R_k z_h, are made in registers, gated, rounded to the inputs' dtype and multiplied
on; each kernel of the backward pass makes them again. Heads are read and written where they lie in z, w, M and y. Sums
are float32; products of float32 are three tf32 ones each, which is float32's accuracy. Nothing is added atomically:
two runs give the same bits.

Shapes: N chunks, C positions and I inputs and states of a chunk, R = I filled up, H heads, K channels, P inputs and E
outputs of a head, S splits of the chunks, T tiles of P.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from megassm.ops.head_mixing import Tiles, inputs_tiles, power_of_two, split_chunks, tiles

ALIGNED = 16
"""Numbers by which a row of R_k is filled up: it is then copied 16 bytes at a time."""
STAGES = 2


@triton.jit
def _forward_kernel(  # type: ignore[no-untyped-def]
    z_ptr, rows_ptr, weights_ptr, channels_ptr, y_ptr, C, I, R, H, K, P, E,
    BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % H  # chunks are on the first axis too: the others end at 65,535
    n = (tl.program_id(0) // H).to(tl.int64)
    c, i = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_I)
    es = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    row_places = rows_ptr + c[:, None] * (K * R) + i[None, :]
    row_mask = (c[:, None] < C) & (i[None, :] < R)
    weight_places = weights_ptr + ((n * C + c) * H + head) * K
    y = tl.zeros((BLOCK_C, BLOCK_E), dtype=tl.float32)
    for first in range(0, P, BLOCK_P):
        ps = first + tl.arange(0, BLOCK_P)
        z_mask = (i[:, None] < I) & (ps[None, :] < P)
        z = tl.load(z_ptr + ((n * I + i[:, None]) * H + head) * P + ps[None, :], mask=z_mask, other=0.0)
        channel_places = channels_ptr + (head * P + ps[:, None]) * E + es[None, :]
        channel_mask = (ps[:, None] < P) & (es[None, :] < E)
        for k in range(0, K):
            rows = tl.load(row_places + k * R, mask=row_mask, other=0.0)
            weights = tl.load(weight_places + k, mask=c < C, other=0.0)
            channels = tl.load(channel_places, mask=channel_mask, other=0.0)
            gated = tl.dot(rows, z, input_precision="tf32x3") * weights[:, None]
            y = tl.dot(gated.to(channels.dtype), channels, y, input_precision="tf32x3")
            channel_places += H * P * E
    places = y_ptr + ((n * C + c[:, None]) * H + head) * E + es[None, :]
    tl.store(places, y.to(y_ptr.dtype.element_ty), mask=(c[:, None] < C) & (es[None, :] < E))


@triton.jit
def _inputs_kernel(  # type: ignore[no-untyped-def]
    z_ptr, rows_ptr, weights_ptr, channels_ptr, dy_ptr, dz_ptr, dweights_ptr, N, C, I, R, H, K, P, E,
    BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(0) % H
    n = (tl.program_id(0) // H).to(tl.int64)
    c, i = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_I)
    es = tl.arange(0, BLOCK_E)
    ps = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    row_places = rows_ptr + c[:, None] * (K * R) + i[None, :]
    row_mask = (c[:, None] < C) & (i[None, :] < R)
    weight_places = ((n * C + c) * H + head) * K
    dweight_places = dweights_ptr + tl.program_id(1).to(tl.int64) * N * C * H * K + weight_places
    z_places = ((n * I + i[:, None]) * H + head) * P + ps[None, :]
    z_mask = (i[:, None] < I) & (ps[None, :] < P)
    z = tl.load(z_ptr + z_places, mask=z_mask, other=0.0)
    dy_mask = (c[:, None] < C) & (es[None, :] < E)
    dy = tl.load(dy_ptr + ((n * C + c[:, None]) * H + head) * E + es[None, :], mask=dy_mask, other=0.0)
    channel_places = channels_ptr + (head * P + ps[:, None]) * E + es[None, :]
    channel_mask = (ps[:, None] < P) & (es[None, :] < E)
    dz = tl.zeros((BLOCK_I, BLOCK_P), dtype=tl.float32)
    for k in range(0, K):
        rows = tl.load(row_places + k * R, mask=row_mask, other=0.0)
        weights = tl.load(weights_ptr + weight_places + k, mask=c < C, other=0.0)
        channels = tl.load(channel_places, mask=channel_mask, other=0.0)
        dgated = tl.dot(dy, tl.trans(channels), input_precision="tf32x3")
        features = tl.dot(rows, z, input_precision="tf32x3")
        tl.store(dweight_places + k, tl.sum(features * dgated, axis=1), mask=c < C)
        dfeatures = (dgated * weights[:, None]).to(rows.dtype)
        dz = tl.dot(tl.trans(rows), dfeatures, dz, input_precision="tf32x3")
        channel_places += H * P * E
    tl.store(dz_ptr + z_places, dz.to(dz_ptr.dtype.element_ty), mask=z_mask)


@triton.jit
def _channels_kernel(  # type: ignore[no-untyped-def]
    z_ptr, rows_ptr, weights_ptr, dy_ptr, dchannels_ptr, N, C, I, R, H, K, P, E, CHUNKS,
    BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    k, head = tl.program_id(0) % K, tl.program_id(0) // K % H  # a head's channels read the same inputs, side by side
    split = tl.program_id(0) // (K * H)
    c, i = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_I)
    across = tl.cdiv(E, BLOCK_E)
    ps = tl.program_id(1) // across * BLOCK_P + tl.arange(0, BLOCK_P)
    es = tl.program_id(1) % across * BLOCK_E + tl.arange(0, BLOCK_E)
    rows_mask = (c[:, None] < C) & (i[None, :] < R)
    rows = tl.load(rows_ptr + c[:, None] * (K * R) + k * R + i[None, :], mask=rows_mask, other=0.0)
    first = split * CHUNKS
    start = first.to(tl.int64)
    z_places = z_ptr + ((start * I + i[:, None]) * H + head) * P + ps[None, :]
    z_mask = (i[:, None] < I) & (ps[None, :] < P)
    dy_places = dy_ptr + ((start * C + c[:, None]) * H + head) * E + es[None, :]
    dy_mask = (c[:, None] < C) & (es[None, :] < E)
    weight_places = weights_ptr + ((start * C + c) * H + head) * K + k
    dchannels = tl.zeros((BLOCK_P, BLOCK_E), dtype=tl.float32)
    for _ in range(first, tl.minimum(first + CHUNKS, N)):
        z = tl.load(z_places, mask=z_mask, other=0.0)
        weights = tl.load(weight_places, mask=c < C, other=0.0)
        dy = tl.load(dy_places, mask=dy_mask, other=0.0)
        gated = tl.dot(tl.trans(z), tl.trans(rows), input_precision="tf32x3") * weights[None, :]
        dchannels = tl.dot(gated.to(dy.dtype), dy, dchannels, input_precision="tf32x3")
        z_places += I * H * P
        dy_places += C * H * E
        weight_places += C * H * K
    place = ((split.to(tl.int64) * K + k) * H + head) * P
    places = dchannels_ptr + (place + ps[:, None]) * E + es[None, :]
    tl.store(places, dchannels.to(dchannels_ptr.dtype.element_ty), mask=(ps[:, None] < P) & (es[None, :] < E))


def padded(rows_CKI: Tensor) -> Tensor:
    """R_k (C, K, R), zero beyond I."""
    return F.pad(rows_CKI, (0, -rows_CKI.shape[2] % ALIGNED)).contiguous()


def gated_product(z_NID: Tensor, rows_CKR: Tensor, weights_NCHK: Tensor, channels_KDE: Tensor) -> Tensor:
    """y (N, C, H*E) in z's dtype, which that of `rows` and `channels` is; all are contiguous, weights float32."""
    sizes, (n, c, _, heads, _, p, e) = _sizes(z_NID, rows_CKR, weights_NCHK, channels_KDE)
    y_NCX = z_NID.new_empty(n, c, heads * e)
    tile = tiles(p, e)
    _forward_kernel[n * heads, triton.cdiv(e, tile.e)](
        z_NID, rows_CKR, weights_NCHK, channels_KDE, y_NCX, *sizes, **_options(tile, rows_CKR),
    )  # fmt: skip
    return y_NCX


def inputs_backward(
    z_NID: Tensor, rows_CKR: Tensor, weights_NCHK: Tensor, channels_KDE: Tensor, dy_NCX: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of z, in its dtype, and of the weights, in float32."""
    sizes, (n, c, _, heads, k, p, e) = _sizes(z_NID, rows_CKR, weights_NCHK, channels_KDE)
    tile = inputs_tiles(p, e, _capability(z_NID.device))
    across = triton.cdiv(p, tile.p)
    dz_NID, dweights_TNCHK = torch.empty_like(z_NID), weights_NCHK.new_empty(across, n, c, heads, k)
    _inputs_kernel[n * heads, across](
        z_NID, rows_CKR, weights_NCHK, channels_KDE, dy_NCX, dz_NID, dweights_TNCHK, n, *sizes,
        **_options(tile, rows_CKR),
    )  # fmt: skip
    return dz_NID, dweights_TNCHK[0] if across == 1 else dweights_TNCHK.sum(0)


def channels_backward(
    z_NID: Tensor, rows_CKR: Tensor, weights_NCHK: Tensor, channels_KDE: Tensor, dy_NCX: Tensor
) -> Tensor:
    """The gradient of the matrices, in z's dtype or in float32: in that in which it was summed last."""
    sizes, (n, _, _, heads, k, p, e) = _sizes(z_NID, rows_CKR, weights_NCHK, channels_KDE)
    tile = tiles(p, e)
    across = triton.cdiv(p, tile.p) * triton.cdiv(e, tile.e)
    chunks = split_chunks(n, k * heads * across)
    splits = triton.cdiv(n, chunks)
    dtype = channels_KDE.dtype if splits == 1 else torch.float32
    dchannels_SKDE = torch.empty(splits, *channels_KDE.shape, dtype=dtype, device=z_NID.device)
    _channels_kernel[splits * k * heads, across](
        z_NID, rows_CKR, weights_NCHK, dy_NCX, dchannels_SKDE, n, *sizes, chunks, **_options(tile, rows_CKR),
    )  # fmt: skip
    return dchannels_SKDE[0] if splits == 1 else dchannels_SKDE.sum(0)


def _sizes(
    z_NID: Tensor, rows_CKR: Tensor, weights_NCHK: Tensor, channels_KDE: Tensor
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(C, I, R, H, K, P, E as the kernels take them; N, C, I, H, K, P, E)."""
    (n, i, d), (c, k, r), heads, e = z_NID.shape, rows_CKR.shape, weights_NCHK.shape[2], channels_KDE.shape[2]
    return (c, i, r, heads, k, d // heads, e), (n, c, i, heads, k, d // heads, e)


def _options(tile: Tiles, rows_CKR: Tensor) -> dict[str, int]:
    c, _, r = rows_CKR.shape
    blocks = {"BLOCK_C": power_of_two(c), "BLOCK_I": power_of_two(r), "BLOCK_P": tile.p, "BLOCK_E": tile.e}
    return blocks | {"num_warps": tile.warps, "num_stages": STAGES}


def _capability(device: torch.device) -> int:
    """Such as 90."""
    major, minor = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    return 10 * major + minor
