"""One K a layer: what is computed, cut, decoded, exported and counted at it, and the search for one under a limit."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megassm.checkpoint.exported import open_model_folder
from megassm.checkpoint.format import load_model
from megassm.cli.mixtures import Limit, mixture
from megassm.config.load import ConfigError, load_config
from megassm.config.model import ModelConfig
from megassm.config.schema import Config
from megassm.cost import forward_flops_per_token, parameters
from megassm.errors import UserError
from megassm.eval.generate import generate
from megassm.eval.mix import Mixture, decoding_time, search, timing_keys, timings
from megassm.eval.sampling import Sampling
from megassm.eval.session import open_session
from megassm.eval.speculate import Drafting
from megassm.eval.sweep import SweepPlan, sweep
from megassm.eval.swept import Sweep
from megassm.model import LanguageModel, build_model, truncate
from megassm.parallel.engine import Engine
from megassm.parallel.world import join_peers, join_world, leave_world
from megassm.report.sweep_files import write_sweep
from tests.conftest import ROOT, run_python
from tests.ranks import run_on_ranks
from tests.test_model import config
from tests.test_sweep import TOKEN_BYTES, text

ELASTIC: dict[str, Any] = {"d_ffn": 72, "ffn_elastic": {"knee_k": 3, "below": 16, "above": 8}}
HEADS: dict[str, Any] = {"mixer_heads": 2, "gate": "sigmoid", "input_taps": 3, "sigma_scale": "none"}
MODELS: list[tuple[ModelConfig, Mixture]] = [
    (config(pattern="S"), (2, 6, 1, 3)),
    (config(pattern="SA", **HEADS), (5, 2, 1, 6)),
    (config(pattern="SSSA", **ELASTIC), (5, 2, 4, 1)),
    (config(pattern="AS", **ELASTIC, **HEADS), (6, 1, 3, 2)),
]


def built(shape: ModelConfig) -> LanguageModel:
    model = build_model(shape, 1).double().eval()
    model.reset_filters()
    return model


@pytest.mark.parametrize(("shape", "layers"), MODELS)
@torch.no_grad()
def test_a_cut_computes_and_decodes_what_the_whole_model_does_at_it(shape: ModelConfig, layers: Mixture) -> None:
    model = built(shape)
    ids_BL = torch.randint(0, 50, (3, 24))
    whole_BLV = model(ids_BL, layers)
    assert not torch.allclose(whole_BLV, model(ids_BL, max(layers)))
    small = truncate(model, layers)
    assert float((small(ids_BL) - whole_BLV).abs().max()) < 1e-10
    for k in (1, 2, max(layers)):
        less = [min(k, each) for each in layers]
        assert float((small(ids_BL, min(k, small.config.num_channels)) - model(ids_BL, less)).abs().max()) < 1e-10
    again = truncate(small, 2)
    assert float((again(ids_BL) - model(ids_BL, [min(2, each) for each in layers])).abs().max()) < 1e-10
    for each, budget in ((model, layers), (small, None)):
        logits_BV, state = each.prefill(ids_BL[:, :7], budget)
        assert float((logits_BV - whole_BLV[:, 6]).abs().max()) < 1e-7
        for position in range(7, 15):
            logits_BV, state = each.step(ids_BL[:, position], state, budget)
            assert float((logits_BV - whole_BLV[:, position]).abs().max()) < 1e-7
        logits_BLV, _ = each.extend(ids_BL[:, 15:], state, budget)
        assert float((logits_BLV - whole_BLV[:, 15:]).abs().max()) < 1e-7


@pytest.mark.parametrize(("shape", "layers"), MODELS)
def test_costs_are_those_of_the_model_that_is_left(shape: ModelConfig, layers: Mixture) -> None:
    small = truncate(build_model(shape, 0), layers)
    count = sum(parameter.numel() for parameter in small.parameters())
    assert parameters(shape, layers) == count == parameters(small.config, small.config.num_channels)
    flops = forward_flops_per_token(shape, layers, 24)
    assert flops == pytest.approx(forward_flops_per_token(small.config, small.config.num_channels, 24))
    alone = shape.model_copy(update={"filterbank": "fft"})  # a filter bank whose products the counter does not see
    model = build_model(alone, 0).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 24, dtype=torch.long), layers)
    seen = counter.get_total_flops() / 24
    unseen = 4 * shape.d_model * 12.5 * shape.mixers.count("A")  # attention is one operator on a CPU
    assert seen == pytest.approx(flops - unseen, rel=1e-6)


def test_a_budget_that_no_layer_has_is_refused() -> None:
    shape = config(pattern="S")
    small = shape.cut((2, 6, 1, 3))
    assert (small.num_channels, small.channels_of_layers) == (6, (2, 6, 1, 3))
    assert small.cut(2).channels_of_layers == (2, 2, 1, 2)
    assert shape.cut((3, 3, 3, 3)).layer_channels is None
    assert config(pattern="SA").cut((2, 6, 1, 3)).num_channels == 2, "attention has no channels, and its K decides none"
    for wrong, message in (
        ((2, 2), "a budget of 2 numbers, one K a layer: this model has 4 layers"),
        ((2, 6, 2, 3), "budget K = 2 of layer 2: must be between 1 and that layer's 1 channels"),
        ((0, 6, 1, 3), "budget K = 0 of layer 0"),
        (7, "budget K = 7: must be between 1 and this model's K_max = 6"),
    ):
        with pytest.raises(UserError, match=message):
            small.layer_budgets(wrong)
    with pytest.raises(UserError, match="must be one number for each of the 4 layers, the largest of them"):
        build_model(shape.model_copy(update={"layer_channels": (6, 2)}), 0)
    with pytest.raises(ConfigError, match=r"model.layer_channels = .*must be null, or one number for each of the 3"):
        load_config(ROOT / "configs/tiny.yaml", ["model.layer_channels=[16,4]"])
    with pytest.raises(ConfigError, match=r"model.layer_channels = .*the largest of them model.num_channels = 16"):
        load_config(ROOT / "configs/tiny.yaml", ["model.layer_channels=[8,4,2]"])


def test_generation_at_one_k_a_layer_drafted_or_not() -> None:
    model = built(config(pattern="SA", **HEADS))
    layers, sampling = [5, 2, 1, 6], Sampling(max_tokens=9, temperature=0)
    plain = generate(model, [[1, 2, 3], [4]], layers, sampling)
    assert plain == generate(truncate(model, layers), [[1, 2, 3], [4]], None, sampling)
    assert plain == generate(model, [[1, 2, 3], [4]], layers, sampling, Drafting(1, 3))
    assert plain == generate(model, [[1, 2, 3], [4]], lambda position: layers, sampling)


def losses_on_a_rank(settings: Config) -> list[list[float]]:
    """Of a fixed text at several budgets, of this rank's part of the positions."""
    torch.set_num_threads(1)
    try:
        engine = Engine(settings, join_world(settings))
        parts = settings.parallel.sequence
        length = 128 // parts
        first = length * (engine.world.rank % parts)
        ids_BT = torch.randint(0, 257, (2, 129), generator=torch.Generator().manual_seed(0))
        part_BT = ids_BT[:, first : first + length + 1]
        return [engine.eval_losses(part_BT, k)[0].tolist() for k in ((8, 3), (2, 5), 4)]
    finally:
        leave_world()


