"""A start says before its work what its machine has not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from megassm.config.schema import Config
from megassm.errors import UserError
from megassm.ops.mixing import GROUP_BYTES
from megassm.parallel import starting
from megassm.parallel.watchdog import RankProgress
from megassm.parallel.world import World, join_world, leave_world
from megassm.plan.cluster import Filters, filters_of
from megassm.plan.memory import host_memory, rank_memory
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
        needed = float(preflight_bytes(config, world))
        monkeypatch.setattr(preflight, "host_bytes", lambda: needed / 2)
        said = preflight.preflight(config, world)
        assert said.startswith("rank 0 is planned to need 0.0 GB at full K, ")
        assert "GB of activations" in said
        assert "the job may be ended without a word. Lower train.micro_batch_sequences" in said
        assert "its share of the host (1 ranks there) has 0.0 GB free" in said
        assert "parallel.zero_stage" in said
        monkeypatch.setattr(preflight, "host_bytes", lambda: needed / 5)
        with pytest.raises(UserError, match=r"model\.seq_len = 64, .* which is not enough by far\. Lower them, set"):
            preflight.preflight(config, world)
    finally:
        leave_world()


def preflight_bytes(config: Config, world: World) -> float:
    memory = rank_memory(config, world.mesh, filters_of(config), GROUP_BYTES["cpu"], fused=False)
    return sum(memory.values()) + host_memory(config, world.mesh)["save: copy"] * config.checkpoint.asynchronous


def test_a_long_sequence_is_refused_or_told_before_its_filters_are_derived(
    small_config: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = small_config("model.seq_len=4000000")

    def derive(config: Config) -> Filters:
        assert (
            "deriving 8 filters of model.seq_len = 4,000,000: 2.0 GB of this host's memory, about 18 s"
            in capsys.readouterr().out
        )
        assert world.progress.mark.place == "its set-up, deriving 8 filters of model.seq_len = 4,000,000"
        return Filters(64, 40, 0)

    monkeypatch.setattr(preflight, "filters_of", derive)
    try:
        world = join_world(config)
        monkeypatch.setattr(preflight, "host_bytes", lambda: 1e8)
        with pytest.raises(
            UserError, match=r"model\.seq_len = 4,000,000, d_model = .*planned to need .*not enough by far"
        ):
            preflight.preflight(config, world)
        assert capsys.readouterr().out == ""
        monkeypatch.setattr(preflight, "host_bytes", lambda: 1e18)
        assert preflight.preflight(config, world) == ""
        assert world.progress.mark.place == "its set-up"
    finally:
        leave_world()


def test_a_start_that_takes_long_says_where_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(starting, "FIRST_S", 0.01)
    monkeypatch.setattr(starting, "LOOK_S", 0.001)
    progress, said = RankProgress(), ""

    def wait_for(text: str) -> None:
        nonlocal said
        deadline = time.monotonic() + 60
        while text not in said:
            assert time.monotonic() < deadline, said
            said += capsys.readouterr().out

    with starting.told_until_first_update(progress):
        wait_for("0 s since the start, no update yet: in its set-up for 0 s\n")
        progress.note("beginning", 41)
        progress.note("forward pass")
        wait_for("no update yet: in step 41, forward pass for ")
        progress.note("beginning", 42)
        threads = [thread for thread in threading.enumerate() if thread.name == "start"]
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive(), "an update is done"
    assert said.count("no update yet") < 20, "each time twice as long after the start"
    monkeypatch.setenv("RANK", "1")
    with starting.told_until_first_update(RankProgress()):
        assert "start" not in {thread.name for thread in threading.enumerate()}
