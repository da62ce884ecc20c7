"""The roofline's FLOPs and bytes against those that a null device counted on the real code (tests/test_nullcuda.py)."""

from __future__ import annotations

import json

import pytest

from megassm.config.load import load_config
from megassm.cost import forward_flops_by_kind, forward_flops_per_token
from megassm.plan.cluster import filters_of
from tests.conftest import ROOT, run_python
from tests.test_nullcuda import PAPERS
from tools.bench.roofline import MEMORY_TB_S, attention_flops, micro_step, mixer_ways, rows, seconds
from tools.bench.roofline_mixer import Shapes

COUNTED = json.loads((ROOT / "docs/results/nullcuda.json").read_text(encoding="utf-8"))
SIZES: dict[str, tuple[str, ...]] = {
    "125m": (),
    "350m_hybrid": (),
    "1b_hybrid": (),
    "1b_hybrid, the paper's layer": PAPERS,
    "1b_hybrid, recomputed": ("train.recompute=true",),
}


@pytest.mark.parametrize("name", SIZES)
def test_flops_and_bytes_are_those_of_the_code(name: str) -> None:
    config = load_config(ROOT / f"configs/{name.partition(',')[0]}.yaml", SIZES[name])
    filters = filters_of(config)
    for k, counted in COUNTED[name]["by K"].items():
        shapes = Shapes(config, filters, int(k))
        kernels = list(micro_step(shapes))
        # torch counts attention over all pairs of positions, and its gradient with the scores made again
        layers = config.model.mixers.count("A")
        all_pairs = 4.0 * config.model.d_model * shapes.tokens * config.model.seq_len
        passes = 4.5 if config.train.recompute else 3.5
        flops = sum(kernel.launches * kernel.flops for kernel in kernels)
        flops += layers * passes * (all_pairs - attention_flops(shapes))
        assert flops / 1e12 == pytest.approx(counted["TFLOP"], rel=0.002), (k, name)
        nbytes = sum(kernel.launches * kernel.nbytes for kernel in kernels)
        assert nbytes / 1e9 == pytest.approx(counted["GB touched"], rel=0.02), (k, name)


def test_products_of_the_forward_pass_are_the_models() -> None:
    """`megassm.cost` counts them apart: a micro-step's are three times as many, beside the filters', which have kernels
    of their own where features are written."""
    config = load_config(ROOT / "configs/1b_hybrid.yaml")
    shapes = Shapes(config, filters_of(config), 8, fused=False)
    flops = sum(k.launches * k.flops for k in micro_step(shapes) if k.kind not in ("filter bank", "attention"))
    model = config.model
    attention = forward_flops_by_kind(model, 8, model.seq_len)["attention"]
    own = forward_flops_per_token(model, 8, model.seq_len) - attention
    assert flops == pytest.approx(3 * own * shapes.tokens, rel=1e-3)


def test_a_kernel_takes_the_longer_of_its_two_times() -> None:
    config = load_config(ROOT / "configs/125m.yaml")
    kernels = list(micro_step(Shapes(config, filters_of(config), 2)))
    for card, memory in MEMORY_TB_S.items():
        times = seconds(kernels, card)
        least = sum(kernel.launches * kernel.nbytes for kernel in kernels) / (memory * 1e12)
        assert least < times.roofline < times.expected
    found = rows(config, [2, 16], ["A100", "B200"])
    assert [(row["K"], row["card"]) for row in found] == [(2, "A100"), (2, "B200"), (16, "A100"), (16, "B200")]
    assert all(0 < row["mfu_expected"] < row["mfu_roofline"] < 1 for row in found)
    assert found[0]["roofline_ms"] > found[1]["roofline_ms"]
    assert found[2]["roofline_ms"] > found[0]["roofline_ms"]


def test_a_mixer_without_features_moves_less() -> None:
    """Its FLOPs are more by one product with the filters' rows; wide heads have the other way alone."""
    config = load_config(ROOT / "configs/350m_hybrid.yaml")
    for row in mixer_ways(config, [2, 8, 16], "H100"):
        own = Shapes(config, filters_of(config), int(row["K"]))
        again = 2.0 * own.chunks * own.filters.chunk * own.k * own.inputs * config.model.d_model / 1e12
        assert row["TFLOP_at_once"] == pytest.approx(row["TFLOP_groups"] + again)
        assert row["GB_at_once"] < row["GB_groups"] / 2
        assert 0 < row["expected_ms_at_once"] < row["expected_ms_groups"]
        assert row["share_needed"] < 0.79
    (wide,) = mixer_ways(load_config(ROOT / "configs/1b_hybrid.yaml"), [2], "H100")
    assert "GB_at_once" not in wide


def test_the_command() -> None:
    done = run_python("tools/bench_roofline.py", "--config", "configs/125m.yaml", "--budgets", "2", "--kinds", "H100",
                      "--mixer", "H100")  # fmt: skip
    assert "mixer products" in done.stdout
    assert "a mixer on one H100" in done.stdout
    for wrong, said in (
        (("--cards", "TPU"), "TPU"),
        (("--budgets", "25"), "K_max = 16"),
    ):
        done = run_python("tools/bench_roofline.py", "--config", "configs/125m.yaml", *wrong, check=False)
        assert done.returncode
        assert said in done.stderr
