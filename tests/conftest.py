"""Shared by all tests: a small data set made by the real tool, and configurations that train on it in seconds."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from tempfile import NamedTemporaryFile

import numpy as np
import pytest
import torch

from megassm.config.load import load_config
from megassm.config.schema import Config
from tests import hub_mixins, nursery

for ignored, act in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(ignored) is signal.SIG_IGN:  # by nohup, or behind a shell's `&`: what tests start would, too
        signal.signal(ignored, act)

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 480
"""Of a program that a test starts."""

SMALL = (
    "model.vocab_size=257", "model.d_model=32", "model.n_layers=2", "model.seq_len=64", "model.num_channels=8",
    "model.d_ffn=64", "model.n_heads=4", "budget.budgets=[1,2,4,8]", "optim.warmup_steps=2", "train.steps=8",
    "train.batch_sequences=4", "train.micro_batch_sequences=2", "eval.sequences=4", "eval.budgets=[1,2,8]",
    "log.wandb=disabled", "parallel.timeout_s=60", "log.peak_tflops=0.1",
    "model.mixer_heads=1", "model.gate=softmax", "model.sigma_scale=quarter_power", "model.input_taps=1",
    "model.beyond=continue",
)  # fmt: skip
"""configs/tiny.yaml made smaller still, with the layer of no choices: a training run takes seconds."""

HYBRID = ("model.pattern=SA", "model.d_ffn=96", "model.ffn_elastic={knee_k: 3, below: 16, above: 8}")
"""What the finished run's model is besides."""
FINISHED = (*HYBRID, "train.steps=12", "data.isolate_documents=true")
"""What the finished run is, `SMALL` apart."""


def pytest_configure(config: pytest.Config) -> None:
    for name in (*(f"{mark}_test" for mark in hub_mixins.MARKS), "accelerate_tests", "generate", "slow", "order"):
        config.addinivalue_line("markers", f"{name}: of transformers' tests")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(scope="session", autouse=True)
def _environment(tmp_path_factory: pytest.TempPathFactory) -> None:
    # the filters' cache of this test session only; children inherit it
    os.environ["MEGASSM_CACHE"] = str(tmp_path_factory.mktemp("filters"))
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    # transformers copies the code of an opened model there, datasets the texts; nothing is asked of a hub
    os.environ["HF_HOME"] = str(tmp_path_factory.mktemp("huggingface"))
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(autouse=True)
def _seed() -> None:
    """What a test draws is the same alone, in any order and on any worker; MEGASSM_TEST_SEED gives it other numbers."""
    seed = int(os.environ.get("MEGASSM_TEST_SEED", "0"))
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(scope="session")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of bytes: some of the standard library's source, through tools/prepare_data.py."""
    folder = tmp_path_factory.mktemp("data")
    library = Path(sysconfig.get_paths()["stdlib"])
    sources = [str(library / name) for name in ("argparse.py", "ast.py", "bdb.py", "calendar.py", "csv.py", "dis.py")]
    run_python("tools/prepare_data.py", "--input", *sources, "--glob", "*.py", "--output", str(folder / "set"),
               "--valid-fraction", "0.3", "--block-tokens", "8192", "--member-tokens", "8192")  # fmt: skip
    return folder / "set"


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, data_path: Path) -> Path:
    """A finished run of 12 steps of a hybrid model, by one process, through the entry point."""
    run_dir = tmp_path_factory.mktemp("runs") / "trained"
    own = (f"run.dir={run_dir}", f"data.path={data_path}", *FINISHED)
    run_python("launch/pretrain.py", "--config", "configs/tiny.yaml", *SMALL, *own)
    return run_dir


@pytest.fixture
def small_config(tmp_path: Path, data_path: Path) -> Callable[..., Config]:
    """Makes a configuration: configs/tiny.yaml, `SMALL`, then the given overrides."""

    def make(*overrides: str, world_size: int = 1) -> Config:
        own = (f"run.dir={tmp_path / 'run'}", f"data.path={data_path}")
        return load_config(ROOT / "configs/tiny.yaml", (*SMALL, *own, *overrides), world_size)

    return make


def run_python(
    *arguments: str, check: bool = True, folder: Path = ROOT, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Runs the project's Python, from its root if no other folder is named, as a user would; a program in its usual
    environment in a fork."""
    if not environment and nursery.serves(arguments):
        return _forked(arguments, check, folder)
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    return _checked(done, check)


def _forked(arguments: tuple[str, ...], check: bool, folder: Path) -> subprocess.CompletedProcess[str]:
    with NamedTemporaryFile("r", encoding="utf-8") as out, NamedTemporaryFile("r", encoding="utf-8") as err:
        code = nursery.run(arguments, Path(out.name), Path(err.name), TIMEOUT_S, folder)
        return _checked(subprocess.CompletedProcess(arguments, code, out.read(), err.read()), check)


def _checked(done: subprocess.CompletedProcess[str], check: bool) -> subprocess.CompletedProcess[str]:
    assert not check or done.returncode == 0, f"{done.args} -> {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done
