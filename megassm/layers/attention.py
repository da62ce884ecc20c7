"""Causal attention: grouped queries (arXiv 2305.13245), rotary positions (arXiv 2104.09864), optional window.

Shapes: B batch, L length, D width, H query heads, G key-value heads, P dimensions a head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megassm.layers.context import Context


class KeyValueCache(NamedTuple):
    """What later queries may still see: rotated keys and values (B, G, T, P)."""

    key_BGTP: Tensor
    value_BGTP: Tensor


def rope_tables(positions_L: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine (L, P/2) of t * theta^(-2i/P) at the positions t, float32."""
    dimensions = torch.arange(0, head_dim, 2, device=positions_L.device, dtype=torch.float32)
    angles = positions_L.float()[:, None] * theta ** (-dimensions / head_dim)
    return angles.cos(), angles.sin()


def rotate(x_BHLP: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates the pairs (i, i + P/2) of every head by the position's angles."""
    cos, sin = (table.to(x_BHLP.dtype) for table in rope)
    first, second = x_BHLP.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, first * sin + second * cos), dim=-1)


def attention_mask(
    length: int, window: int | None, documents_BL: Tensor | None, like: Tensor, real_BL: Tensor | None = None
) -> Tensor | None:
    """What to add to the scores, in `like`'s dtype: 0 where query t may see key s, else -inf; (L, L) or (B, 1, L, L).

    A query sees the last `window` positions, itself included, of its own document, and of others those that are `real`,
    not padding. None where it sees the whole past.
    """
    if documents_BL is None and real_BL is None and (window is None or window >= length):
        return None
    time = torch.arange(length, device=like.device)
    age = time[:, None] - time
    seen = (age >= 0) & (age < (window or length))
    if documents_BL is not None:
        seen = seen & (documents_BL[:, None, :, None] == documents_BL[:, None, None, :])
    if real_BL is not None:  # padding sees itself: a softmax of nothing is no number
        seen = seen & (real_BL[:, None, None, :] | (age == 0))
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, -torch.inf)


Attend = Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]


def attend(query_BHLP: Tensor, key_BGLP: Tensor, value_BGLP: Tensor, mask: Tensor | None) -> Tensor:
    """Causal attention of H heads over G heads of keys and values, H a multiple of G: (B, H, L, P)."""
    return F.scaled_dot_product_attention(
        query_BHLP, key_BGLP, value_BGLP, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )


class Attention(nn.Module):
    """u (B, L, D) -> (B, L, D).

    Args:
        d_model: D, divisible by n_heads.
        n_heads: H, divisible by n_kv_heads.
        n_kv_heads: G.
        window: tokens a query may look back on, itself included; None for all. Here it bounds what `final_state` and
            `step` keep; in `forward` the context's mask has it.
    """

    def __init__(self, d_model: int, n_heads: int, n_kv_heads: int, window: int | None) -> None:
        super().__init__()
        self.head_dim = d_model // n_heads
        self.window = window
        self.attend: Attend = attend
        """What is done with queries, keys and values; `megassm.parallel` puts its exchanges around it."""
        self.query = nn.Linear(d_model, d_model, bias=False)
        self.key = nn.Linear(d_model, n_kv_heads * self.head_dim, bias=False)
        self.value = nn.Linear(d_model, n_kv_heads * self.head_dim, bias=False)
        self.out = nn.Linear(d_model, d_model, bias=False)

    def forward(self, u_BLD: Tensor, context: Context) -> Tensor:
        assert context.rope is not None
        query_BHLP = rotate(self._heads(self.query(u_BLD)), context.rope)
        key_BGLP = rotate(self._heads(self.key(u_BLD)), context.rope)
        value_BGLP = self._heads(self.value(u_BLD))
        mixed_BHLP = self.attend(query_BHLP, key_BGLP, value_BGLP, context.mask)
        mixed: Tensor = self.out(mixed_BHLP.transpose(1, 2).flatten(2))
        return mixed

    def final_state(self, u_BLD: Tensor, context: Context) -> KeyValueCache:
        """The keys and values that positions after u can see."""
        assert context.rope is not None
        first = 0 if self.window is None else max(0, u_BLD.shape[1] - self.window + 1)
        rope = (context.rope[0][first:], context.rope[1][first:])
        seen_BTD = u_BLD[:, first:]
        return KeyValueCache(rotate(self._heads(self.key(seen_BTD)), rope), self._heads(self.value(seen_BTD)))

    def step(self, u_BD: Tensor, state: KeyValueCache, context: Context) -> tuple[Tensor, KeyValueCache]:
        """(y (B, D) of one position, the cache with it); the oldest position leaves a full window."""
        assert context.rope is not None
        u_B1D = u_BD[:, None]
        query_BH1P = rotate(self._heads(self.query(u_B1D)), context.rope)
        key_BGTP = torch.cat((state.key_BGTP, rotate(self._heads(self.key(u_B1D)), context.rope)), dim=2)
        value_BGTP = torch.cat((state.value_BGTP, self._heads(self.value(u_B1D))), dim=2)
        mask = None if context.mask is None else context.mask[..., -key_BGTP.shape[2] :]
        mixed_BH1P = F.scaled_dot_product_attention(query_BH1P, key_BGTP, value_BGTP, mask, enable_gqa=True)
        kept = slice(0 if self.window is None else max(0, key_BGTP.shape[2] - self.window + 1), None)
        cache = KeyValueCache(key_BGTP[:, :, kept], value_BGTP[:, :, kept])
        return self.out(mixed_BH1P.transpose(1, 2).flatten(2))[:, 0], cache

    def _heads(self, x_BLE: Tensor) -> Tensor:
        return x_BLE.view(*x_BLE.shape[:-1], -1, self.head_dim).transpose(1, 2)
