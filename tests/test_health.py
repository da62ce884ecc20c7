"""A slow rank and a loss spike in a run of two ranks; what a validation says of the channels, on any mesh."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megassm.checkpoint.space import PIN
from megassm.config.schema import Config
from megassm.data.dataset import open_dataset
from megassm.data.stream import MicroBatch
from megassm.parallel.world import join_world, leave_world
from megassm.run import records
from megassm.run.directory import METRICS
from megassm.run.events import read_events
from megassm.run.journal import read_records
from megassm.run.lines import Known, Line
from megassm.train.channels import update_counts
from megassm.train.health import Health
from megassm.train.loop import train
from megassm.train.setup import Run, set_up
from tests.ranks import run_on_ranks, whole_state

SPIKE_STEP = 45
SLOW_S = 0.03
Make = Callable[..., Config]


def train_all(configs: list[Config]) -> list[dict[str, Any]]:
    """Trains each; where there are many steps, rank 1 is slow in its forward passes and a batch is noise."""
    seen = []
    try:
        for config in configs:
            Path(config.run.dir).mkdir(parents=True, exist_ok=True)
            run = set_up(config, open_dataset(config), join_world(config))
            if config.train.steps > SPIKE_STEP:
                plant(run)
            train(run)
            whole = [state["weight"] for name, state in sorted(whole_state(run.engine, ["weight"]).items())
                     if name.endswith("channels_KDD")]  # fmt: skip
            norms = [weight.double().flatten(1).norm(dim=1).tolist() for weight in whole]
            seen.append({"updates": run.engine.applied_updates, "norms": norms})
            if run.journal is not None:
                run.journal.close()
    finally:
        leave_world()
    return seen


def plant(run: Run) -> None:
    losses, batches = run.engine.training_losses, run.batches

    def slow_losses(ids_BT: Tensor, k: int) -> tuple[Tensor, Tensor]:
        time.sleep(SLOW_S * (run.world.rank == 1))
        return losses(ids_BT, k)

    def noisy_batches() -> Iterator[MicroBatch]:
        for number, batch in enumerate(batches):
            if number // run.engine.micro_steps + 1 == SPIKE_STEP:
                noise = torch.randint(0, 256, batch.ids_BT.shape, generator=torch.Generator().manual_seed(0)).numpy()
                batch = MicroBatch(noise, batch.mask_BL, batch.sample_ids_B)
            yield batch

    run.engine.training_losses, run.batches = slow_losses, noisy_batches()  # type: ignore[method-assign]


@pytest.mark.ranks
def test_a_slow_rank_a_spike_and_the_channels_of_two_ranks(small_config: Make, tmp_path: Path) -> None:
    meshes = {"data": (3, "fp32"), "tensor": (1, "fp32"), "sequence": (1, "bf16")}
    longest = small_config(
        "train.steps=52", "checkpoint.every_steps=10", "checkpoint.keep=1", "health.spike_action=skip",
        "optim.lr=1e-2", "train.batch_sequences=8", f"run.dir={tmp_path / 'long'}", "eval.every_steps=26", world_size=2,
    )  # fmt: skip
    short = [
        small_config(
            f"parallel.{axis}=2", f"parallel.zero_stage={stage}", f"train.precision={precision}", "train.steps=3",
            "model.seq_len=128", f"run.dir={tmp_path / axis}", "model.pattern=SA", world_size=2,
        )
        for axis, (stage, precision) in meshes.items()
    ]  # fmt: skip
    found = run_on_ranks(2, train_all, [longest, *short])[0]
    check_slow_rank_and_spike(tmp_path / "long", found[0]["updates"])
    for config, seen in zip([longest, *short], found, strict=True):
        row = read_records(Path(config.run.dir))[-1]
        channels = row["channels"]
        rounded = 2e-2 if config.train.precision == "bf16" else 2e-5
        assert np.array(channels["norm"]) == pytest.approx(np.array(seen["norms"]), rel=rounded)
        assert np.array(channels["gate_mass"]).sum(axis=1) == pytest.approx(1.0, abs=1e-3)
        counts = [
            sum(max(r["k_micro"]) >= k and not r["skipped"] for r in read_records(Path(config.run.dir)))
            for k in range(1, 9)
        ]
        assert channels["updates"] == counts


def check_slow_rank_and_spike(run_dir: Path, updates: int) -> None:
    rows, events = read_records(run_dir), list(read_events(run_dir))
    assert [row["step"] for row in rows if row["skipped"]] == [SPIKE_STEP]
    assert [row["step"] for row in rows if row.get("spike")] == [SPIKE_STEP]
    assert updates == len(rows) - 1
    spike = next(event for event in events if event["kind"] == "loss spike")
    first = (SPIKE_STEP - 1) * 8
    assert spike["figures"]["samples"] == [first, first + 7]
    assert spike["figures"]["dropped"]
    assert rows[SPIKE_STEP - 1]["loss"] == spike["figures"]["loss"] > spike["figures"]["expected"] + 1
    assert f"samples {first}..{first + 7} changed no weight" in spike["text"]
    assert spike["figures"]["checkpoint"].endswith("step-00000040")
    assert (run_dir / "checkpoints" / "step-00000040" / PIN).exists()
    assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step-00000040", "step-00000052"]

    told = [event for event in events if event["kind"] == "straggler"]
    named = [(event["figures"]["rank"], event["figures"]["phase"]) for event in told]
    assert named.count((1, "forward")) == 1, "told once, though it lasts"
    assert (0, "forward") not in named, "it waits for the other"
    slow = rows[-1]["slowest"]["forward"]
    assert slow["rank"] == 1
    assert slow["s"] > 2 * SLOW_S > slow["median_s"] * 0.9
    assert rows[-1]["phases_s"]["communication"] > SLOW_S, "rank 0 waits for rank 1"
    assert [event["step"] for event in events if event["kind"] == "checkpoint"] == [10, 20, 30, 40, 50, 52]


@pytest.mark.parametrize("validated", [(), (600,), (100, 601), (950,)])
def test_a_resumed_run_knows_from_the_journals_end_what_all_of_it_says(
    small_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, validated: tuple[int, ...]
) -> None:
    config, rng, counts_K = small_config(), np.random.default_rng(0), np.zeros(8, dtype=int)
    run: Any = SimpleNamespace(
        config=config, done_steps=0, journal=object(), world=SimpleNamespace(mesh=SimpleNamespace(sequence=1, tensor=1))
    )
    never_stopped = Health(run)
    with (tmp_path / "run.jsonl").open("w") as file:
        for step in range(1, 1001):
            row = {"step": step, "k_micro": [int(k) for k in rng.choice([1, 2, 4, 8], 2)], "skipped": step % 97 == 0,
                   "loss": None if step % 97 == 0 else 2 + 3 / step + rng.normal(0, 0.01)}  # fmt: skip
            never_stopped._remember(row)
            counts_K += update_counts([row["k_micro"]], 8) * (not row["skipped"])
            if step in validated:
                row |= {"valid": {"8": 1.0}, "channels": {"updates": counts_K.tolist()}}
            file.write(json.dumps(row) + "\n")
    Path(config.run.dir).mkdir()
    (tmp_path / "run.jsonl").rename(Path(config.run.dir) / METRICS)
    parsed, read_line = [0], records.read_line

    def counting(line: bytes, is_known: Known) -> Line:
        parsed[0] += 1
        return read_line(line, is_known)

    monkeypatch.setattr(records, "read_line", counting)
    run.done_steps = 1000
    resumed = Health(run)
    assert resumed._updates_K.tolist() == never_stopped._updates_K.tolist() == counts_K.tolist()
    assert [row["step"] for row in resumed._records] == list(range(801, 1001))
    assert resumed._spikes.limit([2, 4]) == pytest.approx(never_stopped._spikes.limit([2, 4]), rel=1e-12)
    first = max(validated, default=1)
    assert parsed[0] == max(1000 - first + 1 + (first > 1 and first < 800), 201), "and nothing from before"
