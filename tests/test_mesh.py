"""Ranks and groups of the mesh; what each tensor rank holds."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megassm.config.model import ElasticFfnConfig, ModelConfig
from megassm.model import parameter_shapes
from megassm.parallel.mesh import Mesh
from megassm.parallel.tensor import bounds, weight_slices

SIZES = st.integers(1, 5)


@given(SIZES, SIZES, SIZES)
def test_groups_divide_the_ranks_and_meet_in_one(data: int, sequence: int, tensor: int) -> None:
    mesh = Mesh(data, sequence, tensor)
    for groups, size in (
        (mesh.tensor_groups(), tensor),
        (mesh.sequence_groups(), sequence),
        (mesh.replica_groups(), data * sequence),
        (mesh.reader_groups(), sequence * tensor),
    ):
        assert sorted(itertools.chain(*groups)) == list(range(mesh.size))
        assert {len(group) for group in groups} == {size}
        assert all(group == sorted(group) for group in groups), "a group's ranks are in the order of its axis"
    assert all(mesh.rank(mesh.coordinates(rank)) == rank for rank in range(mesh.size))
    assert all(group == list(range(group[0], group[0] + tensor)) for group in mesh.tensor_groups()), "neighbours"


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("elastic", [None, {"knee_k": 2, "below": 8, "above": 8}])
def test_tensor_ranks_hold_every_number_once_or_all_of_it(ranks: int, kv_heads: int, elastic: object) -> None:
    config = ModelConfig(
        vocab_size=101, d_model=24, n_layers=2, pattern="SA", seq_len=64, num_channels=4, n_heads=8,
        n_kv_heads=kv_heads, d_ffn=37, ffn_elastic=elastic, tie_embeddings=False,
    )  # fmt: skip
    parts = [weight_slices(config, ranks, rank) for rank in range(ranks)]
    for name, shape in parameter_shapes(config).items():
        seen = torch.zeros(shape, dtype=torch.int64)
        for part in parts:
            part[name].of(seen).add_(1)
        split = parts[0][name].axis is not None and ranks > 1
        assert (seen == (1 if split else ranks)).all(), name
        large = len(shape) > 1 and "mixer.gate" not in name
        few = "mixer.key" in name or "mixer.value" in name
        assert split == (large and ranks > 1 and not (few and kv_heads < ranks)), name


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_every_rank_has_its_share_of_an_elastic_width(ranks: int) -> None:
    config = ModelConfig(
        vocab_size=101, d_model=24, n_layers=1, seq_len=64, num_channels=4, d_ffn=37,
        ffn_elastic=ElasticFfnConfig(knee_k=2, below=8, above=8),
    )  # fmt: skip
    held = [weight_slices(config, ranks, rank)["blocks.0.ffn.gate.weight"].indices for rank in range(ranks)]
    for k in range(1, 5):
        shares = [sum(unit < config.ffn_width(k) for unit in mine) for mine in held]
        assert max(shares) - min(shares) <= 1


def test_shares_differ_by_one_at_most() -> None:
    for size, ranks in ((10, 3), (257, 8), (8, 8)):
        shares = [bounds(size, ranks, rank) for rank in range(ranks)]
        assert [start for start, _ in shares[1:]] == [stop for _, stop in shares[:-1]]
        lengths = [stop - start for start, stop in shares]
        assert sum(lengths) == size
        assert max(lengths) - min(lengths) <= 1
