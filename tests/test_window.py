"""Texts longer than the filters, read by windows: against the definition, decoded, bounded, exported."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megassm.checkpoint.exported import open_model_folder, write_model_folder
from megassm.checkpoint.format import load_model
from megassm.data.tokenizer.base import BytesTokenizer
from megassm.eval.generate import generate
from megassm.eval.sampling import Sampling
from megassm.eval.speculate import Drafting
from megassm.layers.filterbank import FilterBank
from megassm.layers.spectral_state import WindowState
from megassm.layers.window import WindowedFilterBank
from megassm.model import build_model, truncate
from megassm.ops.mixing import mix_channels
from tests.test_model import config

K = 6


def bank_of(seq_len: int, method: Any = "auto", k: int = K, basis: Any = "plus") -> WindowedFilterBank:
    bank = WindowedFilterBank(seq_len, k, method, basis)
    bank.reset()
    return bank


def by_definition(u_BLD: Tensor, bank: WindowedFilterBank) -> Tensor:
    """Features, position by position; no entry of a filter but those of the trained length."""
    hop = (bank.seq_len + 1) // 2
    rows = []
    for t in range(u_BLD.shape[1]):
        first = max(0, (t // hop - 1) * hop)
        ages = torch.arange(t - first, -1, -1)
        rows.append(torch.einsum("bsd,sk->bkd", u_BLD[:, first : t + 1], bank.filters(u_BLD)[ages]))
    return torch.stack(rows, 1)


@pytest.mark.parametrize("basis", ["plus", "alternating", "hankel_l"])
@pytest.mark.parametrize(("seq_len", "length"), [(64, 64), (64, 65), (64, 300), (31, 31), (31, 33), (31, 140)])
@torch.no_grad()
def test_windows_are_what_they_are_defined_to_be(seq_len: int, length: int, basis: str) -> None:
    bank = bank_of(seq_len, basis=basis)
    u_BLD = torch.randn(2, length, 3, dtype=torch.float64)
    expected = by_definition(u_BLD, bank)
    scale = float(expected.abs().max())
    for k in (1, K):
        assert float((bank(u_BLD, k) - expected[:, :, :k]).abs().max()) < 1e-6 * scale
        weights_BLHK, channels_KDE = torch.rand(2, length, 1, k).double(), torch.randn(k, 3, 3).double()
        mixed = mix_channels(expected[:, :, :k], weights_BLHK, channels_KDE)
        assert float((bank.mix(u_BLD, weights_BLHK, channels_KDE) - mixed).abs().max()) < 1e-6 * scale
    state = bank.advance(u_BLD[:, :10], None)
    for t in range(10, min(length, 150)):
        features, state = bank.step(u_BLD[:, t], state, K)
        assert float((features - expected[:, t]).abs().max()) < 1e-6 * scale, t
    other = bank.advance(u_BLD[:, 10 : min(length, 150)], bank.advance(u_BLD[:, :10], None))
    assert other.lengths == state.lengths
    for mine, theirs in zip(other[:2], state[:2], strict=True):
        assert float((mine - theirs).abs().max()) < 1e-9 * max(1.0, float(theirs.abs().max()))


@torch.no_grad()
def test_outputs_stay_bounded_where_the_continuation_explodes() -> None:
    """No feature exceeds what a filter's entries within the trained length can sum up to, at 16 times that length."""
    windowed, plain = bank_of(64, k=16), FilterBank(64, 16, "auto")
    plain.reset()
    u_BLD = torch.ones(1, 1024, 1, dtype=torch.float64)
    u_BLD[:, torch.rand(1024, generator=torch.Generator().manual_seed(0)) < 0.5] = -1
    most_K = windowed.filters_LK.abs().sum(0)
    assert bool((windowed(u_BLD, 16).abs().amax((0, 1, 3)) <= 1.001 * most_K).all())
    assert float(plain(u_BLD, 16).abs().amax((0, 1, 3))[-1]) > 100 * float(most_K[-1])
    assert windowed.steady_channels(1024) == 16 > plain.steady_channels(1024)
    assert float((windowed(u_BLD[:, :64], 16) - plain(u_BLD[:, :64], 16)).abs().max()) == 0, "within it nothing differs"


