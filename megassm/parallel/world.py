"""This process among the others: its rank, its device, and the few messages that are not DeepSpeed's.

Works under the `deepspeed` launcher, under `torchrun`, and without either (one process): no MPI, no ports to choose.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
import torch.distributed.nn  # see `leave_world`
from torch._C._distributed_c10d import HashStore

from megassm.cli.arguments import cores, error_text
from megassm.config.schema import Config
from megassm.errors import UserError
from megassm.parallel.background import in_background
from megassm.parallel.device import pick_device, raise_file_limit, shared_device
from megassm.parallel.job_store import meet
from megassm.parallel.mesh import Coordinates, Mesh, mesh_of
from megassm.parallel.phases import count_waits
from megassm.parallel.watchdog import RankProgress

T = TypeVar("T")
Group = dist.ProcessGroup
NCCL_GRACE = timedelta(minutes=2)
PEERS_TIMEOUT = timedelta(hours=1)
"""A tool's other ranks wait this long, at most, for the one that measures."""


@dataclass(frozen=True)
class World:
    """Coordinates of this process, and the groups it communicates in (see `megassm.parallel.mesh`)."""

    rank: int
    device: torch.device
    mesh: Mesh
    tensor: Group
    sequence: Group
    replicas: Group
    readers: Group
    secret: bytes = field(repr=False)
    """Known to the ranks of this job and to nobody else."""
    progress: RankProgress = field(default_factory=RankProgress)

    @property
    def size(self) -> int:
        return self.mesh.size

    @property
    def coordinates(self) -> Coordinates:
        return self.mesh.coordinates(self.rank)

    @property
    def is_main(self) -> bool:
        return self.rank == 0


class Peers(NamedTuple):
    """This process among those that a tool runs as: each holds the whole model and takes a share of the text."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def join_peers(device: Literal["auto", "cpu", "cuda"]) -> Peers:
    """Joins the other processes of a tool; alone without a launcher.

    Raises:
        UserError: CUDA is asked for and absent, or two ranks have the same device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; use --device cpu")
    rank, place = _join(device, PEERS_TIMEOUT)
    return Peers(rank, dist.get_world_size(), place)


def join_world(config: Config, progress: RankProgress | None = None) -> World:
    """Joins the process group that the launcher's environment describes; alone without a launcher.

    `progress` is where this rank notes what it is at, if it does so already.

    Raises:
        UserError: CUDA is asked for and absent, two ranks have the same device, or a tensor group would span machines.
    """
    count_waits()
    timeout = timedelta(seconds=config.parallel.timeout_s)
    rank, device = _join(config.train.device, timeout)
    timeout = _group_timeout(device.type == "cuda", timeout)
    mesh = mesh_of(config, dist.get_world_size())
    _check_machines(mesh)
    tensor, sequence, replicas, readers = (
        dist.new_subgroups_by_enumeration(groups, timeout=timeout)[0]  # type: ignore[no-untyped-call]
        for groups in (mesh.tensor_groups(), mesh.sequence_groups(), mesh.replica_groups(), mesh.reader_groups())
    )
    secret = bytes(map(int, gather_rows([*secrets.token_bytes(32)])[0]))
    return World(rank, device, mesh, tensor, sequence, replicas, readers, secret, progress or RankProgress())


def _check_machines(mesh: Mesh) -> None:
    local = local_ranks(mesh.size)
    if local % mesh.tensor:
        raise UserError(
            f"parallel.tensor = {mesh.tensor}: must divide the {local} ranks of a machine, or a tensor group would "
            "span machines; use a divisor, and parallel.sequence or ZeRO for the rest"
        )


def _join(device: Literal["auto", "cpu", "cuda"], timeout: timedelta) -> tuple[int, torch.device]:
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    place = pick_device(device, int(os.environ["LOCAL_RANK"]), rank)
    if place.type == "cpu":
        _share_cores(size)
    if dist.is_initialized():  # a process may hold several models, one after another
        return dist.get_rank(), place
    raise_file_limit(size)
    cuda = place.type == "cuda"
    backend, bound = ("cpu:gloo,cuda:nccl", place) if cuda else ("gloo", None)
    alone = "RANK" not in os.environ or "MASTER_ADDR" not in os.environ
    if alone:
        rank, size = 0, 1

    def join() -> None:
        store = HashStore() if alone else meet(rank, size, local_ranks(size) == size, timeout)
        dist.init_process_group(
            backend, store=store, rank=rank, world_size=size, timeout=_group_timeout(cuda, timeout), device_id=bound
        )

    try:  # in the background, so that signals are heard here meanwhile: a launcher kills a deaf rank after 30 s
        in_background(join).result()
    except dist.DistBackendError as error:
        raise shared_device(error, place) or error from None
    return dist.get_rank(), place


def _group_timeout(cuda: bool, timeout: timedelta) -> timedelta:
    """NCCL's watchdog would end a process without a word of where it was: `megassm.parallel.watchdog` must be first."""
    return timeout + NCCL_GRACE if cuda else timeout


