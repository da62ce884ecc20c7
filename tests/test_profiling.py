"""The profile: every operation of a layer under its kind, forward and backward; the trace; marks that vanish again."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from megassm.config.load import load_config
from megassm.config.model import ModelConfig
from megassm.cost import forward_flops_by_kind, forward_flops_per_token
from megassm.model import build_model, losses_at
from megassm.train.profiling import GRADIENT_SUMS, OTHER, marked_layers, seconds_by_kind
from tests.conftest import ROOT, SMALL, run_python

MODEL = ModelConfig(vocab_size=97, d_model=16, n_layers=2, seq_len=32, num_channels=4, d_ffn=32, n_heads=2)


def marked_pass(pattern: str, recompute: bool) -> tuple[dict[str, float], dict[str, float]]:
    model = build_model(MODEL.model_copy(update={"pattern": pattern}), 0, recompute)
    ids_BT = torch.randint(0, 97, (2, 33))
    with marked_layers(model), profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiler:
        with torch.profiler.record_function("megassm: forward"):
            loss = losses_at(model, ids_BT, 3).mean()
        with torch.profiler.record_function("megassm: backward"):
            loss.backward()
    return seconds_by_kind(list(profiler.events() or ()), cuda=False)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("pattern", "mixers"), [("S", {"spectral mixer"}), ("A", {"attention"}), ("SA", {"spectral mixer", "attention"})]
)
def test_every_kind_of_layer_is_found_forward_and_backward(pattern: str, mixers: set[str], recompute: bool) -> None:
    forward, backward = marked_pass(pattern, recompute)
    kinds = mixers | {"feed-forward", "norm", "embedding", "head and loss"}
    assert {kind for kind, seconds in forward.items() if seconds > 0} == kinds | {OTHER}
    assert {kind for kind, seconds in backward.items() if seconds > 0} == kinds | {OTHER, GRADIENT_SUMS}


def test_marks_change_nothing_and_go() -> None:
    model = build_model(MODEL, 0)
    ids_BT = torch.randint(0, 97, (2, 33))
    plain = losses_at(model, ids_BT, 3)
    before = set(vars(model))
    with marked_layers(model):
        assert torch.equal(losses_at(model, ids_BT, 3), plain)
    assert set(vars(model)) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_the_tool_profiles_without_a_data_set(tmp_path: Path) -> None:
    done = run_python("tools/profile_training.py", "--config", "configs/tiny.yaml", "--steps", "1", "--k", "4",
                      "--output", str(tmp_path), "--json", str(tmp_path / "p.json"), *SMALL, "model.pattern=SA",
                      "data.path=not/there")  # fmt: skip
    (result,) = json.loads((tmp_path / "p.json").read_text(encoding="utf-8"))
    assert list(result["phases"]) == ["data", "forward", "backward", "update"]
    assert min(result["phases"].values()) > 0
    small = load_config(ROOT / "configs/tiny.yaml", (*SMALL, "model.pattern=SA")).model
    flops = {row["kind"]: row["forward_flops"] for row in result["kinds"]}
    of_kinds = forward_flops_by_kind(small, 4, 64)
    assert {kind: flops[kind] for kind in of_kinds} == pytest.approx({kind: 256 * f for kind, f in of_kinds.items()})
    assert sum(flops.values()) == pytest.approx(256 * forward_flops_per_token(small, 4, 64))
    assert "spectral mixer" in done.stdout
    assert "peak rate 100.0 GFLOP/s (log.peak_tflops)" in done.stdout
    with gzip.open(tmp_path / "trace.json.gz") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"megassm: backward", "megassm: update", "megassm: attention"} <= names


def test_the_tool_reads_the_data_set_where_asked(tmp_path: Path, data_path: Path) -> None:
    arguments = (
        "tools/profile_training.py",
        "--config",
        "configs/tiny.yaml",
        "--steps",
        "1",
        "--data",
        "--output",
        str(tmp_path),
    )
    said = run_python(*arguments, *SMALL, f"data.path={data_path}").stdout
    assert "256 tokens an update, at the K that `paper` draws, on cpu" in said
    assert (tmp_path / "trace.json.gz").exists()
    refused = run_python(*arguments, *SMALL, "data.path=not/there", check=False)
    assert refused.returncode == 1
    assert "not/there" in refused.stderr


def test_the_tool_does_not_stand_in_for_pythons_own_profile() -> None:
    code = "import sys; sys.path.insert(0, 'tools'); import cProfile, profile; print(profile.Profile, cProfile.Profile)"
    assert "profile.Profile" in run_python("-c", code).stdout


def test_a_budget_out_of_range_is_refused() -> None:
    refused = run_python("tools/profile_training.py", "--config", "configs/tiny.yaml", "--k", "17", check=False)
    assert refused.returncode == 2
    assert "the model has 16 channels" in refused.stderr
