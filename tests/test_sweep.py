"""The sweep: the model at every budget, lengths beyond training, ranks that divide the text."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from megassm.commands.sweep import show
from megassm.data.stream import MicroBatch, StreamPlan
from megassm.errors import UserError
from megassm.eval.overlap import with_overlap
from megassm.eval.score import score
from megassm.eval.sweep import SweepPlan, sweep
from megassm.eval.swept import BudgetCurve, Sweep
from megassm.eval.text import EvalText, token_batches
from megassm.model import build_model, losses_at, truncate
from megassm.ops.documents import document_numbers
from megassm.parallel.world import Peers, join_peers, leave_world, together
from tests.ranks import run_on_ranks
from tests.test_model import K_MAX, config

TOKEN_BYTES = np.arange(50, dtype=np.int64) % 3  # 0, 1 or 2 bytes a token
PLAN = SweepPlan(budgets=[1, 3], seq_lens=[24], sequences=100, micro_batch_sequences=2)


def text(name: str = "noise", tokens: int = 215, seed: int = 0) -> EvalText:
    """9 sequences of 24, the last one short."""
    ids_N = np.random.default_rng(seed).integers(0, 50, tokens)
    return EvalText(name, lambda plan, sequences: token_batches(ids_N, 0, plan, sequences))


@pytest.fixture(scope="module")
def peers() -> Iterator[Peers]:
    yield join_peers("cpu")
    leave_world()


def test_sweep_equals_the_model_at_each_budget(peers: Peers) -> None:
    model = build_model(config(), 0)
    (curve,) = sweep(model, [text()], PLAN, TOKEN_BYTES, peers)
    batches = list(text().read(StreamPlan(24, 2, 2, seed=0), 100))
    assert (curve.data, curve.seq_len, curve.sequences, curve.predicted_tokens) == ("noise", 24, 9, 214)
    assert [row.k for row in curve.rows] == [1, 3, K_MAX], "full K is added"
    for row in curve.rows:
        k = row.k
        direct = score(lambda ids, _, k=k: losses_at(model, ids, k), batches, k, TOKEN_BYTES, peers.device)
        assert row.bits_per_byte == pytest.approx(direct.bits_per_byte, rel=1e-5)
        assert row.bits_per_token == pytest.approx(direct.loss / math.log(2), rel=1e-5)
        assert row.perplexity == pytest.approx(direct.perplexity, rel=1e-5)
        assert row.parameters == sum(p.numel() for p in truncate(model, k).parameters())
        assert row.gap_percent == pytest.approx(100 * (row.bits_per_byte / curve.rows[-1].bits_per_byte - 1))
        for value, name in ((row.bits_per_byte, "bits_per_byte"), (row.perplexity, "perplexity")):
            low, high = getattr(row, f"{name}_low"), getattr(row, f"{name}_high")
            assert 0.7 * value < low < value < high < 1.3 * value
        assert row.gap_percent_low is not None
        assert row.gap_percent_high is not None
        assert row.gap_percent_low <= row.gap_percent <= row.gap_percent_high
        assert row.prefill_tokens_per_s > 0
        assert row.decode_tokens_per_s is not None
        assert row.decode_tokens_per_s > 0
    assert (curve.rows[-1].gap_percent_low, curve.rows[-1].gap_percent_high) == (0, 0)
    memory = [row.peak_memory_mib for row in curve.rows]
    assert memory == sorted(memory)
    assert memory[0] < memory[-1]
    flops = [row.forward_flops_per_token for row in curve.rows]
    assert flops[0] < flops[1] < flops[2]


def test_lengths_beyond_training_score_the_same_text(peers: Peers) -> None:
    model = build_model(config(num_channels=4), 0)
    plan = SweepPlan([2], [24, 48, 96], 4, 2)
    curves = sweep(model, [text("a"), text("b", seed=1)], plan, TOKEN_BYTES, peers)
    assert [(c.data, c.seq_len, c.sequences) for c in curves] == [
        ("a", 24, 4), ("b", 24, 4), ("a", 48, 2), ("b", 48, 2), ("a", 96, 1), ("b", 96, 1),
    ]  # fmt: skip
    assert [c.predicted_tokens for c in curves] == [96] * 6
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 50, 215)[None, :97])
    nll = losses_at(model, ids, 2).double().sum().item()
    size = TOKEN_BYTES[ids.numpy()[0, 1:]].sum()
    assert curves[4].rows[0].bits_per_byte == pytest.approx(nll / math.log(2) / size, rel=1e-5)
    assert curves[4].rows[0].perplexity_low is None, "one sequence has no interval"
    assert curves[0].rows[0].prefill_tokens_per_s == curves[1].rows[0].prefill_tokens_per_s, "measured once a length"


def test_refusals(peers: Peers) -> None:
    model = build_model(config(), 0)
    with pytest.raises(UserError, match="K_max = 6"):
        sweep(model, [text()], SweepPlan([7], [24], 4, 2), TOKEN_BYTES, peers)
    with pytest.raises(UserError, match="noise: no text to score"):
        sweep(model, [text(tokens=1)], PLAN, TOKEN_BYTES, peers)
    assert model.filterbank is not None
    model.filterbank.transition_SS = torch.empty(0, 0)
    with pytest.raises(UserError, match="cannot be continued; measure up to 24"):
        sweep(model, [text()], SweepPlan([1], [24, 48], 4, 2), TOKEN_BYTES, peers)


def test_a_model_without_steps_is_measured_without_decoding(peers: Peers) -> None:
    model = build_model(config(), 0)
    whole = sweep(model, [text()], PLAN, TOKEN_BYTES, peers)[0]
    assert model.filterbank is not None
    model.filterbank.transition_SS = torch.empty(0, 0)  # as where the filters have no state within tolerance
    (curve,) = sweep(model, [text()], PLAN, TOKEN_BYTES, peers)
    assert [row.decode_tokens_per_s for row in curve.rows] == [None] * 3
    for row, other in zip(curve.rows, whole.rows, strict=True):
        assert row.bits_per_byte == pytest.approx(other.bits_per_byte, rel=1e-5)


@torch.no_grad()
def test_agreement_and_overlap_are_those_of_the_drafts_that_would_be_accepted(
    peers: Peers, capsys: pytest.CaptureFixture[str]
) -> None:
    model, plan = build_model(config(), 0), replace(PLAN, seq_lens=[24, 48], document_end=3)
    curves = with_overlap(sweep(model, [text()], plan, TOKEN_BYTES, peers), model, [text()], plan, peers)
    for curve in curves:
        length = curve.seq_len
        found = {k: np.zeros((length, 2)) for k in (1, 3, K_MAX)}
        for batch in text().read(StreamPlan(length, 1, 1, seed=0), 100):
            ids_1L = torch.from_numpy(batch.ids_BT[:, :-1])
            documents_1L = document_numbers(ids_1L, 3)
            full_LV = model(ids_1L, None, documents_1L)[0].softmax(-1)
            for k, sums_L2 in found.items():
                small_LV = model(ids_1L, k, documents_1L)[0].softmax(-1)
                shared_L = 1 - (full_LV - small_LV).abs().sum(-1) / 2  # of two distributions
                both_L2 = torch.stack((full_LV.argmax(-1) == small_LV.argmax(-1), shared_L), 1)
                sums_L2 += both_L2.double().numpy() * batch.mask_BL[0][:, None]
        for row in curve.rows:
            expected = found[row.k].sum(0) / curve.predicted_tokens
            assert (row.agreement, row.overlap) == pytest.approx(expected, abs=1e-6)
        assert (curve.rows[-1].agreement, curve.rows[-1].overlap) == pytest.approx((1, 1))
        assert curve.rows[0].overlap is not None
        assert 0.1 < curve.rows[0].overlap < 0.999
        ranges = [(0, 16), (16, 24)] if length == 24 else [(0, 16), (16, 32), (32, 48)]
        assert [(at.k, at.first, at.end) for at in curve.positions] == [(k, *ends) for k in found for ends in ranges]
        for at in curve.positions:
            expected = found[at.k][at.first : at.end].sum(0) / at.tokens
            assert (at.agreement, at.overlap) == pytest.approx(expected, abs=1e-6)
        for row in curve.rows:
            bits = sum(at.tokens * at.bits_per_token for at in curve.positions if at.k == row.k)
            assert bits / curve.predicted_tokens == pytest.approx(row.bits_per_token, rel=1e-5)
    show(Sweep("runs/x", 7, 24, curves))
    shown = capsys.readouterr().out
    assert "overlap" in shown
    assert f"{curves[1].positions[-1].overlap:.3f}" in shown


def quality(curves: list[BudgetCurve]) -> list[Any]:
    """What must not depend on the number of ranks."""
    return [
        [curve.data, curve.sequences, curve.best_unigram_bits_per_byte, curve.shape.area]
        + [value for row in curve.rows for value in (row.k, row.bits_per_byte, row.perplexity_low, row.perplexity_high)]
        + [value for row in curve.rows for value in (row.agreement, row.overlap)]
        for curve in curves
    ]


def whole_sweep(peers: Peers) -> list[BudgetCurve]:
    model, texts = build_model(config(), 0), [text("a"), text("b", 130, 1)]
    return with_overlap(sweep(model, texts, PLAN, TOKEN_BYTES, peers), model, texts, PLAN, peers)


def swept_on_a_rank() -> tuple[list[Any], str]:
    torch.set_num_threads(1)
    peers = join_peers("cpu")
    found = quality(whole_sweep(peers))

    def attempt() -> int:
        if not peers.is_main:
            raise UserError("rank 1 has another disk")
        return 1

    with pytest.raises(UserError) as refusal:
        together(attempt)
    leave_world()
    return found, str(refusal.value)


@pytest.mark.ranks
def test_ranks_divide_the_text_and_get_the_same(peers: Peers) -> None:
    alone = quality(whole_sweep(peers))
    for found, refusal in run_on_ranks(2, swept_on_a_rank):
        assert refusal == "rank 1 has another disk", "all ranks learn why one gave up"
        assert [curve[:2] for curve in found] == [curve[:2] for curve in alone]
        for curve, expected in zip(found, alone, strict=True):
            assert curve[2:] == pytest.approx(expected[2:], rel=1e-6)


def test_token_batches_divide_over_ranks_and_mask_what_is_not_there() -> None:
    ids_N = np.arange(100)
    alone = list(token_batches(ids_N, 7, StreamPlan(8, 4, 4, seed=0), 1000))
    assert sum(int(batch.mask_BL.sum()) for batch in alone) == 99, "all but the first are predicted"
    seen: dict[int, MicroBatch] = {}
    for rank in range(3):
        mine = list(token_batches(ids_N, 7, StreamPlan(8, 12, 4, seed=0, rank=rank, world_size=3), 1000))
        assert len(mine) == 2
        for batch in mine:
            for row, sample in enumerate(batch.sample_ids_B.tolist()):
                if sample < 0:
                    assert not batch.mask_BL[row].any()
                    continue
                expected = ids_N[8 * sample : 8 * sample + 9]
                assert batch.ids_BT[row, : len(expected)].tolist() == expected.tolist()
                assert (batch.ids_BT[row, len(expected) :] == 7).all()
                assert batch.mask_BL[row].sum() == len(expected) - 1
                assert sample not in seen
                seen[sample] = batch
    assert sorted(seen) == list(range(13))
    assert [len(list(token_batches(ids_N, 7, StreamPlan(8, 4, 4, seed=0), n))) for n in (1, 4, 5)] == [1, 1, 2]
