"""A run on a real SLURM of two virtual nodes, through all that ends a job; its curve is that of a run left alone."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megassm.checkpoint.format import newest_checkpoint
from megassm.run.fence import newest_number
from megassm.run.journal import Record, read_records
from tests.conftest import ROOT, SMALL, run_python
from tests.slurm_cluster import Cluster, cluster

pytestmark = [pytest.mark.ranks, pytest.mark.xdist_group("slurm")]  # one cluster

CONSTANT_RATE = ("optim.min_lr_ratio=1.0", "optim.lr=1e-4")
"""The curve of a run is then the beginning of a longer run's, and rounding does not grow over hundreds of updates."""
BASE = (
    *SMALL, *CONSTANT_RATE, "train.micro_batch_sequences=1", "budget.draws=1", "eval.every_steps=null",
    "eval.budgets=[8]", "eval.sequences=4", "checkpoint.every_steps=2",
    "log.every_steps=1000",
)  # fmt: skip
CURVE = ("step", "tokens", "k", "lr")
SAME_ROWS = 400
"""Whose losses a job has to rounding on any number of nodes; how many more it makes depends on the machine."""


@pytest.fixture(scope="module")
def virtual() -> Iterator[Cluster]:
    with cluster() as one:
        yield one


class Submitted:
    """A run's newest job."""

    config_home = "/nowhere"

    def __init__(self, virtual: Cluster, run_dir: Path) -> None:
        self.virtual, self.run_dir = virtual, run_dir

    def tool(self, *arguments: str) -> str:
        environment = [f"{name}={os.environ[name]}" for name in ("MEGASSM_CACHE", "PATH")]
        environment += ["TORCHDYNAMO_DISABLE=1", "OMP_NUM_THREADS=1", f"PYTHONPATH={ROOT}"]
        environment.append(f"XDG_CONFIG_HOME={self.config_home}")
        tool = ("env", "-C", str(ROOT), *environment, sys.executable, "launch/slurm.py")
        return self.virtual.run("ctl", *tool, *arguments)

    @property
    def folder(self) -> Path:
        return max((self.run_dir / "jobs").iterdir())

    @property
    def id(self) -> str:
        return str(json.loads((self.folder / "job.json").read_text(encoding="utf-8"))["job_id"])

    @property
    def facts(self) -> dict[str, str]:
        return self.virtual.job(self.id)

    @property
    def log(self) -> str:
        path = self.folder / "log.txt"
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    @property
    def rows(self) -> int:
        return len(read_records(self.run_dir)) if (self.run_dir / "metrics.jsonl").exists() else 0

    def wait_for(self, state: str, restarts: int = 0) -> None:
        def reached() -> bool:
            facts = self.facts
            return facts["JobState"] == state and int(facts["Restarts"]) == restarts

        self.virtual.wait_until(reached, lambda: f"{self.facts}\n{self.log}")

    def wait_for_rows(self, starts: int) -> None:
        """Until the run's start of that number has made a few updates."""
        begun = " for validation; steps "
        self.virtual.wait_until(lambda: self.log.count(begun) == starts, lambda: self.log)
        assert newest_number(self.run_dir) == starts
        done = self.rows
        self.virtual.wait_until(lambda: self.rows > done + 2, lambda: self.log)

    def saved_step(self) -> int:
        checkpoint, skipped = newest_checkpoint(self.run_dir)
        assert checkpoint is not None
        assert not skipped
        return checkpoint.manifest.step


def submit(virtual: Cluster, run_dir: Path, data: Path, *options: str) -> Submitted:
    job = Submitted(virtual, run_dir)
    job.tool("submit", "--config", "configs/tiny.yaml", "--gpus-per-node", "0", "--tasks-per-node", "2", *options,
             *BASE, f"run.dir={run_dir}", f"data.path={data}", "train.steps=100000")  # fmt: skip
    return job


LeftAlone = Callable[[int], list[Record]]


