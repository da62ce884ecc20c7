"""How long a computation takes, on any device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def timed_seconds(compute: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds of `repeats` runs, one before them to warm caches left out."""
    seconds = []
    for _ in range(repeats + 1):
        started = time.perf_counter()
        compute()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    return seconds[1:]
