"""The past that fades, against its sum over positions in float64: every way, fast and slow, gradients, steps."""

from __future__ import annotations

import math
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from megassm.layers.filterbank import FilterBank
from megassm.layers.selective import faded
from megassm.layers.window import WindowedFilterBank
from megassm.ops.mixing import mix_channels
from megassm.ops.selective import FASTEST, log_decays, parted, with_decays
from tests.test_isolation import noise, numbered, off

K, HEADS, WIDTH = 5, 2, 6
SPEEDS = {"slow": 0.01, "fast": 1.0, "mixed": None}


@lru_cache
def bank_of(way: str, seq_len: int = 256, channels: int = K) -> FilterBank:
    bank = FilterBank(seq_len, channels, way)  # type: ignore[arg-type]
    bank.reset()
    return bank


def decays(speed: str, batch: int, length: int) -> Tensor:
    """Log decays (B, L, H): all slow, all as fast as they may be, or now this and now that."""
    most = SPEEDS[speed]
    if most is None:
        most = torch.where(noise(batch, length, HEADS, seed=7).detach() < 0, 1.0, 1e-3)
    return (-FASTEST * most * noise(batch, length, HEADS, seed=8).detach().sigmoid().add(1).div(2)).requires_grad_()


def definition(bank: FilterBank, u_BLD: Tensor, log_decay_BLH: Tensor, documents_BL: Tensor | None = None) -> Tensor:
    """Features (B, L, K, D), a position at a time."""
    rows = []
    for t in range(u_BLD.shape[1]):
        after_BSH = log_decay_BLH[:, 1 : t + 1].flip(1).cumsum(1).flip(1)  # l[s+1] + .. + l[t], for s < t
        fades_BSH = torch.cat((after_BSH, torch.zeros_like(log_decay_BLH[:, :1])), dim=1).exp()
        if documents_BL is not None:
            fades_BSH = fades_BSH * (documents_BL[:, : t + 1] == documents_BL[:, t : t + 1])[..., None]
        faded_BSD = u_BLD[:, : t + 1] * fades_BSH.repeat_interleave(WIDTH // HEADS, dim=2)
        rows.append(torch.einsum("sk,bsd->bkd", bank.filters_LK[: t + 1].flip(0), faded_BSD))
    return torch.stack(rows, dim=1)


@lru_cache
def truth(speed: str, length: int) -> tuple[list[Tensor], Tensor, tuple[Tensor, ...]]:
    """(u, log decays, weights and matrices; the mixed features by definition; their gradients)."""
    u_BLD, weights_BLHK, channels_KDE = noise(2, length, WIDTH), noise(2, length, HEADS, K), noise(K, WIDTH, 4)
    inputs = [u_BLD, decays(speed, 2, length), weights_BLHK, channels_KDE]
    mixed_BLE = mix_channels(definition(bank_of("direct"), *inputs[:2]), *inputs[2:])
    return inputs, mixed_BLE.detach(), torch.autograd.grad(mixed_BLE, inputs, upstream(mixed_BLE))


def upstream(mixed_BLE: Tensor) -> Tensor:
    return noise(*mixed_BLE.shape, seed=1).detach().to(mixed_BLE.dtype)


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("length", [1, 65, 200])
@pytest.mark.parametrize("way", ["chunked", "direct"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_mix_has_the_outputs_and_gradients_of_the_definition(
    way: str, length: int, speed: str, dtype: torch.dtype
) -> None:
    exact, expected, expected_grads = truth(speed, length)
    inputs = [each.detach().to(dtype).requires_grad_() for each in exact]
    u_BLD, log_decay_BLH, weights_BLHK, channels_KDE = inputs
    found = bank_of(way).mix(u_BLD, with_decays(weights_BLHK, log_decay_BLH), channels_KDE)
    found_grads = torch.autograd.grad(found, inputs, upstream(found))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-6 if way == "chunked" else 1e-11
    for mine, other in zip((found, *found_grads), (expected, *expected_grads), strict=True):
        error = float((mine.double() - other).detach().norm())
        assert error < tolerance * max(1.0, float(other.norm())), "of one position the decay's gradient is 0"
    features = bank_of(way)(u_BLD, K, None, log_decay_BLH)
    assert off(mix_channels(features, weights_BLHK, channels_KDE).double(), expected) < tolerance
    fewer = bank_of(way).mix(u_BLD, with_decays(weights_BLHK[..., :2], log_decay_BLH), channels_KDE[:2])
    partial = mix_channels(features[:, :, :2], weights_BLHK[..., :2], channels_KDE[:2])
    assert off(fewer, partial) < tolerance, "a cut leaves out summands"


@pytest.mark.parametrize("way", ["chunked", "direct"])
@pytest.mark.parametrize("speed", ["fast", "mixed"])
def test_documents_are_kept_apart(way: str, speed: str) -> None:
    documents_BL = torch.stack([numbered((1, 64, 70, 71, 130), 150), numbered((100,), 150)])
    u_BLD, log_decay_BLH = noise(2, 150, WIDTH), decays(speed, 2, 150)
    weights_BLHK, channels_KDE = noise(2, 150, HEADS, K), noise(K, WIDTH, 4)
    bank, inputs = bank_of(way), [u_BLD, log_decay_BLH, weights_BLHK]
    features = definition(bank, u_BLD, log_decay_BLH, documents_BL)
    expected = mix_channels(features, weights_BLHK, channels_KDE)
    segments = bank.segments(documents_BL)
    found = bank.mix(u_BLD, with_decays(weights_BLHK, log_decay_BLH), channels_KDE, segments)
    assert off(bank(u_BLD, K, segments, log_decay_BLH), features) < 2e-6
    pairs = zip(*(torch.autograd.grad(y, inputs, upstream(y)) for y in (found, expected)), strict=True)
    for mine, other in ((found, expected), *pairs):
        assert off(mine, other) < 2e-6


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("windowed", [False, True])
@pytest.mark.parametrize("length", [30, 64, 300])
@torch.no_grad()
def test_steps_and_pieces_of_any_length_equal_the_parallel_form(speed: str, windowed: bool, length: int) -> None:
    bank = bank_of("chunked")
    if windowed:
        bank = WindowedFilterBank(100, K, "auto")
        bank.reset()
    u_BLD, log_decay_BLH = noise(2, length, WIDTH).float(), decays(speed, 2, length).float()
    weights_BLHX = with_decays(noise(2, length, HEADS, K).float(), log_decay_BLH)
    channels_KDE = noise(K, WIDTH, 4).float()
    expected = bank.mix(u_BLD, weights_BLHX, channels_KDE)
    assert off(bank.mix(*(x.double() for x in (u_BLD, weights_BLHX, channels_KDE))), expected.double()) < 1e-5
    features = bank(u_BLD, K, None, log_decay_BLH)
    state = bank.advance(u_BLD[:, :0], None, log_decay_BLH[:, :0])
    for t in range(length):
        stepped, state = bank.step(u_BLD[:, t], faded(state, log_decay_BLH[:, t]), K)
        assert off(stepped, features[:, t]) < 1e-5
    for first, middle in ((0, 17), (17, 20), (1, length), (20, 20)):
        before = bank.advance(u_BLD[:, :first], None, log_decay_BLH[:, :first])
        span = slice(first, middle)
        state = bank.advance(u_BLD[:, span], before, log_decay_BLH[:, span])
        for start, found in ((first, before), (middle, state)):
            if start < length:
                rest = u_BLD[:, start:], found, weights_BLHX[:, start:], channels_KDE
                assert off(bank.mix_from(*rest), expected[:, start:]) < 1e-5


@torch.no_grad()
def test_a_long_text_forgets_and_remembers_as_exactly_as_a_short_one() -> None:
    """At 40,000 positions the sum of the log decays has no digits left for one more; only differences count."""
    bank, length = bank_of("chunked", 2048), 40_000
    u_BLD, log_decay_BLH = noise(1, length, WIDTH), torch.full((1, length, HEADS), -FASTEST, dtype=torch.float64)
    log_decay_BLH[:, -500:] = -1e-4
    last = slice(length - 600, length)  # what was before is gone
    expected = bank(u_BLD[:, last], K, None, log_decay_BLH[:, last])
    found = bank(u_BLD.float(), K, None, log_decay_BLH.float())[:, last]
    assert off(found[:, -500:].double(), expected[:, -500:]) < 1e-5


def test_bfloat16_rounds_and_loses_nothing_else() -> None:
    """As the products are on a GPU: inputs and features of 16 bits, whose range holds a chunk's factors."""
    exact, expected, expected_grads = truth("fast", 200)
    u_BLD, log_decay_BLH, weights_BLHK, channels_KDE = (each.detach().float() for each in exact)
    narrow = [u_BLD.bfloat16(), log_decay_BLH, weights_BLHK, channels_KDE.bfloat16()]
    inputs = [each.requires_grad_() for each in narrow]
    found = bank_of("chunked").mix(inputs[0], with_decays(inputs[2], inputs[1]), inputs[3])
    gradients = torch.autograd.grad(found, inputs, upstream(found))
    for mine, other in zip((found, *gradients), (expected, *expected_grads), strict=True):
        assert off(mine.double(), other) < 0.02


def test_a_decay_is_between_its_bounds_and_1() -> None:
    scores = torch.tensor([-100.0, -5.0, 0.0, 100.0]).bfloat16()
    log_decay = log_decays(scores)
    assert log_decay.dtype == torch.float32
    assert log_decay.tolist() == pytest.approx([0.0, -FASTEST / (1 + math.exp(5)), -FASTEST / 2, -FASTEST], abs=1e-6)
    weights = torch.rand(2, 3, HEADS, K)
    assert parted(weights, K)[1] is None