@pytest.mark.parametrize(
    ("pattern", "basis", "selective"),
    [("S", "plus", True), ("SA", "plus", False), ("SA", "alternating", False), ("S", "hankel_l", False)],
)
@torch.no_grad()
def test_decoding_equals_the_parallel_form_far_beyond_the_trained_length(
    pattern: str, basis: str, selective: bool
) -> None:
    knobs = {"mixer_heads": 2, "gate": "sigmoid", "input_taps": 3, "sigma_scale": "none", "basis": basis}
    model = build_model(config(pattern=pattern, beyond="window", selective=selective, **knobs), 0).double().eval()
    model.reset_filters()
    ids_BL = torch.randint(0, 50, (3, 130))
    expected_BLV = model(ids_BL)

    def differs(logits: Tensor, expected: Tensor) -> float:
        return float((logits - expected).abs().max())

    counts = (5, 12, 61)
    logits_BV, state = model.prefill(ids_BL[:, :61], None, counts)
    for row, count in enumerate(counts):
        assert differs(logits_BV[row], expected_BLV[row, count - 1]) < 1e-7
    for _ in range(20):
        ids_B = torch.stack([ids_BL[row, seen] for row, seen in enumerate(state.lengths)])
        logits_BV, state = model.step(ids_B, state)
        for row, seen in enumerate(state.lengths):
            assert differs(logits_BV[row], expected_BLV[row, seen - 1]) < 1e-7
    parts = torch.stack([ids_BL[row, seen : seen + 49] for row, seen in enumerate(state.lengths)])
    logits_BLV, extension = model.extend(parts, state)
    for row, seen in enumerate(state.lengths):
        assert differs(logits_BLV[row], expected_BLV[row, seen : seen + 49]) < 1e-7
    kept = extension.keep((49, 0, 31))
    assert kept.lengths == (74, 32, 112)
    ids_B = torch.stack([ids_BL[row, seen] for row, seen in enumerate(kept.lengths)])
    logits_BV, _ = model.step(ids_B, kept.take(torch.tensor([0, 1, 2])))
    for row, seen in enumerate(kept.lengths):
        assert differs(logits_BV[row], expected_BLV[row, seen]) < 1e-7
    small = truncate(model, 3)
    assert differs(small(ids_BL), model(ids_BL, 3)) < 1e-9


def test_texts_drafted_or_not_and_states_by_rows() -> None:
    model = build_model(config(pattern="S", beyond="window"), 0).double().eval()
    model.reset_filters()
    sampling = Sampling(max_tokens=40, temperature=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain = generate(model, [[1, 2, 3], [4] * 20], None, sampling)
        assert generate(model, [[1, 2, 3], [4] * 20], None, sampling, Drafting(2, 3)) == plain
        assert generate(model, [[4] * 20], None, sampling) == plain[1:]
    _, state = model.prefill(torch.randint(0, 50, (2, 30)))
    assert isinstance(state.layers[0], WindowState)
    other = state.where(torch.tensor([True, False]), state.take(torch.tensor([1, 0])))
    assert bool((other.layers[0].older_BSD[0] == other.layers[0].older_BSD[1]).all())
    assert state.nbytes == sum(2 * layer.older_BSD.nbytes for layer in state.layers)


@pytest.mark.parametrize("method", ["chunked", "direct", "fft"])
@torch.no_grad()
def test_documents_are_kept_apart_in_windows(method: str) -> None:
    """A document is what it is alone, but for where its windows begin: one within its first hop is the same."""
    shape = config(pattern="SA" if method == "chunked" else "S", beyond="window", seq_len=64, filterbank=method)
    model = build_model(shape, 0).double().eval()
    model.reset_filters()
    ids_BL = torch.randint(0, 50, (2, 300))
    ends = ((50, 110, 131, 300), (7, 8, 200, 300))
    documents_BL = torch.stack([torch.bucketize(torch.arange(300), torch.tensor(end), right=True) for end in ends])
    found_BLV = model(ids_BL, 4, documents_BL)
    other_BL = ids_BL.clone()
    other_BL[0, :110] = 1
    assert float((model(other_BL, 4, documents_BL)[0, 110:] - found_BLV[0, 110:]).abs().max()) < 1e-9
    assert float((model(other_BL, 4)[0, 110:130] - model(ids_BL, 4)[0, 110:130]).abs().max()) > 1e-4
    if "A" not in shape.mixers:  # rotary positions run on
        alone_BLV = model(ids_BL[:1, 110:131], 4)
        assert float((found_BLV[0, 110:131] - alone_BLV[0]).abs().max()) < 1e-6


@torch.no_grad()
def test_it_is_chosen_afterwards_and_goes_with_an_export(tmp_path: Path) -> None:
    from megassm.hf import MegaSSMForCausalLM

    model = build_model(config(vocab_size=257, pattern="SA"), 0).eval()
    ids_BL = torch.randint(0, 257, (2, 100))
    before_BLV = model(ids_BL)
    model.read_beyond("window")
    windowed_BLV = model(ids_BL)
    assert float((windowed_BLV[:, :24] - before_BLV[:, :24]).abs().max()) < 1e-5
    assert float((windowed_BLV - before_BLV).abs().max()) > 1e-3
    write_model_folder(tmp_path, model, BytesTokenizer(), torch.float32)
    again = load_model(open_model_folder(tmp_path))
    assert again.config.beyond == "window"
    assert float((again(ids_BL) - windowed_BLV).abs().max()) < 1e-4
    hub = MegaSSMForCausalLM.from_pretrained(tmp_path)
    assert float((hub(ids_BL).logits - windowed_BLV).abs().max()) < 1e-4
    drawn = hub.generate(ids_BL[:, :20], max_new_tokens=30, do_sample=False)
    assert drawn.tolist() == hub.generate(ids_BL[:, :20], max_new_tokens=30, do_sample=False, use_cache=False).tolist()
