"""What launch/slurm.py hands to SLURM, what it refuses, and what srun tells a rank; no SLURM is needed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megassm.cli.arguments import Parser
from megassm.commands import slurm as slurm_command
from megassm.config.load import load_config
from megassm.errors import UserError
from megassm.run import provenance
from megassm.slurm import queue
from megassm.slurm.ranks import first_host, per_node, rank_environment
from megassm.slurm.request import JobRequest, add_request, given_request, seconds
from megassm.slurm.script import batch_script
from megassm.slurm.site import site_defaults
from tests.conftest import SMALL, run_python

STEP = {
    "SLURM_JOB_ID": "1234", "SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_NTASKS": "9", "SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "4,3", "SLURM_STEP_NODELIST":
    "gpu[07,12-14]", "SLURM_JOB_NODELIST": "gpu[03-14]",
}  # fmt: skip


def test_ranks_that_srun_starts_know_their_place() -> None:
    assert rank_environment(STEP) == {
        "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "7", "LOCAL_WORLD_SIZE": "3", "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "16234",
    }  # fmt: skip
    assert rank_environment(STEP | {"MASTER_PORT": "29500"})["MASTER_PORT"] == "29500"


def test_a_restart_has_another_port() -> None:
    ports = {rank_environment(STEP | {"SLURM_RESTART_COUNT": str(n)})["MASTER_PORT"] for n in range(100)}
    assert len(ports) == 100
    assert all(15_000 <= int(port) < 32_000 for port in ports)


def test_other_launchers_are_left_alone() -> None:
    assert rank_environment(STEP | {"RANK": "0"}) == {}, "torchrun or deepspeed under srun"
    batch = {name: value for name, value in STEP.items() if name != "SLURM_STEP_ID"}
    assert rank_environment(batch) == {}, "plain python in a batch script"
    for name, value in (("SLURM_PROCID", "x"), ("SLURM_NODEID", "2"), ("SLURM_STEP_TASKS_PER_NODE", "4(y2)")):
        with pytest.raises(UserError, match="srun's variables make no sense"):
            rank_environment(STEP | {name: value})


@pytest.mark.parametrize(
    ("nodes", "first"),
    [("n1", "n1"), ("a,b", "a"), ("gpu[003-005,9],login1", "gpu003"), ("n[2,4-8]", "n2"), ("r[1-2]c[05-06]x", "r1c05x"),
     ("a-b-[10-12]", "a-b-10"), ("n-1,n-2", "n-1")],
)  # fmt: skip
def test_first_host(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_tasks_of_every_node() -> None:
    assert list(per_node("4(x2),1,2(x3)")) == [4, 4, 1, 2, 2, 2]


def test_time_limits() -> None:
    assert [seconds(text) for text in ("90", "1:30", "2:00:05", "1-0", "1-2:30", "2-00:00:01")] == [
        5400, 90, 7205, 86400, 95400, 172801,
    ]  # fmt: skip
    for wrong in (" ", "1h", "1:2:3:4", "-1", "1-"):
        with pytest.raises(ValueError, match=wrong):
            seconds(wrong)


def test_the_script_is_bash_and_says_what_was_asked_for(tmp_path: Path) -> None:
    request = JobRequest("2-4", 8, 8, "1-00:00:00", 300, ("partition=gpu", "exclusive"))
    folder = tmp_path / "a run%" / "jobs/0001"
    script = batch_script(request, folder, Path("/env/bin/python"), tmp_path, patience_s=600)
    for line in (
        "#SBATCH --job-name='megassm-a run%'", "#SBATCH --nodes=2-4", "#SBATCH --mincpus=8",
        "#SBATCH --gpus-per-node=8", "#SBATCH --time=1-00:00:00", "#SBATCH --signal=USR1@300", "#SBATCH --requeue",
        "#SBATCH --open-mode=append", "#SBATCH --partition=gpu", "#SBATCH --exclusive",
        f"#SBATCH --output='{tmp_path}/a run%%/jobs/0001/log.txt'", f"JOB='{folder}'",
    ):  # fmt: skip
        assert f"{line}\n" in script, line
    assert script.count("\nsrun ") == 1
    assert "--wait=1200 /env/bin/python" in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    assert "gpus-per-node" not in batch_script(JobRequest("1", 0, 2), folder, Path("p"), tmp_path, 60)


def script_of(tmp_path: Path, data: tuple[Path, ...] = (), **more: Any) -> str:
    request = JobRequest("2", 8, 8, **more)
    script = batch_script(request, tmp_path / "run/jobs/0001", Path("python"), tmp_path, 60, data)
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
    return script


def test_options_of_a_site_reach_sbatch_and_srun(tmp_path: Path) -> None:
    script = script_of(tmp_path, cpus_per_task=6, srun=("mpi=none", "cpu-bind=map_cpu:0,1 x"), logs="label")
    assert "#SBATCH --cpus-per-task=6\n#SBATCH --gpus-per-node=8\n" in script
    assert "  --mpi=none \\\n  '--cpu-bind=map_cpu:0,1 x' \\\n  --label \\\n  --kill-on-bad-exit=0" in script
    assert "#SBATCH --requeue\n" in script
    assert '--output="${JOB//%/%%}/log.%t.txt" --open-mode=append' in script_of(tmp_path, logs="rank").replace(
        " \\\n  ", " "
    )
    generic = script_of(tmp_path, sbatch=("gres=gpu:a100:8",))
    assert "#SBATCH --gres=gpu:a100:8\n" in generic
    assert "gpus-per-node" not in generic
    chained = script_of(tmp_path, chain=3)
    assert "#SBATCH --no-requeue\n" in chained
    assert "scontrol requeue" not in chained


@pytest.mark.parametrize(
    ("gres", "gpus"),
    [
        ("gres=gpu:4", 4),
        ("gres=gpu", 1),
        ("gres=gpu:a100", 1),
        ("gres=lscratch:100,gpu:h100:2", 2),
        ("gres=nic:2", None),
    ],
)
def test_gpus_that_are_asked_for_as_generic_resources(gres: str, gpus: int | None) -> None:
    assert JobRequest("1", 4, 4, sbatch=("exclusive", gres)).own_gpus == gpus


def test_ranks_run_in_a_container(tmp_path: Path) -> None:
    mine = f"{tmp_path}:{tmp_path},{tmp_path}/run:{tmp_path}/run,/data/set:/data/set"
    pyxis = script_of(tmp_path, (Path("/data/set"),), container="pyxis:nvcr.io#nvidia/pytorch:24.03-py3",
                      srun=("container-mounts=/scratch:/scratch", "no-container-mount-home"))  # fmt: skip
    assert f"--container-image='nvcr.io#nvidia/pytorch:24.03-py3' --container-mounts={mine},/scratch:/scratch" in pyxis
    assert pyxis.count("--container-mounts") == 1
    assert "  --no-container-mount-home \\\n" in pyxis
    assert " python3 -P -m megassm train" in pyxis
    apptainer = script_of(tmp_path, container="apptainer:/images/a b.sif")
    own = mine.removesuffix(",/data/set:/data/set")
    command = f"apptainer exec --nv --bind {own} --pwd \"$PWD\" '/images/a b.sif' python3 -P -m megassm train"
    assert command in apptainer
    with pytest.raises(UserError, match="cannot show a folder with ':' or ','"):
        script_of(tmp_path, (Path("/data:x"),), container="pyxis:x")


def run_script(script: str, tmp_path: Path, srun: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script whose srun is a few lines of bash."""
    (tmp_path / "bin").mkdir(exist_ok=True)
    (tmp_path / "bin/srun").write_text(f"#!/bin/bash\n{srun}\n", encoding="utf-8")
    (tmp_path / "bin/srun").chmod(0o755)
    own = {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "SLURM_JOB_NUM_NODES": "2", **environment}
    return subprocess.run(["bash"], input=script, text=True, check=False, capture_output=True, env=own, cwd=tmp_path)


