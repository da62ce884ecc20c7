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

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from megassm.cli.arguments import TableRow
from megassm.config.schema import Config
from megassm.cost import PEAK_TFLOPS, parameters, training_flops_per_token
from megassm.plan.cluster import filters_of
from tools.bench.roofline_mixer import (
    FLOAT32,
    Kernel,
    Shapes,
    W,
    linear_backward,
    mixed_at_once,
    mixed_at_once_backward,
    mixed_in_groups,
    mixed_in_groups_backward,
    passes,
    product,
    spectral_backward,
    spectral_forward,
)

MEMORY_TB_S = {"A100": 2.039, "H100": 3.35, "H200": 4.8, "B200": 8.0}
"""The vendors' data sheets: the SXM modules, A100 of 80 GB."""
PRODUCT_SHARE, MEMORY_SHARE = 0.79, 0.9
"""Of those rates, as an H100 reached them: 779 of 989 TFLOP/s in a large product, 3.0 of 3.35 TB/s in a copy."""


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


def mixer_ways(config: Config, budgets: Sequence[int], card: str) -> list[TableRow]:
    """One spectral layer's features and M_k, forward and backward, with features written and, where heads are narrow
    enough, without: a row a budget.

    `share_needed` is that of the card's product rate at which the kernels that write none are as fast as the others are
    expected to be.
    """
    found: list[TableRow] = []
    for k in budgets:
        s = Shapes(config, filters_of(config), k)
        ways = {"groups": [*mixed_in_groups(s), *mixed_in_groups_backward(s)]}
        if s.writes_no_feature:
            ways["at_once"] = [*mixed_at_once(s), *mixed_at_once_backward(s)]
        row: dict[str, Any] = {"K": k, "head": s.head_width}
        for way, kernels in ways.items():
            row |= {
                f"TFLOP_{way}": sum(kernel.flops for kernel in kernels) / 1e12,
                f"GB_{way}": sum(kernel.nbytes for kernel in kernels) / 1e9,
                f"expected_ms_{way}": 1e3 * seconds(kernels, card).expected,
            }
        if s.writes_no_feature:
            rest = seconds([kernel for kernel in ways["at_once"] if not kernel.flops], card).expected
            flops = sum(kernel.flops for kernel in ways["at_once"])
            needed = seconds(ways["groups"], card).expected - rest
            row["share_needed"] = flops / needed / PEAK_TFLOPS[card] / 1e12
        found.append(row)
    return found
