"""Plans a run on a cluster: memory by kind, FLOPs, bytes between ranks, time a step; and what fits where it does not.

Defaults are an H100 SXM node's, from NVIDIA's data sheets: 989 TFLOP/s dense bf16 (67 in fp32), 80 GB, NVLink 450 GB/s
in each direction (900 in both), one 400 Gb/s InfiniBand card a GPU: 50 GB/s. The achieved shares are assumptions.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from megassm.cli.arguments import Parser, TableRow, positive, print_table, tool_parser, write_json
from megassm.cli.progress import LineProgress
from megassm.config.load import load_config, load_config_or_exit
from megassm.config.schema import Config
from megassm.config.source import ConfigError
from megassm.cost import PEAK_TFLOPS, forward_flops_per_token, parameters, training_flops_per_token
from megassm.errors import UserError

if TYPE_CHECKING:
    from megassm.plan.cluster import Cluster, Filters
    from megassm.plan.estimate import Plan

FP32_TFLOPS = 67.0
"""H100 SXM, float32 outside the tensor cores; NVIDIA's data sheet."""
ANY_MESH = ("parallel.tensor=1", "parallel.sequence=1", "parallel.data=null", "train.micro_batch_sequences=1")
"""With these only the ranks can be wrong on one, so that rules about the model are told from rules about the mesh."""


def parser() -> Parser:
    result = tool_parser(
        __doc__ or "", "python tools/plan.py --config configs/7b_hybrid.yaml --nodes 8 --gpus-per-node 8"
    )
    result.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML, see configs/")
    result.add_argument("--nodes", type=positive, default=1, metavar="N")
    result.add_argument("--gpus-per-node", type=positive, default=8, metavar="M")
    result.add_argument("--gpu-memory", type=above_zero, default=80.0, metavar="GB", help="of a GPU, 10^9 bytes")
    result.add_argument("--peak-tflops", type=above_zero, metavar="TFLOPS", help="of a GPU")
    result.add_argument("--node-link", type=above_zero, default=450.0, metavar="GB/S", help="of a GPU inside a node")
    result.add_argument("--network-link", type=above_zero, default=50.0, metavar="GB/S", help="of a GPU between nodes")
    result.add_argument("--compute-share", type=share, default=0.4, metavar="0..1", help="of the peak, achieved")
    result.add_argument("--link-share", type=share, default=0.7, metavar="0..1", help="of the links' rates, achieved")
    result.add_argument(
        "--memory-share", type=share, default=0.9, metavar="0..1", help="of the memory, left by CUDA, NCCL and gaps"
    )
    result.add_argument("--search", action="store_true", help="the fastest that fit, whatever mesh the file has")
    result.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace values of the file")
    return result


def above_zero(text: str) -> float:
    """For argparse's `type`."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a number above 0")
    return value


def share(text: str) -> float:
    """For argparse's `type`."""
    if (value := above_zero(text)) > 1:
        raise argparse.ArgumentTypeError(f"{text!r}: must be at most 1")
    return value


def main() -> None:
    arguments = parser().parse_intermixed_args()
    world_size = arguments.nodes * arguments.gpus_per_node
    mistakes: tuple[str, ...] = ()
    try:
        config = load_config(arguments.config, arguments.overrides, world_size)
    except ConfigError as error:
        mistakes = error.mistakes
        config = load_config_or_exit(arguments.config, (*arguments.overrides, *ANY_MESH))  # on one rank
    from megassm.plan.cluster import filters_of
    from megassm.plan.estimate import plan_run
    from megassm.plan.search import fitting_plans

    cluster = cluster_of(arguments, config)
    with LineProgress().busy(f"deriving the filters of model.seq_len = {config.model.seq_len:,}"):
        filters = filters_of(config)
    report: dict[str, list[TableRow]] = {"cluster": [cluster._asdict()]}
    if mistakes:
        print("\n".join(mistakes) + f"\nthe mesh does not suit {world_size} GPUs as it is; what does:")
    elif not arguments.search:
        plan = plan_run(config, cluster, filters)
        report |= describe(plan, cluster, filters)
        print_report(report)
        if plan.fits(cluster):
            write(report, arguments.json)
            return
        print("it does not fit; what does:")
    plans = fitting_plans(config, cluster, filters)
    report["fitting"] = [row(plan, cluster) for plan in plans[:5]]
    write(report, arguments.json)
    if not plans:
        raise UserError(
            f"no mesh, ZeRO stage or micro-batch fits {config.train.batch_sequences} sequences a batch on {world_size} "
            f"GPUs of {arguments.gpu_memory:g} GB; use more or larger ones, or another train.batch_sequences"
        )
    print_table(f"fastest of {len(plans)} that fit", report["fitting"])
    explain_stage(plans, cluster)


