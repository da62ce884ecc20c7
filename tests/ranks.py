"""Runs a function on N processes joined by gloo, and hands back what each returned."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from megassm.config.schema import Config
    from megassm.parallel.engine import Engine
    from megassm.parallel.state import Kind, State
    from megassm.parallel.world import World


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


def whole_state(engine: Engine, kinds: Sequence[Kind]) -> State:
    """`Engine.read_state` of all ranks, on every rank: of all parameters."""
    import torch.distributed as dist

    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, engine.read_state(kinds))
    return {name: state for rank in ranks for name, state in rank.items()}


def first_of(config: Config, size: int, device: torch.device) -> World:
    """The first rank of a job whose others are not there: what they would send says nothing."""
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megassm.parallel.mesh import mesh_of
    from megassm.parallel.world import World

    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    mesh = mesh_of(config, size)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    kinds = (mesh.tensor_groups(), mesh.sequence_groups(), mesh.replica_groups(), mesh.reader_groups())
    groups = [dist.new_group(next(group for group in kind if 0 in group)) for kind in kinds]
    return World(0, device, mesh, *groups, b"")


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
