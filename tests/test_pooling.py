"""The pooled head: what it sees, what its losses are, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from megassm.config.model import ModelConfig
from megassm.cost import forward_flops_per_token, parameters
from megassm.model import LanguageModel, build_model, losses_at, truncate
from megassm.ops.pooling import pooled

CLASSES, LENGTH, K = 3, 40, 4
SEPARATOR, PAD = CLASSES, CLASSES + 1


def config(**changes: Any) -> ModelConfig:
    sizes = {"vocab_size": 20, "d_model": 16, "n_layers": 2, "seq_len": LENGTH, "num_channels": 8, "d_ffn": 24}
    return ModelConfig(**(sizes | {"n_heads": 2, "pattern": "SA", "classes": CLASSES} | changes))


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return build_model(config(), 0)


def texts(content: list[int]) -> Tensor:
    """(B, L + 1) rows of so many symbols, a separator, a label and padding; the last id is the next row's."""
    ids_BT = torch.full((len(content), LENGTH + 1), PAD)
    generator = torch.Generator().manual_seed(2)
    for row, size in enumerate(content):
        ids_BT[row, :size] = torch.randint(CLASSES + 3, 20, (size,), generator=generator)
        ids_BT[row, size], ids_BT[row, size + 1] = SEPARATOR, row % CLASSES
    return ids_BT


def test_nothing_after_the_separator_is_seen(model: LanguageModel) -> None:
    ids_BL = texts([5, 30, 38, 1])[:, :-1]
    logits_B1C = model(ids_BL, K)
    assert logits_B1C.shape == (4, 1, CLASSES)
    other_BL = ids_BL.clone()
    for row, size in enumerate([5, 30, 38, 1]):
        other_BL[row, size + 1 :] = torch.arange(size + 1, LENGTH) % 20
    assert torch.equal(model(other_BL, K), logits_B1C)
    other_BL[:, 0] = (other_BL[:, 0] - 5) % 14 + 6
    assert (model(other_BL, K) != logits_B1C).any(-1).all(), "each symbol counts"


def test_the_mean_is_over_the_content() -> None:
    x_BLD = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(1))
    content_BL = torch.tensor([[1, 1, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0], [0] * 6]).bool()
    mean_B1D = pooled(x_BLD, content_BL)
    assert torch.allclose(mean_B1D[:, 0], torch.stack((x_BLD[0, :3].mean(0), x_BLD[1, 0], torch.zeros(4))))


@torch.no_grad()
def test_losses_stand_where_the_label_is_the_target(model: LanguageModel) -> None:
    sizes = [5, 30, 38]
    ids_BT = texts(sizes)
    losses_BL, hits_BL = losses_at(model, ids_BT, K, hits=True)
    logits_BC = model(ids_BT[:, :-1], K)[:, 0]
    labels = torch.tensor([0, 1, 2])
    for row, size in enumerate(sizes):
        expected = torch.zeros(LENGTH)
        expected[size] = F.cross_entropy(logits_BC[row], labels[row])
        assert torch.allclose(losses_BL[row], expected)
        assert float(hits_BL[row].sum()) == float(logits_BC[row].argmax() == labels[row])
    none_BL = losses_at(model, ids_BT[:, :6], K)
    assert not none_BL.any(), "a row without a label"
    ids_BL = ids_BT[:, :-1]
    divergences_BL = model.divergences(ids_BL, model(ids_BL, 2), model(ids_BL, 8), 2.0)
    assert (divergences_BL > 0).sum() == (losses_BL > 0).sum() == 3


def test_equals_share_a_hit() -> None:
    model = build_model(config(classes=None, pattern="S"), 0)
    with torch.no_grad():
        model.embedding_VD.zero_()
    ids_BT = torch.zeros(1, LENGTH + 1, dtype=torch.int64)
    _, hits_BL = losses_at(model, ids_BT, K, hits=True)
    assert torch.allclose(hits_BL, torch.full((1, LENGTH), 1 / 20))


def test_cost_and_truncation_have_the_head(model: LanguageModel) -> None:
    assert sum(p.numel() for p in model.parameters()) == parameters(model.config, 8)
    small = truncate(model, K)
    assert sum(p.numel() for p in small.parameters()) == parameters(model.config, K)
    ids_BL = texts([5, 30])[:, :-1]
    assert torch.allclose(small(ids_BL, K), model(ids_BL, K), atol=1e-6)
    vocabulary = config(classes=None)
    saved = forward_flops_per_token(vocabulary, K, LENGTH) - forward_flops_per_token(model.config, K, LENGTH)
    assert saved == pytest.approx(2 * 16 * (20 - CLASSES / LENGTH))
