"""The least time that a micro-step can take on a GPU: FLOPs and bytes of each of its kernels, from the real shapes.

A kernel takes the longer of its FLOPs at the card's rate and its bytes at the memory's; a micro-step is their sum, one
after another, on a rank without tensor or sequence groups, in bf16. Each input is read once and each output written
once. What neither bounds is left out: launches, which at small K take longer than the kernels, and the update.

    roofline   at the data sheet's rates
    expected   at the shares of them that products and copies reach

Shapes: T tokens, D width, F feed-forward width, G width of keys and values, V vocabulary, K channels, C chunk, S
states, I = C + S, N chunks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megassm.cli.arguments import TableRow
from megassm.config.schema import Config
from megassm.cost import PEAK_TFLOPS, parameters, training_flops_per_token
from megassm.ops.mixing import GROUP_BYTES
from megassm.plan.cluster import Filters, filters_of

MEMORY_TB_S = {"A100": 2.039, "H100": 3.35, "H200": 4.8, "B200": 8.0}
"""The vendors' data sheets: the SXM modules, A100 of 80 GB."""
PRODUCT_SHARE, MEMORY_SHARE = 0.79, 0.9
"""Of those rates, as an H100 reached them: 779 of 989 TFLOP/s in a large product, 3.0 of 3.35 TB/s in a copy."""
W, FLOAT32, FLOAT64 = 2, 4, 8


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
        return self.config.model.d_model // self.config.model.mixer_heads

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