@pytest.mark.ranks
def test_ranks_that_share_layers_or_sequences_equal_one(small_config: Callable[..., Config]) -> None:
    shape = ("model.pattern=SA", "model.seq_len=128", "model.d_ffn=96", "model.mixer_heads=4", "model.gate=sigmoid",
             "model.ffn_elastic={knee_k: 3, below: 16, above: 8}", "parallel.zero_stage=0")  # fmt: skip
    (alone,) = run_on_ranks(1, losses_on_a_rank, small_config(*shape))
    assert alone[0] != alone[1]
    tensor = run_on_ranks(2, losses_on_a_rank, small_config(*shape, "parallel.tensor=2", world_size=2))
    for mine in tensor:
        for found, expected in zip(mine, alone, strict=True):
            assert found == pytest.approx(expected, abs=2e-5)
    first, second = run_on_ranks(2, losses_on_a_rank, small_config(*shape, "parallel.sequence=2", world_size=2))
    for head, tail, expected in zip(first, second, alone, strict=True):
        assert [*head, *tail] == pytest.approx(expected, abs=2e-5)


def greedy_problem(seed: int) -> tuple[ModelConfig, Callable[[Mixture], float], Callable[[Mixture], float]]:
    """Convex losses a layer that do not depend on the others: greedy lowering is then optimal at the costs it meets."""
    generator = np.random.default_rng(seed)
    weight_L, power_L = generator.uniform(0.1, 3, 4), generator.uniform(0.5, 2, 4)
    shape = config(pattern="S", num_channels=8)

    def loss(layers: Mixture) -> float:
        return float(sum(w * k**-p for w, p, k in zip(weight_L, power_L, layers, strict=True)))

    return shape, lambda layers: float(sum(layers)), loss


