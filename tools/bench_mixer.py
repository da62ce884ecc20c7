"""Times one spectral layer each way it can be computed, against the authors' formulation and attention."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from megassm.cli.arguments import Parser, TableRow, budget_list, print_table, run_tool, tool_parser
from megassm.cli.progress import shown_progress, tracked

if TYPE_CHECKING:
    from tools.bench.mixer import MixerRow


def parser() -> Parser:
    result = tool_parser(__doc__ or "", "python tools/bench_mixer.py --lengths 2048,4096 --budgets 4,32 --d-model 256")
    result.add_argument("--lengths", type=budget_list, default=[1024, 4096, 16384], metavar="LIST", help="L")
    result.add_argument("--budgets", type=budget_list, default=[2, 4, 8, 16, 32], metavar="LIST", help="K")
    result.add_argument("--d-model", type=int, default=256, metavar="D")
    result.add_argument("--batch", type=int, default=1, metavar="B")
    result.add_argument(
        "--methods",
        metavar="LIST",
        help="among authors,authors_by_input,fft,direct,chunked,flashfft,attention,mamba2,gated_deltanet",
    )
    result.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    result.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    result.add_argument("--repeats", type=int, default=5, metavar="N", help="timed repeats; the median counts")
    return result


def main() -> None:
    arguments = parser().parse_args()
    import torch

    from tools.bench.mixer import METHODS, MixerBenchPlan, bench

    plan = MixerBenchPlan(
        lengths=arguments.lengths,
        budgets=arguments.budgets,
        methods=arguments.methods.split(",") if arguments.methods else METHODS,
        d_model=arguments.d_model,
        batch=arguments.batch,
        dtype=getattr(torch, arguments.dtype),
        device=torch.device(arguments.device),
        repeats=arguments.repeats,
    )
    with shown_progress() as progress:
        total = len(plan.lengths) * len(plan.budgets) * len(plan.methods)
        rows = list(tracked(bench(plan, progress.note), progress, "bench", total, "rows"))
    title = f"B={plan.batch}, d={plan.d_model}, {arguments.dtype} on {arguments.device}"
    print_table(title, [_with_ratio(row, rows) for row in rows], arguments.json)


def _with_ratio(row: MixerRow, rows: list[MixerRow]) -> TableRow:
    """The row, and how many times as fast forward+backward is as the published form in the same run."""
    same = [other for other in rows if (other.length, other.k, other.method) == (row.length, row.k, "authors")]
    ratio = same[0].forward_backward_s / row.forward_backward_s if same else None
    return asdict(row) | {"speed_over_authors": ratio}


if __name__ == "__main__":
    run_tool(main)
