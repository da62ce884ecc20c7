"""The layer that goes into anybody's model: any length, decoding, casts, autocast, compile, copies, checkpoints."""

from __future__ import annotations

import copy
import io
import pickle
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from megassm import SpectralLayer, UserError
from megassm.layers.filterbank import FilterBank
from megassm.layers.spectral import SpectralMixer

WIDTH, LENGTH, K_MAX = 8, 128, 6
CHOICES: list[dict[str, Any]] = [
    {},
    {"mixer_heads": 2, "gate": "sigmoid", "basis": "alternating"},
    {"gate": "equal", "sigma_scale": "none", "basis": "hankel_l"},
    {"mixer_heads": 2, "gate": "sigmoid", "selective": True},
]


@lru_cache
def layer(number: int = 0) -> SpectralLayer:
    """Not to be changed: a test that changes one copies it."""
    with torch.random.fork_rng():
        torch.manual_seed(number)
        return SpectralLayer(WIDTH, LENGTH, K_MAX, **CHOICES[number])


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def off(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().norm() / expected.detach().norm())


@pytest.mark.parametrize("number", range(len(CHOICES)))
@pytest.mark.parametrize("length", [1, 63, LENGTH, 300])
def test_steps_from_nothing_and_from_a_state_are_the_parallel_form(number: int, length: int) -> None:
    module, x_BLD = layer(number), noise(2, length, WIDTH)
    for k in (2, None):
        y_BLD = module(x_BLD, k=k)
        state, rows = None, []
        for x_BD in x_BLD.unbind(1):
            y_BD, state = module.step(x_BD, state, k)
            rows.append(y_BD)
        assert off(torch.stack(rows, 1), y_BLD) < 1e-5
        first = length // 2
        y_BD, _ = module.step(x_BLD[:, first], module.state(x_BLD[:, :first]), k)
        assert off(y_BD, y_BLD[:, first]) < 1e-5
        parts = module.state(x_BLD[:, first:], module.state(x_BLD[:, :first]))
        assert off(parts, module.state(x_BLD)) < 1e-4


def test_all_channels_are_the_default_and_leading_ones_a_layer_of_their_own() -> None:
    for number in range(len(CHOICES)):
        module, x_BLD = layer(number), noise(2, 70, WIDTH)
        assert torch.equal(module(x_BLD), module(x_BLD, K_MAX))
        assert off(module(x_BLD, 3), module(x_BLD)) > 1e-2
        small = module.truncate(3)
        assert small.mixer.channels_KDD.shape[0] == 3
        assert off(small(x_BLD), module(x_BLD, 3)) < 1e-6
        assert off(small.step(x_BLD[:, 5], module.state(x_BLD[:, :5]))[0], module(x_BLD, 3)[:, 5]) < 1e-5


def test_documents_do_not_see_each_other() -> None:
    x_BLD = noise(1, 100, WIDTH)
    documents_BL = (torch.arange(100) >= 37).long()[None]
    apart = layer()(x_BLD, documents_BL=documents_BL)
    assert off(apart[:, 37:], layer()(x_BLD[:, 37:])) < 1e-5
    with pytest.raises(UserError, match="numbers fall"):
        layer()(x_BLD, documents_BL=1 - documents_BL)


def by_hand() -> list[nn.Module]:
    torch.manual_seed(3)
    bias = {"gate_bias_init": -2.0}
    return [SpectralMixer(layer(1).config, "none"), SpectralLayer(WIDTH, LENGTH, K_MAX, **bias)]


def test_made_by_hand_nothing_is_uninitialised() -> None:
    mixer, module = by_hand()
    summed = K_MAX**-0.5  # a sigmoid's weights do not add up to 1
    for made, shrunk, bias in ((mixer, summed, 0.0), (module, 1.0, -2.0)):
        for name, parameter in made.named_parameters():
            if parameter.dim() == 1:
                assert set(parameter.tolist()) == {bias if name.endswith("score_bias_K") else 0.0}, name
            else:
                expected = parameter.shape[-1] ** -0.5 * (shrunk if name.endswith("channels_KDD") else 1)
                assert parameter.std().item() == pytest.approx(expected, rel=0.35), name
    for mine, again, other in zip(module.parameters(), by_hand()[1].parameters(), layer().parameters(), strict=True):
        assert torch.equal(mine, again)
        assert mine.dim() == 1 or not torch.equal(mine, other)


