"""Steps from a state against the parallel form, at fixed and at changing budgets; the state's size."""

from __future__ import annotations

import warnings
from functools import lru_cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megassm.eval.generate import generate
from megassm.eval.sampling import Sampling
from megassm.layers.state import SLACK, DecodingState, KeyValueCache, TapsState
from megassm.model import LanguageModel, build_model
from tests.conftest import run_python
from tests.test_model import config

LENGTH, K_MAX = 2048, 32


@lru_cache
def model(pattern: str, heads: int = 1) -> LanguageModel:
    """With several heads it has taps and a sigmoid gate too, and filters with signs or a past that fades."""
    kind = {2: {"basis": "hankel_l"}, 4: {"basis": "alternating"}, 8: {"selective": True}}
    other = {"mixer_heads": heads, "gate": "sigmoid", "input_taps": 4, **kind[heads]} if heads > 1 else {}
    settings = config(pattern=pattern, seq_len=LENGTH, num_channels=K_MAX, d_model=32, window=100, **other)
    return build_model(settings, 0).eval()


def text(length: int, batch: int = 1) -> Tensor:
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(1))


def stepped(network: LanguageModel, ids_BL: Tensor, start: int, budgets: list[int]) -> Tensor:
    """Logits at every position from `start` on, a step each; the part before by prefill at the first budget."""
    first, state = network.prefill(ids_BL[:, :start], budgets[0])
    rows = [first]
    for position in range(start, ids_BL.shape[1]):
        logits, state = network.step(ids_BL[:, position], state, budgets[position % len(budgets)])
        rows.append(logits)
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize(
    ("pattern", "heads", "k", "length"),
    [("S", 1, 32, 2000), ("S", 1, 4, 500), ("SA", 1, 8, 500), ("SA", 4, 32, 2000), ("S", 2, 31, 500), ("S", 8, 7, 500)],
)
@torch.no_grad()
def test_steps_equal_the_parallel_form(pattern: str, heads: int, k: int, length: int) -> None:
    ids_BL, network = text(length), model(pattern, heads)
    expected = network(ids_BL, k)
    found = stepped(network, ids_BL, 37, [k])
    assert torch.allclose(found, expected[:, 36:], atol=1e-4)


@torch.no_grad()
def test_changing_budgets_equal_the_parallel_form_of_one_layer() -> None:
    """With one layer the state does not depend on earlier budgets: position t equals the parallel form at its K."""
    network = build_model(config(pattern="S", n_layers=1, seq_len=LENGTH, num_channels=K_MAX), 0).eval()
    ids_BL, budgets = text(500), [3, 32, 1, 17]
    parallel = {k: network(ids_BL, k) for k in budgets}
    found = stepped(network, ids_BL, 1, budgets)
    for position in range(1, 500):
        expected = parallel[budgets[position % 4]][:, position]
        assert torch.allclose(found[:, position], expected, atol=1e-4)


BIG = 1000
"""More than a chunk, and more than what a window has room for."""


@settings(max_examples=30, deadline=None)
@given(
    pattern=st.sampled_from(("S", "SA")),
    heads=st.sampled_from((1, 2, 4, 8)),
    k=st.sampled_from((1, 7, 32)),
    lengths=st.lists(st.sampled_from((1, 2, 5, 63, 64, 65, 130, 300)), min_size=1, max_size=4),
)
@torch.no_grad()
def test_extending_equals_the_parallel_form(pattern: str, heads: int, k: int, lengths: list[int]) -> None:
    """A text read in pieces of any length, each from the state before it."""
    ids_BL, network = text(sum(lengths), 2), model(pattern, heads)
    expected = network(ids_BL, k)
    state, found = None, []
    for piece_BL in ids_BL.split(lengths, dim=1):
        logits_BLV, extension = network.extend(piece_BL, state, k)
        found.append(logits_BLV)
        state = extension.keep()
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=2e-5, rtol=1e-4)
    assert state is not None
    assert state.lengths == (sum(lengths),) * 2


