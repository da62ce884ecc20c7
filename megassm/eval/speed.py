"""How fast a model reads and decodes, and what memory it takes: what of a budget's row no text decides."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megassm.data.stream import MicroBatch
from megassm.errors import UserError
from megassm.eval.measure import peak_tensor_bytes, timed_seconds
from megassm.model import LanguageModel

TIMED_REPEATS = 5
DECODED_TOKENS = 16
"""Steps that decoding is timed over."""


@dataclass(frozen=True)
class MeasuredCost:
    """What of a budget's row is independent of the text; 0 on ranks that do not measure."""

    prefill_tokens_per_s: float = 0.0
    decode_tokens_per_s: float | None = 0.0
    peak_memory_mib: float = 0.0
    prefill_tokens_per_s_low: float | None = None
    """The slowest of the runs that a speed is the median of, and the fastest; None where it was not measured."""
    prefill_tokens_per_s_high: float | None = None
    decode_tokens_per_s_low: float | None = None
    decode_tokens_per_s_high: float | None = None


def has_steps(model: LanguageModel) -> bool:
    """Whether the model can read a token at a time, and beyond the length it was trained at."""
    if model.config.classes is not None:
        return False
    try:
        return model.filterbank is None or model.filterbank.state_size > 0
    except UserError:
        return False


def measured_cost(small: LanguageModel, k: int, batch: MicroBatch, device: torch.device) -> MeasuredCost:
    """Of a model cut to k, on the inputs of `batch`."""
    ids_BL = torch.from_numpy(batch.ids_BT[:, :-1]).to(device)
    steps = has_steps(small)

    @torch.no_grad()
    def prefill() -> object:
        return small.prefill(ids_BL, k) if steps else small(ids_BL, k)

    def decode() -> None:
        state = after
        for _ in range(DECODED_TOKENS):
            _, state = small.step(ids_BL[:, 0], state, k)

    low, rate, high = _rates(ids_BL.numel(), timed_seconds(prefill, device, TIMED_REPEATS))
    memory = peak_tensor_bytes([*small.parameters(), *small.buffers()], prefill, device)
    decode_low, decode_rate, decode_high = None, None, None
    if steps:
        _, after = small.prefill(ids_BL, k)
        seconds = timed_seconds(decode, device, TIMED_REPEATS)
        decode_low, decode_rate, decode_high = _rates(DECODED_TOKENS * len(ids_BL), seconds)
    return MeasuredCost(rate, decode_rate, memory / 2**20, low, high, decode_low, decode_high)


def _rates(tokens: int, seconds: Sequence[float]) -> tuple[float, float, float]:
    """Tokens a second of the slowest run, the median, the fastest."""
    return tokens / max(seconds), tokens / statistics.median(seconds), tokens / min(seconds)


def decoding_seconds(model: LanguageModel, texts: int = 1) -> float:
    """To decode a token of each of so many texts, at all of the model's channels; the median of a few runs."""
    device = model.embedding_VD.device
    ids_B1 = torch.zeros(texts, 1, dtype=torch.long, device=device)
    _, begun = model.prefill(ids_B1)

    def decode() -> None:
        state = begun
        for _ in range(DECODED_TOKENS):
            _, state = model.step(ids_B1[:, 0], state)

    return statistics.median(timed_seconds(decode, device, TIMED_REPEATS)) / DECODED_TOKENS
