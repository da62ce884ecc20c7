"""FLOPs and bytes of a spectral mixer's kernels, in either way, and what `tools.bench.roofline` counts with.

Shapes: T tokens, D width, H heads, P = D/H, K channels, C chunk, S states, I = C + S, R = I filled up, N chunks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from megassm.config.model import FUSED_HEAD_WIDTH, FUSED_INPUTS
from megassm.config.schema import Config
from megassm.ops.head_mixing import inputs_tiles, split_chunks, tiles
from megassm.ops.mixing import GROUP_BYTES
from megassm.plan.cluster import Filters

W, FLOAT32 = 2, 4
CAPABILITY = 90
"""Of the cards whose programs' sizes are counted: H100 and later."""


class Kernel(NamedTuple):
    """One launch of a micro-step, or several alike."""

    kind: str
    name: str
    flops: float
    nbytes: float
    launches: int = 1


def product(kind: str, name: str, rows: int, inner: int, columns: int) -> Kernel:
    """A matrix product (rows, inner) @ (inner, columns) of bf16 numbers."""
    nbytes = W * (rows * inner + inner * columns + rows * columns)
    return Kernel(kind, name, 2.0 * rows * inner * columns, nbytes)


def linear_backward(kind: str, name: str, rows: int, inner: int, columns: int) -> Iterator[Kernel]:
    """The gradients of the inputs and of the matrix."""
    yield product(kind, f"{name}, inputs' gradient", rows, columns, inner)
    yield product(kind, f"{name}, matrix's gradient", inner, rows, columns)


def passes(kind: str, name: str, numbers: float, count: float, size: int = W) -> Kernel:
    """Elementwise work: `count` times so many numbers are read or written."""
    return Kernel(kind, name, 0.0, numbers * count * size)


