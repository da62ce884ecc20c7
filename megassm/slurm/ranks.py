"""The ranks' coordinates as srun tells them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from megassm.errors import UserError

FIRST_PORT, PORTS = 15_000, 17_000
"""Below the ports that Linux gives to connections of its own."""


def rank_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """What torchrun would have set, for a process that srun started; nothing where another launcher did, or none.

    Raises:
        UserError: a variable of srun is missing or makes no sense.
    """
    if "RANK" in environ or "SLURM_STEP_ID" not in environ:
        return {}
    try:
        node = int(environ["SLURM_NODEID"])
        tasks = environ.get("SLURM_STEP_NUM_TASKS") or environ["SLURM_NTASKS"]
        local = [*per_node(environ.get("SLURM_STEP_TASKS_PER_NODE") or environ["SLURM_TASKS_PER_NODE"])][node]
        # another port after every restart: a rank of the last one may live where SLURM cannot reach it
        port = int(environ["SLURM_JOB_ID"]) + 7919 * int(environ.get("SLURM_RESTART_COUNT", "0"))
        return {
            "RANK": str(int(environ["SLURM_PROCID"])),
            "LOCAL_RANK": str(int(environ["SLURM_LOCALID"])),
            "WORLD_SIZE": str(int(tasks)),
            "LOCAL_WORLD_SIZE": str(local),
            "MASTER_ADDR": first_host(environ.get("SLURM_STEP_NODELIST") or environ["SLURM_JOB_NODELIST"]),
            "MASTER_PORT": environ.get("MASTER_PORT") or str(FIRST_PORT + port % PORTS),
        }
    except (KeyError, ValueError, IndexError) as error:
        raise UserError(
            f"environment: srun's variables make no sense ({type(error).__name__}: {error}); start the ranks with srun "
            "itself, or unset SLURM_STEP_ID to run one process"
        ) from None


def first_host(nodes: str) -> str:
    """The first name of a SLURM node list: "gpu[003-005,9],login1" is gpu003, gpu004, gpu005, gpu9, login1."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if first is None:
        raise ValueError(f"{nodes!r} is not a list of nodes")
    return re.sub(r"\[([^\],-]*)[^\]]*\]", r"\1", first.group())


def per_node(counts: str) -> Iterator[int]:
    """Tasks of every node: "4(x2),1" is 4, 4, 1."""
    for part in counts.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise ValueError(f"{counts!r} is not a list of counts")
        yield from [int(found[1])] * int(found[2] or 1)
