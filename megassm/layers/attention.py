"""Causal attention: grouped queries (arXiv 2305.13245), rotary positions (arXiv 2104.09864), optional window.

Shapes: B batch, L length, D width, H query heads, G key-value heads, P dimensions a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from megassm.config.model import ModelConfig
from megassm.layers.context import Context
from megassm.layers.state import KeyValueCache, LayerState, SeparateCaches
from megassm.ops import flex

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def rope_tables(positions_L: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine (L, P/2) of t * theta^(-2i/P) at the positions t, float32."""
    dimensions = torch.arange(0, head_dim, 2, device=positions_L.device, dtype=torch.float32)
    angles = positions_L.float()[..., None] * theta ** (-dimensions / head_dim)
    return angles.cos(), angles.sin()


def rotate(x_BHLP: Tensor, rope: tuple[Tensor, ...]) -> Tensor:
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
    if real_BL is not None:  # padding sees itself: the softmax of an empty row is NaN
        seen = seen & (real_BL[:, None, None, :] | (age == 0))
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, -torch.inf)


Mask: TypeAlias = "Tensor | BlockMask | None"
"""Of `attention_mask`, or the same by blocks (`megassm.ops.flex`)."""


def mask_for(config: ModelConfig, length: int, documents_BL: Tensor | None, like: Tensor, trains: bool) -> Mask:
    """Who may see whom; by blocks where a model `trains` layer by layer, at one length: programs are made for it."""
    window = config.window
    is_whole = documents_BL is None and (window is None or window >= length)
    if trains and not is_whole and flex.serves(like, length, config.d_model // config.n_heads):
        return flex.block_mask(length, window, documents_BL, like.device)
    return attention_mask(length, window, documents_BL, like)


Attend = Callable[[Tensor, Tensor, Tensor, Mask], Tensor]


def attend(query_BHLP: Tensor, key_BGLP: Tensor, value_BGLP: Tensor, mask: Mask) -> Tensor:
    """Causal attention of H heads over G heads of keys and values, H a multiple of G: (B, H, L, P)."""
    if mask is not None and not isinstance(mask, Tensor):
        return flex.attend(query_BHLP, key_BGLP, value_BGLP, mask)
    return F.scaled_dot_product_attention(
        query_BHLP, key_BGLP, value_BGLP, attn_mask=mask, is_causal=mask is None, enable_gqa=True
    )


class ContinuedAttention(NamedTuple):
    """A cache with `length` positions that may be taken back."""

    cache: KeyValueCache
    length: int
    window: int | None

    def keep(self, counts: Sequence[int]) -> KeyValueCache:
        cache = self.cache.keep(self.length, counts)
        return cache if self.window is None else cache.fitted(self.window)


class ContinuedSeparately(NamedTuple):
    """`ContinuedAttention` of each text by itself."""

    texts: list[ContinuedAttention]

    def keep(self, counts: Sequence[int]) -> SeparateCaches:
        return SeparateCaches(tuple(text.keep([count]) for text, count in zip(self.texts, counts, strict=True)))


class Attention(nn.Module):
    """u (B, L, D) -> (B, L, D).

    Args:
        d_model: D, divisible by n_heads.
        n_heads: H, divisible by n_kv_heads.
        n_kv_heads: G.
        window: tokens a query may look back on, itself included; None for all. Here it bounds what `extend`
            looks at and keeps; in `forward` the context's mask has it.
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
        """y (B, L, D), each position from those that the context's mask lets it see."""
        assert context.rope is not None
        query_BHLP = rotate(self._heads(self.query(u_BLD)), context.rope)
        key_BGLP = rotate(self._heads(self.key(u_BLD)), context.rope)
        value_BGLP = self._heads(self.value(u_BLD))
        mixed_BHLP = self._attended(query_BHLP, key_BGLP, value_BGLP, context)
        mixed: Tensor = self.out(mixed_BHLP.transpose(1, 2).flatten(2))
        return mixed

    def extend(
        self, u_BLD: Tensor, state: LayerState | None, context: Context
    ) -> tuple[Tensor, ContinuedAttention | ContinuedSeparately]:
        """(y (B, L, D) of L positions that follow those of `state`, what a state is kept from)."""
        assert context.rope is not None
        rope = tuple(table[:, None] if table.dim() == 3 else table for table in context.rope)
        query_BHLP = rotate(self._heads(self.query(u_BLD)), rope)
        key_BGLP, value_BGLP = rotate(self._heads(self.key(u_BLD)), rope), self._heads(self.value(u_BLD))
        continued: ContinuedAttention | ContinuedSeparately
        if isinstance(state, SeparateCaches):
            assert context.mask is None
            queries, keys, values = (torch.split(x, 1) for x in (query_BHLP, key_BGLP, value_BGLP))
            rows = zip(queries, keys, values, state.caches, strict=True)
            texts = [self._extended(*row, context) for row in rows]
            mixed_BHLP = torch.cat([mixed_1HLP for mixed_1HLP, _ in texts])
            continued = ContinuedSeparately([text for _, text in texts])
        else:
            cache = state if isinstance(state, KeyValueCache) else None
            mixed_BHLP, continued = self._extended(query_BHLP, key_BGLP, value_BGLP, cache, context)
        out_BLD: Tensor = self.out(mixed_BHLP.transpose(1, 2).flatten(2))
        return out_BLD, continued

    def _extended(
        self, query_BHLP: Tensor, key_BGLP: Tensor, value_BGLP: Tensor, before: KeyValueCache | None, context: Context
    ) -> tuple[Tensor, ContinuedAttention]:
        """(what the heads see (B, H, L, P), the cache with the new positions)."""
        cache = KeyValueCache.empty(key_BGLP, value_BGLP) if before is None else before
        cache = cache.append(key_BGLP, value_BGLP, self.window)
        if before is None:
            mixed_BHLP = self._attended(query_BHLP, key_BGLP, value_BGLP, context)
        else:
            key_BGTP, value_BGTP, mask = cache.seen(query_BHLP.shape[2], self.window)
            if isinstance(context.mask, Tensor):  # padding among what was read before
                hidden = context.mask[..., -key_BGTP.shape[2] :]
                mask = hidden if mask is None else hidden.masked_fill(~mask, -torch.inf)
            mixed_BHLP = self._attended_cache(query_BHLP, key_BGTP, value_BGTP, mask, context)
        return mixed_BHLP, ContinuedAttention(cache, query_BHLP.shape[2], self.window)

    def _attended(self, query_BHLP: Tensor, key_BGLP: Tensor, value_BGLP: Tensor, context: Context) -> Tensor:
        return self.attend(query_BHLP, key_BGLP, value_BGLP, context.mask)

    def _attended_cache(
        self, query_BHLP: Tensor, key_BGTP: Tensor, value_BGTP: Tensor, mask: Tensor | None, context: Context
    ) -> Tensor:
        """Of queries over what a cache holds; a mask is True, or 0 and not -inf, where a query may look."""
        return F.scaled_dot_product_attention(query_BHLP, key_BGTP, value_BGTP, mask, enable_gqa=True)

    def _heads(self, x_BLE: Tensor) -> Tensor:
        return x_BLE.view(*x_BLE.shape[:-1], -1, self.head_dim).transpose(1, 2)
