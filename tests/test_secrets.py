"""`grep -ra SECRET RUN` finds nothing, whatever wandb does, wherever the data is, and whoever starts the ranks."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import FINISHED, SMALL, run_python
from tests.fault_server import FaultServer, serving
from tests.jobs import Job, Launcher
from tests.test_wandb_log import closed_port

SECRET = "5ECRET0123456789abcdef5ECRET0123456789ab"
Place = Callable[[FaultServer, Path, Path], tuple[str, dict[str, str]]]
"""(data.path, environment) for a server of the folder above a data set, the set, and a folder to write to."""


def in_the_url(server: FaultServer, data: Path, work: Path) -> tuple[str, dict[str, str]]:
    return f"{server.url.replace('://', f'://user:{SECRET}@')}/{data.name}?sig={SECRET}", {}


def in_the_environment(server: FaultServer, data: Path, work: Path) -> tuple[str, dict[str, str]]:
    return f"{server.url}/{data.name}", {"MEGASSM_DATA_QUERY": f"{server.url}?sig={SECRET}"}


def in_links(server: FaultServer, data: Path, work: Path) -> tuple[str, dict[str, str]]:
    files = [path.relative_to(data) for path in data.rglob("*") if path.is_file()]
    links = {str(path): f"{server.url}/{data.name}/{path}?sig={SECRET}" for path in files}
    (work / "links.json").write_text(json.dumps(links), encoding="utf-8")
    return str(work / "links.json"), {}


def in_keys_of_s3(server: FaultServer, data: Path, work: Path) -> tuple[str, dict[str, str]]:
    pytest.importorskip("boto3", reason="needs boto3: pip install -e '.[s3]'")
    keys = {"AWS_ACCESS_KEY_ID": SECRET, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_SESSION_TOKEN": SECRET}
    return f"s3://{data.name}", {**keys, "AWS_ENDPOINT_URL": server.url, "AWS_DEFAULT_REGION": "us-east-1"}


WANDB: dict[str, tuple[str, dict[str, str]]] = {
    "disabled": ("disabled", {}),
    "offline": ("offline", {}),
    "no key": ("online", {}),
    "dead server": ("online", {"WANDB_API_KEY": SECRET, "WANDB_BASE_URL": "http://127.0.0.1:{port}"}),
}
WITH_WANDB = (
    "import megassm.run.wandb_log as log; log.INIT_TIMEOUT_S = 2; import runpy, sys; sys.argv[0] = 'pretrain.py'\n"
    "runpy.run_path('launch/pretrain.py', run_name='__main__')"
)


def run_of(
    work: Path, data: Path, wandb: str, place: Place, launcher: Launcher | None, server: FaultServer, *more: str
) -> str:
    """Trains for a while, in work/run; returns all that was said."""
    mode, environment = WANDB[wandb]
    environment = {name: value.format(port=closed_port()) for name, value in environment.items()}
    path, own = place(server, data, work)
    home = {"HOME": str(work), "NETRC": str(work / "none"), "A_TOKEN": SECRET}
    overrides = [*SMALL, *FINISHED, f"data.path={path}", f"log.wandb={mode}", "train.steps=4", *more]
    if launcher is None:
        arguments = ("-c", WITH_WANDB, "--config", "configs/tiny.yaml", *overrides, f"run.dir={work / 'run'}")
        done = run_python(*arguments, check=not more, **home, **environment, **own)
        return done.stdout + done.stderr
    script = work / "start.py"
    script.write_text(WITH_WANDB, encoding="utf-8")
    with Job(
        work / "run", 2, overrides, str(script), launcher, PYTHONPATH=os.getcwd(), **home, **environment, **own
    ) as job:
        return job.finish()


def found_in(folder: Path) -> list[str]:
    """Lines of `grep -ra`."""
    done = subprocess.run(["grep", "-ra", SECRET, str(folder)], capture_output=True, check=False)
    return done.stdout.decode(errors="replace").splitlines()


@pytest.fixture
def server(data_path: Path) -> Iterator[FaultServer]:
    with serving(data_path.parent) as started:
        yield started


@pytest.mark.parametrize(
    ("wandb", "place"),
    [("offline", in_the_url), ("dead server", in_the_environment), ("no key", in_links), ("disabled", in_keys_of_s3)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_no_secret_is_in_a_run_directory(
    wandb: str, place: Place, data_path: Path, tmp_path: Path, server: FaultServer
) -> None:
    said = run_of(tmp_path, data_path, wandb, place, None, server)
    assert server.requests, "the data came from there"
    assert (tmp_path / "run/metrics.jsonl").exists()
    assert bool(list((tmp_path / "run").rglob("*.wandb"))) == (wandb != "disabled")
    assert found_in(tmp_path / "run") == []
    assert SECRET not in said


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("launcher", "wandb", "place"),
    [("torchrun", "dead server", in_the_url), ("deepspeed", "offline", in_the_environment)],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_no_launcher_writes_one_there(
    launcher: Launcher, wandb: str, place: Place, data_path: Path, tmp_path: Path, server: FaultServer
) -> None:
    run_of(tmp_path, data_path, wandb, place, launcher, server)
    assert list((tmp_path / "run").rglob("*.wandb"))
    assert found_in(tmp_path / "run") == []


@pytest.mark.parametrize("place", [in_the_url, in_the_environment, in_links])
def test_a_run_that_fails_tells_none(place: Place, data_path: Path, tmp_path: Path, server: FaultServer) -> None:
    """The server refuses after a while: the reason stands in failure.txt, events.jsonl and what is said."""
    server.faults.extend(["none", "none", *["403"] * 100])  # type: ignore[list-item]
    said = run_of(tmp_path, data_path, "offline", place, None, server, "train.steps=400")
    assert "access denied" in said
    assert "access denied" in (tmp_path / "run/failure.txt").read_text(encoding="utf-8")
    assert found_in(tmp_path / "run") == []
    assert SECRET not in said


def test_a_submitted_job_holds_none(data_path: Path, tmp_path: Path, server: FaultServer) -> None:
    """The copy of the code, the script, the diff, job.json and the configuration."""
    sbatch = tmp_path / "bin/sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\necho 41\n", encoding="utf-8")
    sbatch.chmod(0o755)
    path, own = in_the_environment(server, data_path, tmp_path)
    environment = {**own, "PATH": f"{sbatch.parent}:{os.environ['PATH']}", "WANDB_API_KEY": SECRET, "A_TOKEN": SECRET}
    words = ("submit", "--config", "configs/tiny.yaml", "--nodes", "1", "--gpus-per-node", "0", "--tasks-per-node", "2")
    overrides = (*SMALL, f"data.path={path}", f"run.dir={tmp_path / 'run'}", "train.micro_batch_sequences=1")
    run_python("launch/slurm.py", *words, *overrides, **environment)
    assert (tmp_path / "run/jobs/0001/job.json").exists()
    assert found_in(tmp_path / "run") == []
