"""This process among the others: its rank, its device, and the few messages that are not DeepSpeed's.

Works under the `deepspeed` launcher, under `torchrun`, and without either (one process): no MPI, no ports to choose.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

from megassm.errors import UserError


class World(NamedTuple):
    """Coordinates of this process."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def join_world(device: Literal["auto", "cpu", "cuda"], timeout_s: int) -> World:
    """Joins the process group that the launcher's environment describes; alone without a launcher.

    Raises:
        UserError: CUDA is asked for and absent, or there are more local ranks than devices.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    place = _pick_device(device, int(os.environ.setdefault("LOCAL_RANK", "0")))  # DeepSpeed insists on it
    if place.type == "cpu":
        _share_cores(size)
    backend = "gloo" if place.type == "cpu" else "cpu:gloo,cuda:nccl"
    timeout = timedelta(seconds=timeout_s)
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ:
        dist.init_process_group(backend, rank=rank, world_size=size, timeout=timeout)
    else:
        dist.init_process_group(
            backend, store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1, timeout=timeout
        )
    return World(dist.get_rank(), dist.get_world_size(), place)


def leave_world() -> None:
    """Ends the process group; leaving without it aborts now and then."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _pick_device(device: Literal["auto", "cpu", "cuda"], local_rank: int) -> torch.device:
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if count == 0:
        raise UserError("train.device = cuda: torch finds no CUDA device here (0 CUDA devices); set train.device=cpu")
    if local_rank >= count:
        raise UserError(
            f"local rank {local_rank} has no device: this machine has {count} CUDA devices. Start at most {count} "
            "ranks on it, or set train.device=cpu"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def is_first_to_refuse() -> bool:
    """True for one rank only: the one that should say why the job ends; the others would repeat or mask it."""
    try:
        return bool(dist.distributed_c10d._get_default_store().add("refusals", 1) == 1)
    except RuntimeError:  # the rank that holds the store has left, and so has spoken
        return False


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank has gone, as opposed to a mistake of this one."""
    text = str(error)
    return isinstance(error, dist.DistError) or ("gloo" in text and ("onnection" in text or "imed out" in text))


def _share_cores(world_size: int) -> None:
    """Divides this machine's cores among its ranks, where nobody has said otherwise; torch takes all for each."""
    if "OMP_NUM_THREADS" not in os.environ:
        # torchrun calls the ranks on this machine LOCAL_WORLD_SIZE, deepspeed LOCAL_SIZE
        local = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", str(world_size)))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(local)))


def gather_rows(row: Sequence[float], world: World) -> list[list[float]]:
    """Every rank's `row` of float64 numbers, in the order of ranks, on every rank."""
    mine = torch.tensor(row, dtype=torch.float64)
    rows = [torch.empty_like(mine) for _ in range(world.size)]
    dist.all_gather(rows, mine)  # over gloo also on CUDA: a few bytes, no device synchronisation of its own
    return [other.tolist() for other in rows]


def barrier() -> None:
    gather_rows([0.0], World(dist.get_rank(), dist.get_world_size(), torch.device("cpu")))
