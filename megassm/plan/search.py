"""Meshes, ZeRO stages, micro-batches and recomputation that fit a cluster, the fastest first."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from megassm.config.rules import violations
from megassm.config.schema import Config
from megassm.plan.cluster import Cluster, Filters
from megassm.plan.estimate import Plan, budget_shares, plan_run

TIE = 0.02
"""Plans within this share of the fastest are as fast: the formulas know no better."""


def fitting_plans(config: Config, cluster: Cluster, filters: Filters) -> list[Plan]:
    """All that fit, by expected time of an update.

    Of those that are as fast as the fastest first the lowest ZeRO stage, which sends least and is simplest, then the
    most sequences at once on a rank, whose products fill a GPU best, then the least split, then the least memory. The
    model, the global batch and the precision stay; tensor groups stay inside a node.
    """
    shares = budget_shares(config)
    plans = (plan_run(candidate, cluster, filters, shares) for candidate in candidates(config, cluster))
    fitting = [plan for plan in plans if plan.fits(cluster)]
    as_fast = (1 + TIE) * min((plan.mean_seconds for plan in fitting), default=0.0)

    def order(plan: Plan) -> tuple[float, ...]:
        if plan.mean_seconds > as_fast:
            return plan.mean_seconds, plan.total_bytes
        split = plan.mesh.sequence * plan.mesh.tensor
        return 0.0, plan.config.parallel.zero_stage, -sequences_at_once(plan), split, plan.total_bytes

    return sorted(fitting, key=order)


def sequences_at_once(plan: Plan) -> float:
    """Of a rank's micro-batch; sequence parallelism leaves it a part of each."""
    return plan.config.train.micro_batch_sequences / plan.mesh.sequence


def candidates(config: Config, cluster: Cluster) -> Iterator[Config]:
    """Every way to run `config` on the cluster that breaks no rule."""
    for tensor in divisors(cluster.gpus_per_node):
        for sequence in divisors(cluster.size // tensor):
            data = cluster.size // (tensor * sequence)
            if config.train.batch_sequences % data:
                continue
            micro_batches = divisors(config.train.batch_sequences // data)
            for micro, stage, recompute in product(micro_batches, (0, 1, 2, 3), (False, True)):
                parallel = {"tensor": tensor, "sequence": sequence, "data": None, "zero_stage": stage}
                train = {"micro_batch_sequences": micro, "recompute": recompute}
                candidate = config.model_copy(
                    update={
                        "parallel": config.parallel.model_copy(update=parallel),
                        "train": config.train.model_copy(update=train),
                    }
                )
                if next(violations(candidate, cluster.size), None) is None:
                    yield candidate


def divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
