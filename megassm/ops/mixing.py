"""The gate's weights, and the gated features' few large matrix products.

    shat  = sqrt(K) s / max(||s||_2, eps)               over the K leading scores (ES-SSM, Eq. 8b)
    alpha = softmax(shat), or 2 sigmoid(s), which has nothing to do with the other channels
    y     = sum_{k<=K} alpha_k sigma_k^(1/4) M_k f_k    as one product with inner dimension K*P

Each of H heads has P = D/H of the inputs, weights and matrices of its own: to the products they are H times as many
chunks of an Hth of the width.

Shapes: B batch, L length, H heads, K channels within the budget, D inputs, P = D/H, E outputs of a head, C chunk,
I inputs and states of a chunk, N chunks of all sequences, M = H N, Q = N C.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megassm.ops import head_mixing
from megassm.ops.documents import Segments
from megassm.ops.filterbank import copied_inputs
from megassm.ops.kernel_check import agrees, has_triton, in_compiled_graph
from megassm.ops.precision import without_autocast

NORM_FLOOR = 1e-6
GROUP_BYTES = {"cpu": 8 << 20, "cuda": 1 << 30}
"""Features held at a time, in either direction; on a CPU few enough to stay in its caches."""

TRITON_INPUTS = 128
"""Largest I whose blocks fit the shared memory of a CUDA core."""
TRITON_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Of the norm, for `_triton_is_right`."""


def gate_weights(scores_BLK: Tensor, rescale: bool) -> Tensor:
    """alpha (B, L, K) in at least float32: the masked softmax, given only the scores within the budget.

    With `rescale` the scores' root mean square is 1 first, so that the softmax's temperature does not depend on K.
    """
    scores_BLK = scores_BLK.to(torch.promote_types(scores_BLK.dtype, torch.float32))
    if rescale:
        norm_BL1 = torch.linalg.vector_norm(scores_BLK, dim=-1, keepdim=True)
        scores_BLK = scores_BLK * (scores_BLK.shape[-1] ** 0.5 / norm_BL1.clamp_min(NORM_FLOOR))
    return scores_BLK.softmax(dim=-1)


def open_weights(scores_BLHK: Tensor) -> Tensor:
    """alpha = 2 sigmoid(s) in at least float32: 1 where the score is 0, and the same at every budget."""
    return 2 * scores_BLHK.to(torch.promote_types(scores_BLHK.dtype, torch.float32)).sigmoid()


def mix_channels(features_BLKD: Tensor, weights_BLHK: Tensor, channels_KDE: Tensor) -> Tensor:
    """sum_k weights[k] * (features[k] @ channels[k]), (B, L, H*E), without forming any (B, L, K, E) product.

    Head h has the features, and the rows of `channels`, from h*P on.
    """
    gated_HQX = gate_features(features_BLKD, weights_BLHK).flatten(1, 2).to(channels_KDE.dtype)
    mixed_HQE = torch.bmm(gated_HQX, _head_matrices(channels_KDE, weights_BLHK.shape[2]))
    return _heads_last(torch.unflatten(mixed_HQE, 1, features_BLKD.shape[:2]))


def gate_features(features_BLKD: Tensor, weights_BLHK: Tensor) -> Tensor:
    """(H, B, L, K*P): each head's features times their weights, channel by channel."""
    gated_HBLKP = _heads_first(features_BLKD, weights_BLHK.shape[2]) * weights_BLHK.movedim(2, 0)[..., None]
    return gated_HBLKP.flatten(3)


def gated_product(z_NID: Tensor, rows_CKI: Tensor, weights_NCHK: Tensor, channels_KDE: Tensor) -> Tensor:
    """`mix_channels(rows @ z, weights, channels)` (N, C, H*E) that keeps no feature: they are made again in backward.

    Features are formed, gated and multiplied in groups of filters, forward and backward, so that memory is O(N I D)
    whatever K is, and the cost of K filters is that of K products. On CUDA narrow heads form none outside of registers
    (`head_mixing`).

    Args:
        z_NID: a chunk's inputs and states (`chunk_inputs`).
        rows_CKI: constant, [T | Q]; no gradient.
        weights_NCHK: alpha_k sigma_k^(1/4).
        channels_KDE: M_k.
    """
    mixed: Tensor
    if in_compiled_graph():
        mixed = product_node(z_NID, rows_CKI, weights_NCHK, channels_KDE)
        return mixed
    if head_mixing.kernel_serves(z_NID, rows_CKI, weights_NCHK, channels_KDE):
        return head_mixing.gated_product(z_NID, rows_CKI, weights_NCHK, channels_KDE)
    mixed = _GatedProduct.apply(z_NID, rows_CKI, weights_NCHK, channels_KDE)  # type: ignore[no-untyped-call]
    return mixed