def test_off_the_meta_device_it_starts_anew() -> None:
    with torch.device("meta"):
        module = SpectralLayer(WIDTH, LENGTH, K_MAX)
    module.to_empty(device="cpu").reset_parameters()
    module.load_state_dict(layer().state_dict())
    assert torch.equal(module(noise(1, 50, WIDTH)), layer()(noise(1, 50, WIDTH)))


def test_under_autocast_only_products_are_rounded() -> None:
    x_BLD = noise(1, 4096, WIDTH)  # long: a recurrence in bfloat16 would be lost long before the end
    whole = layer()(x_BLD, 4)
    module = copy.deepcopy(layer())
    with torch.autocast("cpu", torch.bfloat16):
        y_BLD = module(x_BLD, 4)
        step, state = module.step(x_BLD[:, 4000], module.state(x_BLD[:, :4000]), 4)
        y_BLD.float().square().sum().backward()  # inside, as people do
    assert (y_BLD.dtype, step.dtype, state.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert off(y_BLD[:, -100:].float(), whole[:, -100:]) < 0.02
    assert off(step.float(), whole[:, 4000]) < 0.02
    gradients = [parameter.grad for parameter in module.mixer.parameters()]
    exact = torch.autograd.grad(layer()(x_BLD, 4).square().sum(), list(layer().mixer.parameters()))
    assert all(off(mine, other) < 0.05 for mine, other in zip(gradients, exact, strict=True))


@pytest.mark.parametrize("fullgraph", [False, True])
def test_compiled_it_computes_the_same(fullgraph: bool) -> None:
    torch._dynamo.reset()
    module, x_BLD = copy.deepcopy(layer()), noise(1, 70, WIDTH).requires_grad_()
    compiled = torch.compile(module, backend="aot_eager", fullgraph=fullgraph)
    expected = module(x_BLD, 4)
    found = compiled(x_BLD, k=4)
    assert off(found, expected) < 1e-5
    (mine,), (other,) = (torch.autograd.grad(y.square().sum(), x_BLD) for y in (found, expected))
    assert off(mine, other) < 1e-5


def test_in_another_model_it_is_copied_pickled_saved_and_cast() -> None:
    model = nn.Sequential(nn.LayerNorm(WIDTH), copy.deepcopy(layer()), nn.Linear(WIDTH, 2))
    x_BLD = noise(1, 200, WIDTH)
    y_BLD = model(x_BLD)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x_BLD), y_BLD)
        assert other[1].filterbank is not model[1].filterbank
    assert not any("filterbank" in name for name in model.state_dict())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    torch.manual_seed(9)
    fresh = nn.Sequential(nn.LayerNorm(WIDTH), SpectralLayer(WIDTH, LENGTH, K_MAX), nn.Linear(WIDTH, 2))
    assert not torch.equal(fresh(x_BLD), y_BLD)
    fresh.load_state_dict(torch.load(file))
    assert torch.equal(fresh(x_BLD), y_BLD)
    rounded = copy.deepcopy(model).to(torch.bfloat16)(x_BLD.bfloat16())
    assert rounded.dtype == torch.bfloat16
    assert off(rounded.float(), y_BLD) < 0.03
    exact = copy.deepcopy(model).double()
    assert off(exact(x_BLD.double()).float(), y_BLD) < 1e-5
    assert exact.float()[1].filterbank.filters_LK.dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SpectralLayer(8, 16, 17), "num_channels = 17 for seq_len = 16"),
        (lambda: SpectralLayer(0, 16, 4), "d_model = 0"),
        (lambda: SpectralLayer(8, 16, 4, mixer_heads=3), "divisible by mixer_heads = 3"),
        (lambda: SpectralLayer(8, 16, 4, gate="tanh"), "gate = 'tanh'"),
        (lambda: SpectralLayer(8, 16, 4, heads=2), "heads = 2"),
        (lambda: layer()(noise(1, 4, WIDTH), k=7), "k = 7: must be between 1 and this layer's num_channels = 6"),
        (lambda: layer()(noise(1, 4, WIDTH), k=0), "k = 0"),
        (lambda: layer()(noise(1, 4, 5)), r"x is \(1, 4, 5\)"),
        (lambda: layer().step(noise(1, 4, WIDTH)), r"\(batch, d_model\)"),
        (lambda: layer().truncate(9), "k = 9"),
    ],
)
def test_mistakes_are_named(call: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        call()


def test_a_bank_is_not_shared_but_equal() -> None:
    mine, other = layer().filterbank, FilterBank(LENGTH, K_MAX, "auto")
    other.reset()
    assert torch.equal(mine.filters_LK, other.filters_LK)
