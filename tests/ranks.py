"""Runs a function on N processes joined by gloo, and hands back what each returned."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from typing import Any


def run_on_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 400) -> list[Any]:
    """`function(*arguments)` on every rank, in the environment a launcher makes; results in the order of ranks.

    `function` must be importable by name. A failing rank fails the test with its traceback.
    """
    context = multiprocessing.get_context("forkserver")  # a rank starts as fast as a fork, yet from a clean process
    context.set_forkserver_preload(["megassm.train.loop", "torch._dynamo"])
    queue = context.Queue()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    processes = [
        context.Process(
            target=_rank,
            args=(rank, environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}, queue, function, arguments),
        )
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    try:
        answers = dict(_answer(queue.get(timeout=timeout_s)) for _ in processes)
    finally:
        for process in processes:
            process.join(timeout=20)
            process.kill()
    return [answers[rank] for rank in range(world_size)]


def _answer(message: tuple[int, bool, Any]) -> tuple[int, Any]:
    rank, succeeded, answer = message
    assert succeeded, f"rank {rank} failed:\n{answer}"
    return rank, answer


def _rank(rank: int, environment: dict[str, str], queue: Any, function: Any, arguments: Any) -> None:
    os.environ.clear()  # what the server began with
    os.environ |= environment
    try:
        queue.put((rank, True, function(*arguments)))
    except BaseException:
        queue.put((rank, False, traceback.format_exc()))
