"""Processes that share out the preparation and checking of data; they end with the process that started them."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, as_completed, wait
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, TypeVar

from megassm.errors import UserError

MOST_PROCESSES = 1000
WORTH_A_PROCESS_BYTES = 64 << 20  # of data to read: starting one takes seconds

Item = TypeVar("Item")
Result = TypeVar("Result")


def worker_pool(workers: int, set_up: Callable[..., None] | None = None, *arguments: Any) -> Executor:
    """A pool whose processes call `set_up(*arguments)` when they start; UserError for more than any machine runs."""
    if workers > MOST_PROCESSES:
        raise UserError(f"--workers {workers}: at most {MOST_PROCESSES:,}; give about as many as there are processors")
    # Spawned, not forked: the parent runs the threads of a progress bar.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(set_up, arguments))


def in_processes(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int, on_done: Callable[[Item], None]
) -> list[Result]:
    """`work` of every item, in the order of the items; in this process where one worker is enough."""
    if min(workers, len(items)) <= 1:
        results = []
        for item in items:
            results.append(work(item))
            on_done(item)
        return results
    with worker_pool(min(workers, len(items))) as pool:
        try:
            futures = {pool.submit(work, item): item for item in items}
            for future in as_completed(futures):
                future.result()
                on_done(futures[future])
        except BrokenProcessPool:
            raise worker_lost("run the same command again with fewer --workers") from None
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [future.result() for future in futures]


class Crew:
    """Worker processes for every phase of a job; one worker is this process itself. A context manager."""

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self._pool: Executor | None = None  # started with the first work

    def run(
        self, work: Callable[[Item], Result], items: Iterable[Item], on_done: Callable[[Item, Result], None]
    ) -> None:
        """`work` of every item; `on_done` is told of each as it is done. Takes few items ahead of the work.

        Raises:
            UserError: from the work, or a worker was killed.
        """
        if self.workers == 1:
            for item in items:
                on_done(item, work(item))
            return
        self._pool = self._pool or worker_pool(self.workers)
        in_flight: dict[Future[Result], Item] = {}

        def collect() -> None:
            for future in wait(in_flight, return_when=FIRST_COMPLETED).done:
                item = in_flight.pop(future)
                on_done(item, future.result())

        try:
            for item in items:
                in_flight[_submit(self._pool, work, item)] = item
                while len(in_flight) >= self.workers + 2:
                    collect()
            while in_flight:
                collect()
        except BrokenProcessPool:
            raise worker_lost("run the same command again with fewer --workers: finished parts are kept") from None

    def __enter__(self) -> Crew:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def _submit(pool: Executor, work: Callable[[Item], Result], item: Item) -> Future[Result]:
    try:
        return pool.submit(work, item)
    except (ValueError, OSError):
        # The pool starts workers as work comes. Where one dies meanwhile, it closes the pipes under the
        # one that starts, which then fails with either of these.
        raise BrokenProcessPool from None


def worthwhile(workers: int, data_bytes: int) -> int:
    """The number of processes, at most `workers`, that this much data keeps busy."""
    return min(workers, 1 + data_bytes // WORTH_A_PROCESS_BYTES)


def worker_lost(way_out: str) -> UserError:
    return UserError(f"a worker process was killed or cannot start (out of memory?); {way_out}")


def _start(set_up: Callable[..., None] | None, arguments: tuple[Any, ...]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once and silently: what it writes is atomic
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if set_up is not None:
        set_up(*arguments)


def _end_with_parent() -> None:
    """A worker of a killed parent would wait for work for ever: it holds both ends of the pipe."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
