"""`mixing.gated_product` by Triton kernels that never write a feature, for heads narrow enough; on CUDA in 16 bits.

torch's way writes (N, C, K, D) features, gated, and reads them, a group of channels at a time, and copies heads apart
and together again. Where a head's matrices are small the products take less time than those bytes. Here a program
makes a chunk's features of one channel and head in registers and multiplies them on; it keeps the sum over the
channels in registers too, and writes it once.

Shapes: N chunks, C positions and I inputs and states of a chunk, H heads, K channels within the budget, D inputs,
P = D/H, E outputs of a head, S splits of the chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from megassm.config.model import FUSED_HEAD_WIDTH, FUSED_INPUTS
from megassm.ops.kernel_check import agrees, has_triton, with_gradients

MOST_POSITIONS = 64
"""C of the largest program."""
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Of the norm, for `_is_right`: gated features are rounded once, and the gradient of the weights is not."""
LEAST, MOST_P = 16, 64
"""Numbers of an axis that tensor cores take, and of P that a program does."""
PROGRAMS = 264
"""Wanted for the matrices' gradient, which are few at a small K: two for each core of an H100. On every card, so that
all add in the same order."""


class Tiles(NamedTuple):
    """Of P and E that a program has at a time, and its warps."""

    p: int
    e: int
    warps: int