def test_the_setup_is_read_first_and_what_it_sets_stays(tmp_path: Path) -> None:
    job = tmp_path / "run/jobs/0001"
    job.mkdir(parents=True)
    (job / "setup.sh").write_text("set -eu\nexport NCCL_DEBUG=WARN PYTHONPATH=/site/lib\n", encoding="utf-8")
    said = f'echo "$NCCL_DEBUG $PYTHONPATH" > {tmp_path}/seen; exit 3'
    done = run_script(script_of(tmp_path, setup="mine.sh"), tmp_path, said)
    assert (tmp_path / "seen").read_text(encoding="utf-8") == f"WARN {job}/code:/site/lib\n"
    assert done.returncode == 3, "a file that ends at every error does not end the script before its last words"
    assert "the ranks ended with code 3" in done.stdout
    run_script(script_of(tmp_path), tmp_path, f'echo "$PYTHONPATH" > {tmp_path}/seen')
    assert (tmp_path / "seen").read_text(encoding="utf-8") == f"{job}/code\n"


def test_a_chain_goes_on_after_a_stop_or_a_loss_alone(tmp_path: Path) -> None:
    job = tmp_path / "run/jobs/0001"
    job.mkdir(parents=True)
    script, starts = script_of(tmp_path, chain=4), tmp_path / "starts"
    for ended, code in ((75, 75), (None, 75), (75, 0), (0, 0), (0, 0), (1, 1)):
        if ended is None:
            (job / "ended.txt").unlink()  # the node has died
        elif ended == 1:
            (job / "ended.txt").write_text("1\n", encoding="utf-8")
        assert run_script(script, tmp_path, f"echo >> {starts}; exit {code}").returncode == code
    assert starts.read_text(encoding="utf-8") == "\n" * 3, "neither after the run's end, nor after an error"


