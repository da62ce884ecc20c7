"""The GPU path on a null CUDA device: what is launched, copied, waited for and allocated; kernels do nothing there.

Skipped without a CUDA build of torch, or without the device's library, whose folder MEGASSM_NULLCUDA names; `make
test-nullcuda` sets up the former. Counts are held against docs/results/nullcuda.json, which is written anew where
MEGASSM_NULLCUDA_WRITE is set.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import ROOT
from tests.jobs import free_port
from tools.bench.gpu.training import ARMS, HYBRID

LIBRARY = Path(os.environ.get("MEGASSM_NULLCUDA", ""), "libnull.so")
RESULTS = ROOT / "docs/results/nullcuda.json"
NEAR = {"launches": 0.02, "GB touched": 0.02, "TFLOP": 0.001}
"""Relative differences from the file of results that are let pass."""
PAPERS = ("model.d_model=1280", "model.num_channels=32", "model.mixer_heads=1", "model.gate=softmax",
          "model.gate_rescale=true", "model.sigma_scale=quarter_power", "model.input_taps=1",
          "model.d_ffn=4096")  # fmt: skip
"""The paper's layer, in a model of as many parameters; its micro-step was 2,428 launches once, and 153 GB."""
SEVEN = ("parallel.zero_stage=3", "train.micro_batch_sequences=2")
SIZES: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "125m": ("125m", 1, ()),
    "350m_hybrid": ("350m_hybrid", 1, ()),
    "1b_hybrid": ("1b_hybrid", 1, ()),
    "1b_hybrid, the paper's layer": ("1b_hybrid", 1, PAPERS),
    "1b_hybrid, recomputed": ("1b_hybrid", 1, ("train.recompute=true",)),
    "1b_hybrid, distilled": ("1b_hybrid", 1, ("budget.distill_weight=0.5",)),
    "1b_hybrid, 2 tensor ranks": ("1b_hybrid", 2, ("parallel.tensor=2",)),
    "7b_hybrid, 64 ranks": ("7b_hybrid", 64, SEVEN),
}
"""What is counted: (configuration, ranks, overrides)."""


def why_not() -> str:
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is no CUDA build"
    if "MEGASSM_NULLCUDA" not in os.environ:
        return "MEGASSM_NULLCUDA names no folder with a null CUDA device's library"
    return "" if LIBRARY.exists() else f"there is no {LIBRARY}"


pytestmark = [pytest.mark.nullcuda, pytest.mark.skipif(bool(why_not()), reason=why_not())]


