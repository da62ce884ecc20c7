"""A run that goes back after a loss spike passes over what it read since, and everything that counts batches knows."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megassm.config.schema import Config
from megassm.data.dataset import open_dataset
from megassm.data.inspect import read_samples, samples_of_update
from megassm.data.skipped import LeftOut, batch_of, step_of
from megassm.data.stream import MicroBatch
from megassm.errors import UserError
from megassm.parallel.watchdog import Watchdog
from megassm.parallel.world import join_world, leave_world
from megassm.run.directory import FAILURE, LEFT_OUT
from megassm.run.events import read_events
from megassm.run.journal import read_records
from megassm.run.left_out import leave_out, read_left_out
from megassm.train import loop
from megassm.train.setup import Run, set_up

Make = Callable[..., Config]
SPIKE_BATCH = 44
ENTRIES = st.lists(st.builds(LeftOut, st.integers(0, 30), st.integers(1, 5)), max_size=4)


@given(ENTRIES)
def test_every_batch_is_read_once_or_passed_over(left_out: list[LeftOut]) -> None:
    read = [batch_of(left_out, step) for step in range(60)]
    assert read == sorted(set(read))
    steps = [step_of(left_out, batch) for batch in range(read[-1] + 1)]
    assert [step for step in steps if step is not None] == list(range(60))
    assert steps.count(None) == sum(entry.batches for entry in left_out)


def test_what_is_left_out_is_kept(tmp_path: Path) -> None:
    assert read_left_out(tmp_path) == ()
    leave_out(tmp_path, LeftOut(40, 5))
    leave_out(tmp_path, LeftOut(20, 1))
    assert read_left_out(tmp_path) == ((20, 1), (40, 5))
    (tmp_path / LEFT_OUT).write_text('[{"step": 4}]')
    with pytest.raises(UserError, match=r"left_out.json: .*batches: Field required; .*write them again"):
        read_left_out(tmp_path)


def train_with_noise(config: Config, monkeypatch: pytest.MonkeyPatch, told_to_stop: bool = False) -> bool:
    """One process; whoever reads batch `SPIKE_BATCH` finds noise in it, and a stop signal comes with it if so told.

    Returns whether all updates are done.
    """

    def planted(*arguments: object) -> Run:
        run = set_up(*arguments)  # type: ignore[arg-type]
        run.batches = noisy(run.batches)
        return run

    def noisy(batches: Iterator[MicroBatch]) -> Iterator[MicroBatch]:
        for batch in batches:
            if batch.sample_ids_B[0] // config.train.batch_sequences == SPIKE_BATCH:
                if told_to_stop:
                    os.kill(os.getpid(), signal.SIGUSR1)
                noise = torch.randint(0, 256, batch.ids_BT.shape, generator=torch.Generator().manual_seed(0)).numpy()
                batch = MicroBatch(noise, batch.mask_BL, batch.sample_ids_B)
            yield batch

    return train_in_process(config, monkeypatch, planted)


def train_in_process(config: Config, monkeypatch: pytest.MonkeyPatch, planted: Callable[..., Run]) -> bool:
    monkeypatch.setattr(loop, "set_up", planted)
    Path(config.run.dir).mkdir(parents=True, exist_ok=True)
    try:
        world = join_world(config)
        watchdog = Watchdog((0, 1), world.progress, config.parallel.timeout_s, Path(config.run.dir, FAILURE))
        done = loop.set_up_and_train(config, open_dataset(config), world, watchdog)
        watchdog.stop()
        return done
    finally:
        leave_world()


def test_a_spike_rewinds_the_run(small_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    same = ("train.steps=50", "checkpoint.every_steps=10", "optim.lr=1e-2", "eval.every_steps=null",
            "health.spike_action=rewind")  # fmt: skip
    rewound = small_config(*same, f"run.dir={tmp_path / 'rewound'}")
    assert train_with_noise(rewound, monkeypatch)
    run_dir = Path(rewound.run.dir)
    assert read_left_out(run_dir) == ((40, 5),)
    events = {event["kind"]: event for event in read_events(run_dir)}
    assert events["loss spike"]["step"] == events["rewind"]["step"] == SPIKE_BATCH + 1
    assert events["rewind"]["figures"] == {"checkpoint": 40, "batches": 5}
    rows = read_records(run_dir)
    assert [row["step"] for row in rows] == list(range(1, 51))
    assert not any(row["skipped"] for row in rows)

    never = small_config(*same, f"run.dir={tmp_path / 'never'}")
    Path(never.run.dir).mkdir()
    left_out = (LeftOut(40, 5),)
    leave_out(Path(never.run.dir), *left_out)  # as if it had always been so
    assert train_with_noise(never, monkeypatch)
    assert [row["loss"] for row in read_records(Path(never.run.dir))] == [row["loss"] for row in rows]
    size = rewound.train.batch_sequences
    assert samples_of_update(rewound, 41, left_out) == range(45 * size, 46 * size)
    found = [sample.update for sample in read_samples(rewound, [39 * size, 42 * size, 45 * size], left_out)]
    assert found == [40, None, 41]
    assert rows[-1]["epochs"] == pytest.approx({name: 55 / 50 * count for name, count in epochs_of(never).items()})


def test_a_stop_signal_outlives_a_rewind(small_config: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config("train.steps=50", "checkpoint.every_steps=10", "optim.lr=1e-2", "eval.every_steps=null",
                          "health.spike_action=rewind")  # fmt: skip
    assert not train_with_noise(config, monkeypatch, told_to_stop=True)
    kinds = [event["kind"] for event in read_events(Path(config.run.dir))]
    assert kinds[-3:] == ["rewind", "resume", "stop"]
    assert read_records(Path(config.run.dir))[-1]["step"] == 40


def test_a_dropped_update_after_a_rewind_names_the_samples_it_read(
    small_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config("train.steps=3", "eval.every_steps=null")
    Path(config.run.dir).mkdir(parents=True)
    leave_out(Path(config.run.dir), LeftOut(1, 5))

    def planted(*arguments: object) -> Run:
        run = set_up(*arguments)  # type: ignore[arg-type]
        losses = run.engine.losses
        run.engine.losses = lambda ids_BT, k: (
            losses(ids_BT, k)
            * (  # type: ignore[method-assign]
                float("nan") if run.world.progress.mark.step == 2 else 1.0
            )
        )
        return run

    train_in_process(config, monkeypatch, planted)
    event = next(event for event in read_events(Path(config.run.dir)) if event["kind"] == "non-finite")
    size = config.train.batch_sequences
    assert event["figures"]["samples"] == [6 * size, 7 * size - 1]
    assert f"samples {6 * size}..{7 * size - 1} changed no weight" in event["text"]


def test_ranks_ask_about_a_signal_within_an_update_only_where_updates_are_long(
    small_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, asked = small_config("train.steps=4", "train.micro_batch_sequences=1", "eval.every_steps=null"), [0]

    def any_rank(flag: bool) -> bool:
        asked[0] += 1
        return flag

    monkeypatch.setattr(loop, "any_rank", any_rank)
    monkeypatch.setattr(loop, "STOP_CHECK_S", 1e9)
    Path(config.run.dir).mkdir(parents=True)
    assert train_in_process(config, monkeypatch, set_up)
    assert asked[0] == 3, "in the first update only, whose length nobody knows"


@pytest.mark.parametrize(("seconds", "micro_steps", "stride"), [(1.0, 4, 40), (40.0, 4, 1), (40.0, 16, 4), (1e3, 2, 1)])
def test_stop_stride(seconds: float, micro_steps: int, stride: int) -> None:
    totals = SimpleNamespace(slowest_s=seconds)
    assert loop.stop_stride(totals, micro_steps) == stride  # type: ignore[arg-type]


def epochs_of(config: Config) -> dict[str, float]:
    """Of 50 batches in a row."""
    from megassm.data.stream import StreamPlan, TokenStream

    size = config.train.batch_sequences
    data = open_dataset(config)
    return TokenStream(data.train, StreamPlan(config.model.seq_len, size, size, config.run.seed)).epochs(50)
