"""A start says before its work what its machine has not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megassm.config.schema import Config
from megassm.parallel.world import join_world, leave_world
from megassm.train import preflight
from megassm.train.preflight import host_bytes

Make = Callable[..., Config]


def test_what_is_free(tmp_path: Path) -> None:
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    assert host_bytes(proc, cgroup) == float("inf")
    for folder in (proc, cgroup):
        folder.mkdir()
    (proc / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:     500 kB\n")
    assert host_bytes(proc, cgroup) == 500 * 1024
    (cgroup / "memory.max").write_text("max\n")
    (cgroup / "memory.current").write_text("300000\n")
    assert host_bytes(proc, cgroup) == 500 * 1024, "no limit"
    (cgroup / "memory.max").write_text("400000\n")
    assert host_bytes(proc, cgroup) == 100_000
    (cgroup / "memory.stat").write_text("anon 250000\nfile 50000\nfile_mapped 1\n")
    assert host_bytes(proc, cgroup) == 150_000


def test_a_job_that_is_too_large_is_told_of_with_the_way_out(
    small_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config()
    try:
        world = join_world(config)
        assert preflight.preflight(config, world) == ""
        monkeypatch.setattr(preflight, "host_bytes", lambda: 1e5)
        said = preflight.preflight(config, world)
        assert said.startswith("rank 0 is planned to need 0.0 GB at full K, ")
        assert "GB of activations" in said
        assert "its share of the host (1 ranks there) has 0.0 GB free" in said
        assert "parallel.zero_stage" in said
    finally:
        leave_world()