def mix_rows(
    z_NID: Tensor, rows_CKI: Tensor, weights_BLHK: Tensor, channels_KDE: Tensor, segments: Segments | None
) -> Tensor:
    """`mix_channels` (B, L, H*E) of features that are products with rows of C positions each; see `gated_product`."""
    (batch, length, heads, k), positions = weights_BLHK.shape, rows_CKI.shape[0]
    padding = -length % positions
    if padding or not weights_BLHK.is_contiguous():  # to pad is to copy
        weights_BLHK = F.pad(weights_BLHK, (0, 0, 0, 0, 0, padding))
    weights_NCHK = weights_BLHK.reshape(-1, positions, heads, k)
    mixed_NCE = gated_product(z_NID, rows_CKI, weights_NCHK, channels_KDE)
    if segments is not None and segments.has_copies:
        z_XID, weights_XCHK = copied_inputs(z_NID, segments), weights_NCHK[segments.copied_X]
        mixed_NCE = segments.join(mixed_NCE, gated_product(z_XID, rows_CKI, weights_XCHK, channels_KDE))
    return mixed_NCE.reshape(batch, length + padding, -1)[:, :length]


def gated_features(z_NID: Tensor, rows_XI: Tensor, weights_NX: Tensor) -> Tensor:
    """(rows @ z) * weights, (N, X, D) in z's dtype. The truth beside `mixing_triton.gated_features`."""
    features_NXD = torch.bmm(rows_XI.expand(z_NID.shape[0], -1, -1), z_NID)
    features_NXD *= weights_NX[..., None]
    return features_NXD


def gated_features_backward(
    z_NID: Tensor, rows_XI: Tensor, weights_NX: Tensor, dgated_NXD: Tensor
) -> tuple[Tensor, Tensor]:
    """(`gated_features` made again, the gradient of the weights); turns `dgated_NXD` into that of the features.

    The truth beside `mixing_triton.gated_features_backward`.
    """
    features_NXD = torch.bmm(rows_XI.expand(z_NID.shape[0], -1, -1), z_NID)
    dweights_NX = torch.einsum("nxd,nxd->nx", features_NXD, dgated_NXD).to(weights_NX.dtype)
    features_NXD *= weights_NX[..., None]
    dgated_NXD *= weights_NX[..., None]
    return features_NXD, dweights_NX


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z_NID: Tensor, rows_CKI: Tensor, weights_NCHK: Tensor, channels_KDE: Tensor) -> Tensor:
        ctx.save_for_backward(z_NID, rows_CKI, weights_NCHK, channels_KDE)
        return _product(z_NID, rows_CKI, weights_NCHK, channels_KDE)

    @staticmethod
    @without_autocast
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        dz_NID, dweights_NCHK, dchannels_KDE = _product_backward(dy, *ctx.saved_tensors)
        return dz_NID, None, dweights_NCHK, dchannels_KDE


def _product(z_NID: Tensor, rows_CKI: Tensor, weights_NCHK: Tensor, channels_KDE: Tensor) -> Tensor:
    """Filters go through in groups; X = (C, G) are the positions of a chunk and the filters of a group."""
    n, c, heads, _ = weights_NCHK.shape
    z_MIP, weights_MCK = _heads_first(z_NID, heads).flatten(0, 1), weights_NCHK.movedim(2, 0).flatten(0, 1)
    form, _ = _kernels(z_MIP)
    y_HQE, groups = None, _groups(z_MIP, rows_CKI)
    for ks in groups:
        gated_MXP = form(z_MIP, _rows(rows_CKI, ks, z_NID), weights_MCK[:, :, ks].flatten(1))
        matrices_HXE = _head_matrices(channels_KDE[ks], heads).to(z_NID.dtype)
        y_HQE = _plus_product(y_HQE, gated_MXP.view(heads, n * c, -1), matrices_HXE, len(groups) > 1)
        del gated_MXP  # before the next group is formed
    assert y_HQE is not None
    return _heads_last(y_HQE.to(channels_KDE.dtype).view(heads, n, c, -1))


