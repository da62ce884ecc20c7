"""Which device a rank computes on, and what the process needs of its system for a job of many."""

from __future__ import annotations

import os
import resource
import sys
from typing import Any, Literal

import numpy.typing as npt
import torch

from megassm.cli.arguments import print_line
from megassm.errors import UserError
from megassm.ops import transfer

FILES_BESIDE_RANKS, FILES_A_RANK = 256, 2
"""Files and connections that a process holds open: gloo has two to every other rank (seen: 23 + 2 N); the rest is data,
logs and libraries."""


def pick_device(device: Literal["auto", "cpu", "cuda"], local_rank: int, rank: int) -> torch.device:
    """The device of this rank, made torch's current one.

    The ranks of a machine may see all of its devices, or each its own alone (`srun --gpus-per-task=1`): the device is
    the local rank modulo those in sight. That two ranks share one shows when they meet (`shared_device`).

    Raises:
        UserError: CUDA is asked for and absent.
    """
    if device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        if device == "cuda":
            raise UserError(
                "train.device = cuda: torch finds no CUDA device here (0 CUDA devices); set train.device=cpu"
            )
        if torch.version.cuda is not None and rank == 0:
            print_line(
                f"warning: this torch is built for CUDA {torch.version.cuda} and finds no GPU here: training on the "
                "CPU. See nvidia-smi and CUDA_VISIBLE_DEVICES; train.device=cuda refuses instead, train.device=cpu is "
                "silent",
                sys.stderr,
            )
        return torch.device("cpu")
    place = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(place)
    return place


def to_device(array: npt.NDArray[Any], device: torch.device) -> torch.Tensor:
    """The array on the device; the process does not wait for the copy."""
    return transfer.to_device(torch.from_numpy(array), device)


def shared_device(error: Exception, place: torch.device) -> UserError | None:
    """What to tell of NCCL's refusal to put two ranks on one device; None if that was not it."""
    if "Duplicate GPU" not in str(error):
        return None
    count, local_ranks = torch.cuda.device_count(), os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE"))
    return UserError(
        f"two ranks compute on one GPU: {local_ranks or 'the'} ranks of {os.uname().nodename} see {count} CUDA "
        f"devices, and this one took {place}. Start one rank for each GPU (--nproc-per-node, --num_gpus, "
        "--ntasks-per-node), or set train.device=cpu"
    )


def raise_file_limit(world_size: int) -> None:
    """Lets the process open as many files as a job of this size needs, where the system's hard limit allows it.

    Raises:
        UserError: it does not.
    """
    needed = FILES_BESIDE_RANKS + FILES_A_RANK * world_size
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or (hard == soft and soft >= needed):
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UserError(
            f"a job of {world_size} ranks opens up to {needed} files and connections a process, and this system "
            f"allows {hard} ({os.uname().nodename}): raise the hard limit (ulimit -Hn; LimitNOFILE= of the batch "
            "system's daemon)"
        )
    wanted = max(needed, min(hard, 65_536) if hard != resource.RLIM_INFINITY else 65_536)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
