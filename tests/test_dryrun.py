"""Jobs of any size in one process: their groups and shards cover everything once, and what does not is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megassm.config.load import load_config
from megassm.config.schema import Config
from megassm.errors import UserError
from megassm.parallel.mesh import Mesh
from megassm.parallel.tensor import WeightSlice, weight_slices
from megassm.plan import dryrun
from megassm.plan.dryrun import check_groups, dry_run, zero_shares
from tests.conftest import ROOT, run_python


def load(name: str, world_size: int, *overrides: str) -> Config:
    return load_config(ROOT / f"configs/{name}.yaml", overrides, world_size)


@pytest.mark.parametrize(
    ("name", "world_size", "mesh", "overrides"),
    [
        # every rung of the ladder at the size it is meant for, and at 1,024 ranks
        ("125m", 16, (16, 1, 1), ()),
        ("125m", 1024, (128, 1, 8), ("train.micro_batch_sequences=1",)),
        ("350m_hybrid", 64, (64, 1, 1), ()),
        ("350m_hybrid", 1024, (256, 1, 4), ("train.micro_batch_sequences=1",)),
        ("1b_hybrid", 512, (64, 1, 8), ()),
        ("1b_hybrid", 512, (64, 1, 8), ("model.ffn_elastic={knee_k: 8, below: 256, above: 64}",)),
        ("1b_hybrid", 1024, (256, 2, 2), ("train.micro_batch_sequences=2", "model.base_width=512")),
        ("3b_hybrid", 1024, (128, 1, 8), ()),
        ("7b_hybrid", 512, (64, 2, 4), ()),
        ("7b_hybrid", 1024, (128, 1, 8), ()),
        ("30b_hybrid", 1024, (1024, 1, 1), ()),
        ("30b_hybrid", 1024, (128, 1, 8), ("train.micro_batch_sequences=4", "parallel.zero_stage=1")),
        ("1b_hybrid", 4096, (512, 1, 8), ("train.micro_batch_sequences=1", "parallel.zero_stage=3")),
        ("7b_hybrid", 4096, (512, 1, 8), ("train.micro_batch_sequences=1", "parallel.zero_stage=1")),
    ],
)
def test_large_jobs(name: str, world_size: int, mesh: tuple[int, int, int], overrides: tuple[str, ...]) -> None:
    data, sequence, tensor = mesh
    config = load(name, world_size, *overrides, f"parallel.sequence={sequence}", f"parallel.tensor={tensor}")
    facts = dry_run(config, world_size)
    assert facts["ranks"] == world_size
    assert facts["mesh"] == f"data {data} x sequence {sequence} x tensor {tensor}"
    assert (
        facts["parameters"] / tensor <= facts["parameters of a rank"] < 1.35 * facts["parameters"] / tensor
    )  # gates are whole
    assert facts["micro-steps"] * config.train.micro_batch_sequences == facts["sequences a batch and data rank"]
    replicas = 1 if config.parallel.zero_stage == 0 else data * sequence
    assert facts["optimizer's share of them"] == round(facts["parameters of a rank"] / replicas)


def test_every_rung_of_the_ladder_is_tried() -> None:
    (cases,) = (mark.args[1] for mark in test_large_jobs.pytestmark)
    rungs = {path.stem for path in (ROOT / "configs").glob("*b*.yaml")} | {"125m", "350m_hybrid"}
    assert {name for name, world_size, *_ in cases if world_size == 1024} == rungs


def test_a_lost_row_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def short(model: object, ranks: int, rank: int) -> dict[str, WeightSlice]:
        parts = weight_slices(model, ranks, rank)  # type: ignore[arg-type]
        name = "embedding_VD"
        return parts | {name: parts[name]._replace(stop=parts[name].stop - (rank == 1))}

    monkeypatch.setattr(dryrun, "weight_slices", short)
    with pytest.raises(UserError, match="embedding_VD"):
        dry_run(load("tiny", 2, "parallel.tensor=2"), 2)


def test_groups_that_overlap_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    check_groups(Mesh(3, 2, 4))
    monkeypatch.setattr(Mesh, "replica_groups", lambda mesh: [[0, 1], [1, 2]])
    with pytest.raises(UserError, match="replica groups"):
        check_groups(Mesh(2, 1, 2))


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([1, 2, 3]),
    st.lists(st.integers(1, 400), min_size=1, max_size=12),
    st.integers(1, 64),
)
def test_zero_shares_hold_every_number_once(stage: int, sizes: list[int], replicas: int) -> None:
    shares = dict(zero_shares(stage, [(str(i), size) for i, size in enumerate(sizes)], replicas))
    for i, size in enumerate(sizes):
        held = [number for start, stop in shares[str(i)] for number in range(start, stop)]
        assert sorted(held) == list(range(size))
        assert len(shares[str(i)]) <= replicas


def test_command_starts_nothing_and_writes_nothing(tmp_path: Path) -> None:
    base = ("launch/pretrain.py", "--config", "configs/1b_hybrid.yaml", "--dry-run", f"run.dir={tmp_path / 'run'}")
    done = run_python(*base, "--world-size", "512", "parallel.tensor=8")
    assert "data 64 x sequence 1 x tensor 8" in done.stdout
    assert not (tmp_path / "run").exists()
    wrong = run_python(*base, "--world-size", "500", "parallel.tensor=8", check=False)
    assert wrong.returncode == 2
    assert "but 500 were started" in wrong.stderr
    lonely = run_python(*base[:3], "--world-size", "8", check=False)
    assert lonely.returncode == 2
    assert "--world-size goes with --dry-run" in lonely.stderr
