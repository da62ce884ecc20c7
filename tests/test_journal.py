"""The journal: one curve without a seam, wandb that never stops a run, memory and rates."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megassm.cli.arguments import print_line
from megassm.config.schema import Config
from megassm.run import tracker, wandb_log
from megassm.run.console import format_record
from megassm.run.journal import Journal, peak_flops, read_records

Make = Callable[..., Config]


def row(step: int, **more: object) -> dict[str, object]:
    return {
        "step": step, "tokens": step * 256, "loss": 3.0, "bits_per_byte": 2.0, "k": 4, "k_micro": [4], "lr": 1e-3,
        "grad_norm": 0.5, "tokens_per_s": 1000.0, "mfu": 0.4, "step_s": 0.2, "data_wait_s": 0.02,
        "peak_memory_bytes": 2**30, **more,
    }  # fmt: skip


@pytest.fixture
def config(small_config: Make) -> Config:
    made = small_config()
    Path(made.run.dir).mkdir()
    return made


def test_resume_drops_rows_that_are_made_again_and_half_a_line(config: Config) -> None:
    first = Journal(config, 0)
    for step in (1, 2, 3):
        first.write(row(step))
    first.close()
    path = Path(config.run.dir) / "metrics.jsonl"
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": "x"}\n{"step": null}\n{"step": 4, "lo')
    again = Journal(config, 2)
    again.write(row(3, loss=9.0))
    again.close()
    assert [(r["step"], r["loss"]) for r in read_records(Path(config.run.dir))] == [(1, 3.0), (2, 3.0), (3, 9.0)]
    assert len(path.read_text(encoding="utf-8").splitlines()) == 3


def test_lines_for_people(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    journal = Journal(config, 0)
    journal.write(row(1))
    journal.write(row(2))
    journal.write(row(8, valid={"1": 2.5, "8": 2.25}))
    journal.close()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 3, "the first, none for the second, the last with a line for validation"
    for part in ("step 1/8", "loss 3.000", "2.000 bits/byte", "K  4", "lr 1.0e-3", "1,000 tok/s", "MFU 40%",
                 "wait 10%", "eta "):  # fmt: skip
        assert part in said[0]
    assert "K=1: 2.500  K=8: 2.250" in said[2]


def test_a_line_says_what_share_was_waiting_and_fits_a_terminal() -> None:
    phases = {"data": 0.01, "forward": 0.05, "backward": 0.1, "update": 0.03, "communication": 0.02}
    large = row(100_000, loss=10.5, grad_norm=12.5, k=32, tokens_per_s=45e6, phases_s=phases)
    line = format_record(large, 100_000, 9e5)
    assert "wait 15%" in line
    assert "MFU" not in format_record(large | {"mfu": None}, 100_000, 9e5)
    assert len(line) <= 120
    assert "wait" not in format_record(row(1, data_wait_s=0.001), 10, 1.0)


def test_eta_is_readable() -> None:
    for seconds, text in ((5, "0m05s"), (125, "2m05s"), (7500, "2h05m"), (200_000, "2d07h"), (900_000, "10d")):
        assert f"eta {text}" in format_record(row(1), 10, seconds)


def test_wandb_offline_needs_no_account(small_config: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    config = small_config("log.wandb=offline")
    Path(config.run.dir).mkdir()
    journal = Journal(config, 0)
    journal.write(row(1, valid={"2": 1.0}))
    journal.close()
    assert list((Path(config.run.dir) / "wandb").glob("offline-run-*/*.wandb"))


def test_wandb_gets_a_validation_as_a_plot_over_k_and_as_lines_over_steps(
    small_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    told: list[tuple[int, dict[str, Any]]] = []

    class Run:
        def log(self, values: dict[str, Any], step: int) -> None:
            told.append((step, values))

        def finish(self) -> None: ...

    monkeypatch.setattr(wandb, "init", lambda **_: Run())
    config = small_config("log.wandb=offline")
    Path(config.run.dir).mkdir()
    journal = Journal(config, 0)
    journal.write(row(1))
    journal.write(row(2, valid={"2": 2.5, "8": 2.25}))
    journal.saved(2)
    journal.close()
    (_, plain), (step, values) = told
    assert not [name for name in plain if name.startswith("valid")]
    assert step == 2
    assert (values["valid/bits_per_byte_k2"], values["valid/bits_per_byte_k8"]) == (2.5, 2.25)
    plot = values["valid/over_k"]
    assert plot.table.columns == ["K", "bits per byte"]
    assert plot.table.data == [[2, 2.5], [8, 2.25]]


def test_wandb_online_without_a_key_falls_back_with_one_warning(
    small_config: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    config = small_config("log.wandb=online")
    Path(config.run.dir).mkdir()
    journal = Journal(config, 0)
    journal.write(row(1))
    journal.close()
    assert capsys.readouterr().err.count("warning: wandb has no API key") == 1
    assert list((Path(config.run.dir) / "wandb").glob("offline-run-*"))


def test_wandb_that_breaks_stops_nothing(
    small_config: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    def broken(**_: object) -> None:
        raise RuntimeError("no disk, no network, no luck")

    monkeypatch.setattr(wandb, "init", broken)
    config = small_config("log.wandb=offline")
    Path(config.run.dir).mkdir()
    journal = Journal(config, 0)
    journal.write(row(1))
    journal.close()
    assert "no luck" in capsys.readouterr().err
    assert json.loads((Path(config.run.dir) / "metrics.jsonl").read_text(encoding="utf-8"))["step"] == 1


def test_training_does_not_wait_for_a_server_that_does_not_answer(
    small_config: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(wandb_log, "INIT_TIMEOUT_S", 2)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    config = small_config("log.wandb=online")
    Path(config.run.dir).mkdir()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
        journal = Journal(config, 0)
        for step in range(1, 9):
            journal.write(row(step))
        assert len(read_records(Path(config.run.dir))) == 8
        assert "reached" not in capsys.readouterr().err, "training is done, and wandb still waits"
        journal.close()
    assert capsys.readouterr().err.count("wandb cannot be reached") == 1
    assert list((Path(config.run.dir) / "wandb").glob("offline-run-*"))


def test_wandb_that_hangs_is_given_up_where_it_falls_behind(
    small_config: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    stuck = threading.Event()
    monkeypatch.setattr(wandb, "init", lambda **_: stuck.wait())
    monkeypatch.setattr(tracker, "CLOSE_TIMEOUT_S", 1)
    monkeypatch.setattr(tracker, "WAITING_RECORDS", 3)
    config = small_config("log.wandb=offline")
    Path(config.run.dir).mkdir()
    journal = Journal(config, 0)
    for step in range(1, 9):
        journal.write(row(step))
    journal.close()
    stuck.set()
    assert capsys.readouterr().err.count("wandb is given up (it is 3 records behind)") == 1
    assert len(read_records(Path(config.run.dir))) == 8


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_full_disk_behind_the_log_ends_nothing(config: Config, monkeypatch: pytest.MonkeyPatch, stream: str) -> None:
    with open("/dev/full", "w", encoding="utf-8", buffering=1) as full:
        monkeypatch.setattr(sys, stream, full)
        journal = Journal(config, 0)
        journal.write(row(1))
        print_line("warning", sys.stderr)
        journal.close()
        monkeypatch.undo()
        with pytest.raises(OSError, match="No space"):
            full.flush()
        with contextlib.suppress(OSError):
            full.close()
    assert len(read_records(Path(config.run.dir))) == 1


def test_the_peak_rate_of_a_cpu_is_stated_or_not_known() -> None:
    cpu = torch.device("cpu")
    assert peak_flops(2.0, cpu) == (2e12, "log.peak_tflops")
    rate, source = peak_flops(None, cpu)
    assert rate is None, "a figure that changes from start to start is none"
    assert "log.peak_tflops" in source


def test_wandb_that_dies_on_the_way_is_given_up_once(
    small_config: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    class Dying:
        def log(self, *_: object, **__: object) -> None:
            raise ConnectionResetError("Connection lost")

    monkeypatch.setattr(wandb, "init", lambda **_: Dying())
    config = small_config("log.wandb=offline")
    Path(config.run.dir).mkdir()
    journal = Journal(config, 0)
    journal.write(row(1))
    journal.write(row(2))
    journal.saved(2)
    journal.close()
    assert capsys.readouterr().err.count("Connection lost") == 1
    assert len(read_records(Path(config.run.dir))) == 2


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A10", 125), ("NVIDIA L4", 121), ("NVIDIA L40S", 362),
        ("NVIDIA GB200", 2500), ("NVIDIA B200", 2250), ("AMD Instinct MI300X", 1307),
        ("NVIDIA RTX 6000 Ada Generation", 364),
    ],
)  # fmt: skip
def test_peak_rate_by_name(monkeypatch: pytest.MonkeyPatch, name: str, tflops: float) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: name)
    rate, source = peak_flops(None, torch.device("cuda", 0))
    assert rate == tflops * 1e12
    assert source.startswith("data sheet of ")


def test_an_unknown_card_is_measured_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA A1000")
    monkeypatch.setattr(
        "megassm.run.journal._measured_flops", lambda device, size, dtype: asked.append((size, dtype)) or 1e14
    )
    rate, source = peak_flops(None, torch.device("cuda", 0))
    assert (rate, asked) == (1e14, [(8192, torch.bfloat16)])
    assert "bf16" in source
    assert "A1000" in source
