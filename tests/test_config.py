"""Configuration: what ships is right, and what is wrong is refused with its place."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import BaseModel

from megassm.commands.make_task import OPTIONS
from megassm.config.load import dump_config, load_config
from megassm.config.model import ElasticFfnConfig
from megassm.config.schema import Config, RunConfig
from megassm.config.source import ConfigError
from megassm.cost import parameters
from megassm.model import LanguageModel
from tests.conftest import ROOT, run_python

TINY = ROOT / "configs/tiny.yaml"
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))
PROMISED = {"125m": 125e6, "350m_hybrid": 350e6, "1b_hybrid": 1e9, "3b_hybrid": 3e9, "7b_hybrid": 7e9,
            "30b_hybrid": 30e9}  # fmt: skip

MINIMAL = """\
run:
  dir: runs/x
data: {path: data/x}
model:
  vocab_size: 257
  d_model: 64
  n_layers: 4
  seq_len: 128
  d_ffn: 128
train:
  steps: 200
  batch_sequences: 8
  micro_batch_sequences: 2
"""


def mistakes(tmp_path: Path, text: str, *overrides: str, world_size: int = 1) -> list[str]:
    path = tmp_path / "c.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as refusal:
        load_config(path, overrides, world_size)
    return [line.removeprefix(f"{tmp_path}/") for line in refusal.value.mistakes]


def knobs() -> list[tuple[str, type[BaseModel], str]]:
    return [
        (section, field.annotation, name)
        for section, field in Config.model_fields.items()
        for name in field.annotation.model_fields
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_are_the_size_their_names_promise(path: Path) -> None:
    model = load_config(path, world_size=8 if path.stem in PROMISED else 1).model
    with torch.device("meta"):
        built = sum(p.numel() for p in LanguageModel(model).parameters())
    assert built == parameters(model, model.num_channels)
    if path.stem in PROMISED:
        assert built == pytest.approx(PROMISED[path.stem], rel=0.1)


def test_all_promised_configs_ship() -> None:
    assert {path.stem for path in CONFIGS} >= {"tiny", *PROMISED}
    assert {path.stem for path in CONFIGS if path.parent.name == "tasks"} == OPTIONS.keys()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_resolved_config_is_a_config(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["optim.lr=1e-3"])
    resolved = tmp_path / "resolved.yaml"
    resolved.write_text(dump_config(config), encoding="utf-8")
    assert load_config(resolved) == config
    assert config.optim.lr == 1e-3


def test_every_knob_is_described_and_read_somewhere() -> None:
    assert len(knobs()) <= 99
    code = "\n".join(
        path.read_text(encoding="utf-8") for path in (ROOT / "megassm").rglob("*.py") if path.parent.name != "config"
    )
    schema = "\n".join((ROOT / f"megassm/config/{name}.py").read_text(encoding="utf-8") for name in ("model", "schema"))
    for section, model, name in knobs():
        description = model.model_fields[name].description
        assert description, f"{section}.{name} has no description"
        read = re.search(rf"\.{name}\b", code)
        in_config = re.search(rf"(self|\.{section})\.{name}\b", schema)
        assert read or in_config, f"nobody reads {section}.{name}"


@pytest.mark.parametrize(
    ("change", "place", "expected"),
    [
        ("  n_layers: 4", "c.yaml:7", "no key 'model.n_layer'; did you mean 'model.n_layers'?"),
        ("  seq_len: 128", "c.yaml:8", "model.seq_len = 'many': must be a whole number"),
        ("  d_ffn: 128", "c.yaml:9", "model.d_ffn = -1: must be at least 1"),
        ("  steps: 200", "c.yaml:11", "train.steps = true: must be a whole number"),
        ("  dir: runs/x", "c.yaml:2", "run.dir = 7: must be text"),
    ],
)
def test_one_mistake_is_named_with_its_place(tmp_path: Path, change: str, place: str, expected: str) -> None:
    wrong = {
        "  n_layers: 4": "  n_layer: 4",
        "  seq_len: 128": "  seq_len: many",
        "  d_ffn: 128": "  d_ffn: -1",
        "  steps: 200": "  steps: true",
        "  dir: runs/x": "  dir: 7",
    }[change]
    found = mistakes(tmp_path, MINIMAL.replace(change, wrong))
    assert f"{place}: {expected}" in found


def test_duplicate_key(tmp_path: Path) -> None:
    found = mistakes(tmp_path, MINIMAL + "  steps: 300\n")
    assert found == ["c.yaml:14: key 'train.steps' stands twice, first in line 11; keep one of them"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("model.num_channels=129", "model.num_channels = 129: must be at most model.seq_len = 128"),
        ("model.seq_len=256 model.num_channels=129", "model.num_channels = 129: must be at most 128: float64 knows"),
        ("budget.budgets=[2,64]", "budget.budgets = [2, 64]: must be at most model.num_channels = 32"),
        ("budget.budgets=[4,2]", "budget.budgets = [4, 2]: must be increasing"),
        ("eval.budgets=[33]", "eval.budgets = [33]: must be at most model.num_channels = 32"),
        ("budget.min_k=40", "budget.min_k = 40: must be at most model.num_channels = 32"),
        ("budget.k=3", "budget.k = 3: must be null"),
        ("model.pattern=SSA", "model.n_layers = 4: must be a multiple of the pattern's length, 3"),
        (
            "model.sigma_scale=[none,quarter_power,none]",
            "model.sigma_scale = ['none', 'quarter_power', 'none']: must be "
            "one choice, or as many as divide the model's 4 spectral layers",
        ),
        ("model.sigma_scale=[none,half]", "model.sigma_scale = 'half': must be one of 'quarter_power' or 'none'"),
        ("model.sigma_scale=half", "model.sigma_scale = 'half': must be one of 'quarter_power' or 'none'"),
        (
            "model.ffn_elastic={knee_k: 8, below: 16, above: 8}",
            "model.ffn_elastic = {knee_k: 8, below: 16, above: 8}: must be such that hidden units are left at K = 1: "
            "the other channels bring 304, and model.d_ffn = 128 is all of them",
        ),
        (
            "model.ffn_elastic={knee_k: 8, below: 16, above: 0} model.d_ffn=113 parallel.tensor=2",
            "such that each of parallel.tensor = 2 ranks has a hidden unit at K = 1: there are 1",
        ),
        ("model.ffn_elastic={knee_k: 8, below: 3, above: 0}", "model.ffn_elastic.below = 3: must be a multiple of 8"),
        ("model.ffn_elastic={knee: 8}", "no key 'model.ffn_elastic.knee'"),
        ("model.ffn_elastic={knee_k: 8}", "key 'model.ffn_elastic.below' is missing"),
        ("model.pattern=SSX", "model.pattern = 'SSX': must be text of the form"),
        ("model.pattern=A model.n_heads=7", "model.d_model = 64: must be divisible by model.n_heads = 7"),
        ("model.pattern=A model.n_heads=64", "an even number of dimensions a head"),
        ("model.mixer_heads=5", "model.mixer_heads = 5: must be a divisor of model.d_model = 64"),
        ("model.gate=relu", "model.gate = 'relu': must be one of 'softmax', 'sigmoid', 'none' or 'equal'"),
        ("model.gate=sigmoid model.gate_rescale=false", "model.gate_rescale = false: must be true with model.gate"),
        (
            "model.gate=none model.gate_bias_init=-2.0",
            "model.gate_bias_init = -2.0: must be 0 with model.gate",
        ),
        (
            "parallel.tensor=3 model.mixer_heads=8",
            "model.mixer_heads = 8: must be 1, or divisible by parallel.tensor = 3: the ranks share the heads",
        ),
        ("model.pattern=A model.n_kv_heads=3", "model.n_kv_heads = 3: must be a divisor of model.n_heads = 8"),
        (
            "parallel.tensor=3 model.pattern=A",
            "model.n_heads = 8: must be divisible by parallel.tensor x parallel.sequence = 3 x 1 = 3",
        ),
        (
            "parallel.tensor=3",
            "parallel.data x parallel.sequence x parallel.tensor is the number of ranks: 1 x 1 x 3 = 3, but 2",
        ),
        ("parallel.data=1 parallel.tensor=4", "1 x 1 x 4 = 4, but 2 were started"),
        (
            "parallel.sequence=2 model.seq_len=192",
            "model.seq_len = 192: must be a multiple of 64 x parallel.sequence = 128",
        ),
        (
            "parallel.sequence=2 model.selective=true",
            "model.selective = true: must be false with parallel.sequence above 1: what a part hands on fades",
        ),
        (
            "model.selective=true model.filterbank=fft",
            "model.filterbank = 'fft': must be auto, chunked or direct with model.selective = true",
        ),
        (
            "parallel.sequence=2 model.filterbank=fft",
            "model.filterbank = 'fft': must be chunked with parallel.sequence = 2",
        ),
        ("budget.draws=3", "budget.draws = 3: must be a divisor of the 2 micro-steps of a rank"),
        (
            "parallel.sequence=2 model.seq_len=256 train.compile=true",
            "train.compile = true: must be false with parallel.sequence above 1",
        ),
        ("train.batch_sequences=6", "train.batch_sequences = 6: must be a multiple of"),
        ("eval.sequences=3", "eval.sequences = 3: must be a multiple of the 2 data-parallel ranks"),
        ("optim.schedule=wsd optim.decay_steps=150", "optim.decay_steps = 150: must be at most"),
        ("optim.decay_steps=10", "optim.decay_steps = 10: must be null"),
        ("optim.beta1=1", "optim.beta1 = 1.0: must be less than 1"),
        ("optim.lr=.nan", "optim.lr = nan: must be"),
        ("parallel.zero_stage=0", "parallel.zero_stage = 0: must be 1, 2 or 3 with train.precision = bf16"),
        ("parallel.zero_stage=4", "parallel.zero_stage = 4: must be one of 0, 1, 2 or 3"),
        ("train.steps", "an override is section.key=value"),
        ("train.stps=3", "no key 'train.stps'; did you mean 'train.steps'?"),
        ("train.seq_len=3", "no key 'train.seq_len'; did you mean 'model.seq_len'?"),
    ],
)
def test_broken_rules(tmp_path: Path, override: str, expected: str) -> None:
    found = mistakes(tmp_path, MINIMAL, *re.split(r" (?=\w+\.)", override), world_size=2)
    assert any(expected in line for line in found), found


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    text = MINIMAL.replace("n_layers: 4", "n_layer: 4").replace("batch_sequences: 8", "batch_sequences: 7")
    found = mistakes(tmp_path, text + "optim: {lr: fast}\nextra: 1\n", "model.num_channels=1000")
    places = [line.split(": ")[0] for line in found]
    assert places == [
        "c.yaml:4",
        "c.yaml:7",
        "c.yaml:12",
        "c.yaml:14",
        "c.yaml:15",
        "command line 'model.num_channels=1000'",
    ]


def test_mistakes_beside_a_name_that_is_no_utf_8(tmp_path: Path) -> None:
    path = tmp_path / "odd.yaml"
    path.write_text((ROOT / "configs/tiny.yaml").read_text(encoding="utf-8") + '"\\udcc3odel": 1\n', encoding="utf-8")
    with pytest.raises(ConfigError) as refusal:
        load_config(path, ["\udcc3odel.pattern=S", "model.pattern=X", "train.steps=0"])
    said = str(refusal.value)
    assert "the names of sections and knobs are ASCII" in said
    assert "model.pattern = 'X': must be text of the form ^[SA]+$" in said
    assert "train.steps = 0: must be at least 1" in said


@pytest.mark.parametrize("text", ["", "- a\n", "run: [", "run: 3\n", "\tx: 1\n", "run: {dir: !foo x}\n"])
def test_what_is_no_configuration_at_all(tmp_path: Path, text: str) -> None:
    assert all(line.startswith("c.yaml:") for line in mistakes(tmp_path, text))


def test_numbers_follow_yaml_1_2(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL + "optim: {lr: 3e-4}\n", encoding="utf-8")
    assert load_config(path).optim.lr == 3e-4


def test_sections_are_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        RunConfig(dir="x").seed = 3  # type: ignore[misc]


def test_a_mistake_is_told_without_torch_and_by_another_rank_with_its_name(tmp_path: Path) -> None:
    """Where all ranks have it, the launcher has ended the others by the time that they would tell it."""
    path = tmp_path / "c.yaml"
    path.write_text(MINIMAL.replace("steps: 200", "steps: -1"), encoding="utf-8")
    for rank, named in (("0", False), ("1", True)):
        done = run_python("-X", "importtime", "launch/pretrain.py", "--config", str(path), check=False, RANK=rank)
        imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if "|" in line}
        assert done.returncode == 2
        assert "train.steps = -1" in done.stderr
        assert (f"[rank 1 on {os.uname().nodename}] " in done.stderr) is named
        assert "pydantic" in imported
        assert not {"torch", "deepspeed", "numpy"} & imported


def test_command_line_mistakes_exit_with_2() -> None:
    done = subprocess.run([sys.executable, "launch/pretrain.py"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--config" in done.stderr


def test_overrides_reach_into_optional_sections_and_mappings() -> None:
    elastic = ("model.ffn_elastic.knee_k=8", "model.ffn_elastic.below=8", "model.ffn_elastic.above=0")
    assert load_config(TINY, elastic).model.ffn_elastic == ElasticFfnConfig(knee_k=8, below=8, above=0)
    mixture = ("data.path=null", "data.sources.books=x", "data.sources.web.v2=y",
               "data.phases=[{start_step: 0, sources: {books: 1, web.v2: 2}}]")  # fmt: skip
    assert load_config(TINY, mixture).data.sources == {"books": "x", "web.v2": "y"}
    for override, rule in (
        ("model.ffn_elastic.knee=8", "no key 'model.ffn_elastic.knee'; did you mean 'model.ffn_elastic.knee_k'?"),
        ("model.ffn_elastic.knee_k=8", "key 'model.ffn_elastic.below' is missing"),
        ("data.sources.books=3", "data.sources.books = 3: must be text"),
        ("train.steps.x=1", "no key 'train.steps.x'"),
        ("train.steps.=1", "an override is section.key=value"),
        ("lr=1e-3", "an override is section.key=value, such as train.steps=100; did you mean optim.lr=1e-3?"),
        (
            "budgets=[2]",
            "an override is section.key=value, such as train.steps=100; did you mean budget.budgets=[2] or ",
        ),
    ):
        with pytest.raises(ConfigError, match=re.escape(f"command line '{override}': {rule}")):
            load_config(TINY, (override,))


@pytest.mark.parametrize(
    ("k_max", "paper", "validated"),
    [
        (1, (1,), (1,)),
        (16, (2, 3, 4, 6, 8, 12, 16), (2, 4, 8, 16)),
        (20, (2, 3, 4, 6, 8, 12, 16, 20), (2, 4, 8, 16, 20)),
        (32, (2, 3, 4, 6, 8, 12, 16, 24, 32), (2, 4, 8, 16, 32)),
        (48, (2, 3, 4, 6, 8, 12, 16, 24, 32, 48), (2, 4, 8, 16, 32, 48)),
    ],
)
def test_default_budgets_follow_the_number_of_channels(
    k_max: int, paper: tuple[int, ...], validated: tuple[int, ...]
) -> None:
    config = load_config(TINY, (f"model.num_channels={k_max}",))
    assert (config.listed_budgets(), config.eval_budgets()) == (paper, validated)
    own = load_config(TINY, (f"model.num_channels={k_max}", "budget.budgets=[1]", "eval.budgets=[1]"))
    assert (own.listed_budgets(), own.eval_budgets()) == ((1,), (1,))