@dataclass(frozen=True)
class Shapes:
    """Sizes of a micro-step at a budget."""

    config: Config
    filters: Filters
    k: int
    fused: bool = True
    """Whether heads that are narrow enough are mixed without writing features (`megassm.ops.head_mixing`)."""

    @property
    def tokens(self) -> int:
        return self.config.train.micro_batch_sequences * self.config.model.seq_len

    @property
    def chunks(self) -> int:
        return self.config.train.micro_batch_sequences * math.ceil(self.config.model.seq_len / self.filters.chunk)

    @property
    def inputs(self) -> int:
        return self.filters.chunk + self.filters.state_size

    @property
    def head_width(self) -> int:
        return self.config.model.d_model // self.heads

    @property
    def writes_no_feature(self) -> bool:
        return self.fused and self.head_width <= FUSED_HEAD_WIDTH and self.inputs <= FUSED_INPUTS

    @property
    def heads(self) -> int:
        return self.config.model.mixer_heads

    @property
    def rows(self) -> int:
        """R."""
        return -(-self.inputs // 16) * 16

    def groups(self) -> list[int]:
        """Filters of each group (`megassm.ops.mixing`)."""
        one = self.chunks * self.filters.chunk * self.config.model.d_model * W
        size = max(1, min(self.k, GROUP_BYTES["cuda"] // one))
        return [min(size, self.k - first) for first in range(0, self.k, size)]


def heads_product(name: str, tokens: int, filters: int, s: Shapes) -> Kernel:
    """Each head's features of some filters by its own matrices, forward or either gradient."""
    d, p = s.config.model.d_model, s.head_width
    nbytes = W * (tokens * filters * d + filters * d * p + tokens * d)
    return Kernel("mixer products", name, 2.0 * tokens * filters * d * p, nbytes)


def mixed_in_groups(s: Shapes) -> Iterator[Kernel]:
    """Gated features written and multiplied, a group of filters at a time (`megassm.ops.mixing`)."""
    t, d, n, c, i, heads = s.tokens, s.config.model.d_model, s.chunks, s.filters.chunk, s.inputs, s.heads
    groups = s.groups()
    if heads > 1:
        yield passes("filter bank", "heads apart", n * i * d, 2)
    for size in groups:
        x = c * size
        nbytes = W * (n * i * d + x * i + n * x * d) + FLOAT32 * n * x * heads
        yield Kernel("filter bank", "gated features", 2.0 * n * x * i * d, nbytes)
        if heads > 1:
            yield passes("mixer products", "matrices of the heads", size * d * s.head_width, 2)
        yield heads_product("channels M", t, size, s)
        if len(groups) > 1:
            yield passes("mixer products", "sum of the groups", t * d, 2.5, FLOAT32)
    if len(groups) > 1:
        yield passes("mixer products", "sum of the groups, begun and rounded", t * d, 2.5, FLOAT32)
    if heads > 1:
        yield passes("mixer products", "heads together", t * d, 2)


def mixed_in_groups_backward(s: Shapes) -> Iterator[Kernel]:
    t, d, n, c, i, heads = s.tokens, s.config.model.d_model, s.chunks, s.filters.chunk, s.inputs, s.heads
    groups = s.groups()
    if heads > 1:
        yield passes("filter bank", "heads apart again, and together", n * i * d, 4)
    for size in groups:
        x = c * size
        if heads > 1:
            yield passes("mixer products", "matrices of the heads", size * d * s.head_width, 2)
        yield heads_product("channels M, inputs' gradient", t, size, s)
        nbytes = W * (n * i * d + x * i + 3 * n * x * d) + 2 * FLOAT32 * n * x * heads
        yield Kernel("filter bank", "gated features again, gradients", 2.0 * n * x * i * d, nbytes)
        yield heads_product("channels M, matrix's gradient", t, size, s)
        copies = 2 + 2 * (heads > 1)
        yield passes("mixer products", "channels M, a group's gradient in place", size * d * s.head_width, copies)
        nbytes = W * (x * i + n * x * d + n * i * d)
        yield Kernel("filter bank", "inputs' gradient", 2.0 * n * i * x * d, nbytes)
        if len(groups) > 1:
            yield passes("filter bank", "sum of the groups", n * i * d, 2.5, FLOAT32)
    if len(groups) > 1:
        yield passes("filter bank", "sum of the groups, begun and rounded", n * i * d, 2.5, FLOAT32)


def mixed_at_once(s: Shapes) -> Iterator[Kernel]:
    """By one kernel that writes no feature (`megassm.ops.head_mixing`)."""
    d, n, x, i = s.config.model.d_model, s.chunks, s.filters.chunk * s.k, s.inputs
    yield passes("mixer at once", "rows filled up", x * (i + s.rows), 1)
    nbytes = W * (n * i * d + x * s.rows + s.k * d * s.head_width + n * s.filters.chunk * d) + FLOAT32 * n * x * s.heads
    yield Kernel("mixer at once", "features, M", 2.0 * n * x * d * (i + s.head_width), nbytes)


def mixed_at_once_backward(s: Shapes) -> Iterator[Kernel]:
    d, n, x, i, p = s.config.model.d_model, s.chunks, s.filters.chunk * s.k, s.inputs, s.head_width
    given, weights, matrices = n * i * d + x * s.rows + n * s.filters.chunk * d, n * x * s.heads, s.k * d * p
    parts = -(-p // inputs_tiles(p, p, CAPABILITY).p)
    nbytes = W * (given + matrices + n * i * d) + FLOAT32 * weights * (1 + parts)
    yield Kernel("mixer at once", "inputs' and gate's gradient", 2.0 * n * x * d * (2 * i + p), nbytes)
    if parts > 1:
        yield passes("mixer at once", "gate's gradient, sum of its parts", weights, parts + 1, FLOAT32)
    splits = -(-n // split_chunks(n, s.k * s.heads * -(-p // tiles(p, p).p)))
    nbytes = W * given + FLOAT32 * weights + (matrices * FLOAT32 * splits if splits > 1 else matrices * W)
    yield Kernel("mixer at once", "M's gradient", 2.0 * n * x * d * (i + p), nbytes)
    if splits > 1:
        yield passes("mixer at once", "M's gradient, sum of its parts, rounded", matrices, splits + 2.5, FLOAT32)


def spectral_forward(s: Shapes) -> Iterator[Kernel]:
    model = s.config.model
    t, d, hidden, k, heads = s.tokens, model.d_model, max(1, model.d_model // 2), s.k, model.mixer_heads
    n, i, states, apart = s.chunks, s.inputs, s.filters.state_size, heads > 1 and not s.writes_no_feature
    if model.has_gate:
        yield product("gate", "hidden layer", t, d, hidden)
        yield passes("gate", "gelu", t * hidden, 2)
        yield product("gate", "scores", t, hidden, k * heads)
        yield passes("gate", "weights of the channels", t * k * heads, 3.5 + 2 * apart, FLOAT32)
    yield Kernel("filter bank", "states of the chunks", 2.0 * n * states * i * d, W * (t * d + n * i * d))
    yield from mixed_at_once(s) if s.writes_no_feature else mixed_in_groups(s)
    if heads > 1:
        yield product("mixer products", "output O", t, d, d)
    yield product("mixer products", "direct D", t, d, d)
    yield passes("elementwise", "sum of both", t * d, 3)


def spectral_backward(s: Shapes) -> Iterator[Kernel]:
    model = s.config.model
    t, d, hidden, k, heads = s.tokens, model.d_model, max(1, model.d_model // 2), s.k, model.mixer_heads
    n, i, states, apart = s.chunks, s.inputs, s.filters.state_size, heads > 1 and not s.writes_no_feature
    yield from linear_backward("mixer products", "direct D", t, d, d)
    if heads > 1:
        yield from linear_backward("mixer products", "output O", t, d, d)
    yield from mixed_at_once_backward(s) if s.writes_no_feature else mixed_in_groups_backward(s)
    yield Kernel("filter bank", "states, gradient", 2.0 * n * states * i * d, W * (t * d + n * i * d))
    if model.has_gate:
        yield passes("gate", "weights of the channels, gradient", t * k * heads, 4 + 4 * apart, FLOAT32)
        yield from linear_backward("gate", "scores", t, hidden, k * heads)
        yield passes("gate", "gelu, gradient; biases'", t * hidden, 4)
        yield from linear_backward("gate", "hidden layer", t, d, hidden)
        yield passes("elementwise", "gate's gradient added", t * d, 3)
        yield passes("gradient sums", "scores beyond K", hidden * heads, k + model.num_channels)
    yield passes("elementwise", "sum of two gradients", t * d, 3)
    yield passes("gradient sums", "channels M beyond K", d * s.head_width, k + model.num_channels)
