"""The command `megassm`: all its names, at no cost; the scripts in tools/ and launch/ are the same functions."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from megassm.__main__ import COMMANDS
from megassm.cli.arguments import SCRIPTS, as_started
from megassm.config.load import ConfigError, load_config
from tests.conftest import ROOT, run_python


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    done = run_python("-X", "importtime", "-m", "megassm", "--help")
    assert re.findall(r"^  (\w+) ", done.stdout, re.MULTILINE) == list(COMMANDS)
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert not loaded & {"torch", "numpy", "scipy", "pydantic", "rich", "argparse"}
    assert {path.stem for path in (ROOT / "megassm/commands").glob("[a-z]*.py")} == set(COMMANDS)


@pytest.mark.parametrize("name", ["export", "train", "prepare"])
def test_help_of_a_command_shows_the_command(name: str) -> None:
    done = run_python("-X", "importtime", "-m", "megassm", name, "--help")
    assert f"usage: megassm {name}" in done.stdout
    assert re.search(rf"example:\n  megassm {name} ", done.stdout)
    assert not re.search(r"\| +torch$", done.stderr, re.MULTILINE)


def test_scripts_and_commands_are_one() -> None:
    scripts = [*(ROOT / "tools").glob("*.py"), *(ROOT / "launch").glob("*.py")]
    found = {
        str(path.relative_to(ROOT)): started[1]
        for path in scripts
        if (started := re.search(r"from megassm\.commands\.(\w+) import", path.read_text(encoding="utf-8")))
    }
    assert found == SCRIPTS
    assert sorted(SCRIPTS.values()) == sorted(COMMANDS)
    for name in COMMANDS:
        assert callable(importlib.import_module(f"megassm.commands.{name}").main)


def test_messages_name_commands_as_the_process_was_started(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "next: python tools/sweep_budgets.py runs/a; made by tools/export.py, tools/demo.py, launch/pretrain.py --x"
    monkeypatch.setattr("sys.argv", ["tools/generate.py", "x"])
    assert as_started(text) == text
    monkeypatch.setattr("sys.argv", ["megassm generate", "x"])
    assert as_started(text) == "next: megassm sweep runs/a; made by megassm export, tools/demo.py, megassm train --x"


def test_slurm_is_a_command_like_the_others(tmp_path: Path) -> None:
    done = run_python("-m", "megassm", "slurm", "status", str(tmp_path), check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert "no job of it was submitted with megassm slurm; give a run directory" in done.stderr
    usage = run_python("-m", "megassm", "slurm", "submit", "--help").stdout
    assert usage.startswith("usage: megassm slurm submit")
    assert "example:\n  megassm slurm submit --config" in usage


def test_the_deepspeed_launcher_puts_an_option_before_the_command() -> None:
    assert run_python("-m", "megassm", "--local_rank=1", "train", "--help").stdout.startswith("usage: megassm train")


def test_an_unknown_command_is_named() -> None:
    done = run_python("-m", "megassm", "trian", check=False)
    assert done.returncode == 2
    assert "no command 'trian'; there are" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_configuration_goes_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config(Path("tiny")) == load_config(ROOT / "configs/tiny.yaml")
    assert load_config(Path("tasks/recall")) == load_config(ROOT / "configs/tasks/recall.yaml")
    (tmp_path / "tiny").write_text("model: 3\n")
    with pytest.raises(ConfigError, match="tiny:1"):
        load_config(Path("tiny"))
    with pytest.raises(ConfigError, match="nowhere: no such file"):
        load_config(Path("nowhere"))