def spectral_forward(s: Shapes) -> Iterator[Kernel]:
    model = s.config.model
    t, d, hidden, k, heads = s.tokens, model.d_model, max(1, model.d_model // 2), s.k, model.mixer_heads
    n, c, i, states = s.chunks, s.filters.chunk, s.inputs, s.filters.state_size
    groups, apart = s.groups(), heads > 1
    if model.has_gate:
        yield product("gate", "hidden layer", t, d, hidden)
        yield passes("gate", "gelu", t * hidden, 2)
        yield product("gate", "scores", t, hidden, k * heads)
        yield passes("gate", "weights of the channels", t * k * heads, 3.5 + 2 * apart, FLOAT32)
    yield Kernel("filter bank", "states of the chunks", 2.0 * n * states * (states + c) * d, W * (t * d + n * i * d))
    if apart:
        yield passes("filter bank", "heads apart", n * i * d, 2)
    for size in groups:
        x = c * size
        nbytes = W * (n * i * d + x * i + n * x * d) + FLOAT32 * n * x * heads
        yield Kernel("filter bank", "gated features", 2.0 * n * x * i * d, nbytes)
        if apart:
            yield passes("mixer products", "matrices of the heads", size * d * s.head_width, 2)
        yield heads_product("channels M", t, size, s)
        if len(groups) > 1:
            yield passes("mixer products", "sum of the groups", t * d, 2.5, FLOAT32)
    if len(groups) > 1:
        yield passes("mixer products", "sum of the groups, begun and rounded", t * d, 2.5, FLOAT32)
    if apart:
        yield passes("mixer products", "heads together", t * d, 2)
        yield product("mixer products", "output O", t, d, d)
    yield product("mixer products", "direct D", t, d, d)
    yield passes("elementwise", "sum of both", t * d, 3)


def spectral_backward(s: Shapes) -> Iterator[Kernel]:
    model = s.config.model
    t, d, hidden, k, heads = s.tokens, model.d_model, max(1, model.d_model // 2), s.k, model.mixer_heads
    n, c, i, states = s.chunks, s.filters.chunk, s.inputs, s.filters.state_size
    groups, apart = s.groups(), heads > 1
    yield from linear_backward("mixer products", "direct D", t, d, d)
    if apart:
        yield from linear_backward("mixer products", "output O", t, d, d)
        yield passes("filter bank", "heads apart again, and together", n * i * d, 4)
    for size in groups:
        x = c * size
        if apart:
            yield passes("mixer products", "matrices of the heads", size * d * s.head_width, 2)
        yield heads_product("channels M, inputs' gradient", t, size, s)
        nbytes = W * (n * i * d + x * i + 3 * n * x * d) + 2 * FLOAT32 * n * x * heads
        yield Kernel("filter bank", "gated features again, gradients", 2.0 * n * x * i * d, nbytes)
        yield heads_product("channels M, matrix's gradient", t, size, s)
        copies = 2 + 2 * apart
        yield passes("mixer products", "channels M, a group's gradient in place", size * d * s.head_width, copies)
        nbytes = W * (x * i + n * x * d + n * i * d)
        yield Kernel("filter bank", "inputs' gradient", 2.0 * n * i * x * d, nbytes)
        if len(groups) > 1:
            yield passes("filter bank", "sum of the groups", n * i * d, 2.5, FLOAT32)
    if len(groups) > 1:
        yield passes("filter bank", "sum of the groups, begun and rounded", n * i * d, 2.5, FLOAT32)
    yield Kernel("filter bank", "states, gradient", 2.0 * n * states * (states + c) * d, W * (t * d + n * i * d))
    if model.has_gate:
        yield passes("gate", "weights of the channels, gradient", t * k * heads, 4 + 4 * apart, FLOAT32)
        yield from linear_backward("gate", "scores", t, hidden, k * heads)
        yield passes("gate", "gelu, gradient; biases'", t * hidden, 4)
        yield from linear_backward("gate", "hidden layer", t, d, hidden)
        yield passes("elementwise", "gate's gradient added", t * d, 3)
        yield passes("gradient sums", "scores beyond K", hidden * heads, k + model.num_channels)
    yield passes("elementwise", "sum of two gradients", t * d, 3)
    yield passes("gradient sums", "channels M beyond K", d * s.head_width, k + model.num_channels)


def attention_forward(s: Shapes) -> Iterator[Kernel]:
    model = s.config.model
    t, d = s.tokens, model.d_model
    g = d // model.n_heads * model.kv_heads
    for name, width in (("query", d), ("key", g), ("value", g), ("output", d)):
        yield product("attention", name, t, d, width)
    yield passes("attention", "rotation", t * (d + g), 9)
    yield Kernel(
        "attention", "attention itself", attention_flops(s), W * t * (2 * d + 2 * g) + FLOAT32 * t * model.n_heads
    )


def attention_backward(s: Shapes) -> Iterator[Kernel]:
    model = s.config.model
    t, d = s.tokens, model.d_model
    g = d // model.n_heads * model.kv_heads
    nbytes = W * t * (4 * d + 4 * g) + FLOAT32 * t * model.n_heads
    yield Kernel("attention", "attention itself, gradient", 2.5 * attention_flops(s), nbytes)
    yield passes("attention", "rotation, gradient", t * (d + g), 15)
    for name, width in (("query", d), ("key", g), ("value", g), ("output", d)):
        yield from linear_backward("attention", name, t, d, width)
    yield passes("elementwise", "sum of three gradients", t * d, 6)


def attention_flops(s: Shapes) -> float:
    """Of the two products over the positions that a query sees."""
    model = s.config.model
    window = min(model.window or model.seq_len, model.seq_len)
    return 4.0 * model.d_model * s.tokens * (window - window * (window - 1) / (2 * model.seq_len))


def block_forward(s: Shapes, mixer: str) -> Iterator[Kernel]:
    t, d, f = s.tokens, s.config.model.d_model, s.config.model.ffn_width(s.k)
    yield passes("norms", "norm", t * d, 2)
    if s.config.model.input_taps > 1:
        yield passes("taps", "input taps", t * d, 2)
    yield from attention_forward(s) if mixer == "A" else spectral_forward(s)
    yield passes("elementwise", "residual", t * d, 3)
    yield passes("norms", "norm", t * d, 2)
    yield product("feed-forward", "gate", t, d, f)
    yield product("feed-forward", "up", t, d, f)
    yield passes("feed-forward", "silu, product", t * f, 3)
    yield product("feed-forward", "down", t, f, d)
    yield passes("elementwise", "residual", t * d, 3)


def block_backward(s: Shapes, mixer: str) -> Iterator[Kernel]:
    t, d, f = s.tokens, s.config.model.d_model, s.config.model.ffn_width(s.k)
    yield from linear_backward("feed-forward", "down", t, f, d)
    yield passes("feed-forward", "silu, product, gradient", t * f, 5)
    yield from linear_backward("feed-forward", "gate", t, d, f)
    yield from linear_backward("feed-forward", "up", t, d, f)
    yield passes("elementwise", "sum of two gradients", t * d, 3)
    yield passes("norms", "norm, gradient", t * d, 3)
    yield passes("elementwise", "residual, gradient", t * d, 3)
    yield from attention_backward(s) if mixer == "A" else spectral_backward(s)
    if s.config.model.input_taps > 1:
        yield passes("taps", "input taps, gradient", t * d, 3 + s.config.model.input_taps / 8)
    yield passes("norms", "norm, gradient", t * d, 3)
    yield passes("elementwise", "residual, gradient", t * d, 3)


def ends(s: Shapes) -> Iterator[Kernel]:
    """Embedding, head and loss, forward and backward."""
    model, t = s.config.model, s.tokens
    d, v = model.d_model, model.outputs
    yield passes("embedding", "rows", t * d, 2)
    yield passes("norms", "norm", t * d, 2)
    yield product("head and loss", "logits", t, d, v)
    yield passes("head and loss", "loss", t * v, 1)
    yield passes("head and loss", "loss, gradient", t * v, 2)
    yield from linear_backward("head and loss", "logits", t, d, v)
    yield passes("norms", "norm, gradient", t * d, 3)
    yield passes("embedding", "rows, gradient", t * d + model.vocab_size * d, 1)
    if not model.has_head:
        yield passes("embedding", "sum with the head's gradient", v * d, 3)


def micro_step(s: Shapes) -> Iterator[Kernel]:
    """All kernels of a forward and backward pass, and of adding gradients to their float32 sums (ZeRO 1)."""
    model = s.config.model
    yield from ends(s)
    for mixer in "SA":
        count = model.mixers.count(mixer)
        # torch makes a block's last product and sum not again: nothing that is kept comes after them
        again = list(block_forward(s, mixer))[:-2] if s.config.train.recompute else []
        for kernel in (*block_forward(s, mixer), *again, *block_backward(s, mixer)) if count else ():
            yield kernel._replace(launches=count * kernel.launches)
    yield passes("gradient sums", "added to float32", parameters(model, model.num_channels), 1, W + 2 * FLOAT32)


class Times(NamedTuple):
    """Seconds of a micro-step."""

    roofline: float
    expected: float


def seconds(kernels: Sequence[Kernel], card: str) -> Times:
    flops, memory = PEAK_TFLOPS[card] * 1e12, MEMORY_TB_S[card] * 1e12

    def total(product_share: float, memory_share: float) -> float:
        return sum(
            kernel.launches * max(kernel.flops / (flops * product_share), kernel.nbytes / (memory * memory_share))
            for kernel in kernels
        )

    return Times(total(1.0, 1.0), total(PRODUCT_SHARE, MEMORY_SHARE))


def rows(config: Config, budgets: Sequence[int], cards: Sequence[str]) -> list[TableRow]:
    """A row a budget and card."""
    found: list[TableRow] = []
    filters = filters_of(config)
    for k in budgets:
        s = Shapes(config, filters, k)
        kernels = list(micro_step(s))
        flops = sum(kernel.launches * kernel.flops for kernel in kernels)
        model_flops = training_flops_per_token(config.model, k, config.model.seq_len) * s.tokens
        for card in cards:
            times = seconds(kernels, card)
            found.append({
                "K": k,
                "card": card,
                "TFLOP": flops / 1e12,
                "GB": sum(kernel.launches * kernel.nbytes for kernel in kernels) / 1e9,
                "roofline_ms": 1e3 * times.roofline,
                "expected_ms": 1e3 * times.expected,
                "tokens_per_s": round(s.tokens / times.expected),
                "mfu_roofline": model_flops / times.roofline / PEAK_TFLOPS[card] / 1e12,
                "mfu_expected": model_flops / times.expected / PEAK_TFLOPS[card] / 1e12,
            })  # fmt: skip
    return found


def kinds(config: Config, k: int, card: str) -> list[TableRow]:
    """A row a kind of kernel, the longest first."""
    kernels = list(micro_step(Shapes(config, filters_of(config), k)))
    found: list[TableRow] = []
    for kind in dict.fromkeys(kernel.kind for kernel in kernels):
        own = [kernel for kernel in kernels if kernel.kind == kind]
        times = seconds(own, card)
        found.append({
            "kind": kind,
            "TFLOP": sum(kernel.launches * kernel.flops for kernel in own) / 1e12,
            "GB": sum(kernel.launches * kernel.nbytes for kernel in own) / 1e9,
            "roofline_ms": 1e3 * times.roofline,
            "expected_ms": 1e3 * times.expected,
        })  # fmt: skip
    return sorted(found, key=lambda row: -row["expected_ms"])