@settings(max_examples=30, deadline=None)
@given(
    pattern=st.sampled_from(("S", "SA")),
    heads=st.sampled_from((4, 8)),
    rounds=st.lists(st.lists(st.integers(0, 70), min_size=3, max_size=3), min_size=1, max_size=4),
)
@torch.no_grad()
def test_texts_of_a_batch_take_what_they_keep(pattern: str, heads: int, rounds: list[list[int]]) -> None:
    """Each text keeps its own share of what was read, and what it did not keep leaves no trace."""
    network, noise = model(pattern, heads), torch.Generator().manual_seed(2)
    length = 1 + sum(max(counts) for counts in rounds) + 1
    ids_BL = text(length, 3)
    _, state = network.prefill(ids_BL[:, :1], 8)
    for counts in rounds:
        wide = max(counts) + 3
        piece_BL = torch.randint(0, 50, (3, wide), generator=noise)
        for row, count in enumerate(counts):
            start = state.lengths[row]
            piece_BL[row, :count] = ids_BL[row, start : start + count]
        _, extension = network.extend(piece_BL, state, 8)
        state = extension.keep(counts)
    assert state.lengths == tuple(1 + sum(taken) for taken in zip(*rounds, strict=True))
    last_B = torch.stack([ids_BL[row, state.lengths[row]] for row in range(3)])
    found, _ = network.step(last_B, state, 8)
    for row in range(3):
        expected = network(ids_BL[row : row + 1, : state.lengths[row] + 1], 8)[0, -1]
        torch.testing.assert_close(found[row], expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_states_are_values() -> None:
    """A state may be continued twice, taken in parts and rewound; an older one still means what it meant."""
    network, ids_BL = model("SA", 4), text(BIG, 2)
    _, state = network.prefill(ids_BL[:, :50], 8)
    states = [state]
    for position in range(50, 300):
        _, state = network.step(ids_BL[:, position], state, 8)
        states.append(state)
    for number in (0, 17, 120, 249):
        found, _ = network.step(ids_BL[:, 50 + number], states[number], 8)
        expected = network(ids_BL[:, : 51 + number], 8)[:, -1]
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    rows = torch.tensor([1, 1, 0])
    found, _ = network.step(ids_BL[rows, 300], state.take(rows), 8)
    torch.testing.assert_close(found, network(ids_BL[:, :301], 8)[rows, -1], atol=2e-5, rtol=1e-4)
    network.extend(text(30, 2), state, 8)
    state.rewind()
    logits_BLV, _ = network.extend(ids_BL[:, 300:], state, 8)
    torch.testing.assert_close(logits_BLV, network(ids_BL, 8)[:, 300:], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_keys_and_values_are_written_in_place() -> None:
    network, ids_BL = model("SA", 4), text(BIG)
    wide = build_model(network.config.model_copy(update={"window": None}), 0).eval()
    for case, copies in ((wide, 4), (network, BIG // SLACK + 1)):
        _, state = case.prefill(ids_BL[:, :100], 8)
        moves, newest = 0, None
        for position in range(100, BIG):
            _, state = case.step(ids_BL[:, position], state, 8)
            layer = state.layers[1]
            assert isinstance(layer, TapsState)
            cache = layer.mixer
            assert isinstance(cache, KeyValueCache)
            moves += cache.buffers is not newest
            newest = cache.buffers
        assert moves <= copies
    assert newest is not None
    assert newest.key_BGTP.shape[2] <= 99 + SLACK


def test_budget_as_a_function_of_the_position() -> None:
    network = build_model(config(pattern="SA"), 0).eval()
    greedy = Sampling(20, temperature=0)
    prompts = [[1, 2, 3, 4, 5]]
    assert generate(network, prompts, lambda _: 4, greedy) == generate(network, prompts, 4, greedy)
    changing = generate(network, prompts, lambda position: 1 if position % 2 else 6, greedy)[0]
    logits, state = network.prefill(torch.tensor([[1]]), 6)
    ids = prompts[0] + changing
    for position in range(1, len(ids)):
        if position >= 5:
            assert int(logits.argmax()) == ids[position]
        logits, state = network.step(torch.tensor([ids[position]]), state, 1 if position % 2 else 6)


@torch.no_grad()
def test_state_is_small_and_does_not_grow() -> None:
    def after(pattern: str, length: int) -> DecodingState:
        return model(pattern).prefill(text(length), 4)[1]

    network = model("S")
    assert network.filterbank is not None
    assert network.filterbank.state_size <= K_MAX + 16
    for length in (1, 100, 6000):
        assert after("S", length).nbytes == network.config.n_layers * network.filterbank.state_size * 32 * 4
    windowed = after("SA", 6000).nbytes
    assert windowed == after("SA", 3000).nbytes
    attention = 2 * ((network.config.window or 0) + SLACK) * 16 * 4  # keys and values of 2 heads of 8, a layer
    assert windowed <= after("S", 1).nbytes // 2 + network.config.n_layers // 2 * attention


COMPILE_CHECK = """
import torch
from megassm.model import build_model, losses_at
from tests.test_model import config, ids
graphs = 0
def backend(graph, inputs):
    global graphs
    graphs += 1
    return graph
model = build_model(config(pattern="SA", seq_len=96), 0)
compiled = torch.compile(model, fullgraph=True, backend=backend)
text = torch.randint(0, 50, (2, 65))
for k in (4, 2, 4, 6, 2, 6, 4):
    loss = losses_at(model, text, k, forward=compiled).mean()
    loss.backward()
    assert torch.allclose(loss, losses_at(model, text, k).mean())
print(graphs)
"""


def test_torch_compile_makes_one_graph_a_budget_without_a_break() -> None:
    done = run_python("-c", COMPILE_CHECK, check=False, TORCHDYNAMO_DISABLE="0")
    assert done.stdout == "3\n", done.stderr


def test_a_text_that_high_filters_cannot_carry_is_named() -> None:
    network = build_model(config(seq_len=128, num_channels=16, d_model=16), 0).eval()
    prompt, sampling = [[1, 2, 3]], Sampling(253, temperature=0.0)
    with pytest.warns(UserWarning, match=r"256 positions at K = 16: beyond the 128 of the training .* take K <= 12"):
        generate(network, prompt, 16, sampling)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        generate(network, prompt, 12, sampling)
        generate(network, prompt, 16, sampling._replace(max_tokens=125))