def on_null_device(folder: Path, part: str, *arguments: str, ranks: int = 1) -> list[dict[str, Any]]:
    """What a part of `tests.nullcuda` returns, on every rank."""
    folder.mkdir(exist_ok=True)
    common = os.environ | {
        "LD_PRELOAD": str(LIBRARY),
        "LD_LIBRARY_PATH": str(LIBRARY.parent / "lib"),
        "NULLCUDA_DEVICES": str(ranks),
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, range(ranks))),
    }
    outs = [folder / f"{part}-{rank}.json" for rank in range(ranks)]
    logs = [folder / f"{part}-{rank}.log" for rank in range(ranks)]
    processes = []
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                 "MASTER_ADDR": "127.0.0.1"} if ranks > 1 else {}  # fmt: skip
        with logs[rank].open("w") as log:
            command = [sys.executable, "-m", "tests.nullcuda", part, str(outs[rank]), *arguments]
            processes.append(subprocess.Popen(command, cwd=ROOT, env=common | place, stdout=log, stderr=log))
    try:
        codes = [process.wait(timeout=280) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert codes == [0] * ranks, "\n".join(log.read_text(errors="replace")[-6000:] for log in logs)
    return [json.loads(out.read_text()) if out.exists() else {} for out in outs]


Runs = dict[str, tuple[Sequence[str], Sequence[str]]]
"""By name: overrides of a training, and what it is resumed with from its middle."""
ONE: Runs = {
    name: (own, ("parallel.zero_stage=3",) if name == "zero1" else own)
    for name, own in ARMS.items()
    if name != "zero0"  # bf16 has no stage 0
} | {"fp32, stage 0": (("parallel.zero_stage=0", "train.precision=fp32"),) * 2}
TWO: Runs = {
    "data, stage 1": (("parallel.zero_stage=1",), ("parallel.tensor=2", "parallel.zero_stage=2")),
    "data, stage 2": (("parallel.zero_stage=2", "optim.ema=0.99"),) * 2,
    "data, stage 3": (("parallel.zero_stage=3", *HYBRID), (*HYBRID, "parallel.sequence=2")),
    "tensor": ((*HYBRID, "parallel.tensor=2"), (*HYBRID, "parallel.zero_stage=3")),
    "sequence": ((*HYBRID, "parallel.sequence=2", "budget.distill_weight=0.5"),) * 2,
}
FOUR: Runs = {
    "data and tensor": (
        (*HYBRID, "parallel.tensor=2", "parallel.zero_stage=3"),
        (*HYBRID, "parallel.tensor=4"),
    ),
    "data and sequence": (
        (*HYBRID, "parallel.sequence=2", "parallel.zero_stage=2"),
        (*HYBRID, "parallel.sequence=2", "parallel.tensor=2"),
    ),
}


@pytest.mark.parametrize(("ranks", "runs"), [(1, ONE), (2, TWO), (4, FOUR)], ids=["one", "two", "four"])
def test_every_kind_of_run_trains_saves_and_resumes(
    tmp_path: Path, data_path: Path, ranks: int, runs: Runs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")  # one of them is compiled
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    given = [(name, own, others, (free_port(), free_port())) for name, (own, others) in runs.items()]
    for found in on_null_device(tmp_path, "train", str(data_path), str(tmp_path), json.dumps(given), ranks=ranks):
        assert found["illegal grids"] == 0
        assert set(map(tuple, found["steps"].values())) == {(1, 2, 3, 4)}, found["steps"]
        assert len(found["steps"]) == len(runs)
        assert found["resumed"] == list(runs)
    for name in runs:
        assert (tmp_path / name / "checkpoints/step-00000004").exists(), name


def test_commands_find_the_device(tmp_path: Path, trained: Path) -> None:
    on_null_device(tmp_path, "command", "sweep", str(trained), "--device", "cuda", "--budgets", "1,8")
    on_null_device(tmp_path, "command", "generate", str(trained), "--device", "cuda", "--prompt", "def ", "--tokens",
                   "4", "--temperature", "0")  # fmt: skip


@pytest.fixture(scope="module")
def results() -> dict[str, Any]:
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}


@pytest.mark.parametrize("name", SIZES)
def test_counts_of_a_micro_step(
    tmp_path: Path, results: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, ranks, overrides = SIZES[name]
    monkeypatch.setenv("NULLCUDA_COPY", "0")  # nothing is copied: it would take minutes
    (found,) = on_null_device(tmp_path, "count", config, str(ranks), *overrides)
    if os.environ.get("MEGASSM_NULLCUDA_WRITE"):
        write(name, found)
        results[name] = found
    for k, counts in found["by K"].items():
        # DeepSpeed's stage 3 waits for its stream of reductions at the end of every backward pass
        assert counts["device syncs"] == ("parallel.zero_stage=3" in overrides), (k, counts)
        assert counts["copies to the device"] == 2, (k, counts)
        assert counts["of these from pageable memory"] == 0, (k, counts)
        assert counts["copies to the host"] == 0, (k, counts)
        assert counts["illegal grids"] == 0, (k, counts)
        for what, near in NEAR.items():
            assert counts[what] == pytest.approx(results[name]["by K"][k][what], rel=near), (k, what)
    if overrides == PAPERS:
        assert found["by K"]["2"]["launches"] < 1500
        assert found["by K"]["2"]["GB touched"] < 153 / 2
    assert found["planned peak GB"] == pytest.approx(found["peak GB"], rel=0.1)
    stays = sum(found["planned GB"][kind] for kind in ("weights", "gradients", "master weights", "moments", "buckets"))
    assert found["start GB"] <= 1.1 * max(found["planned start GB"], stays)


def test_compiled_blocks_launch_less(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NULLCUDA_COPY", "0")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    (found,) = on_null_device(tmp_path, "compiled", "350m_hybrid", "model.n_layers=4")
    if os.environ.get("MEGASSM_NULLCUDA_WRITE"):
        write("350m_hybrid, 4 layers, compiled", found)
    assert found["breaks"] == found["made again"] == 0
    assert found["graphs"] == 2 + 1, "spectral layers at two budgets, attention layers at both"
    for k, launches in found["compiled"].items():
        assert launches < found["by layers"][k], found


def test_windows_and_documents_are_attended_to_by_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NULLCUDA_COPY", "0")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "compiled"))
    apart = ("model.n_layers=4", "model.window=700", "data.isolate_documents=true")
    (found,) = on_null_device(tmp_path, "compiled", "350m_hybrid", *apart)
    assert found["breaks"] == found["made again"] == 0
    assert found["graphs"] == 2 + 1 + 1, "those of compiled blocks, whose masks are dense, and FlexAttention's"


def write(name: str, found: dict[str, Any]) -> None:
    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rounded(inner) for key, inner in value.items()}
        return float(f"{value:.4g}") if isinstance(value, float) else value

    whole = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    whole["torch"] = torch.__version__
    RESULTS.write_text(json.dumps(whole | {name: rounded(found)}, indent=1) + "\n", encoding="utf-8")


def test_a_large_job_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """30B on 64 ranks: neither the device nor the host ever holds more than the rank's share and one parameter."""
    monkeypatch.setenv("NULLCUDA_COPY", "0")  # the device's memory is the host's: what is copied there would be counted
    (found,) = on_null_device(tmp_path, "start", "30b_hybrid", "64")
    if os.environ.get("MEGASSM_NULLCUDA_WRITE"):
        write("30b_hybrid, 64 ranks, start", found)
    assert found["parameters"] > 28e9
    assert found["host start GB"] < found["share GB"] + found["largest parameter GB"]
    assert found["start GB"] < found["planned peak GB"]
    assert found["peak GB"] == pytest.approx(found["planned peak GB"], rel=0.1)
