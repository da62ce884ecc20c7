"""A rank's device, its open files, and a refusal of one rank alone."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megassm.errors import UserError
from megassm.parallel import device as devices
from megassm.parallel import world
from tests.conftest import ROOT, SMALL, run_python


@pytest.fixture
def sees(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """A torch that is built for CUDA and sees as many devices as MEGASSM_TEST_DEVICES says; what was made current."""
    current: list[torch.device] = []
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(os.environ["MEGASSM_TEST_DEVICES"]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: os.environ["MEGASSM_TEST_DEVICES"] != "0")
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    return current


@pytest.mark.parametrize(("visible", "local_rank", "index"), [(8, 3, 3), (1, 3, 0), (2, 3, 1)])
def test_each_rank_takes_its_own_device_also_where_it_sees_one_alone(
    sees: list[torch.device], monkeypatch: pytest.MonkeyPatch, visible: int, local_rank: int, index: int
) -> None:
    monkeypatch.setenv("MEGASSM_TEST_DEVICES", str(visible))
    assert devices.pick_device("auto", local_rank, local_rank) == torch.device("cuda", index)
    assert sees == [torch.device("cuda", index)]


def test_a_cuda_torch_without_a_gpu_says_so_once(
    sees: list[torch.device], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEGASSM_TEST_DEVICES", "0")
    for rank in (0, 1):
        assert devices.pick_device("auto", rank, rank) == torch.device("cpu")
    assert capsys.readouterr().err.count("finds no GPU here") == 1
    devices.pick_device("cpu", 0, 0)
    with pytest.raises(UserError, match="0 CUDA devices"):
        devices.pick_device("cuda", 0, 0)
    monkeypatch.setattr(torch.version, "cuda", None)
    devices.pick_device("auto", 0, 0)
    assert capsys.readouterr().err == ""
    assert sees == []


def test_two_ranks_on_one_device_are_refused(sees: list[torch.device], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGASSM_TEST_DEVICES", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.delenv("RANK", raising=False)
    asked: dict[str, object] = {}

    def refuses(backend: str, **given: object) -> None:
        asked.update(given, backend=backend)
        raise dist.DistBackendError("NCCL error ...: Duplicate GPU detected : rank 2 and rank 0 both on CUDA device 1")

    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", refuses)
    with pytest.raises(UserError, match=r"4 ranks of .* see 2 CUDA devices"):
        world._join("cuda", world.PEERS_TIMEOUT)
    assert asked["device_id"] == torch.device("cuda", 0)
    assert asked["backend"] == "cpu:gloo,cuda:nccl"
    assert asked["timeout"] == world.PEERS_TIMEOUT + world.NCCL_GRACE


def test_the_file_limit_follows_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"now": (1024, 4096)}
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda _, wanted: limits.update(now=wanted))
    devices.raise_file_limit(1)
    assert limits["now"] == (4096, 4096)
    with pytest.raises(UserError, match=r"10000 ranks opens up to 20256 .* allows 4096"):
        devices.raise_file_limit(10_000)
    limits["now"] = (1024, resource.RLIM_INFINITY)
    devices.raise_file_limit(100_000)
    assert limits["now"] == (200_256, resource.RLIM_INFINITY)
    limits["now"] = (1_048_576, 1_048_576)
    devices.raise_file_limit(1024)
    assert limits["now"] == (1_048_576, 1_048_576)


def test_the_real_limit_is_raised() -> None:
    done = run_python("-c", "import resource as r; from megassm.parallel.device import raise_file_limit as up\n"
                            "hard = r.getrlimit(r.RLIMIT_NOFILE)[1]; r.setrlimit(r.RLIMIT_NOFILE, (64, hard)); up(1)\n"
                            "print(r.getrlimit(r.RLIMIT_NOFILE)[0])")  # fmt: skip
    assert int(done.stdout) > 64


@pytest.mark.end_to_end
@pytest.mark.ranks
def test_a_rank_that_refuses_alone_says_why(tmp_path: Path, data_path: Path) -> None:
    """Its machine has no data: rank 0 knows nothing of it, and heeds the launcher's SIGTERM where it waits."""
    gone = tmp_path / "other machine"
    shutil.copytree(data_path, gone)
    shutil.rmtree(gone / "train")
    script = tmp_path / "start.py"
    script.write_text(
        f"import os, runpy, sys\nsys.argv = [a.replace('DATA', os.environ['RANK'] == '1' and {str(gone)!r} or "
        f"{str(data_path)!r}) for a in sys.argv]\nrunpy.run_path('launch/pretrain.py', run_name='__main__')\n"
    )
    own = ("train.steps=2", f"run.dir={tmp_path / 'run'}", "data.path=DATA")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script),
         "--config", "configs/tiny.yaml", *SMALL, *own],
        cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert f"[rank 1 on {os.uname().nodename}] error: {gone}" in done.stderr
    assert "SIGKILL" not in done.stderr


def test_a_group_that_is_left_leaves_no_thread() -> None:
    """One that lives on at the interpreter's end aborts it now and then."""
    code = (
        "from pathlib import Path; from megassm.parallel.world import gather_rows, join_peers, leave_world\n"
        "join_peers('cpu'); gather_rows([1.0]); import torch._dynamo; leave_world()\n"
        "print(*(path.read_text() for path in Path('/proc/self/task').glob('*/comm')))"
    )
    assert "gloo" not in run_python("-c", code).stdout
