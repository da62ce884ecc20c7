"""What `from megassm import ...` gives: lazily, completely, by page and by path."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import megassm
from megassm import LanguageModel, Sampling, UserError, build_model, generate, open_model, open_tokenizer, truncate
from megassm.checkpoint import format
from megassm.checkpoint.exported import write_model_folder
from megassm.data.tokenizer.base import BytesTokenizer
from tests.conftest import ROOT
from tests.test_model import config

IDS = torch.arange(2, 42)[None] % 16


def run(code: str, cwd: Path) -> str:
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_name_is_there_and_none_is_imported_early(tmp_path: Path) -> None:
    heavy = "[m for m in ('torch', 'numpy', 'scipy', 'pydantic') if m in sys.modules]"
    assert run(f"import sys, megassm; print({heavy}, len(dir(megassm)))", tmp_path).startswith("[] ")
    run("from megassm import *; assert callable(build_model) and LanguageModel and spectral_filters", tmp_path)
    for name in megassm.__all__:
        assert getattr(megassm, name) is not None
    assert set(megassm.__all__) == {*megassm._PLACES, "__version__"}
    with pytest.raises(AttributeError, match="no attribute 'buildmodel'"):
        megassm.buildmodel  # noqa: B018


def test_what_a_type_checker_is_told_is_what_is_imported() -> None:
    text = (ROOT / "megassm/__init__.py").read_text(encoding="utf-8")
    told = re.findall(r"^    from (\S+) import (.+)$", text, re.MULTILINE)
    assert {name: place for place, names in told for name in names.split(", ")} == megassm._PLACES


def test_the_page_on_python_runs(tmp_path: Path) -> None:
    """As somebody types it, outside the project."""
    page = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    (script,) = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    loss, same, text, step = run(script, tmp_path).splitlines()
    assert 0.5 < float(loss.split()[1]) < 4.0  # ln 256 = 5.5 untrained
    assert (same.split()[0], step) == ("True", "True")
    assert text.startswith("b")


def test_the_page_names_everything_public() -> None:
    page = (ROOT / "docs/python.md").read_text(encoding="utf-8")
    named = set(re.findall(r"^\| `(\w+)", page, re.MULTILINE))
    assert named == set(megassm.__all__) - {"__version__", "Sampling"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An exported model with elastic feed-forward layers and gates: every kind of leading part."""
    sizes = {"vocab_size": 257, "d_ffn": 64, "ffn_elastic": {"knee_k": 2, "below": 8, "above": 8}}
    model = build_model(config(pattern="SA", mixer_heads=2, **sizes), 1)
    write_model_folder(tmp_path, model, BytesTokenizer(), torch.float32)
    return tmp_path


def test_a_budget_of_a_model_is_opened_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = open_model(str(folder))
    assert isinstance(whole, LanguageModel)
    assert not whole.training
    read: list[int] = []
    leading = format.leading

    def counted(*arguments: Any) -> torch.Tensor:
        part = leading(*arguments)
        read.append(part.untyped_storage().nbytes())
        return part

    monkeypatch.setattr("megassm.checkpoint.exported.leading", counted)
    small = open_model(folder, k=3)
    assert sum(read) == sum(parameter.nbytes for parameter in small.parameters())
    assert small.config == whole.config.cut(3)
    for mine, other in zip(small.parameters(), truncate(whole, 3).parameters(), strict=True):
        assert torch.equal(mine, other)
        assert mine.requires_grad
    assert torch.allclose(small(IDS), whole(IDS, 3), atol=1e-5)
    assert open_tokenizer(folder).decode([104, 105]) == "hi"


def test_what_cannot_be_opened_is_named(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    with pytest.raises(UserError, match="K = 99: must be between 1 and this model's K_max"):
        open_model(folder, k=99)
    with pytest.raises(UserError, match="no complete checkpoint"):
        open_model(tmp_path_factory.mktemp("empty"))
    weights = folder / "model.safetensors"
    save_file({"model.embedding_VD": torch.zeros(3, 3)}, weights)
    with pytest.raises(UserError, match=r"config\.json: says a model of .* its weights have 124;"):
        open_model(folder, k=2)


def test_budget_and_seed_have_defaults() -> None:
    model = build_model(config())
    for mine, other in zip(model.parameters(), build_model(config(), seed=0).parameters(), strict=True):
        assert torch.equal(mine, other)
    k_max = model.config.num_channels
    assert torch.equal(model(IDS), model(IDS, k_max))
    logits, state = model.prefill(IDS)
    assert torch.equal(model.step(IDS[:, 0], state)[0], model.step(IDS[:, 0], state, k_max)[0])
    greedy = Sampling(5, temperature=0)
    assert generate(model, [[1, 2]], sampling=greedy) == generate(model, [[1, 2]], k_max, greedy)
    assert len(generate(model, [[1, 2]])[0]) == 64
    assert logits.shape == (1, model.config.vocab_size)
