"""The benchmarks of mixer and model: all ways compute the same, the table has its columns."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch

import tools.bench.model
from megassm.config.load import load_config
from megassm.config.model import ModelConfig
from megassm.cost import parameters
from megassm.errors import UserError
from tests.conftest import ROOT, run_python
from tools.bench.drafting import estimates
from tools.bench.filters import rows as filter_rows
from tools.bench.mixer import MixerBenchPlan, bench
from tools.bench.model import MODELS, SIZES, ModelBenchPlan, bench_models, transformer_of_equal_size
from tools.bench.peers import peer_layer


def test_every_method_computes_the_same() -> None:
    plan = MixerBenchPlan(
        [100, 256], [1, 5], methods=("authors", "authors_by_input", "fft", "direct", "chunked"), d_model=16, repeats=1
    )
    rows = list(bench(plan))
    assert [(row.length, row.k) for row in rows[::5]] == [(100, 1), (100, 5), (256, 1), (256, 5)]
    for row in rows:
        assert row.relative_error is not None
        assert row.relative_error < 1e-5
        assert min(row.forward_s, row.forward_backward_s, row.peak_bytes, row.gflops_per_s) > 0


def test_chunked_keeps_less_than_the_authors_formulation() -> None:
    plan = MixerBenchPlan([2048], [16], methods=("authors", "chunked"), d_model=64, repeats=1)
    authors, chunked = bench(plan)
    assert chunked.peak_bytes < authors.peak_bytes / 2


def test_attention_has_as_many_parameters_and_needs_nothing() -> None:
    plan = MixerBenchPlan([64], [4, 16], methods=("chunked", "attention", "mamba2"), d_model=64, repeats=1)
    notes: list[str] = []
    rows = list(bench(plan, notes.append))
    assert [row.method for row in rows] == ["chunked", "attention"] * 2
    assert [row.parameters for row in rows] == [k * 64 * 64 for k in (4, 4, 16, 16)]
    assert len(notes) == 1


def test_wide_attention_is_causal_attention() -> None:
    layer = peer_layer("attention", 16, 16 * 16 * 9)
    u_BLD = torch.randn(2, 10, 16)
    before = layer(u_BLD)
    u_BLD[:, 6:] += 1
    assert torch.allclose(layer(u_BLD)[:, :6], before[:, :6], atol=1e-6)
    assert not torch.allclose(layer(u_BLD)[:, 6:], before[:, 6:], atol=1e-3)


class FakeMamba2(torch.nn.Module):
    """Takes what fla's takes, has its parameters, gives a tuple."""

    def __init__(self, num_heads: int, head_dim: int, hidden_size: int, expand: float) -> None:
        super().__init__()
        inner = int(expand * hidden_size)
        assert inner == num_heads * head_dim
        self.inputs, self.out = torch.nn.Linear(hidden_size, 2 * inner), torch.nn.Linear(inner, hidden_size)

    def forward(self, u_BLD: torch.Tensor) -> tuple[torch.Tensor, None]:
        return self.out(self.inputs(u_BLD).chunk(2, dim=2)[0]), None


def test_models_of_equal_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fla", types.ModuleType("fla"))
    monkeypatch.setitem(sys.modules, "fla.layers", types.SimpleNamespace(Mamba2=FakeMamba2))
    monkeypatch.setattr(tools.bench.model, "why_no_peer", lambda *_: None)
    config = SIZES["tiny"].model_copy(update={"num_channels": 24})
    plan = ModelBenchPlan(config, [64, 128], torch.device("cpu"), torch.float32, repeats=1, peak_tflops=0.1)
    rows = list(bench_models(plan))
    assert [(row.model, row.length) for row in rows] == [(model, length) for length in (64, 128) for model in MODELS]
    size = parameters(config, 24)
    for row in rows:
        assert row.parameters == pytest.approx(size, rel=0.1)
        flops = row.mfu * 1e11 / row.tokens_per_s
        assert 6 * 0.85 * size < flops < 6 * 1.5 * size, "six FLOPs a parameter and token, and attention's own"
        assert row.peak_memory_gib * 2**30 > 8 * size, "weights and gradients"


def test_the_large_models_are_of_equal_size() -> None:
    spectral = SIZES["1.3b"]
    size = parameters(spectral, 32)
    assert size == pytest.approx(1.3e9, rel=0.05)
    transformer = transformer_of_equal_size(spectral)
    assert parameters(transformer, 1) == pytest.approx(size, rel=0.03)
    assert transformer.d_model % transformer.n_heads == 0


def test_a_configuration_s_model_is_held_against_a_plain_transformer() -> None:
    """Which has no taps, no heads of channels and one width at every K."""
    model = load_config(ROOT / "configs/family.yaml").model
    transformer = transformer_of_equal_size(model)
    assert parameters(transformer, model.num_channels) == pytest.approx(parameters(model, 16), rel=0.01)
    assert parameters(transformer, 2) == parameters(transformer, 16)
    assert (transformer.input_taps, transformer.pattern) == (1, "A")


