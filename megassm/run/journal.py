"""The journal: metrics.jsonl is the truth, one object an update; a readable line now and then; wandb and
TensorBoard get the same.

Only the main rank keeps one. On resume, records of updates that the checkpoint does not hold are dropped, for they are
about to be made again: the file is always one curve without a seam. Whatever fails here - a full disk, a closed
terminal, wandb - training goes on.
"""

from __future__ import annotations

import re
import resource
import sys
import time
from pathlib import Path

import torch

from megassm.cli.arguments import print_line
from megassm.config.schema import Config
from megassm.cost import PEAK_TFLOPS
from megassm.run.console import format_record, is_validated
from megassm.run.directory import METRICS
from megassm.run.fence import Fence
from megassm.run.lines import Record
from megassm.run.records import RecordFile, cut_after, newest_record, read_records
from megassm.run.tensorboard_log import TensorBoardSink
from megassm.run.tracker import Tracker
from megassm.run.wandb_log import WandbSink

__all__ = ["METRICS", "Journal", "Record", "peak_flops", "peak_memory_bytes", "read_records"]


class Journal:
    """Writes a run's metrics."""

    def __init__(self, config: Config, done_steps: int, fence: Fence | None = None) -> None:
        """Continues the journal of `config.run.dir` after `done_steps` updates, as long as `fence` holds."""
        self._config = config
        self._fence = fence
        path = Path(config.run.dir) / METRICS
        cut_after(path, done_steps)
        _tell_gap(path, done_steps)
        self._file = RecordFile(path, _warn)
        self._trackers: list[Tracker] = []
        if config.log.wandb != "disabled":
            self._trackers.append(Tracker(WandbSink(config, done_steps, _warn), _warn))
        if config.log.tensorboard:
            self._trackers.append(Tracker(TensorBoardSink(config, done_steps), _warn))
        self._first_step = done_steps
        self._started = time.monotonic()

    def write(self, record: Record) -> None:
        """Appends one update's record, and prints it where a line is due.

        Raises:
            SupersededError: a newer start of the run has taken over.
        """
        if self._fence is not None:
            self._fence.check()
        self._file.write(record)
        for tracker in self._trackers:
            tracker.tell(record)
        step, steps = record["step"], self._config.train.steps
        if step % self._config.log.every_steps == 0 or step in (self._first_step + 1, steps) or is_validated(record):
            elapsed = time.monotonic() - self._started
            eta = elapsed / (step - self._first_step) * (steps - step)
            print_line(format_record(record, steps, eta))

    def saved(self, step: int) -> None:
        """To be called when a checkpoint of `step` updates has been published."""
        for tracker in self._trackers:
            tracker.saved(step)

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


def _tell_gap(path: Path, done_steps: int) -> None:
    """Says which updates a journal lacks, though a checkpoint holds them: a job was killed while its disk was full."""
    newest = newest_record(path)
    last = newest["step"] if newest else 0
    if last < done_steps:
        which = f"update {done_steps}" if last + 1 == done_steps else f"updates {last + 1:,} to {done_steps:,}"
        _warn(f"{path}: has no record of {which}, which the checkpoint holds; curves have a gap there")


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory so far: allocated on a CUDA device, resident in this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def peak_flops(peak_tflops: float | None, device: torch.device) -> tuple[float | None, str]:
    """(FLOP/s of one rank's device, where the figure is from), the denominator of model FLOPs utilisation.

    `peak_tflops` is the knob log.peak_tflops. Without it a CPU has no such rate: what a product takes depends on the
    machine's other work, and was seen to differ by a factor of nine between two starts.
    """
    if peak_tflops is not None:
        return peak_tflops * 1e12, "log.peak_tflops"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        words = set(re.split(r"[\s-]+", name))
        for part, tflops in PEAK_TFLOPS.items():
            if words.issuperset(part.split()):
                return tflops * 1e12, f"data sheet of {part}, dense bf16"
        measured = _measured_flops(device, 8192, torch.bfloat16)
        return measured, f"measured: bf16 product of 8192 x 8192 matrices, for no data sheet of {name} is known here"
    return None, "a CPU's is not known; log.peak_tflops states it"


def _measured_flops(device: torch.device, size: int, dtype: torch.dtype, repeats: int = 5) -> float:
    matrix = torch.randn(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        (matrix @ matrix)[0, 0].item()
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


def _warn(message: str) -> None:
    print_line(f"warning: {message}", sys.stderr)
