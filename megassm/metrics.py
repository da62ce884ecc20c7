"""The journal: metrics.jsonl is the truth, one object an update; a readable line now and then; wandb gets the same.

Only the main rank keeps one. On resume, rows of updates that the checkpoint does not hold are dropped, for they are
about to be made again: the file is always one curve without a seam.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from megassm.config import Config
from megassm.cost import PEAK_TFLOPS
from megassm.durable import write_atomically
from megassm.fence import Fence
from megassm.rundir import METRICS

Row = dict[str, Any]


class Journal:
    """Writes a run's metrics."""

    def __init__(self, config: Config, done_steps: int, fence: Fence | None = None) -> None:
        """Continues the journal of `config.run.dir` after `done_steps` updates, as long as `fence` holds."""
        self._config = config
        self._fence = fence
        self._path = Path(config.run.dir) / METRICS
        self._keep_rows(done_steps)
        self._file: IO[str] = self._path.open("a", encoding="utf-8")
        self._wandb = _start_wandb(config, done_steps)
        self._first_step = done_steps
        self._started = time.monotonic()

    def _keep_rows(self, done_steps: int) -> None:
        """Drops rows after `done_steps`, and a last line that a kill cut in half.

        The file is always a new one: what an older start may still append to its own is seen by nobody.
        """
        text = self._path.read_text(encoding="utf-8", errors="replace") if self._path.exists() else ""
        kept = [line for line in text.splitlines() if (row := _parse(line)) is not None and row["step"] <= done_steps]
        write_atomically(self._path, "".join(f"{line}\n" for line in kept).encode())

    def write(self, row: Row) -> None:
        """Appends one update's row, and prints it where a line is due.

        Raises:
            SupersededError: a newer start of the run has taken over.
        """
        if self._fence is not None:
            self._fence.check()
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        step, steps = row["step"], self._config.train.steps
        if self._wandb is not None:
            self._tell_wandb(lambda run: run.log(_flat(row) | _curve_over_budgets(row), step=step))
        if step % self._config.log.every_steps == 0 or step in (self._first_step + 1, steps) or "valid" in row:
            elapsed = time.monotonic() - self._started
            eta = elapsed / (step - self._first_step) * (steps - step)
            print(format_row(row, steps, eta), flush=True)

    def close(self) -> None:
        self._file.close()
        if self._wandb is not None:
            self._tell_wandb(lambda run: run.finish())

    def _tell_wandb(self, message: Callable[[Any], None]) -> None:
        """Gives wandb up where it fails: a launcher that ends a job ends wandb's process with it."""
        try:
            message(self._wandb)
        except Exception as error:
            import wandb

            _warn(f"wandb is gone ({error}); {METRICS} has everything")
            self._wandb = None
            with contextlib.suppress(Exception):
                wandb.teardown()  # it would try again, loudly, when Python exits


def format_row(row: Row, steps: int, eta_s: float) -> str:
    """One line for people."""
    parts = [
        f"step {row['step']:>{len(str(steps))}}/{steps}",
        f"loss {_number(row['loss']):.4f}",
        f"{_number(row['bits_per_byte']):.3f} bits/byte",
        f"K {row['k']:>2}",
        f"lr {row['lr']:.2e}",
        f"norm {_number(row['grad_norm']):.3f}",
        f"{row['tokens_per_s']:,.0f} tok/s",
        f"MFU {row['mfu']:.1%}",
        f"data wait {row['data_wait_s'] / row['step_s']:.1%}",
        f"{row['peak_memory_bytes'] / 2**30:.2f} GiB",
        f"eta {_duration(eta_s)}",
    ]
    line = " | ".join(parts)
    if "valid" in row:
        scores = "  ".join(f"K={k}: {value:.3f}" for k, value in row["valid"].items())
        line += f"\n  validation bits/byte   {scores}"
    return line


def read_rows(run_dir: Path) -> list[Row]:
    """A run's journal, oldest update first."""
    lines = (run_dir / METRICS).read_text(encoding="utf-8", errors="replace").splitlines()
    return [row for line in lines if (row := _parse(line)) is not None]


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory so far: allocated on a CUDA device, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_flops(peak_tflops: float | None, device: torch.device) -> tuple[float, str]:
    """(FLOP/s of one rank's device, where the figure is from), the denominator of model FLOPs utilisation.

    `peak_tflops` is the knob log.peak_tflops.
    """
    if peak_tflops is not None:
        return peak_tflops * 1e12, "log.peak_tflops"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, tflops in PEAK_TFLOPS.items():
            if all(word in name for word in part.split()):
                return tflops * 1e12, f"data sheet of {part}, dense bf16"
    return _measured_flops(device), "measured: float32 product of 1024 x 1024 matrices on one rank"


def _measured_flops(device: torch.device, size: int = 1024, repeats: int = 5) -> float:
    matrix = torch.randn(size, size, device=device)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


def _start_wandb(config: Config, done_steps: int) -> Any:
    """A wandb run, or None. It never asks, never waits long, and never stops a training run."""
    mode = config.log.wandb
    if mode == "disabled":
        return None
    os.environ.setdefault("WANDB_SILENT", "true")
    try:
        import wandb

        if mode == "online" and not wandb.api.api_key:
            _warn("wandb has no API key (run `wandb login`); this run is logged offline")
            mode = "offline"
        settings = wandb.Settings(silent=True, console="off", init_timeout=30)
        arguments: dict[str, Any] = {
            "project": config.log.wandb_project,
            "name": Path(config.run.dir).name,
            "dir": config.run.dir,
            "config": config.model_dump(mode="json") | {"resumed_from_step": done_steps},
            "settings": settings,
        }
        try:
            return wandb.init(mode=mode, **arguments)
        except Exception as error:
            if mode == "offline":
                raise
            _warn(f"wandb cannot be reached ({error}); this run is logged offline")
            return wandb.init(mode="offline", **arguments)
    except Exception as error:
        _warn(f"wandb is unusable ({error}); {METRICS} has everything")
        return None


def _flat(row: Row) -> Row:
    """A row as wandb draws it: numbers only, one curve a K, one a source."""
    flat = {name: value for name, value in row.items() if not isinstance(value, (dict, list))}
    flat |= {f"epochs/{source}": value for source, value in row.get("epochs", {}).items()}
    return flat | {f"valid/bits_per_byte_k{k}": value for k, value in row.get("valid", {}).items()}


def _curve_over_budgets(row: Row) -> Row:
    """A validation as a plot over K beside the lines over steps that `_flat` makes; wandb keeps one a step."""
    if not row.get("valid"):
        return {}
    import wandb

    table = wandb.Table(columns=["K", "bits per byte"], data=[[int(k), bits] for k, bits in row["valid"].items()])
    return {"valid/over_k": wandb.plot.line(table, "K", "bits per byte", title="validation bits per byte over K")}


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def _parse(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and type(row.get("step")) is int else None


def _number(value: float | None) -> float:
    """A figure of a row; null where it was not finite."""
    return float("nan") if value is None else value


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
