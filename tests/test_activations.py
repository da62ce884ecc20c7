"""The formulas for activation memory against what torch keeps, counted storage by storage."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from megassm.config.model import ModelConfig
from megassm.cost import Workload, activation_bytes, layer_activation_bytes, peak_activation_bytes
from megassm.eval.measure import peak_tensor_bytes
from megassm.layers.filterbank import CHUNK
from megassm.model import LanguageModel, build_model, losses_at
from megassm.ops.mixing import GROUP_BYTES
from tests.test_model import config

K_MAX = 16


def settings(**changes: object) -> ModelConfig:
    base: dict[str, object] = {"d_model": 64, "d_ffn": 96, "vocab_size": 50, "seq_len": 1024, "num_channels": K_MAX}
    return config(**(base | changes))


def make(model_config: ModelConfig, dtype: torch.dtype = torch.float32, recompute: bool = False) -> LanguageModel:
    model = build_model(model_config, 0, recompute).to(dtype)
    if model.filterbank is not None:
        model.filterbank.double()
        model.reset_filters()
    return model


def workload(model: LanguageModel, batch: int, length: int) -> Workload:
    number_bytes = model.embedding_VD.element_size()
    if model.filterbank is None or model.filterbank.way(length) == "direct":
        return Workload(batch, length, number_bytes, length, 0)
    return Workload(batch, length, number_bytes, CHUNK, model.filterbank.state_size)


def text(work: Workload) -> Tensor:
    return torch.randint(0, 50, (work.batch, work.length + 1), generator=torch.Generator().manual_seed(0))


def kept(model: LanguageModel, k: int, work: Workload) -> int:
    """Bytes of all storages that autograd saves, each once, weights and filters left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    ids = text(work)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        losses_at(model, ids, k)
    return sum(storage.nbytes() for storage in saved.values())


@pytest.mark.parametrize("pattern", ["S", "A", "SSSA"])
@pytest.mark.parametrize("k", [1, 7, K_MAX])
@pytest.mark.parametrize(("batch", "length"), [(1, 100), (3, 256), (2, 1024)])
@pytest.mark.parametrize("recompute", [False, True])
def test_kept_in_float32(pattern: str, k: int, batch: int, length: int, recompute: bool) -> None:
    model = make(settings(pattern=pattern), recompute=recompute)
    work = workload(model, batch, length)
    assert activation_bytes(model.config, k, work, recompute) == pytest.approx(kept(model, k, work), rel=4e-3)


@pytest.mark.parametrize(
    "changes",
    [
        {"gate": "equal"},
        {"gate_rescale": False},
        {"pattern": "S", "mixer_heads": 4},
        {"input_taps": 4},
        {"pattern": "S", "mixer_heads": 4, "gate": "sigmoid", "selective": True},
        {"pattern": "S", "mixer_heads": 2, "selective": True, "filterbank": "direct", "seq_len": 128},
        {"pattern": "S", "mixer_heads": 8, "gate": "sigmoid"},
        {"pattern": "S", "mixer_heads": 2, "gate": "none", "filterbank": "direct", "seq_len": 128},
        {"d_ffn": 160, "ffn_elastic": {"knee_k": 4, "below": 16, "above": 8}},
        {"filterbank": "direct", "seq_len": 128},
        {"pattern": "A", "window": 50},
        {"n_heads": 8, "n_kv_heads": 8, "tie_embeddings": False},
    ],
)
def test_kept_by_variants(changes: dict[str, object]) -> None:
    model = make(settings(**changes))
    work = workload(model, 2, 128)
    assert activation_bytes(model.config, 5, work) == pytest.approx(kept(model, 5, work), rel=1e-3)


@pytest.mark.parametrize("pattern", ["S", "A"])
def test_kept_in_bfloat16(pattern: str) -> None:
    model = make(settings(pattern=pattern), torch.bfloat16)
    work = workload(model, 2, 1024)
    expected = activation_bytes(model.config, 5, work)
    if pattern == "S":  # a CPU has no fast bfloat16 products: there the mixer's inputs and filters are float32
        inputs = work.chunk + work.state_size
        expected += 2 * inputs * model.config.n_layers * (work.batch * work.chunks * 64 + work.chunk * 5)
    assert expected == pytest.approx(kept(model, 5, work), rel=1e-2)


def test_the_budget_costs_gate_weights_only() -> None:
    """From K = 1 to K_max a layer keeps three float32 numbers a position and channel more, and its filters."""
    model = make(settings(pattern="S"))
    work = workload(model, 4, 1024)
    low, high = (kept(model, k, work) for k in (1, K_MAX))
    filters = 4 * CHUNK * (CHUNK + work.state_size)
    assert high - low <= model.config.n_layers * (K_MAX - 1) * (12 * work.positions + filters + 4)
    assert high < 1.1 * low
    features = model.config.n_layers * (K_MAX - 1) * 4 * work.positions * 64
    assert high - low < 0.1 * features, "no feature is kept"
    layers = [layer_activation_bytes(model.config, "S", k, work) for k in (1, K_MAX)]
    assert model.config.n_layers * (layers[1] - layers[0]) == pytest.approx(high - low, rel=1e-3)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("pattern", "k", "vocab", "heads", "selective"),
    [
        ("S", 1, 50, 1, False), ("S", 16, 50, 1, False), ("S", 8, 4000, 1, False), ("A", 1, 4000, 1, False),
        ("SSSA", 16, 50, 1, False), ("S", 1, 50, 8, False), ("S", 16, 50, 8, False), ("S", 16, 50, 8, True),
    ],
)  # fmt: skip
def test_peak_of_a_step(pattern: str, k: int, vocab: int, heads: int, selective: bool, recompute: bool) -> None:
    """Against the most that forward and backward hold; the gradients' memory is there beforehand."""
    knobs = {"pattern": pattern, "vocab_size": vocab, "mixer_heads": heads, "selective": selective}
    model = make(settings(**knobs), recompute=recompute)
    work = workload(model, 8, 1024)
    ids = text(work)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    found = peak_tensor_bytes([], lambda: losses_at(model, ids, k).mean().backward(), torch.device("cpu"))
    expected = peak_activation_bytes(model.config, k, work, GROUP_BYTES["cpu"], recompute)
    assert expected == pytest.approx(found, rel=0.05)