def leave_world() -> None:
    """Ends the process group, and its threads; leaving without it aborts now and then.

    The group must not outlive this call: `torch.distributed.nn` has it as its functions' default where it is imported
    while there is one, so it is imported before.
    """
    if dist.is_initialized():
        dist.destroy_process_group()


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank has gone, as opposed to a mistake of this one."""
    text = str(error)
    return isinstance(error, dist.DistError) or ("gloo" in text and ("onnection" in text or "imed out" in text))


def _share_cores(world_size: int) -> None:
    """Divides the cores that this process may use among the ranks here; torch would take all of the machine for each.

    srun says how many are each rank's. OMP_NUM_THREADS is respected where a person has set it: torchrun sets it to 1
    for every job that has not.
    """
    if "OMP_NUM_THREADS" in os.environ and not _set_by_torchrun("OMP_NUM_THREADS"):
        return
    started_by_srun = os.environ.get("SLURM_STEP_NUM_TASKS") == str(world_size)  # not one torchrun a node
    of_srun = os.environ.get("SLURM_CPUS_PER_TASK", "") if started_by_srun else ""
    own = int(of_srun) if of_srun.isdecimal() else cores() // local_ranks(world_size)
    torch.set_num_threads(max(1, min(own, cores())))


def _set_by_torchrun(name: str) -> bool:
    """Whether torchrun has set a variable for its ranks that it was not started with itself."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return False
    try:
        started_with = Path(f"/proc/{os.getppid()}/environ").read_bytes().split(b"\0")
    except OSError:
        return False
    return not any(variable.startswith(f"{name}=".encode()) for variable in started_with)


def local_ranks(world_size: int) -> int:
    """Ranks on this machine; torchrun calls them LOCAL_WORLD_SIZE, deepspeed LOCAL_SIZE."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", world_size)))


def gather_rows(row: Sequence[float]) -> list[list[float]]:
    """Every rank's `row` of float64 numbers, in the order of ranks, on every rank."""
    mine = torch.tensor(row, dtype=torch.float64)
    rows = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(rows, mine)  # over gloo also on CUDA: a few bytes, no device synchronisation of its own
    return [other.tolist() for other in rows]


def gather_at_first(row: Sequence[float]) -> list[list[float]] | None:
    """Every rank's `row`, in the order of ranks, on the first rank; None on the others. All rows are as long.

    By a tree: a thousand ranks need ten messages one after another, where a ring, which `gather_rows` is, needs as many
    as there are ranks.
    """
    rank, size, bit = dist.get_rank(), dist.get_world_size(), 1
    rows = torch.tensor([row], dtype=torch.float64)
    while bit < size:
        if rank & bit:
            dist.send(rows, rank - bit)
            return None
        if rank + bit < size:
            more = torch.empty(min(bit, size - rank - bit), rows.shape[1], dtype=torch.float64)
            dist.recv(more, rank + bit)
            rows = torch.cat((rows, more))
        bit *= 2
    return rows.tolist()


def from_first(row: Sequence[float] | None, count: int) -> list[float]:
    """The first rank's `row` of `count` float64 numbers, on every rank; by a tree too."""
    numbers = torch.zeros(count, dtype=torch.float64) if row is None else torch.tensor(row, dtype=torch.float64)
    dist.broadcast(numbers, 0)
    return numbers.tolist()


def sum_rows(row: Sequence[float]) -> list[float]:
    """The sums over all ranks of float64 numbers, on every rank."""
    total = torch.tensor(row, dtype=torch.float64)
    dist.all_reduce(total)
    return total.tolist()


def broadcast_array(array: npt.NDArray[np.int64], group: Group) -> npt.NDArray[np.int64]:
    """The array of the group's first rank, on all of its ranks."""
    tensor = torch.from_numpy(array)
    dist.broadcast(tensor, group=group, group_src=0)
    return tensor.numpy()


def gather_texts(text: str) -> list[str]:
    """Every rank's text, in the order of ranks, on every rank; almost always empty, and then one small message."""
    raw = text.encode(errors="surrogateescape")  # a path may not be UTF-8
    longest = int(max(row[0] for row in gather_rows([len(raw)])))
    if longest == 0:
        return [""] * dist.get_world_size()
    rows = gather_rows([*raw, *([0] * (longest - len(raw)))])
    return [bytes(int(byte) for byte in row).rstrip(b"\0").decode(errors="surrogateescape") for row in rows]


def together(attempt: Callable[[], T]) -> T:
    """`attempt()` on every rank, or the first rank's error on all: no rank waits for one that has given up.

    Raises:
        UserError: what any rank raised as one or as an `OSError`.
    """
    errors, results = "", []
    try:
        results.append(attempt())
    except (UserError, OSError) as error:
        errors = error_text(error) or type(error).__name__
    for text in gather_texts(errors):
        if text:
            raise UserError(text)
    return results[0]


def any_rank(flag: bool) -> bool:
    """Whether `flag` is true on any rank."""
    highest = torch.tensor([int(flag)])
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return bool(highest.item())


def barrier() -> None:
    gather_rows([0.0])