def _product_backward(
    dy_NCE: Tensor, z_NID: Tensor, rows_CKI: Tensor, weights_NCHK: Tensor, channels_KDE: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of z, weights and channels."""
    n, c, heads, _ = weights_NCHK.shape
    z_MIP, weights_MCK = _heads_first(z_NID, heads).flatten(0, 1), weights_NCHK.movedim(2, 0).flatten(0, 1)
    _, form_again = _kernels(z_MIP)
    dy_HQE = _heads_first(dy_NCE.to(z_NID.dtype), heads).flatten(1, 2)
    dz_MIP, groups = None, _groups(z_MIP, rows_CKI)
    dweights_MCK = torch.empty_like(weights_MCK)
    dchannels_KDE = torch.empty_like(channels_KDE)
    for ks in groups:
        rows_XI, weights_MCG = _rows(rows_CKI, ks, z_NID), weights_MCK[:, :, ks]
        matrices_HXE = _head_matrices(channels_KDE[ks], heads).to(z_NID.dtype)
        dgated_MXP = torch.bmm(dy_HQE, matrices_HXE.transpose(1, 2)).view(heads * n, -1, z_MIP.shape[2])
        gated_MXP, dweights_MX = form_again(z_MIP, rows_XI, weights_MCG.flatten(1), dgated_MXP)
        dweights_MCK[:, :, ks] = dweights_MX.view_as(weights_MCG)
        dmatrices_HXE = torch.bmm(gated_MXP.view(heads, n * c, -1).transpose(1, 2), dy_HQE)
        dmatrices_HGPE = torch.unflatten(dmatrices_HXE, 1, (-1, z_MIP.shape[2]))
        dchannels_KDE[ks] = dmatrices_HGPE.transpose(0, 1).flatten(1, 2)
        dz_MIP = _plus_product(dz_MIP, rows_XI.t().expand(heads * n, -1, -1), dgated_MXP, len(groups) > 1)
        del gated_MXP, dgated_MXP
    assert dz_MIP is not None
    dz_NID = _heads_last(dz_MIP.to(z_NID.dtype).view(heads, n, *z_MIP.shape[1:]))
    return dz_NID, dweights_MCK.view(heads, n, c, -1).movedim(0, 2), dchannels_KDE


@torch.library.custom_op("megassm::gated_product", mutates_args=())
def product_node(z_NID: Tensor, rows_CKI: Tensor, weights_NCHK: Tensor, channels_KDE: Tensor) -> Tensor:
    """`gated_product` as one node of a compiled graph: a compiler would unroll its groups, and has no faster form of
    products that cuBLAS and the kernels of `mixing_triton` make already."""
    return gated_product(z_NID, rows_CKI, weights_NCHK, channels_KDE).contiguous()


@torch.library.custom_op("megassm::gated_product_backward", mutates_args=())
def _backward_node(
    dy_NCE: Tensor, z_NID: Tensor, rows_CKI: Tensor, weights_NCHK: Tensor, channels_KDE: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    given = z_NID, rows_CKI, weights_NCHK, channels_KDE
    gradients = head_mixing.gradients if head_mixing.kernel_serves(*given) else _product_backward
    dz_NID, dweights_NCHK, dchannels_KDE = gradients(dy_NCE, *given)
    return dz_NID.contiguous(), dweights_NCHK.contiguous(), dchannels_KDE.contiguous()


@product_node.register_fake
def _(z_NID: Tensor, rows_CKI: Tensor, weights_NCHK: Tensor, channels_KDE: Tensor) -> Tensor:
    n, c, heads, _ = weights_NCHK.shape
    return channels_KDE.new_empty(n, c, heads * channels_KDE.shape[2])


@_backward_node.register_fake
def _(
    dy_NCE: Tensor, z_NID: Tensor, rows_CKI: Tensor, weights_NCHK: Tensor, channels_KDE: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        z_NID.new_empty(z_NID.shape),
        weights_NCHK.new_empty(weights_NCHK.shape),
        channels_KDE.new_empty(channels_KDE.shape),
    )


def _keep(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _node_gradients(ctx: Any, dy_NCE: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
    dz_NID, dweights_NCHK, dchannels_KDE = _backward_node(dy_NCE, *ctx.saved_tensors)
    return dz_NID, None, dweights_NCHK, dchannels_KDE


product_node.register_autograd(_node_gradients, setup_context=_keep)


def _kernels(z_NID: Tensor) -> tuple[Any, Any]:
    """How gated features are formed: by Triton on CUDA, where it is and is right; by torch anywhere else."""
    device, dtype = z_NID.device, z_NID.dtype
    narrow = dtype.itemsize == 2  # float32's products have no tensor cores there that are as exact as torch's
    if device.type == "cuda" and narrow and z_NID.shape[1] <= TRITON_INPUTS and _triton_is_right(device, dtype):
        from megassm.ops import mixing_triton

        return mixing_triton.gated_features, mixing_triton.gated_features_backward
    return gated_features, gated_features_backward


@lru_cache
def _triton_is_right(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the Triton kernels agree with torch on this device: asked once, before anything relies on them."""
    if not has_triton() or dtype not in TRITON_TOLERANCE:
        return False
    from megassm.ops import mixing_triton

    generator = torch.Generator(device).manual_seed(0)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    z_NID, rows_XI = noise(3, 108, 200).to(dtype), (noise(96, 108) / 10).to(dtype)
    weights_NX, dgated_NXD = noise(3, 96), noise(3, 96, 200).to(dtype)
    own = z_NID, rows_XI, weights_NX
    return agrees(
        lambda: (
            mixing_triton.gated_features(*own),
            *mixing_triton.gated_features_backward(*own, dgated_NXD.clone()),
        ),
        lambda: (gated_features(*own), *gated_features_backward(*own, dgated_NXD.clone())),
        TRITON_TOLERANCE[dtype], "kernels", "torch's products are", plural=True,
    )  # fmt: skip


def _heads_first(x_XD: Tensor, heads: int) -> Tensor:
    """(..., D) -> (H, ..., P)."""
    return torch.unflatten(x_XD, -1, (heads, -1)).movedim(-2, 0)


def _heads_last(x_HXYP: Tensor) -> Tensor:
    """(H, X, Y, P) -> (X, Y, H*P)."""
    return x_HXYP.movedim(0, 2).flatten(2)


def _head_matrices(channels_KDE: Tensor, heads: int) -> Tensor:
    """(H, K*P, E): each head's rows of all matrices, one below the other."""
    return torch.unflatten(channels_KDE, 1, (heads, -1)).transpose(0, 1).flatten(1, 2)


def _rows(rows_CKI: Tensor, ks: slice, z_NID: Tensor) -> Tensor:
    """[T | Q] (X, I) of a group of filters, in z's dtype."""
    return rows_CKI[:, ks].flatten(0, 1).to(z_NID.dtype)


def _groups(z_NID: Tensor, rows_CKI: Tensor) -> list[slice]:
    """The filters in runs whose features fit GROUP_BYTES."""
    c, k = rows_CKI.shape[:2]
    one = z_NID.shape[0] * c * z_NID.shape[2] * z_NID.element_size()
    size = max(1, min(k, GROUP_BYTES[z_NID.device.type] // max(1, one)))
    return [slice(first, min(k, first + size)) for first in range(0, k, size)]


def _plus_product(total: Tensor | None, left: Tensor, right: Tensor, more: bool) -> Tensor:
    """`total` and the batched product. Sums of several are in at least float32; the only one of 16 bits needs none.

    torch's FLOP counter does not see baddbmm_.
    """
    dtype = torch.promote_types(left.dtype, torch.float32)
    if total is None:
        if dtype != left.dtype and not more:
            return torch.bmm(left, right)
        total = left.new_zeros(left.shape[0], left.shape[1], right.shape[2], dtype=dtype)
    if dtype == left.dtype:
        return torch.baddbmm(total, left, right, out=total)
    return total.add_(torch.bmm(left, right))
