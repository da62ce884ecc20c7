"""FlexAttention's blocks and function say what the dense mask says; on a CPU it runs forward, without a compiler."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from megassm.layers import attention
from megassm.layers.attention import attention_mask
from megassm.model import build_model, losses_at
from megassm.ops import flex
from megassm.ops.kernel_check import compiler_switch
from tests.test_model import config

END = 7


def numbered(batch: int, length: int, generator: torch.Generator) -> Tensor:
    """Documents of all kinds of lengths: of one position, of several blocks, and one that fills a row."""
    begins_BL = torch.rand(batch, length, generator=generator) < torch.tensor([0.0, 0.003, 0.02, 0.5])[:batch, None]
    return begins_BL.cumsum(1)


@pytest.mark.parametrize("length", [1, 127, 128, 300, 513])
@pytest.mark.parametrize("window", [None, 1, 100, 129, 256, 1000])
@pytest.mark.parametrize("apart", [False, True])
def test_blocks_and_function_are_the_dense_mask(length: int, window: int | None, apart: bool) -> None:
    documents_BL = numbered(4, length, torch.Generator().manual_seed(length)) if apart else None
    dense = attention_mask(length, window, documents_BL, torch.zeros(1))
    seen = torch.ones(length, length).tril() > 0 if dense is None else dense == 0
    seen_BLL = seen.view(-1, length, length)
    mask = flex.block_mask(length, window, documents_BL, torch.device("cpu"))
    places = torch.arange(length)
    for row, expected in enumerate(seen_BLL):
        found = mask.mask_mod(torch.tensor(row), torch.tensor(0), places[:, None], places)
        assert torch.equal(found, expected)
    counts, whole = (blocks_of(mask, kind, length) for kind in ("kv", "full_kv"))
    assert not (counts & whole).any()
    outside = -length % flex.BLOCK
    padded = torch.nn.functional.pad(seen_BLL, (0, outside, 0, outside))
    blocks = padded.view(len(padded), len(counts[0]), flex.BLOCK, -1, flex.BLOCK)
    assert torch.equal(whole | counts, blocks.any(4).any(2)), "no block that is seen is left out, and none is too many"
    assert torch.equal(whole, blocks.all(4).all(2))


def blocks_of(mask: object, kind: str, length: int) -> Tensor:
    """(B, N, N), True where the mask lists a block of that kind."""
    counts_BN, places_BNN = (getattr(mask, f"{kind}_{what}")[:, 0] for what in ("num_blocks", "indices"))
    listed_BNN = torch.zeros(places_BNN.shape, dtype=torch.bool)
    ranks_N = torch.arange(places_BNN.shape[-1])
    return listed_BNN.scatter(2, places_BNN.long(), ranks_N < counts_BN[..., None])


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
def test_heads_see_what_a_dense_mask_lets_them_see(heads: int, groups: int) -> None:
    generator, length = torch.Generator().manual_seed(heads), 277
    query, key, value = (torch.randn(2, n, length, 16, generator=generator) for n in (heads, groups, groups))
    documents_BL = numbered(2, length, generator)
    found = attention.attend(query, key, value, flex.block_mask(length, 90, documents_BL, query.device))
    expected = attention.attend(query, key, value, attention_mask(length, 90, documents_BL, query))
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
def test_a_model_takes_it_in_training_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def serves(like: Tensor, length: int, head_dim: int) -> bool:
        asked.append(length)
        return True

    plain, blocked = (build_model(config(pattern="SA", window=50, seq_len=160), 0) for _ in range(2))
    ids = torch.tensor([[random.Random(place).choice((1, 2, 3, 4, 5, END)) for place in range(161)]])
    for document_end in (None, END):
        with torch.no_grad():
            expected = losses_at(plain, ids, 3, document_end)
            assert not asked
            monkeypatch.setattr(flex, "serves", serves)
            assert torch.allclose(losses_at(blocked.train(), ids, 3, document_end), expected, atol=1e-5)
            assert asked
            asked.clear()
            assert torch.equal(losses_at(blocked.eval(), ids, 3, document_end), expected)
            assert not asked
        monkeypatch.undo()


def test_a_cpu_and_a_compiler_that_is_off_have_the_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not flex.serves(torch.zeros(1), 4096, 64)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    assert compiler_switch() == "TORCHDYNAMO_DISABLE"