def cluster_of(arguments: argparse.Namespace, config: Config) -> Cluster:
    from megassm.ops.mixing import GROUP_BYTES
    from megassm.plan.cluster import Cluster

    peak = arguments.peak_tflops or (PEAK_TFLOPS["H100"] if config.train.precision == "bf16" else FP32_TFLOPS)
    return Cluster(
        nodes=arguments.nodes,
        gpus_per_node=arguments.gpus_per_node,
        memory_bytes=arguments.gpu_memory * 1e9,
        peak_flops=peak * 1e12,
        node_rate=arguments.node_link * 1e9,
        network_rate=arguments.network_link * 1e9,
        compute_share=arguments.compute_share,
        link_share=arguments.link_share,
        memory_share=arguments.memory_share,
        group_bytes=GROUP_BYTES["cuda"],
    )


def row(plan: Plan, cluster: Cluster) -> TableRow:
    """A plan in one line."""
    from megassm.plan.estimate import model_flops_share

    train, parallel = plan.config.train, plan.config.parallel
    return {
        "data_x_sequence_x_tensor": f"{plan.mesh.data} x {plan.mesh.sequence} x {plan.mesh.tensor}",
        "zero_stage": parallel.zero_stage,
        "micro_batch": train.micro_batch_sequences,
        "recompute": train.recompute,
        "memory_GB": round(plan.total_bytes / 1e9, 1),
        "step_s": round(plan.mean_seconds, 3),
        "step_s_at_full_K": round(max(plan.seconds.values()), 3),
        "tokens_per_s": round(plan.tokens_per_second),
        "run_GPU_hours": round(plan.mean_seconds * train.steps / 3600 * plan.mesh.size),
        "mfu_at_full_K": round(model_flops_share(plan, cluster), 3),
    }


def explain_stage(plans: list[Plan], cluster: Cluster) -> None:
    """Prints why the first plan has its ZeRO stage, and the first of each stage that fits."""
    from megassm.plan.search import TIE

    fastest = min(plan.mean_seconds for plan in plans)
    firsts = {plan.config.parallel.zero_stage: plan for plan in reversed(plans)}
    chosen = plans[0].config.parallel.zero_stage
    print(
        f"why ZeRO {chosen}: the lowest stage that is as fast, to {TIE:.0%}, as the fastest.\n"
        "Only stage 3 is taken to send its messages behind its products; bf16 has no stage 0"
    )
    shown = ("zero_stage", "data_x_sequence_x_tensor", "micro_batch", "recompute", "memory_GB", "step_s")
    rows: list[TableRow] = []
    for _, plan in sorted(firsts.items()):
        facts = row(plan, cluster)
        rows.append({name: facts[name] for name in shown} | {"slower": f"{plan.mean_seconds / fastest - 1:.1%}"})
    print_table("the first of each stage that fits", rows)


def describe(plan: Plan, cluster: Cluster, filters: Filters) -> dict[str, list[TableRow]]:
    config, model = plan.config, plan.config.model
    memory: list[TableRow] = [{"kind": kind, "GB": size / 1e9} for kind, size in plan.memory.items()]
    limit = cluster.memory_bytes * cluster.memory_share
    memory += [{"kind": "peak", "GB": plan.total_bytes / 1e9}, {"kind": "start-up", "GB": plan.start_bytes / 1e9}]
    memory += [{"kind": "usable", "GB": limit / 1e9}]
    return {
        "plan": [{**row(plan, cluster), "fits": plan.fits(cluster)}],
        "memory": memory,
        "host": [{"needed_for": what, "GB": size / 1e9} for what, size in plan.host.items()],
        "sent": [
            {"group": kind, "GB_an_update": size / 1e9, "messages": plan.messages[kind]}
            for kind, size in plan.sent.items()
        ],
        "budgets": [
            {
                "K": k,
                "parameters": parameters(model, k),
                "forward_MFLOP_a_token": forward_flops_per_token(model, k, model.seq_len) / 1e6,
                "training_MFLOP_a_token": training_flops_per_token(model, k, model.seq_len) / 1e6,
                "step_s": seconds,
                "tokens_per_s": config.tokens_per_step() / seconds,
            }
            for k, seconds in plan.seconds.items()
        ],
    }


def print_report(report: dict[str, list[TableRow]]) -> None:
    cluster = report["cluster"][0]
    print(
        f"{cluster['nodes']} x {cluster['gpus_per_node']} GPUs at {cluster['peak_flops'] / 1e12:g} TFLOP/s, of which "
        f"{cluster['compute_share']:.0%} is assumed; links {cluster['node_rate'] / 1e9:g} GB/s in a node, "
        f"{cluster['network_rate'] / 1e9:g} GB/s between nodes, of which {cluster['link_share']:.0%}"
    )
    print_table("plan; step_s is the mean over the budgets drawn", report["plan"])
    print_table("memory of one rank at full K", report["memory"])
    print_table("host memory of one rank, beside what it computes on", report["host"])
    print_table("sent by one rank", report["sent"])
    print_table("budgets", report["budgets"])


def write(report: dict[str, list[TableRow]], path: Path | None) -> None:
    """One row a line of every table, with the table's name."""
    write_json([{"table": name, **line} for name, rows in report.items() for line in rows], path)