def test_model_tool(tmp_path: Path) -> None:
    table = tmp_path / "models.json"
    done = run_python("tools/bench_model.py", "--lengths", "64,128", "--repeats", "1", "--recompute",
                      "--dtype", "bfloat16", "--json", str(table))  # fmt: skip
    rows = json.loads(table.read_text(encoding="utf-8"))
    assert [(row["model"], row["length"]) for row in rows] == [
        (model, length) for length in (64, 128) for model in ("es_ssm", "transformer")
    ]
    assert all(row["tokens_per_s"] > 0 and row["mfu"] is None for row in rows), "a CPU states no peak"
    assert "no row for mamba2: fla and mamba_ssm not installed" in done.stderr
    refused = run_python("tools/bench_model.py", "--batch", "0", check=False)
    assert refused.returncode == 2
    refused = run_python("tools/bench_model.py", "--set", "model.d_model=8", check=False)
    assert "name it with --config FILE" in refused.stderr
    own = ("--config", "configs/family.yaml", "--set", "model.d_ffn=160", "model.ffn_elastic=null")
    own += ("--lengths", "64", "--repeats", "1", "--budgets", "2,16", "--json", str(table))
    said = run_python("tools/bench_model.py", *own).stdout
    rows = json.loads(table.read_text(encoding="utf-8"))
    assert [row["parameters"] for row in rows] == pytest.approx([178_000] * 3, rel=0.02), said
    assert [(row["model"], row["k"]) for row in rows] == [("es_ssm", 2), ("es_ssm", 16), ("transformer", 1)]


def test_an_eigensolver_knows_the_first_filters_only() -> None:
    """As many as its precision has: sigma_k falls by a factor of about ten from one to the next at this length."""
    rows = list(filter_rows(128))
    found = {row["by"]: row for row in rows if row["what"] == "error"}
    assert set(found) == {"float32 subspace", "float32 eigh", "float64 eigh"}
    wrong = {name: int(row["wrong from"] or 0) for name, row in found.items()}
    assert 8 <= wrong["float32 eigh"] < wrong["float64 eigh"] <= 24
    assert float(found["float64 eigh"]["k=8"] or 1) < 1e-9 < float(found["float32 subspace"]["k=8"] or 1) < 1e-2
    assert all(float(row["k=32"] or 0) >= 1 for row in found.values())
    assert all(float(row["k=32"] or 0) > 100 for row in rows if row["what"] == "weight"), "and too loud by far"


def test_unknown_method() -> None:
    with pytest.raises(UserError, match="methods magic: must be among authors"):
        list(bench(MixerBenchPlan([8], [1], methods=("magic",))))


def test_tool(tmp_path: Path) -> None:
    table = tmp_path / "bench.json"
    done = run_python("tools/bench_mixer.py", "--lengths", "64,128", "--budgets", "2", "--d-model", "16",
                      "--repeats", "1", "--json", str(table))  # fmt: skip
    assert "chunked" in done.stdout
    assert "no row for mamba2 at L=64: fla and mamba_ssm not installed" in done.stderr
    rows = json.loads(table.read_text(encoding="utf-8"))
    assert {"method", "length", "k", "forward_s", "forward_backward_s", "peak_bytes", "relative_error"} <= set(rows[0])
    assert [row["length"] for row in rows if row["method"] == "chunked"] == [64, 128]
    assert all(row["speed_over_authors"] > 0 for row in rows)


def test_drafting_tool(trained: Path, tmp_path: Path) -> None:
    """Speed-up and break-even follow from the parts of a round; nothing is accepted more often than always."""
    text, table = tmp_path / "text.txt", tmp_path / "drafting.json"
    text.write_text("It was the best of times, it was the worst of times. " * 20, encoding="utf-8")
    done = run_python("tools/bench_drafting.py", "--run", str(trained), "--prompts", str(text), "--draft-ks", "1,2,64",
                      "--lengths", "1,3", "--repeats", "1", "--tokens", "6", "--texts", "1", "--json", str(table),
                      "--estimate", "configs/7b_hybrid.yaml")  # fmt: skip
    assert "both ways" in done.stdout
    assert "7b_hybrid: bounded by the reading of weights" in done.stdout
    rows = json.loads(table.read_text(encoding="utf-8"))
    assert [(row["draft_k"], row["drafts"]) for row in rows] == [(1, 1), (1, 3), (2, 1), (2, 3)]
    for row in rows:
        assert 0 <= row["acceptance"] <= 1
        tokens = sum(row["acceptance"] ** count for count in range(row["drafts"] + 1))
        round_ms = (row["drafts"] * row["draft_ms"] + row["read_ms"]) / (1 - row["keep_percent"] / 100)
        assert row["speed_up"] == pytest.approx(tokens * row["plain_ms"] / round_ms)
        if row["break_even"] is not None:
            at_even = sum(row["break_even"] ** count for count in range(row["drafts"] + 1))
            assert at_even * row["plain_ms"] == pytest.approx(max(round_ms, row["plain_ms"]))
    refused = run_python("tools/bench_drafting.py", "--run", str(trained), check=False)
    assert refused.returncode == 2


def test_estimates_are_the_weights_read() -> None:
    """Of a model whose drafts read nothing, every accepted token is a whole step; where they read all, none is."""
    config = ModelConfig(vocab_size=50, d_model=64, n_layers=2, seq_len=64, num_channels=16, d_ffn=8)
    small = parameters(config, 2) / parameters(config, 16)
    (row,) = estimates(config, {2: 1.0, 16: 1.0}, [3])
    assert row["draft_over_step"] == pytest.approx(small)
    assert row["speed_up"] == pytest.approx(4 / (1 + 3 * small))
