"""What a run needs of a cluster before it is started: memory by kind, bytes between ranks, time a step. Formulas only.

Times are compute and messages one after another, as DeepSpeed runs them; stage 3 alone overlaps its own. A message
costs its bytes and its hops: without the latter, a small model would be as fast on a thousand GPUs as on eight.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from megassm.budget import budget_at
from megassm.config.schema import Config
from megassm.cost import (
    filterbank_flops_per_token,
    forward_flops_per_token,
    gate_flops_per_token,
)
from megassm.parallel.mesh import Mesh, mesh_of
from megassm.plan.cluster import Cluster, Filters
from megassm.plan.memory import host_memory, rank_memory, start_memory, workload
from megassm.plan.traffic import bytes_sent, messages_sent

DRAWS = 1000
"""Updates over which budgets are counted."""


class Plan(NamedTuple):
    """A configuration on a cluster."""

    config: Config
    mesh: Mesh
    memory: dict[str, float]
    """Bytes a rank by kind; their sum is the peak."""
    start_bytes: float
    """Of a rank's device before its first step."""
    host: dict[str, float]
    """Bytes of host memory a rank, by what needs them."""
    sent: dict[str, float]
    """Bytes a rank sends in an update, by kind."""
    messages: dict[str, int]
    """How many, by kind."""
    seconds: dict[int, float]
    """Of an update, by budget."""
    mean_seconds: float
    """Of an update, over the budgets the run draws after its start."""

    @property
    def total_bytes(self) -> float:
        return sum(self.memory.values())

    @property
    def tokens_per_second(self) -> float:
        return self.config.tokens_per_step() / self.mean_seconds

    def fits(self, cluster: Cluster) -> bool:
        return max(self.total_bytes, self.start_bytes) <= cluster.memory_bytes * cluster.memory_share


def plan_run(config: Config, cluster: Cluster, filters: Filters, shares: dict[int, float] | None = None) -> Plan:
    """The plan of a configuration without violations; `shares` is `budget_shares(config)` where it is known already."""
    mesh = mesh_of(config, cluster.size)
    sent, messages = bytes_sent(config, mesh, filters), messages_sent(config, mesh)
    budgets = planned_budgets(config)
    shares = shares or budget_shares(config)
    mean = sum(share * rank_flops_per_token(config, mesh, k, filters) for k, share in shares.items())

    def seconds(flops_per_token: float) -> float:
        return step_seconds(config, mesh, cluster, flops_per_token, sent, messages)

    return Plan(
        config,
        mesh,
        rank_memory(config, mesh, filters, cluster.group_bytes),
        start_memory(config, mesh),
        host_memory(config, mesh),
        sent,
        messages,
        {k: seconds(rank_flops_per_token(config, mesh, k, filters)) for k in budgets},
        seconds(mean),
    )


def planned_budgets(config: Config) -> list[int]:
    """The budgets worth a line: those of training and validation, and the largest."""
    k_max = config.model.num_channels
    return sorted({k for k in (*config.listed_budgets(), *config.eval_budgets(), k_max) if k <= k_max})


def budget_shares(config: Config) -> dict[int, float]:
    """The part of the updates that each K has, after those at full budget."""
    first = config.full_budget_steps()
    drawn = Counter(budget_at(config, first + step, 0) for step in range(DRAWS))
    return {k: count / DRAWS for k, count in drawn.items()}


def rank_flops_per_token(config: Config, mesh: Mesh, k: int, filters: Filters) -> float:
    """FLOPs of one tensor rank a token at budget k, filter bank and recomputation included; all compute the gates."""
    model = config.model
    gate = gate_flops_per_token(model, k) * model.mixers.count("S")
    work = workload(config, mesh, filters)
    forwards = 4 if config.train.recompute else 3
    bank = filterbank_flops_per_token(model, k, work, backward=True)
    if config.train.recompute:
        bank += filterbank_flops_per_token(model, k, work)
    products = forwards * (forward_flops_per_token(model, k, model.seq_len) - gate) + bank
    return products / mesh.tensor + forwards * gate


def step_seconds(
    config: Config,
    mesh: Mesh,
    cluster: Cluster,
    flops_per_token: float,
    sent: dict[str, float],
    messages: dict[str, int],
) -> float:
    """Of one update; optimizer, data and launching are not counted."""
    stage = config.parallel.zero_stage

    def seconds(kind: str, ranks: int, apart: int, sums: bool) -> float:
        return sent[kind] / cluster.rate(ranks, apart) + messages[kind] * cluster.hops_seconds(ranks, apart, sums)

    tokens = config.tokens_per_step() / mesh.replicas
    compute = flops_per_token * tokens / (cluster.peak_flops * cluster.compute_share)
    compute += seconds("tensor", mesh.tensor, 1, sums=True)
    compute += seconds("sequence", mesh.sequence, mesh.tensor, sums=False)
    data = seconds("data", mesh.replicas, mesh.tensor, sums=stage != 3)
    return max(compute, data) if stage == 3 else compute + data


def model_flops_share(plan: Plan, cluster: Cluster) -> float:
    """Model FLOPs utilisation at full budget: what the journal calls mfu."""
    model = plan.config.model
    flops = 3 * forward_flops_per_token(model, model.num_channels, model.seq_len) * plan.config.tokens_per_step()
    return flops / plan.seconds[model.num_channels] / (cluster.size * cluster.peak_flops)