def tiles(p: int, e: int, most_p: int = MOST_P) -> Tiles:
    """All of E, in a power of two, and the parts of P that leave least over."""
    parts = [size for size in (64, 32) if size <= most_p] if p > LEAST else [LEAST]
    part = min(parts, key=lambda size: (-(-p // size) * size, -size))
    return Tiles(part, power_of_two(e), 8 if e > 32 else 4)


def inputs_tiles(p: int, e: int, capability: int) -> Tiles:
    """Those of z's gradient: with more of P its kernel spills registers on an A100 (80)."""
    return tiles(p, e, MOST_P if capability >= 90 else 32)


def split_chunks(chunks: int, matrices: int) -> int:
    """Chunks of a split, over which a program sums a part of `matrices`."""
    splits = min(chunks, -(-PROGRAMS // matrices))
    return -(-chunks // splits)


def power_of_two(size: int) -> int:
    """That holds `size`, and is no less than `LEAST`."""
    return max(LEAST, 1 << (size - 1).bit_length())


def kernel_serves(z_NID: Tensor, rows_CKI: Tensor, weights_NCHK: Tensor, channels_KDE: Tensor) -> bool:
    """Whether `gated_product` of this module computes these.

    Not in float32: three tf32 products each spill registers on the cards that the compiler was asked about. Not in a
    graph of torch.compile, which has no place for the question whether a kernel is right: it has a node for that.
    """
    width, outputs = channels_KDE.shape[1] // weights_NCHK.shape[2], channels_KDE.shape[2]
    return (
        z_NID.device.type == "cuda"
        and z_NID.dtype.itemsize == 2
        and weights_NCHK.dtype == torch.float32
        and max(width, outputs) <= FUSED_HEAD_WIDTH
        and z_NID.shape[1] <= FUSED_INPUTS
        and rows_CKI.shape[0] <= MOST_POSITIONS
        and not torch.compiler.is_compiling()
        and _is_right(z_NID.device, z_NID.dtype, width, outputs)
    )


def gated_product(z_NID: Tensor, rows_CKI: Tensor, weights_NCHK: Tensor, channels_KDE: Tensor) -> Tensor:
    """sum_k weights[k] * ((rows[k] @ z) @ channels[k]), (N, C, H*E), head by head, in the dtype of `channels`."""
    mixed: Tensor = _GatedProduct.apply(z_NID, rows_CKI, weights_NCHK, channels_KDE)  # type: ignore[no-untyped-call]
    return mixed


class _GatedProduct(torch.autograd.Function):
    """What is kept is what was given."""

    @staticmethod
    def forward(ctx: Any, z_NID: Tensor, rows_CKI: Tensor, weights_NCHK: Tensor, channels_KDE: Tensor) -> Tensor:
        from megassm.ops import head_mixing_triton

        rows_CKR = head_mixing_triton.padded(rows_CKI.to(z_NID.dtype))
        z_NID, weights_NCHK, channels_KDE = z_NID.contiguous(), weights_NCHK.contiguous(), channels_KDE.contiguous()
        ctx.save_for_backward(z_NID, rows_CKR, weights_NCHK, channels_KDE)
        narrow_KDE = channels_KDE.to(z_NID.dtype)
        return head_mixing_triton.gated_product(z_NID, rows_CKR, weights_NCHK, narrow_KDE).to(channels_KDE.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor, Tensor]:
        dz_NID, dweights_NCHK, dchannels_KDE = _gradients(grads[0], *ctx.saved_tensors)
        return dz_NID, None, dweights_NCHK, dchannels_KDE


def gradients(
    dy_NCX: Tensor, z_NID: Tensor, rows_CKI: Tensor, weights_NCHK: Tensor, channels_KDE: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Those of z, weights and channels, of what `gated_product` was given."""
    from megassm.ops import head_mixing_triton

    rows_CKR = head_mixing_triton.padded(rows_CKI.to(z_NID.dtype))
    return _gradients(dy_NCX, z_NID.contiguous(), rows_CKR, weights_NCHK.contiguous(), channels_KDE.contiguous())


def _gradients(
    dy_NCX: Tensor, z_NID: Tensor, rows_CKR: Tensor, weights_NCHK: Tensor, channels_KDE: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from megassm.ops import head_mixing_triton

    narrow = channels_KDE.to(z_NID.dtype), dy_NCX.to(z_NID.dtype).contiguous()
    dz_NID, dweights_NCHK = head_mixing_triton.inputs_backward(z_NID, rows_CKR, weights_NCHK, *narrow)
    dchannels_KDE = head_mixing_triton.channels_backward(z_NID, rows_CKR, weights_NCHK, *narrow)
    return dz_NID, dweights_NCHK, dchannels_KDE.to(channels_KDE.dtype)


@lru_cache
@torch.inference_mode(False)
def _is_right(device: torch.device, dtype: torch.dtype, width: int, outputs: int) -> bool:
    """Whether the kernels agree with torch on this device, forward and backward: asked once for each kind of heads."""
    if not has_triton() or dtype not in TOLERANCE:
        return False
    generator = torch.Generator().manual_seed(0)
    n, c, i, heads, k = 3, 64, 108, 2, 3

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    rows_CKI, dy_NCX = noise(c, k, i) / 10, noise(n, c, heads * outputs)
    given = noise(n, i, heads * width), noise(n, c, heads, k).float(), noise(k, heads * width, outputs)
    exact = [tensor.double() for tensor in given]
    return agrees(
        lambda: product_with_gradients(gated_product, given, rows_CKI, dy_NCX),
        lambda: product_with_gradients(_truth, exact, rows_CKI.double(), dy_NCX.double()),
        TOLERANCE[dtype], f"product of heads of {width} inputs", "torch's is",
    )  # fmt: skip


def _truth(z_NID: Tensor, rows_CKI: Tensor, weights_NCHK: Tensor, channels_KDE: Tensor) -> Tensor:
    """By all features at once."""
    heads = weights_NCHK.shape[2]
    z_NIHP, channels_KHPE = torch.unflatten(z_NID, 2, (heads, -1)), torch.unflatten(channels_KDE, 1, (heads, -1))
    gated_NCKHP = torch.einsum("cki,nihp,nchk->nckhp", rows_CKI, z_NIHP, weights_NCHK)
    return torch.einsum("nckhp,khpe->nche", gated_NCKHP, channels_KHPE).flatten(2)


def product_with_gradients(way: Any, given: Sequence[Tensor], rows_CKI: Tensor, dy_NCX: Tensor) -> tuple[Tensor, ...]:
    """(y, the gradients of those that are given: z, weights, channels)."""
    return with_gradients(lambda z_NID, *others: way(z_NID, rows_CKI, *others), given, dy_NCX)
