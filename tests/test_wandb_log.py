"""Whatever happens to wandb, and to the disk under it, a run's losses are the same and its exit code is 0."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megassm.run.records import read_records
from tests.conftest import FINISHED, SMALL, run_python

LAUNCH = """
import sys
import megassm.run.wandb_log
megassm.run.wandb_log.INIT_TIMEOUT_S = 2
from megassm.commands import train as pretrain
from megassm.cli.arguments import run_tool
sys.argv[0] = "pretrain"
run_tool(pretrain.main)
pretrain.leave(0)
"""


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def losses(run_dir: Path) -> list[float]:
    return [row["loss"] for row in read_records(run_dir)]


def train(run_dir: Path, data_path: Path, mode: str, first: str = "", *more: str, **environment: str) -> str:
    """Trains what the fixture `trained` did, after the code `first`; returns what was said on stderr."""
    own = (f"run.dir={run_dir}", f"data.path={data_path}", *FINISHED, f"log.wandb={mode}", *more)
    home = str(run_dir.parent)  # no key there
    arguments = ("-c", first + LAUNCH, "--config", "configs/tiny.yaml", *SMALL, *own)
    inherited = {"WANDB_SERVICE": "of the process that started this one"}
    return run_python(*arguments, **{"HOME": home, "NETRC": f"{home}/none"} | inherited | environment).stderr


@pytest.mark.parametrize(
    ("mode", "server", "key", "warning"),
    [
        ("offline", "", "", ""),
        ("online", "", "", "wandb has no API key"),
        ("online", "http://127.0.0.1:{port}", "a" * 40, "wandb cannot be reached"),
    ],
    ids=["offline", "no key", "dead server"],
)
def test_the_same_losses_whatever_wandb_does(
    trained: Path, data_path: Path, tmp_path: Path, mode: str, server: str, key: str, warning: str
) -> None:
    address = {"WANDB_BASE_URL": server.format(port=closed_port())} if server else {}
    said = train(tmp_path / "run", data_path, mode, **address, **({"WANDB_API_KEY": key} if key else {}))
    assert losses(tmp_path / "run") == losses(trained)
    assert said.count("warning:") == bool(warning), said
    assert warning in said
    assert list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))


FILL = """
import os
from pathlib import Path
from megassm.run.records import RecordFile

write = RecordFile.write

def write_on_a_disk_that_is_full_for_a_while(self, row):
    brick = Path(os.environ["BRICK"])
    if row["step"] == 4:
        with brick.open("wb") as file:
            free = os.statvfs(brick.parent)
            os.posix_fallocate(file.fileno(), 0, free.f_bavail * free.f_frsize)
    if row["step"] == 9:
        brick.unlink()
    write(self, row)

RecordFile.write = write_on_a_disk_that_is_full_for_a_while
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A small file system of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ("mount", "-t", "tmpfs", "-o", "size=8m", "none", str(place))
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("a small file system needs root, and the right to mount")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)


def test_the_same_losses_where_the_disk_is_full_for_a_while(trained: Path, data_path: Path, small_disk: Path) -> None:
    said = train(small_disk / "run", data_path, "offline", FILL, BRICK=str(small_disk / "brick"))
    assert losses(small_disk / "run") == losses(trained)
    warnings = [line for line in said.splitlines() if line.startswith("warning:")]
    own = [line for line in warnings if "metrics.jsonl: " in line]
    assert ["records wait in memory" in line for line in own] == [True, False]
    assert own[1].endswith("every record is written")
    assert len(warnings) - len(own) == sum("wandb is given up" in line for line in warnings) <= 1
    assert "Traceback" not in said
    assert "Logging error" not in said
