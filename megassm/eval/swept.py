"""What a sweep gives: rows by budget, curves by text and length."""

from __future__ import annotations

from dataclasses import dataclass, field

from megassm.eval.curve import Shape


@dataclass(frozen=True)
class BudgetRow:
    """One budget's line in the table; `low` and `high` enclose the bootstrap's 95%, None for a single sequence."""

    k: int
    parameters: int
    bits_per_byte: float
    bits_per_byte_low: float | None
    bits_per_byte_high: float | None
    bits_per_token: float
    perplexity: float
    """Per token."""
    perplexity_low: float | None
    perplexity_high: float | None
    gap_percent: float
    """Bits per byte above those at full K, in percent of them."""
    gap_percent_low: float | None
    gap_percent_high: float | None
    """Of the same resamples at both: what all budgets find hard does not widen it."""
    forward_flops_per_token: float
    prefill_tokens_per_s: float
    """Of one rank alone, a micro-batch at a time."""
    decode_tokens_per_s: float | None
    """... one token of each of its sequences at a time, after them; None where the filters have no steps."""
    peak_memory_mib: float
    """Weights, and all that the prefill keeps besides."""
    accuracy: float | None = None
    """Of a task: share of the answers that are the most likely of all tokens or classes; None for text."""
    accuracy_low: float | None = None
    accuracy_high: float | None = None
    prefill_tokens_per_s_low: float | None = None
    """The slowest of the runs that a speed is the median of, and the fastest; None where it was not measured."""
    prefill_tokens_per_s_high: float | None = None
    decode_tokens_per_s_low: float | None = None
    decode_tokens_per_s_high: float | None = None
    agreement: float | None = None
    """Share of the predictions whose most likely token is that at full K; None where it was not asked for."""
    overlap: float | None = None
    """What the predictions share of their probability with those at full K, on average."""
    layers: tuple[int, ...] | None = None
    """K of each layer, of a row that has one a layer; its `k` is then the largest."""
    limit: str | None = None
    """What these layers were searched under."""


@dataclass(frozen=True)
class PositionRow:
    """One budget over the predictions at some positions of all sequences."""

    k: int
    first: int
    end: int
    """One more than the last position."""
    tokens: int
    bits_per_token: float
    agreement: float
    overlap: float


@dataclass(frozen=True)
class BudgetCurve:
    """One text at one sequence length."""

    data: str
    seq_len: int
    """Tokens."""
    sequences: int
    predicted_tokens: int
    best_unigram_bits_per_byte: float
    """Of a model that knows only this text's token frequencies."""
    shape: Shape
    rows: list[BudgetRow]
    positions: list[PositionRow] = field(default_factory=list)
    """Where agreement was asked for."""
    mixed: list[BudgetRow] = field(default_factory=list)
    """Of one K a layer, as many as were asked for."""

    @property
    def is_task(self) -> bool:
        """What was scored are answers: bits per byte are then bits per answer."""
        return self.rows[0].accuracy is not None

    @property
    def bits(self) -> str:
        """The unit of its bits, in words."""
        return "bits per answer" if self.is_task else "bits per byte"


@dataclass(frozen=True)
class Sweep:
    """What one checkpoint gives."""

    run: str
    step: int
    trained_seq_len: int
    curves: list[BudgetCurve]

    @property
    def name(self) -> str:
        return f"{self.run}, step {self.step}"
