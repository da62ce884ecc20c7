"""The journal: metrics.jsonl is the truth, one object an update; a readable line now and then; wandb gets the same.

Only the main rank keeps one. On resume, rows of updates that the checkpoint does not hold are dropped, for they are
about to be made again: the file is always one curve without a seam. Whatever fails here - a full disk, a closed
terminal, wandb - training goes on.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path

import torch

from megassm.cli import print_line
from megassm.config import Config
from megassm.cost import PEAK_TFLOPS
from megassm.rows import METRICS, Row, RowFile, cut_after, read_rows
from megassm.tracker import Tracker

__all__ = [
    "METRICS", "Journal", "Row", "duration", "format_row", "peak_flops", "peak_memory_bytes", "rate",
    "read_rows", "tokens_of_planned",
]  # fmt: skip


class Journal:
    """Writes a run's metrics."""

    def __init__(self, config: Config, done_steps: int) -> None:
        """Continues the journal of `config.run.dir` after `done_steps` updates."""
        self._config = config
        path = Path(config.run.dir) / METRICS
        cut_after(path, done_steps)
        self._file = RowFile(path, _warn)
        self._tracker = None if config.log.wandb == "disabled" else Tracker(config, done_steps, _warn)
        self._first_step = done_steps
        self._started = time.monotonic()

    def write(self, row: Row) -> None:
        """Appends one update's row, and prints it where a line is due."""
        self._file.write(row)
        if self._tracker is not None:
            self._tracker.tell(row)
        step, steps = row["step"], self._config.train.steps
        if step % self._config.log.every_steps == 0 or step in (self._first_step + 1, steps) or "valid" in row:
            elapsed = time.monotonic() - self._started
            eta = elapsed / (step - self._first_step) * (steps - step)
            print_line(format_row(row, steps, eta))

    def close(self) -> None:
        self._file.close()
        if self._tracker is not None:
            self._tracker.close()


def format_row(row: Row, steps: int, eta_s: float) -> str:
    """One line for people, and one more where validation ran."""
    parts = [
        f"step {row['step']:>{len(str(steps))}}/{steps}",
        tokens_of_planned(row, steps),
        f"loss {_number(row['loss']):.4f}",
        f"{_number(row['bits_per_byte']):.3f} bits/byte",
        f"K {row['k']:>2}",
        f"lr {row['lr']:.1e}",
        f"norm {_number(row['grad_norm']):.2f}",
        f"{rate(row['tokens_per_s'])} tok/s",
        f"MFU {row['mfu']:.1%}",
        _phases(row),
        f"{row['peak_memory_bytes'] / 2**30:.1f} GiB",
        f"eta {duration(eta_s)}",
    ]
    line = " | ".join(parts)
    if "valid" in row:
        scores = "  ".join(f"K={k}: {value:.3f}" for k, value in row["valid"].items())
        line += f"\n  validation bits/byte   {scores}"
    return line


def tokens_of_planned(row: Row, steps: int) -> str:
    """Such as "1.3/10.0 B tokens": those seen, of those that `steps` updates see."""
    planned = row["tokens"] / row["step"] * steps
    size, name = next(unit for unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"), (1, "")) if planned >= unit[0])
    digits = 1 if size > 1 else 0
    return f"{row['tokens'] / size:.{digits}f}/{planned / size:.{digits}f} {name + ' ' if name else ''}tokens"


def rate(tokens_per_s: float) -> str:
    """Such as 3,810 or 45.0M."""
    return f"{tokens_per_s / 1e6:,.1f}M" if tokens_per_s >= 1e6 else f"{tokens_per_s:,.0f}"


def _phases(row: Row) -> str:
    """Where an update's time went: its phases where they were timed, else the wait for data."""
    phases = row.get("phases_s")
    if not phases:
        return f"data wait {row['data_wait_s'] / row['step_s']:.0%}"
    short = {"forward": "fwd", "backward": "bwd", "update": "upd", "communication": "comm"}
    return " ".join(f"{short.get(name, name)} {seconds / row['step_s']:.0%}" for name, seconds in phases.items())


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


def _warn(message: str) -> None:
    print_line(f"warning: {message}", sys.stderr)


def _number(value: float | None) -> float:
    """A figure of a row; null where it was not finite."""
    return float("nan") if value is None else value


def duration(seconds: float) -> str:
    """Such as 2m05s, 3h20m, 4d06h."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24}d{hours % 24:02d}h"
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
