"""Causal attention within windows and documents by torch's FlexAttention, on CUDA where it is and is right.

A dense mask is B x L x L numbers, and no fused kernel takes one. Here is known which blocks of positions see which,
from the blocks' first and last positions and documents alone; within a block that is seen in part, a function says.

Shapes: B batch, L length, H query heads, G key-value heads, P dimensions a head, N blocks of a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from megassm.ops.kernel_check import agrees, compiler_switch, has_triton, with_gradients

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK = 128
"""Positions of a block."""
LEAST_LENGTH = 512
"""Below it a dense mask is small, and texts have many lengths."""
LEAST_DIMENSIONS = 16
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}
"""Of the norm, for `_is_right`: a gradient's, of rounded weights; float32's products may be tf32's."""


def serves(like: Tensor, length: int, head_dim: int) -> bool:
    """Whether `attend` serves sequences of `length` in `like`'s dtype on its device, and is right there."""
    return (
        like.device.type == "cuda"
        and length >= LEAST_LENGTH
        and head_dim >= LEAST_DIMENSIONS
        and not torch.compiler.is_compiling()
        and compiler_switch() is None  # without a compiler FlexAttention would form all scores
        and _is_right(like.device, like.dtype, head_dim)
    )


def block_mask(length: int, window: int | None, documents_BL: Tensor | None, device: torch.device) -> BlockMask:
    """Who sees whom, as `megassm.layers.attention.attention_mask` has it; of any batch where no documents are given."""
    from torch.nn.attention.flex_attention import BlockMask

    partly_BNN, whole_BNN = _blocks(length, window, documents_BL, device)
    return BlockMask.from_kv_blocks(
        *_listed(partly_BNN), *_listed(whole_BNN), BLOCK, _seen(window or length, documents_BL), (length, length)
    )


def _blocks(
    length: int, window: int | None, documents_BL: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """(query block, key block) (B or 1, N, N) of which some pairs of positions see each other, and of which all."""
    first_N = torch.arange(0, length, BLOCK, device=device)
    last_N = (first_N + BLOCK - 1).clamp(max=length - 1)
    oldest_NN, youngest_NN = last_N[:, None] - first_N, first_N[:, None] - last_N
    within = window or length
    some_BNN = ((oldest_NN >= 0) & (youngest_NN < within))[None]
    inside_N = first_N + BLOCK <= length  # positions that are not there see nothing
    every_BNN = ((youngest_NN >= 0) & (oldest_NN < within) & inside_N[:, None] & inside_N)[None]
    if documents_BL is not None:  # their numbers do not fall
        opening_BN, closing_BN = documents_BL[:, first_N], documents_BL[:, last_N]
        some_BNN = some_BNN & (closing_BN[:, None] >= opening_BN[:, :, None])
        every_BNN = every_BNN & (opening_BN[:, None] == closing_BN[:, :, None])
    return some_BNN & ~every_BNN, every_BNN


def _listed(blocks_BNN: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block has (B, 1, N), and which, first of all (B, 1, N, N)."""
    order_BNN = blocks_BNN.int().argsort(dim=-1, descending=True, stable=True)
    return blocks_BNN.sum(-1, dtype=torch.int32)[:, None], order_BNN.int()[:, None]


def _seen(window: int, documents_BL: Tensor | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """FlexAttention's `mask_mod`."""

    def of_window(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < window)

    if documents_BL is None:
        return of_window
    documents = documents_BL

    def of_document(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return of_window(b, h, query, key) & (documents[b, query] == documents[b, key])

    return of_document


def attend(query_BHLP: Tensor, key_BGLP: Tensor, value_BGLP: Tensor, mask: BlockMask) -> Tensor:
    """Attention (B, H, L, P) of H heads over G heads of keys and values, H a multiple of G."""
    from torch.nn.attention.flex_attention import flex_attention

    whole = flex_attention if torch.compiler.is_compiling() or query_BHLP.device.type == "cpu" else _compiled()
    attended: Tensor = whole(query_BHLP, key_BGLP, value_BGLP, block_mask=mask, enable_gqa=True)
    return attended


@lru_cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@lru_cache
@torch.inference_mode(False)
def _is_right(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    """Whether it agrees with a dense mask on this device, forward and backward: asked once."""
    if not has_triton() or dtype not in TOLERANCE:
        return False
    generator = torch.Generator().manual_seed(0)
    *given, gradient = (
        torch.randn(2, heads, 300, head_dim, generator=generator).to(device, dtype) for heads in (4, 2, 2, 4)
    )
    documents_BL = (
        torch.searchsorted(torch.tensor([0, 90, 91, 250]), torch.arange(300), right=True).expand(2, -1).to(device)
    )
    mask = block_mask(300, 150, documents_BL, device)
    dense = (documents_BL[:, :, None] == documents_BL[:, None]).tril().triu(-149)[:, None]
    by_dense_mask = partial(F.scaled_dot_product_attention, attn_mask=dense, enable_gqa=True)
    return agrees(
        lambda: with_gradients(partial(attend, mask=mask), given, gradient),
        lambda: with_gradients(by_dense_mask, given, gradient),
        TOLERANCE[dtype], "FlexAttention", "a dense mask is",
    )  # fmt: skip
