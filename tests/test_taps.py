"""The convolution before a mixer against its sum, one position at a time; its steps; documents kept apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megassm.layers.context import Context
from megassm.layers.taps import InputTaps
from megassm.model import build_model
from megassm.optim import parameter_groups
from tests.test_model import config, ids

WIDTH = 3


def make(taps: int) -> InputTaps:
    torch.manual_seed(0)
    layer = InputTaps(WIDTH, taps).double()
    torch.nn.init.normal_(layer.weight_ND)
    return layer


def truth(layer: InputTaps, u_BLD: Tensor, documents_BL: Tensor) -> Tensor:
    rows = []
    for u_LD, documents_L in zip(u_BLD, documents_BL, strict=True):
        for t in range(len(u_LD)):
            seen = [i for i in range(layer.taps) if i <= t and documents_L[t - i] == documents_L[t]]
            rows.append(sum(layer.weight_ND[i * WIDTH : (i + 1) * WIDTH] * u_LD[t - i] for i in seen))
    return torch.stack(rows).view_as(u_BLD)


@pytest.mark.parametrize("taps", [2, 3, 7])
@pytest.mark.parametrize("length", [1, 2, 5, 12])
@pytest.mark.parametrize("cuts", [(), (1,), (3, 4, 9)])
def test_outputs_and_gradients(taps: int, length: int, cuts: tuple[int, ...]) -> None:
    layer = make(taps)
    u_BLD = torch.randn(2, length, WIDTH, dtype=torch.float64, requires_grad=True)
    documents_BL = sum((torch.arange(length) >= cut).long() for cut in cuts) + torch.zeros(2, length).long()
    context = Context(1, None, None, documents_BL=documents_BL if cuts else None)
    found, expected = layer(u_BLD, context), truth(layer, u_BLD, documents_BL)
    assert torch.allclose(found, expected, atol=1e-12)
    gradient = torch.randn_like(expected)
    inputs = [u_BLD, layer.weight_ND]
    for mine, other in zip(*(torch.autograd.grad(y, inputs, gradient) for y in (found, expected)), strict=True):
        assert torch.allclose(mine, other, atol=1e-11)


@pytest.mark.parametrize("lengths", [(1, 1, 7), (2, 5, 1, 1), (9,)])
def test_any_number_of_positions_go_on_from_those_before(lengths: tuple[int, ...]) -> None:
    layer, u_BLD = make(4), torch.randn(2, 9, WIDTH, dtype=torch.float64)
    expected, past, parts = layer(u_BLD, Context(1, None, None)), None, []
    for part_BLD in u_BLD.split(lengths, dim=1):
        v_BLD, inputs_BXD = layer.extend(part_BLD, past, Context(1, None, None))
        past = inputs_BXD[:, -3:]
        parts.append(v_BLD)
    assert torch.allclose(torch.cat(parts, 1), expected, atol=1e-12)


@pytest.mark.parametrize("pattern", ["S", "A"])
def test_a_new_model_computes_what_it_does_without_taps(pattern: str) -> None:
    plain, tapped = (build_model(config(pattern=pattern, input_taps=n), 0) for n in (1, 3))
    assert torch.allclose(plain(ids(), 3), tapped(ids(), 3), atol=1e-6)
    tapped(ids(), 3).square().sum().backward()
    gradient = tapped.get_parameter("blocks.1.taps.weight_ND").grad
    assert gradient is not None
    assert (gradient.view(3, -1) != 0).all(), "what starts at zero is learned"


def test_taps_are_a_vector_to_the_optimizer() -> None:
    model = build_model(config(input_taps=4, base_width=8), 0)
    groups = parameter_groups({name: p.shape for name, p in model.named_parameters()}, 0.5, 0.1)
    (mine,) = (group for group in groups if "blocks.0.taps.weight_ND" in group.names)
    assert (mine.lr_factor, mine.weight_decay) == (1.0, 0.0)
