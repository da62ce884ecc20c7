"""Every command of docs/*.md is run: here, on small sizes, one page after another, or by the test that is named."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import ROOT, SMALL, run_python

PAGES = (
    "quickstart",
    "training",
    "resuming",
    "elasticity",
    "checkpoints",
    "data",
    "troubleshooting",
    "cluster",
    "scaling",
)
OWN = "vocab_size|num_channels|mixer_heads|gate|sigma_scale|input_taps|beyond"
"""Of a model, what a page's is by its file."""
SMALLER = {
    "configs/tiny.yaml": [text for text in SMALL if not re.match(f"model\\.({OWN})|.*budgets", text)],
    "configs/tasks/high_frequency.yaml": [
        "train.steps=4",
        "optim.warmup_steps=2",
        "eval.sequences=8",
        "log.wandb=disabled",
        "log.peak_tflops=0.1",
    ],
}
"""What a training is given beyond what the page says: fewer steps, a narrower model."""
ELSEWHERE = {
    "make demo": ("test_demo.py", "demo.py"),
    "python launch/slurm.py submit": ("test_slurm.py", "submit"),
    "python launch/slurm.py status": ("test_slurm.py", "status"),
    "python launch/slurm.py logs": ("test_slurm.py", "logs"),
    "python launch/slurm.py cancel": ("test_slurm.py", "cancel"),
    "python launch/slurm.py resume": ("test_slurm.py", "resume"),
    "python tools/branch.py": ("test_continuing.py", "tools/branch.py"),
    "python launch/pretrain.py --config runs/longer": ("test_continuing.py", "config.yaml"),
    "torchrun --nnodes 2": ("test_multinode.py", "--nnodes"),
    "deepspeed --hostfile": ("test_multinode.py", "--hostfile"),
    "python tools/plan.py": ("test_plan.py", "plan"),
    "python tools/evaluate_tasks.py": ("test_harness.py", "evaluate_tasks.py"),
    "python tools/experiments/run.py": ("test_experiments.py", "run_experiment"),
    "python tools/experiments/sweep_lr.py": ("test_sweep_lr.py", "sweep_lr.py"),
}


def commands(page: str) -> Iterator[str]:
    """The commands of a page's bash blocks, continued lines joined, without comments."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield shlex.join(words)


def runs_elsewhere(command: str) -> bool:
    return any(command.startswith(prefix) for prefix in ELSEWHERE)


def test_what_is_not_run_here_is_run_by_the_test_that_is_named() -> None:
    seen = {
        prefix for page in PAGES for command in commands(page) for prefix in ELSEWHERE if command.startswith(prefix)
    }
    assert {"make demo", "python launch/slurm.py submit", "torchrun --nnodes 2"} <= seen
    for prefix in seen:
        name, word = ELSEWHERE[prefix]
        assert word in (ROOT / "tests" / name).read_text(encoding="utf-8"), f"{prefix}: not in {name}"


def test_links_lead_somewhere() -> None:
    for page in [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs/results").glob("*.md"), ROOT / "README.md"]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page}: {target}"


@pytest.mark.long
@pytest.mark.ranks
def test_the_commands_of_the_pages_run(tmp_path: Path) -> None:
    """As a new user types them, in a folder that holds the project and a corpus."""
    for part in ("configs", "launch", "tools", "megassm", "pyproject.toml"):
        (tmp_path / part).symlink_to(ROOT / part)
    (tmp_path / "corpus").mkdir()
    library = Path(sysconfig.get_paths()["stdlib"])
    for name in ("argparse", "ast", "bdb", "calendar", "csv", "dis", "enum", "glob", "inspect", "pdb", "typing"):
        shutil.copy(library / f"{name}.py", tmp_path / "corpus" / f"{name}.txt")
    for page in PAGES:
        for command in commands(page):
            if not runs_elsewhere(command):
                done = run(small(command), tmp_path)
                assert done.returncode == 0, f"docs/{page}.md: {command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def small(command: str) -> list[str]:
    """The command, with what makes a training small put behind its configuration, so that the page's own values win,
    but for the number of updates."""
    words = shlex.split(command)
    for place, word in enumerate(words):
        if word in SMALLER and any(part.endswith("pretrain.py") for part in words):
            own = ["train.steps=12" if value.startswith("train.steps=") else value for value in words[place + 1 :]]
            return [*words[: place + 1], *SMALLER[word], *own]
    return words


def run(words: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    if words[0] == "python":
        return run_python(*words[1:], check=False, folder=folder)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT)}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False)


def test_the_readme_is_short_and_its_example_runs() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.split()) <= 1200
    (example,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    done = run_python("-c", example)
    assert done.stdout == "True\n"


def test_the_readmes_commands_have_the_options_it_gives_them() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    for words in (shlex.split(line, comments=True) for block in blocks for line in block.splitlines()):
        program = next((word for word in words if word.endswith(".py")), None)
        if program is None:
            assert words[0] == "make", words
            continue
        known = run_python(program, "--help").stdout
        mine = words[words.index(program) :]
        assert [word for word in mine if word.startswith("--") and word not in known] == []