@pytest.mark.parametrize(
    ("said", "request_", "cpus"),
    [
        ("96 gpu:a100:8(S:0-1)\n96 gpu:a100:8(S:0-1)", JobRequest("2", 8, 8), 12),
        ("96 gpu:a100:8(S:0-1)", JobRequest("2", 4, 4), 12),
        ("96 gpu:8", JobRequest("2", 4, 2), 24),
        ("64 gpu:2,mps:200\n128 gpu:h100:2", JobRequest("1", 2, 2), 32),
        ("64 (null)\n32 gpu:4", JobRequest("1", 4, 4), 8),
        ("64 (null)", JobRequest("1", 4, 4), None),
        ("4 (null)\n4 (null)", JobRequest("2", 0, 2), 2),
        ("1 (null)", JobRequest("2", 0, 2), None),
        ("96 gpu:8", JobRequest("1", 8, 8, sbatch=("exclusive",)), None),
        ("96 gpu:8", JobRequest("1", 8, 8, sbatch=("cpus-per-gpu=3",)), None),
    ],
)
def test_the_cpus_of_a_rank_are_the_nodes_by_its_gpus(
    monkeypatch: pytest.MonkeyPatch, said: str, request_: JobRequest, cpus: int | None
) -> None:
    monkeypatch.setattr(queue, "ask_slurm", lambda *command: said)
    assert queue.rank_cpus(request_) == cpus


