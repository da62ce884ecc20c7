"""How long a computation takes and how much memory, on any device."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of every storage that an operator gives, while it lives."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = 0
        self.peak = 0
        self._seen: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.count(leaf.untyped_storage())
        return result

    def count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def freed(_: object) -> None:
            self.live -= size
            del self._seen[key]

        self._seen[key] = weakref.ref(storage, freed)
        self.live += size
        self.peak = max(self.peak, self.live)


def peak_tensor_bytes(own: Iterable[torch.Tensor], compute: Callable[[], object], device: torch.device) -> int:
    """The bytes of `own`, such as a model's weights, and the most that `compute` keeps besides.

    On a CPU these are the bytes of live tensors (workspace inside an operator does not show), so that the figure
    repeats exactly; on CUDA what the allocator had to hold.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        compute()
        torch.cuda.synchronize(device)
        kept = sum(tensor.nbytes for tensor in own)
        return int(kept + torch.cuda.max_memory_allocated(device) - before)
    counter = _LiveBytes()
    for tensor in own:  # operators that work in place return them
        counter.count(tensor.untyped_storage())
    with counter:
        compute()
    return counter.peak


def timed_seconds(compute: Callable[[], object], device: torch.device, repeats: int) -> list[float]:
    """Seconds of `repeats` runs, one before them to warm caches left out."""
    return [seconds_of(compute, device) for _ in range(repeats + 1)][1:]


def seconds_of(
    compute: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter
) -> float:
    """What one run takes by `clock`, to its end on the device."""
    started = clock()
    compute()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - started