@pytest.fixture(scope="module")
def left_alone(tmp_path_factory: pytest.TempPathFactory, data_path: Path) -> LeftAlone:
    """So many rows of the same run by one process that nobody disturbs."""
    run_dir = tmp_path_factory.mktemp("slurm") / "left_alone"

    def rows(steps: int) -> list[Record]:
        run_python("launch/pretrain.py", "--config", "configs/tiny.yaml", *BASE, f"run.dir={run_dir}",
                   f"data.path={data_path}", f"train.steps={steps}")  # fmt: skip
        return read_records(run_dir)

    return rows


def check_curve(job: Submitted, left_alone: LeftAlone) -> None:
    rows = read_records(job.run_dir)
    truth = left_alone(len(rows))
    assert [[row[name] for name in CURVE] for row in rows] == [
        [row[name] for name in CURVE] for row in truth[: len(rows)]
    ]
    losses, expected = ([row["loss"] for row in each[: len(rows)]] for each in (rows, truth))
    assert losses[:SAME_ROWS] == pytest.approx(expected[:SAME_ROWS], abs=1e-5)
    assert losses == pytest.approx(expected, abs=1e-2)
    assert losses[-1] < losses[0]


@pytest.fixture(scope="module")
def told(virtual: Cluster, data_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Submitted:
    """A run of 2 x 2 ranks that SLURM ends in time: its limit, an urgent job, a person; finished on one node."""
    job = submit(virtual, tmp_path_factory.mktemp("slurm") / "told", data_path, "--nodes", "2", "--time", "10",
                 "--save-before-s", "60")  # fmt: skip
    job.wait_for_rows(1)
    virtual.run("ctl", "scontrol", "update", f"JobId={job.id}", "TimeLimit=1")  # looked at every 30 s
    job.wait_for("PENDING", restarts=1)
    virtual.run("ctl", "scontrol", "update", f"JobId={job.id}", "TimeLimit=10")
    assert job.saved_step() == job.rows
    job.wait_for_rows(2)
    urgent = ("--partition=urgent", "--nodes=2", "--exclusive", f"--output={virtual.lab}/urgent", "--wrap=hostname")
    virtual.run("ctl", "sbatch", *urgent)
    job.wait_for("PENDING", restarts=2)
    assert job.saved_step() == job.rows
    job.wait_for_rows(3)
    virtual.run("ctl", "scancel", "--batch", "--signal=USR1", job.id)
    job.wait_for("PENDING", restarts=3)
    assert job.saved_step() == job.rows
    virtual.run("ctl", "scontrol", "hold", job.id)
    job.tool("cancel", str(job.run_dir))
    job.wait_for("CANCELLED", restarts=3)
    return job


@pytest.mark.timeout(900)
def test_a_job_that_is_told_to_end_saves_and_is_requeued(told: Submitted, left_alone: LeftAlone) -> None:
    assert told.log.count("stopped by a signal after step") == 3
    assert told.log.count("the ranks ended with code 75") == 3
    assert "DUE TO PREEMPTION" in told.log
    assert len(re.findall(r"continuing after step", told.log)) == 2
    assert "Traceback" not in told.log
    steps = told.rows + 4
    before = told.id
    told.tool("resume", str(told.run_dir), "--nodes", "1", f"train.steps={steps}")
    assert told.id != before
    told.wait_for("COMPLETED")
    assert told.facts["ExitCode"] == "0:0"
    assert (told.facts["NumNodes"], told.rows) == ("1", steps)
    assert "continued by" in told.log, "on another number of ranks"
    assert "COMPLETED" in told.tool("status", str(told.run_dir))
    assert f"done: {steps} steps" in told.tool("logs", str(told.run_dir))
    check_curve(told, left_alone)


@pytest.mark.timeout(900)
def test_a_chain_of_jobs_as_a_site_wants_them(
    virtual: Cluster, left_alone: LeftAlone, data_path: Path, tmp_path: Path
) -> None:
    """4 ranks with their CPUs, a setup file and labelled logs from the site's defaults, and no job that is requeued."""
    site = tmp_path / "config/megassm"
    site.mkdir(parents=True)
    (site / "slurm.yaml").write_text("logs: label\nsetup: site.sh\nsbatch: [partition=train]\n", encoding="utf-8")
    (site / "site.sh").write_text('echo "setup on $(hostname)"\nunset OMP_NUM_THREADS\n',
                                  encoding="utf-8")  # fmt: skip
    job = Submitted(virtual, tmp_path / "chained")
    job.config_home = str(tmp_path / "config")
    own = (f"run.dir={job.run_dir}", f"data.path={data_path}", "train.steps=100000")
    job.tool("submit", "--config", "configs/tiny.yaml", "--gpus-per-node", "0", "--tasks-per-node", "2", "--nodes", "2",
             "--chain", "2", *BASE, *own)  # fmt: skip
    facts = json.loads((job.folder / "job.json").read_text(encoding="utf-8"))
    first, (second,) = facts["job_id"], facts["chain_ids"]
    virtual.wait_until(lambda: job.rows > 2, lambda: job.log)
    assert virtual.job(second)["JobState"] == "PENDING"
    assert virtual.job(second)["Dependency"].startswith(f"afterany:{first}")
    assert (virtual.job(first)["CPUs/Task"], virtual.job(first)["Requeue"]) == ("2", "0")
    environment = json.loads((job.run_dir / "environment.json").read_text(encoding="utf-8"))
    assert (environment["world_size"], environment["threads_per_rank"]) == (4, 2)
    assert "setup on n1" in job.log
    assert re.search(r"(?m)^0: .*step +\d+/100000", job.log) or re.search(r"(?m)^0: .*for validation; steps ", job.log)
    virtual.run("ctl", "scancel", "--batch", "--signal=USR1", first)
    virtual.wait_until(lambda: virtual.job(second)["JobState"] == "RUNNING", lambda: job.log)
    assert (virtual.job(first)["JobState"], virtual.job(first)["ExitCode"]) == ("FAILED", "75:0")
    assert f"{second} of 2" in job.tool("status", str(job.run_dir))
    job.wait_for_rows(2)
    assert job.log.count("continuing after step") == 1
    job.tool("cancel", str(job.run_dir))
    virtual.wait_until(lambda: virtual.job(second)["JobState"] == "CANCELLED", lambda: job.log)
    virtual.wait_until(lambda: job.log.count("stopped by a signal after step") == 2, lambda: job.log)
    check_curve(job, left_alone)


@pytest.mark.timeout(900)
def test_an_orphan_behind_a_cut_link_writes_nothing_more(
    virtual: Cluster, left_alone: LeftAlone, data_path: Path, tmp_path: Path
) -> None:
    """The last of this file: a node stays cut off."""
    job = submit(virtual, tmp_path / "lost", data_path, "--nodes", "1-2")
    job.wait_for_rows(1)
    assert job.facts["NumNodes"] == "2"
    virtual.kill("n2")
    job.wait_for("RUNNING", restarts=1)
    assert job.facts["NodeList"] == "n1", "what is left of the allocation"
    job.wait_for_rows(2)
    assert "continued by" in job.log
    virtual.start("n2")
    virtual.wait_until(lambda: virtual.idle("n2"))
    ranks = [process for process in virtual.processes("n1") if "megassm train" in " ".join(process.cmdline())]
    assert len(ranks) >= 2
    virtual.cut("n1")
    job.wait_for("RUNNING", restarts=2)
    assert job.facts["NodeList"] == "n2"
    alive = sum(rank.is_running() for rank in ranks)
    assert alive == len(ranks), "nothing has told the old ranks that they are given up"
    job.wait_for_rows(3)
    virtual.wait_until(lambda: not any(rank.is_running() for rank in ranks), lambda: job.log)
    errors = re.findall(r"error: .*start 3 of this run .* has taken over from start 2, which is this one", job.log)
    assert len(errors) == 1
    assert not (job.run_dir / "failure.txt").exists()
    job.tool("cancel", str(job.run_dir))
    job.wait_for("CANCELLED", restarts=2)
    virtual.wait_until(lambda: "stopped by a signal" in job.log)
    assert job.saved_step() == job.rows
    check_curve(job, left_alone)
