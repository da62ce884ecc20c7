"""Times the training of models of equal size: elastic spectral, transformer, and Mamba-2 where it is installed."""

from __future__ import annotations

from dataclasses import asdict

from megassm.cli.arguments import Parser, budget_list, path_argument, positive, print_table, run_tool, tool_parser
from megassm.cli.progress import shown_progress


def parser() -> Parser:
    result = tool_parser(
        __doc__ or "",
        "python tools/bench_model.py --size 1.3b --device cuda --dtype bfloat16 --lengths 2048,8192 --batch 2",
    )
    which = result.add_mutually_exclusive_group()
    which.add_argument("--size", choices=("1.3b", "tiny"), default="tiny", help="of the paper's layer; parameters")
    which.add_argument("--config", type=path_argument, metavar="FILE", help="the model of a configuration instead")
    result.add_argument("--set", nargs="+", default=[], metavar="section.key=value", help="replace values of --config")
    result.add_argument("--lengths", type=budget_list, default=[256], metavar="LIST", help="L")
    result.add_argument(
        "--budgets", type=budget_list, default=[], metavar="LIST", help="K of the stack (default: K_max)"
    )
    result.add_argument("--batch", type=positive, default=1, metavar="B", help="sequences of the micro-batch")
    result.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    result.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    result.add_argument("--recompute", action="store_true", help="recompute each block in the backward pass")
    result.add_argument("--repeats", type=positive, default=5, metavar="N", help="timed repeats; the median counts")
    result.add_argument("--peak-tflops", type=float, metavar="X", help="the device's peak rate, where it is not known")
    return result


def main() -> None:
    arguments = parser().parse_args()
    import torch

    from megassm.config.load import load_config
    from megassm.errors import UserError
    from tools.bench.model import SIZES, ModelBenchPlan, bench_models

    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch finds no CUDA device here; use --device cpu")
    if arguments.set and not arguments.config:
        raise UserError("--set: replaces values of a configuration; name it with --config FILE")
    plan = ModelBenchPlan(
        config=load_config(arguments.config, arguments.set).model if arguments.config else SIZES[arguments.size],
        lengths=arguments.lengths,
        device=torch.device(arguments.device),
        dtype=getattr(torch, arguments.dtype),
        batch=arguments.batch,
        recompute=arguments.recompute,
        repeats=arguments.repeats,
        budgets=arguments.budgets,
        peak_tflops=arguments.peak_tflops,
    )
    with shown_progress() as progress, progress.busy("bench"):
        rows = [asdict(row) for row in bench_models(plan, progress.note)]
    print_table(f"B={plan.batch}, {arguments.dtype} on {arguments.device}", rows, arguments.json)


if __name__ == "__main__":
    run_tool(main)
