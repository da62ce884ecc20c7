"""How many threads a rank takes: its share of what the process may use, whoever has started it."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from megassm.parallel import world
from tests.conftest import ROOT, run_python


def test_cores_are_those_that_the_process_may_use() -> None:
    code = "import os; os.sched_setaffinity(0, {0}); from megassm.cli.arguments import cores; print(cores())"
    assert run_python("-c", code).stdout == "1\n"


SRUN = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_CPUS_PER_TASK": "6", "LOCAL_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "may_use", "threads"),
    [
        ({"LOCAL_WORLD_SIZE": "2"}, 16, 8),
        ({"LOCAL_SIZE": "4"}, 3, 1),
        (SRUN, 12, 6),
        (SRUN, 6, 6),
        (SRUN, 4, 4),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "2"}, 12, 6),  # a torchrun on each of two nodes
        (SRUN | {"SLURM_CPUS_PER_TASK": ""}, 12, 6),
        ({"OMP_NUM_THREADS": "3", "LOCAL_WORLD_SIZE": "2"}, 16, None),
        (SRUN | {"OMP_NUM_THREADS": "1"}, 12, None),
    ],
)
def test_ranks_share_the_cores(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], may_use: int, threads: int | None
) -> None:
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", *SRUN):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    set_to: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    monkeypatch.setattr(world, "cores", lambda: may_use)
    world._share_cores(4)
    assert set_to == ([] if threads is None else [threads])


@pytest.mark.ranks
@pytest.mark.parametrize("own", [None, "1"])
def test_one_thread_by_torchrun_is_no_persons_wish(own: str | None) -> None:
    """torchrun sets OMP_NUM_THREADS=1 for jobs of several ranks where nobody has set it."""
    code = (
        "import os; from megassm.parallel.world import _set_by_torchrun as of; print(os.environ['OMP_NUM_THREADS'], "
        "of('OMP_NUM_THREADS'))"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment |= {} if own is None else {"OMP_NUM_THREADS": own}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    done = subprocess.run([*command, sys.executable, "-c", code], cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)},
                          capture_output=True, text=True, check=True, timeout=120)  # fmt: skip
    assert done.stdout.splitlines() == [f"1 {own is None}"] * 2
