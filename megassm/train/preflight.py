"""Before work begins: what a rank of the job needs beside what its machine has."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from megassm.config.schema import Config
from megassm.ops.mixing import GROUP_BYTES
from megassm.parallel.world import World, gather_rows, local_ranks
from megassm.plan.cluster import filters_of
from megassm.plan.memory import host_memory, rank_memory


def preflight(config: Config, world: World) -> str:
    """Why the job may be ended for its memory, as planned; empty where it should fit. All ranks call it."""
    cuda = world.device.type == "cuda"
    memory = rank_memory(config, world.mesh, filters_of(config), GROUP_BYTES[world.device.type], fused=cuda)
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
    return (
        f"rank {short[0]} is planned to need {needed / 1e9:.1f} GB at full K, {kinds} among them, and {where} has "
        f"{has / 1e9:.1f} GB free: the job may be ended without a word. Lower train.micro_batch_sequences, set "
        "train.recompute or a higher parallel.zero_stage, or take more ranks; tools/plan.py has all figures"
    )


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
