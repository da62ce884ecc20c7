"""Documents kept apart: nothing leaks over a boundary, and each document's numbers are those it has alone."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megassm.config.schema import Config
from megassm.data.dataset import open_dataset
from megassm.data.stream import MicroBatch
from megassm.errors import UserError
from megassm.eval.sweep import SweepPlan, sweep
from megassm.eval.text import EvalText
from megassm.layers.filterbank import FilterBank
from megassm.model import LanguageModel, build_model
from megassm.ops.documents import document_numbers
from megassm.ops.mixing import mix_channels
from megassm.parallel.engine import Engine
from megassm.parallel.world import join_peers, join_world, leave_world
from tests.ranks import run_on_ranks
from tests.test_model import config

LENGTH, K_MAX = 200, 6
CUTS = [
    (),
    (1,),
    (199,),
    (64, 128),  # at the edges of chunks
    (63, 65, 129),
    (10, 11, 12, 30, 40, 63),  # several in one chunk
    (1, 2, 100, 101, 190, 198, 199),
]
WAYS = ("direct", "fft", "chunked")


def numbered(cuts: tuple[int, ...], length: int = LENGTH) -> Tensor:
    """(L,) documents that begin at 0 and at `cuts`; the numbers have gaps."""
    time = torch.arange(length)
    return 3 * sum((time >= cut).long() for cut in cuts) if cuts else torch.zeros(length, dtype=torch.long)


def parts(documents_L: Tensor) -> Iterator[slice]:
    """Each document's positions."""
    begins = [0, *((documents_L.diff() != 0).nonzero()[:, 0] + 1).tolist(), len(documents_L)]
    return (slice(*pair) for pair in itertools.pairwise(begins))


@lru_cache
def bank_of(way: str, basis: str = "plus") -> FilterBank:
    bank = FilterBank(256, 16, way, basis)  # type: ignore[arg-type]
    bank.reset()
    return bank


@lru_cache
def model(pattern: str, way: str) -> LanguageModel:
    return build_model(config(pattern=pattern, filterbank=way, seq_len=LENGTH), 0).double()


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm().clamp_min(1e-300))


def check_mix(way: str, documents_BL: Tensor, k: int, basis: str = "plus") -> None:
    """`mix` and its gradients in float64 against each document alone, its features by the definition's sum."""
    batch, length = documents_BL.shape
    bank, truth = bank_of(way, basis), bank_of("direct", basis)
    inputs = [noise(batch, length, 6), noise(batch, length, 2, k), noise(k, 6, 4)]
    rows = []
    for row, documents_L in enumerate(documents_BL):
        u, weights = (tensor[row : row + 1] for tensor in inputs[:2])
        rows.append(
            torch.cat([mix_channels(truth(u[:, p], k), weights[:, p], inputs[2]) for p in parts(documents_L)], 1)
        )
    expected = torch.cat(rows)
    segments = bank.segments(documents_BL)
    found = bank.mix(*inputs, segments)
    gradient = noise(*expected.shape, seed=1).detach()
    expected_grads = torch.autograd.grad(expected, inputs, gradient)
    found_grads = torch.autograd.grad(found, inputs, gradient)
    for mine, other in zip((found, *found_grads), (expected, *expected_grads), strict=True):
        assert off(mine, other) < (2e-6 if way == "chunked" else 1e-11)
    assert off(mix_channels(bank(inputs[0], k, segments), *inputs[1:]), expected) < 2e-6


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cuts", CUTS)
def test_mix_equals_each_document_alone(way: str, cuts: tuple[int, ...]) -> None:
    check_mix(way, torch.stack((numbered(cuts), numbered((77,)))), 5)


@pytest.mark.parametrize("basis", ["alternating", "hankel_l"])
def test_documents_begin_at_age_0_of_filters_with_signs(basis: str) -> None:
    for cuts in CUTS:
        check_mix("chunked", torch.stack((numbered(cuts), numbered((77,)))), 5, basis)


@given(data=st.data(), length=st.integers(1, 256), batch=st.integers(1, 3), k=st.integers(1, 16))
@settings(max_examples=25, deadline=None)
@pytest.mark.parametrize("way", ["direct", "chunked"])
def test_mix_at_any_boundaries(way: str, data: st.DataObject, length: int, batch: int, k: int) -> None:
    cuts = [data.draw(st.sets(st.integers(1, max(1, length - 1)), max_size=6)) for _ in range(batch)]
    check_mix(way, torch.stack([numbered(tuple(sorted(c)), length) for c in cuts]), k)


@pytest.mark.parametrize("way", ["direct", "chunked"])
@pytest.mark.parametrize(
    ("pattern", "window", "taps", "selective"),
    [("S", None, 1, False), ("A", None, 1, False), ("SA", None, 4, False), ("SA", 30, 1, True)],
)
@pytest.mark.parametrize("cuts", CUTS)
def test_model_equals_each_document_alone(
    way: str, pattern: str, window: int | None, taps: int, selective: bool, cuts: tuple[int, ...]
) -> None:
    knobs = {"window": window, "input_taps": taps, "selective": selective}
    settings_ = config(pattern=pattern, filterbank=way, seq_len=LENGTH, **knobs)
    network = build_model(settings_, 0).double()
    for name, parameter in network.named_parameters():
        if "taps" in name:
            torch.nn.init.normal_(parameter)
    text = torch.randint(0, 50, (1, LENGTH), generator=torch.Generator().manual_seed(1))
    documents = numbered(cuts)
    found = network(text, K_MAX, documents_BL=documents[None])
    alone = torch.cat([network(text[:, part], K_MAX) for part in parts(documents)], 1)
    assert torch.allclose(found, alone, atol=1e-5)
    gradients = []
    for logits in (found, alone):
        network.zero_grad()
        logits.square().mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for mine, other in zip(*gradients, strict=True):
        assert off(mine, other) < 1e-4  # type: ignore[arg-type]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("pattern", ["S", "A", "SA"])