def test_a_site_sets_what_its_jobs_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    assert site_defaults() == {}
    path = tmp_path / "megassm/slurm.yaml"
    path.parent.mkdir()
    path.write_text("sbatch: [partition=gpu, qos=long]\nsrun: mpi=none\nsetup: mine.sh\ncpus-per-task: 12\ntime: 90\n",
                    encoding="utf-8")  # fmt: skip
    assert site_defaults() == {"sbatch": ["partition=gpu", "qos=long"], "srun": ["mpi=none"], "cpus_per_task": 12,
                               "setup": str(tmp_path / "megassm/mine.sh"), "time": "90"}  # fmt: skip
    for text, message in (
        ("nodes: 3", "nodes: is no option that a site sets; known are time, save-before-s, cpus-per-task"),
        ("logs: all", "argument --logs: invalid choice: 'all'"),
        ("sbatch: [array=1-3]", "is not for sbatch to be told"),
        ("chain: true", "chain = True: must be text or a whole number; quote it"),
        ("- a", "must be options by name"),
        ("a: [", "is not YAML"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(UserError, match=re.escape(message)) as told:
            site_defaults()
        assert str(path) in str(told.value)


def test_an_option_of_the_command_line_takes_the_place_of_the_sites(monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--nodes", "1", "--gpus-per-node", "0", "--sbatch", "partition=a", "--sbatch", "qos=x", "--time", "10"]
    parser = Parser("", "")
    add_request(parser, required=True)
    site = {"sbatch": ["partition=gpu", "account=lab"], "time": "90", "logs": "label"}
    request = given_request(parser.parse_args(words), None, site)
    assert request == JobRequest("1", 0, 1, "10", sbatch=("account=lab", "partition=a", "qos=x"), logs="label")
    assert given_request(parser.parse_args(words[:4]), request, site) == request


def test_defaults_of_a_site_stand_below_the_command_line_and_the_last_request(
    tmp_path: Path, data_path: Path, fake_slurm: dict[str, str]
) -> None:
    site = tmp_path / "config/megassm"
    site.mkdir(parents=True)
    (site / "slurm.yaml").write_text(
        "sbatch: [partition=gpu]\nlogs: label\nsetup: site.sh\nchain: 2\n", encoding="utf-8"
    )
    (site / "site.sh").write_text("export A=1\n", encoding="utf-8")
    environment = fake_slurm | {"XDG_CONFIG_HOME": str(tmp_path / "config")}
    given = ("--sbatch", "mail-user=me@x.org", "--sbatch", "account=lab", "--cpus-per-task", "1")
    done = submit(tmp_path / "run", data_path, *given, **environment)
    assert done.returncode == 0, done.stderr
    assert "jobs 41, 42, one after another, train in" in done.stdout
    assert (
        (tmp_path / "asked")
        .read_text(encoding="utf-8")
        .splitlines()[1]
        .startswith("--parsable --dependency=afterany:41")
    )
    job = tmp_path / "run/jobs/0001"
    assert (job / "setup.sh").read_text(encoding="utf-8") == "export A=1\n"
    script = (job / "job.sh").read_text(encoding="utf-8")
    for line in ("--partition=gpu", "--mail-user=me@x.org", "--account=lab", "--cpus-per-task=1", "--no-requeue"):
        assert f"#SBATCH {line}\n" in script, line
    assert "--label" in script
    facts = json.loads((job / "job.json").read_text(encoding="utf-8"))
    assert (facts["job_id"], facts["chain_ids"], facts["again"]) == (
        "41", ["42"], ["--sbatch mail-user=me@x.org", f"--setup {site}/site.sh"],
    )  # fmt: skip
    (tmp_path / "state").write_text("COMPLETED", encoding="utf-8")
    done = slurm("resume", str(tmp_path / "run"), "--chain", "1", **environment)
    assert done.returncode == 0, done.stderr
    assert "note: --sbatch mail-user=me@x.org was given before and is not taken over" in done.stdout
    again = (tmp_path / "run/jobs/0002/job.sh").read_text(encoding="utf-8")
    assert "#SBATCH --account=lab\n" in again
    assert "mail-user" not in again
    assert "#SBATCH --requeue\n" in again
    (site / "slurm.yaml").unlink()
    newest = tmp_path / "run/jobs/0002/job.json"
    facts = json.loads(newest.read_text(encoding="utf-8"))
    both = facts | {"again": [*facts["again"], "--container apptainer:my image.sif"]}
    newest.write_text(json.dumps(both), encoding="utf-8")
    done = slurm("resume", str(tmp_path / "run"), **environment)
    assert f"--setup {site}/site.sh and --container 'apptainer:my image.sif', which is not taken" in done.stderr
    assert "give --setup and --container again, or --setup '' --container '' to do without" in done.stderr
    newest.write_text(json.dumps(facts), encoding="utf-8")
    done = slurm("resume", str(tmp_path / "run"), **environment)
    assert done.returncode == 1
    assert "which is not taken from its folder; give --setup again, or --setup '' to do without" in done.stderr
    slurm("cancel", str(tmp_path / "run"), check=True, **environment)


@pytest.mark.parametrize(
    ("given", "cores"),
    [({"SLURM_CPUS_ON_NODE": "96"}, 12), ({"SLURM_CPUS_ON_NODE": "96", "SLURM_CPUS_PER_TASK": "6"}, 6),
     ({"SLURM_CPUS_ON_NODE": "4"}, 1), ({}, 1)],
)  # fmt: skip
def test_ranks_share_the_cores_of_their_node(tmp_path: Path, given: dict[str, str], cores: int) -> None:
    script = batch_script(JobRequest("2", 8, 8), tmp_path / "run/jobs/0001", Path("python"), tmp_path, 60)
    fake = tmp_path / "srun"
    fake.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/asked\n')
    fake.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NUM_NODES": "2", **given}
    subprocess.run(["bash"], input=script, text=True, check=True, env=environment, cwd=tmp_path)
    asked = (tmp_path / "asked").read_text().splitlines()
    assert f"--cpus-per-task={cores}" in asked
    assert {"--ntasks=16", "--ntasks-per-node=8", "--nodes=2"} <= set(asked)


def slurm(*arguments: str, check: bool = False, **environment: str) -> subprocess.CompletedProcess[str]:
    return run_python("launch/slurm.py", *arguments, check=check, **environment)


def submit(run_dir: Path, data: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    options = ("--config", "configs/tiny.yaml", "--nodes", "2", "--gpus-per-node", "0", "--tasks-per-node", "2")
    own = (f"run.dir={run_dir}", f"data.path={data}", "train.micro_batch_sequences=1")
    return slurm("submit", *options, *SMALL, *own, *more, **environment)


@pytest.fixture
def fake_slurm(tmp_path: Path) -> dict[str, str]:
    """Commands that answer as a cluster whose job 41 is in the state that the file `state` names."""
    folder = tmp_path / "bin"
    folder.mkdir()
    scripts = {
        "sbatch": f'test -e {tmp_path}/full && {{ echo "invalid partition" >&2; exit 1; }}; '
        f'echo "$@" >> {tmp_path}/asked; case "$2" in --dependency*) echo "42;cluster";; *) echo "41;cluster";; esac',
        "sinfo": "exit 1",
        "scontrol": f'state=$(cat {tmp_path}/state); test "$state" = gone && {{ echo "slurm_load_jobs error: Invalid '
        'job id specified" >&2; exit 1; }; echo "JobId=$4 JobState=$state ExitCode=0:0 Restarts=2 NodeList=n[1-2]"',
        "sacct": 'echo "CANCELLED by 0|0:15"',
        "scancel": f"echo $1 > {tmp_path}/cancelled",
    }
    for name, text in scripts.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
        (folder / name).chmod(0o755)
    return {"PATH": f"{folder}:{os.environ['PATH']}"}


def test_print_writes_and_submits_nothing(tmp_path: Path, data_path: Path) -> None:
    done = submit(tmp_path / "run", data_path, "--print")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("#!/usr/bin/env bash\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (("--nodes", "3"), 2, "batch"),
        (("--nodes", "4-2"), 2, "must be a number of nodes, or FIRST-LAST"),
        (("train.step=3",), 2, "did you mean 'train.steps'?"),
        (("--time", "1h"), 2, "must be a time of SLURM's"),
        (("--time", "5"), 1, "too short to train before --save-before-s 180"),
        (("train.device=cuda",), 1, "--gpus-per-node 0: but train.device = cuda"),
        (("parallel.tensor=4",), 1, "parallel.tensor = 4: must divide the 2 ranks of a node"),
        (("--gpus-per-node", "1"), 1, "--tasks-per-node 2: more ranks than --gpus-per-node 1"),
        (("--sbatch", "--partition=x"), 2, "expected one argument"),
        (("--sbatch", "array=1-4"), 2, "'array=1-4': is not for sbatch to be told: a run is one job"),
        (("--sbatch", "output=x"), 2, "is not for sbatch to be told: use --logs"),
        (("--srun", "kill-on-bad-exit"), 2, "is not for srun to be told: the other ranks say why one has left"),
        (("--sbatch", "gres=gpu:a100:8"), 1, "--sbatch gres: asks for 8 GPUs a node, --gpus-per-node 0"),
        (("--setup", "none.sh"), 1, "--setup none.sh: no such file"),
        (("--container", "image.sif"), 2, "must be pyxis:IMAGE or apptainer:IMAGE"),
        (("--chain", "2", "--sbatch", "dependency=afterok:7"), 1, "the jobs of a --chain depend on each other"),
        (("data.path=https://user:secret@host/set",), 1, "which is not written down: use MEGASSM_DATA_QUERY"),
    ],
)
def test_what_the_job_would_refuse_is_refused_before_the_queue(
    tmp_path: Path, data_path: Path, more: tuple[str, ...], code: int, message: str
) -> None:
    done = submit(tmp_path / "run", data_path, *more)
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "secret" not in done.stderr + done.stdout
    assert not (tmp_path / "run").exists()


def test_a_run_from_submission_to_resumption(tmp_path: Path, data_path: Path, fake_slurm: dict[str, str]) -> None:
    run_dir = tmp_path / "run"
    done = submit(run_dir, data_path, "train.steps=33", **fake_slurm)
    assert done.returncode == 0, done.stderr
    assert "job 41 trains in" in done.stdout
    job = run_dir / "jobs/0001"
    assert load_config(job / "config.yaml", world_size=4).train.steps == 33
    assert {path.name for path in (job / "code").iterdir()} == {"megassm"}
    assert (job / "version.txt").read_text(encoding="utf-8").startswith("megassm 0.")
    assert json.loads((job / "job.json").read_text(encoding="utf-8"))["job_id"] == "41"
    for private in ("version.txt", "job.json", "job.sh"):
        assert (job / private).stat().st_mode & 0o777 == 0o600, private
    assert (job / "code").stat().st_mode & 0o777 == 0o700
    inside = subprocess.run(
        [sys.executable, "-c", "import megassm; print(megassm.__file__)"], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(job / "code")}, check=True,
    )  # fmt: skip
    assert inside.stdout.startswith(str(job)), "the job runs the code as it was when submitted"

    state = tmp_path / "state"
    state.write_text("RUNNING", encoding="utf-8")
    for command in (("resume", str(run_dir)), ("submit", "--config", str(job / "config.yaml"), "--nodes", "1",
                                                "--gpus-per-node", "0")):  # fmt: skip
        done = slurm(*command, **fake_slurm)
        assert done.returncode == 1
        assert "job 41 is RUNNING; wait for it" in done.stderr
    assert slurm("logs", str(run_dir), **fake_slurm).returncode == 1, "it has not started"
    (job / "log.txt").write_text("a\nb\n", encoding="utf-8")
    assert slurm("logs", str(run_dir), "--lines", "1", **fake_slurm).stdout == "b\n"
    slurm("cancel", str(run_dir), check=True, **fake_slurm)
    assert (tmp_path / "cancelled").read_text(encoding="utf-8") == "41\n"

    state.write_text("gone", encoding="utf-8")
    table = tmp_path / "status.json"
    slurm("status", str(run_dir), "--json", str(table), check=True, **fake_slurm)
    (row,) = json.loads(table.read_text(encoding="utf-8"))
    assert (row["job"], row["state"], row["exit"], row["step"]) == ("41", "CANCELLED", "0:15", 0)
    done = slurm("resume", str(run_dir), "--nodes", "1", "train.steps=50", **fake_slurm)
    assert done.returncode == 0, done.stderr
    again = run_dir / "jobs/0002"
    assert load_config(again / "config.yaml", world_size=2).train.steps == 50
    script = (again / "job.sh").read_text(encoding="utf-8")
    assert "--nodes=1\n" in script
    assert "--ntasks-per-node=2\n" in script


def test_a_job_gets_code_and_not_what_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "megassm/new.py",
        "megassm/py.typed",
        "megassm/creds.json",
        "launch/.env",
        "megassm/eval/tasks/a.yaml",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("SECRET", encoding="utf-8")
    (tmp_path / "megassm/link.py").symlink_to(tmp_path / "launch/.env")
    monkeypatch.setattr(slurm_command, "ROOT", tmp_path)
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    package = ["megassm/eval/tasks/a.yaml", "megassm/new.py", "megassm/py.typed"]
    assert [str(path) for path in slurm_command.code_files()] == package, "without git"
    for command in (("init", "-q"), ("add", "megassm/py.typed")):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    assert [str(path) for path in slurm_command.code_files()] == package[1:], "Python files, and what git tracks"


ASKED = {"nodes": "1", "gpus_per_node": 0, "tasks_per_node": 2, "time": "24:00:00", "save_before_s": 180, "sbatch": []}


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        (b"{}", "job_id: Field required"),
        (b"[]", "job.json: the whole: "),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "nested more than 64 deep"),
        ({"job_id": "--user=root"}, "job_id: String should match"),
        ({"job_id": "41\n"}, "job_id: String should match"),
        ({"job_id": 41}, "job_id: Input should be a valid string"),
        ({"sbatch": ["comment=x\n\ncommand"]}, "must be an option of sbatch"),
        ({"sbatch": ["comment=x\r"]}, "must be an option of sbatch"),
        ({"sbatch": ["wrap=rm -r ."]}, "is not for sbatch to be told"),
        ({"sbatch": ["output=.bashrc"]}, "is not for sbatch to be told"),
        ({"sbatch": ["bb=x"]}, "is not taken from a file; give it with --sbatch"),
        ({"sbatch": "x"}, "sbatch: Input should be a valid"),
        ({"nodes": "1\n#SBATCH --uid=0"}, "must be a number of nodes"),
        ({"nodes": "1-999999999"}, "must be at most 20,000 nodes"),
        ({"nodes": ["1"]}, "nodes: Input should be a valid string"),
        ({"time": "1; id"}, "must be a time of SLURM's"),
        ({"gpus_per_node": "8"}, "gpus_per_node: Input should be a valid integer"),
        ({"gpus_per_node": -1}, "must be a whole number of at least 1"),
        ({"save_before_s": 0}, "must be a whole number of at least 1"),
        ({"srun": ["task-prolog=./x"]}, "is not taken from a file; give it with --srun"),
        ({"srun": ["multi-prog"]}, "is not for srun to be told"),
        ({"sbatch": ["array=1-9"]}, "is not for sbatch to be told: a run is one job"),
        ({"cpus_per_task": "4"}, "cpus_per_task: Input should be a valid integer"),
        ({"logs": "none"}, "--logs: invalid choice"),
        ({"chain": 1000}, "must be at most 100 jobs"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("name", ["cancel", "resume"])
def test_a_job_of_a_stranger_is_read_as_if_it_were_typed(
    name: str, facts: bytes | dict[str, object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tmp_path / "jobs/0001"
    job.mkdir(parents=True)
    if isinstance(facts, dict):
        request = ASKED | {key: value for key, value in facts.items() if key != "job_id"}
        facts = json.dumps({"job_id": facts.get("job_id", "41"), "request": request}).encode()
    (job / "job.json").write_bytes(facts)
    asked: list[tuple[str, ...]] = []
    for module in (slurm_command, queue):
        monkeypatch.setattr(module, "ask_slurm", lambda *command: asked.append(command))
    monkeypatch.setattr(sys, "argv", ["slurm.py", name, str(tmp_path)])
    with pytest.raises(UserError, match=re.escape(message)) as told:
        slurm_command.main()
    assert str(job / "job.json") in str(told.value)
    assert not asked


def test_a_resumed_run_trains_in_the_folder_that_was_named(
    tmp_path: Path, data_path: Path, fake_slurm: dict[str, str]
) -> None:
    assert submit(tmp_path / "theirs", data_path, **fake_slurm).returncode == 0
    moved = (tmp_path / "theirs").rename(tmp_path / "ours: [x]")
    (tmp_path / "state").write_text("COMPLETED", encoding="utf-8")
    done = slurm("resume", str(moved), **fake_slurm)
    assert done.returncode == 0, done.stderr
    assert load_config(moved / "jobs/0002/config.yaml", world_size=4).run.dir == str(moved)
    assert not (tmp_path / "theirs").exists()


def test_a_refused_submission_leaves_nothing(tmp_path: Path, data_path: Path, fake_slurm: dict[str, str]) -> None:
    (tmp_path / "full").touch()
    done = submit(tmp_path / "run", data_path, **fake_slurm)
    assert done.returncode == 1
    assert "sbatch: invalid partition; nothing was changed" in done.stderr
    assert not (tmp_path / "run").exists()
    for name in ("status", "resume"):
        done = slurm(name, str(tmp_path / "run"), **fake_slurm)
        assert done.returncode == 1
        assert "no job of it was submitted" in done.stderr
