"""Before work begins: what a rank of the job needs beside what its machine has."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from megassm.cli.arguments import print_line
from megassm.config.model import CHUNK
from megassm.config.schema import Config
from megassm.errors import UserError
from megassm.ops.mixing import GROUP_BYTES
from megassm.parallel.world import World, gather_rows, local_ranks
from megassm.plan.cluster import Filters, filters_of
from megassm.plan.memory import host_memory, rank_memory

LONG = 2**18
"""Positions from which on filters take seconds, and more memory than anybody expects."""
DERIVING_COPIES, DERIVING_S = 8, 7e-8
"""What deriving filters takes at once of their own size, and seconds a byte of them; seen at 2^18 and 2^20."""
HOPELESS = 4
"""Times what there is; plans are up to 1.8 times too high."""


def preflight(config: Config, world: World) -> str:
    """Why the job may be ended for its memory, as planned; empty where it should fit. All ranks call it.

    Raises:
        UserError: it needs many times what there is. A long sequence is refused before its filters are derived.
    """
    model = config.model
    if "S" in model.mixers and model.seq_len >= LONG:
        table_bytes = 8 * model.seq_len * model.num_channels
        _shortage(config, world, Filters(CHUNK, 1, table_bytes))
        what = f"deriving {model.num_channels} filters of model.seq_len = {model.seq_len:,}"
        if world.is_main:
            size = DERIVING_COPIES * table_bytes / 1e9
            print_line(f"{what}: {size:.1f} GB of this host's memory, about {DERIVING_S * table_bytes:.0f} s")
        world.progress.note(f"its set-up, {what}")
    filters = filters_of(config)
    world.progress.note("its set-up")
    return _shortage(config, world, filters)


def _shortage(config: Config, world: World, filters: Filters) -> str:
    cuda = world.device.type == "cuda"
    memory = rank_memory(config, world.mesh, filters, GROUP_BYTES[world.device.type], fused=cuda)
    host = host_memory(config, world.mesh)
    copy = host["save: copy"] if config.checkpoint.asynchronous else 0.0
    needed = sum(memory.values()) + (0.0 if cuda else copy)
    has = device_bytes(world.device) if cuda else host_bytes() / local_ranks(world.size)
    ranks = gather_rows([needed, has])
    short = [rank for rank, (needed, has) in enumerate(ranks) if needed > has]
    if not short:
        return ""
    needed, has = ranks[short[0]]
    largest = sorted(memory.items(), key=lambda item: -item[1])[:2]
    kinds = " and ".join(f"{size / 1e9:.1f} GB of {kind}" for kind, size in largest)
    where = "its device" if cuda else f"its share of the host ({local_ranks(world.size)} ranks there)"
    plan = (
        f"rank {short[0]} is planned to need {needed / 1e9:.1f} GB at full K, {kinds} among them, and {where} has "
        f"{has / 1e9:.1f} GB free"
    )
    ways = "set train.recompute or a higher parallel.zero_stage, or take more ranks; tools/plan.py has all figures"
    if needed > HOPELESS * has:
        size = f"model.seq_len = {config.model.seq_len:,}, d_model = {config.model.d_model:,}"
        micro_batch = f"train.micro_batch_sequences = {config.train.micro_batch_sequences}"
        raise UserError(f"{size}, {micro_batch}: {plan}, which is not enough by far. Lower them, {ways}")
    return f"{plan}: the job may be ended without a word. Lower train.micro_batch_sequences, {ways}"


def device_bytes(device: torch.device) -> float:
    """Free on a CUDA device."""
    return float(torch.cuda.mem_get_info(device)[0])


def host_bytes(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> float:
    """Free on this machine, or of what a container may take of it; infinite where nobody can tell."""
    found = [1024.0 * number for number in _numbers(proc / "meminfo", "MemAvailable:")]
    limit, used = _numbers(cgroup / "memory.max"), _numbers(cgroup / "memory.current")
    if limit and used:  # pages of files go when there is need
        found.append(limit[0] - used[0] + sum(_numbers(cgroup / "memory.stat", "file")))
    return min(found, default=float("inf"))


def _numbers(path: Path, name: str = "") -> list[float]:
    """The number behind a name that begins a line; none where it is not there, or is no number."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        return []
    return [float(found) for found in re.findall(rf"^{name}\s*(\d+)", text, re.MULTILINE)]
