"""Two nodes, here two launchers, under torchrun's rendezvous and DeepSpeed's hostfile: the curve of one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megassm.run.journal import read_records
from tests.conftest import ROOT, SMALL, run_python

JOB = (*SMALL, "train.steps=4", "budget.draws=1", "eval.every_steps=null", "eval.budgets=[8]")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def torchrun(node: int, port: int, hostfile: Path) -> list[str]:
    return ["-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(node), "--nproc-per-node", "1",
            "--rdzv-id", "x", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{port}"]  # fmt: skip


def deepspeed(node: int, port: int, hostfile: Path) -> list[str]:
    hostfile.write_text("node-a slots=1\nnode-b slots=1\n", encoding="utf-8")
    return ["-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--no_ssh", "--node_rank", str(node),
            "--master_addr", "127.0.0.1", "--master_port", str(port)]  # fmt: skip


@pytest.mark.end_to_end
def test_two_nodes_are_one_run(tmp_path: Path, data_path: Path) -> None:
    def command(name: str) -> list[str]:
        own = (f"run.dir={tmp_path / name}", f"data.path={data_path}")
        return ["launch/pretrain.py", "--config", "configs/tiny.yaml", *JOB, *own]

    def start(name: str, launcher: Callable[[int, int, Path], list[str]]) -> list[subprocess.Popen[str]]:
        port = free_port()
        return [
            subprocess.Popen([sys.executable, *launcher(node, port, tmp_path / "hostfile"), *command(name)], cwd=ROOT,
                             env=dict(os.environ), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            for node in range(2)
        ]  # fmt: skip

    nodes = start("torchrun", torchrun) + start("deepspeed", deepspeed)
    try:
        said = [node.communicate(timeout=480)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0] * 4, "\n".join(said)
    run_python(*command("alone"))
    alone = read_records(tmp_path / "alone")
    for name, text in (("torchrun", said[0] + said[1]), ("deepspeed", said[2] + said[3])):
        assert "2 rank(s) on cpu" in text
        rows = read_records(tmp_path / name)
        assert [row["step"] for row in rows] == [1, 2, 3, 4]
        assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in alone], abs=1e-5)