@pytest.mark.parametrize("seed", range(6))
def test_the_search_finds_the_best_where_greed_is_enough(seed: int) -> None:
    shape, cost, loss = greedy_problem(seed)
    ladder = range(1, 9)
    everything = [(cost(layers), loss(layers)) for layers in itertools.product(ladder, repeat=4)]
    for limit in (32, 20, 13, 7, 4):
        found = search(shape, limit, ladder, cost, loss)
        best = min(value for spent, value in everything if spent <= limit)
        assert found.cost <= limit
        assert found.loss == pytest.approx(best, rel=1e-12)
        assert found.single_k == limit // 4
        assert found.loss <= (found.single_loss or math.inf)
        assert found.measured <= 4 * (33 - limit) + 5
    with pytest.raises(UserError, match="no K a layer is within 3: K = 1 in every layer takes 4"):
        search(shape, 3, ladder, cost, loss)


def test_the_search_measures_few_mixtures_and_is_never_worse_than_one_k() -> None:
    shape, cost, _ = greedy_problem(0)

    def trap(layers: Mixture) -> float:
        """Lowering any one layer is bad, lowering all alike is not."""
        return float(max(layers) - min(layers))

    found = search(shape, 16, (2, 4, 8), cost, trap)
    assert (found.layers, found.loss) == ((4, 4, 4, 4), 0.0)
    layers = 24
    deep = config(pattern="S", n_layers=layers, num_channels=8)
    weights = np.random.default_rng(1).uniform(0.1, 3, layers)
    found = search(deep, 50, (1, 2, 4, 8), cost, lambda ks: float(sum(w / k for w, k in zip(weights, ks, strict=True))))
    steps = sum({8: 0, 4: 1, 2: 2, 1: 3}[k] for k in found.layers)
    assert found.measured < 3 * steps + layers, "not every layer anew at every step"


def test_time_is_shared_among_the_layers_of_a_kind() -> None:
    shape = config(pattern="SSA", n_layers=3, **ELASTIC)
    table = {("S", 1): 4.0, ("S", 2): 6.5, ("S", 4): 6.0, ("S", 6): 8.0} | {("A", k): 7.9 for k in (1, 2, 4)}
    cost = decoding_time(shape, table | {("A", 6): 8.0})
    assert cost((6, 6, 6)) == pytest.approx(8.0)
    assert cost((1, 1, 6)) == pytest.approx(4.0)
    assert cost((1, 6, 6)) == pytest.approx(6.0)
    assert cost((2, 6, 6)) == pytest.approx(7.0), "slower than K = 4 by noise: as fast as it"
    assert cost((6, 6, 1)) == pytest.approx(7.9)
    small = shape.cut((5, 2, 4))
    of_small = decoding_time(small, {key: 1.0 + key[1] for key in timing_keys(small, (1, 3))})
    assert of_small((1, 1, 1)) < of_small((3, 2, 3)) < of_small(small.channels_of_layers)
    measured = timings(build_model(shape, 0).eval(), (1, 6))
    assert set(measured) == {("S", 1), ("S", 6), ("A", 1), ("A", 6)}
    assert all(value > 0 for value in measured.values())
    with pytest.raises(UserError, match="cannot decode token by token"):
        timings(build_model(config(classes=5), 0), (1, 6))


@pytest.mark.parametrize(
    ("given", "expected"),
    [("16/8/4/8", (16, 8, 4, 8)), ("7", (7,)), ("ms=0.5", Limit("ms", 0.5)), ("mflops=3", Limit("mflops", 3.0)),
     ("parameters=1.5e6", Limit("parameters", 1.5e6))],
)  # fmt: skip
def test_mixtures_of_a_command_line(given: str, expected: object) -> None:
    assert mixture(given) == expected


@pytest.mark.parametrize("given", ["", "0/1", "8,4", "a/b", "8/", "params=3", "ms=0", "ms=nan", "ms=inf", "mflops=x"])
def test_what_is_no_mixture_is_refused(given: str) -> None:
    with pytest.raises(Exception, match=r"give one K a layer|a limit is parameters=N"):
        mixture(given)