@pytest.mark.parametrize("cuts", CUTS)
@torch.no_grad()
def test_no_document_sees_another(way: str, pattern: str, cuts: tuple[int, ...]) -> None:
    network = model(pattern, way)
    text = torch.randint(0, 50, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    documents = numbered(cuts)
    before = network(text, K_MAX, documents_BL=documents.expand(2, -1))
    for part in parts(documents):
        changed = text.clone()
        changed[0, part] = (changed[0, part] + 1) % 50
        after = network(changed, K_MAX, documents_BL=documents.expand(2, -1))
        same = torch.ones(LENGTH, dtype=torch.bool)
        same[part] = False
        if way == "fft":  # rounds all of a sequence together
            assert torch.allclose(after[:, same], before[:, same], rtol=0, atol=1e-13)
        else:
            assert torch.equal(after[:, same], before[:, same])
            assert torch.equal(after[1], before[1])
        assert (after[0, part] != before[0, part]).any()


def test_recomputation_keeps_them_apart() -> None:
    text, documents = torch.randint(0, 50, (1, 100)), numbered((30, 64, 70), 100)[None]
    gradients = []
    for recompute in (False, True):
        network = build_model(config(seq_len=100), 0, recompute)
        network.losses(text, network(text, 4, documents), text).mean().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_one_document_costs_what_none_does() -> None:
    bank = bank_of("chunked")
    segments = bank.segments(torch.zeros(2, 200, dtype=torch.long))
    assert not segments.has_copies
    edges = bank.segments(numbered((64, 128))[None])
    assert not edges.has_copies, "a boundary at a chunk's edge needs no second product"
    assert bank.segments(numbered((10, 20, 70))[None]).copied_X.tolist() == [0, 0, 1]


def test_a_document_ends_with_its_end() -> None:
    ids = torch.tensor([[5, 9, 7, 9, 9, 1]])
    assert document_numbers(ids, 9).tolist() == [[0, 0, 1, 1, 2, 3]]  # type: ignore[union-attr]
    assert document_numbers(ids, None) is None


@pytest.mark.parametrize(
    ("documents", "expected"), [([[0, 1, 0]], "count up"), ([[0, 1]], "one number for every position")]
)
def test_what_are_no_documents(documents: list[list[int]], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        model("S", "chunked")(torch.zeros(1, 3, dtype=torch.long), 1, documents_BL=torch.tensor(documents))


def engine_losses(settings_: Config) -> list[list[float]]:
    """Losses of a sequence with an end inside; then with another first document."""
    data = open_dataset(settings_)
    world = join_world(settings_)
    try:
        engine = Engine(settings_, world, data.document_end(settings_))
        ids = torch.randint(0, 250, (2, settings_.model.seq_len + 1), generator=torch.Generator().manual_seed(0))
        ids[:, 20] = data.train.eod
        other = ids.clone()
        other[:, :20] = 1
        return [engine.eval_losses(text, 4)[0].tolist() for text in (ids, other)]
    finally:
        leave_world()


@pytest.mark.ranks
@pytest.mark.parametrize("isolate", [True, False])
def test_the_engine_takes_documents_from_the_ids(small_config: Callable[..., Config], isolate: bool) -> None:
    settings_ = small_config("model.pattern=SA", f"data.isolate_documents={str(isolate).lower()}")
    (first, second), *_ = run_on_ranks(1, engine_losses, settings_)
    assert first[:19] != second[:19]
    assert (first[21:] == second[21:]) is isolate


def test_a_sweep_keeps_documents_apart(small_config: Callable[..., Config]) -> None:
    settings_ = small_config()
    network = build_model(settings_.model, 0)
    end = open_dataset(settings_).train.eod
    ids = torch.randint(0, 250, (1, 65), generator=torch.Generator().manual_seed(0)).numpy()
    ids[:, 30] = end
    mask = torch.zeros(1, 64, dtype=torch.bool).numpy()
    mask[:, 31:] = True
    other = ids.copy()
    other[:, :30] = 1
    sizes = torch.ones(257, dtype=torch.long).numpy()

    def bits(text: Any, document_end: int | None) -> float:
        batch = MicroBatch(text, mask, np.zeros(1, np.int64))
        plan = SweepPlan([8], [64], 1, 1, document_end)
        (curve,) = sweep(network, [EvalText("text", lambda *_: iter([batch]))], plan, sizes, peers)
        return curve.rows[0].bits_per_byte

    peers = join_peers("cpu")
    assert bits(ids, end) == bits(other, end)
    assert bits(ids, None) != bits(other, None)
    leave_world()