LIMIT = Limit("parameters", 15_000)


def swept() -> tuple[list[dict[str, Any]], Sweep]:
    """Rows of one K a layer, timings apart."""
    peers = join_peers("cpu")
    try:
        plan = SweepPlan([1, 2, 3], [24], 8, 2, mixtures=[(1, 6, 2, 4), LIMIT])
        model = build_model(config(pattern="S", d_model=16), 0)
        curves = sweep(model, [text(tokens=600)], plan, TOKEN_BYTES, peers)
        rows = [asdict(row) for row in curves[0].mixed]
        for row in rows:
            row |= {name: 0 for name in row if "tokens_per_s" in name} | {"peak_memory_mib": 0}
        return rows, Sweep("run", 1, 24, curves)
    finally:
        leave_world()


@pytest.mark.ranks
def test_a_sweep_measures_mixtures_and_searches(tmp_path: Path) -> None:
    rows, whole = swept()
    given, found = rows
    shape = config(pattern="S", d_model=16)
    assert (given["layers"], given["limit"], given["k"]) == ((1, 6, 2, 4), None, 6)
    assert given["parameters"] == parameters(shape, (1, 6, 2, 4))
    assert found["limit"] == "parameters=15,000"
    assert found["parameters"] == parameters(shape, found["layers"]) <= 15_000
    assert [row.k for row in whole.curves[0].rows] == [1, 2, 3, 6], "the curve over K is of one K alone"
    written = {path.suffix: path.read_bytes() for path in write_sweep(whole, tmp_path)}
    assert json.loads(written[".json"])["curves"][0]["mixed"][0]["layers"] == [1, 6, 2, 4]
    assert b"1/6/2/4" in written[".html"]
    assert written[".csv"].count(b"\n") == 1 + 4 + 2
    for mine in run_on_ranks(2, swept_on_a_rank):
        for row, other in zip(mine, rows, strict=True):
            assert row.keys() == other.keys()
            for name, value in other.items():
                assert row[name] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), name


def swept_on_a_rank() -> list[dict[str, Any]]:
    return swept()[0]


def test_an_export_at_one_k_a_layer_opens_everywhere(trained: Path, tmp_path: Path) -> None:
    from megassm.hf import MegaSSMForCausalLM

    session = open_session(trained, None, "cpu")
    options = ("--mix", "2/5", "--output", str(tmp_path / "a"), "--sequences", "2", "--json", str(tmp_path / "t.json"))
    run_python("tools/export.py", str(trained), *options)
    (row,) = json.loads((tmp_path / "t.json").read_text())
    assert row["k"] == "2/5"
    assert row["parameters"] == parameters(session.config.model, (2, 5))
    assert row["logits_difference"] <= 1e-5
    small = load_model(open_model_folder(tmp_path / "a"))
    assert small.config.channels_of_layers == (2, 5)
    ids_BL = torch.randint(0, 257, (2, 40))
    with torch.no_grad():
        expected_BLV = session.model(ids_BL, (2, 5))
        assert float((small(ids_BL) - expected_BLV).abs().max()) < 1e-3
        hub = MegaSSMForCausalLM.from_pretrained(tmp_path / "a")
        assert hub.config.model.layer_channels == (2, 5)
        assert float((hub(ids_BL).logits - small(ids_BL)).abs().max()) < 1e-5
        assert float((hub(ids_BL, k=[1, 3]).logits - small(ids_BL, [1, 3])).abs().max()) < 1e-5
        one = hub.generate(ids_BL[:, :5], max_new_tokens=6, do_sample=False)
        assert one.tolist() == hub.generate(ids_BL[:, :5], max_new_tokens=6, do_sample=False, use_cache=False).tolist()
    most = parameters(session.config.model, 4)
    run_python("tools/export.py", str(trained), "--mix", f"parameters={most}", "--budgets", "1,2,4,8", *options[2:])
    (row,) = json.loads((tmp_path / "t.json").read_text())
    assert row["parameters"] <= most
    assert (tmp_path / "a/README.md").read_text().count(str(row["k"])) >= 1
    refused = run_python("tools/export.py", str(trained), "--mix", "2/5/1", *options[2:4], check=False)
    assert refused.returncode == 1
    assert "a budget of 3 numbers, one K a layer: this model has 2 layers" in refused.stderr
