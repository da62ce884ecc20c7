"""Times self-speculative decoding: a plain step, a draft, the reading of drafts, and what follows for the speed-up.

Acceptance is that of the trained model of `--run`, on the text of `--prompts`; costs are its own too, or with --size
those of a larger model with random weights, whose values they do not depend on. The model of --run also decodes texts
both ways, side by side. With --estimate FILE: what reading the weights allows at a configuration's size.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from megassm.cli.arguments import Parser, TableRow, budget_list, positive, print_table, run_tool, tool_parser

if TYPE_CHECKING:
    from megassm.eval.sampling import Sampling
    from megassm.model import LanguageModel


def parser() -> Parser:
    result = tool_parser(
        __doc__ or "",
        "python tools/bench_drafting.py --run runs/demo --prompts notes.txt --estimate configs/7b_hybrid.yaml\n"
        "  python tools/bench_drafting.py --size 50m",
    )
    add = result.add_argument
    add("--size", choices=("50m", "50m_heads", "tiny"), help="of the model whose costs are timed (default: the run's)")
    add("--draft-ks", type=budget_list, default=[2, 4, 8, 16], metavar="LIST", help="K of the drafts")
    add("--lengths", type=budget_list, default=[1, 2, 4, 8], metavar="LIST", help="drafts a round")
    add("--repeats", type=positive, default=15, metavar="N", help="timed repeats of each part; the median counts")
    add("--run", type=Path, metavar="RUN_DIR", help="a trained model, for the acceptance")
    add("--prompts", type=Path, metavar="FILE", help="a text; pieces of it are prompts")
    add("--temperature", type=float, default=0.0, metavar="T", help="of the sampling (default: 0)")
    add("--tokens", type=positive, default=100, metavar="N", help="to draw after each prompt")
    add("--texts", type=positive, default=3, metavar="N", help="decoded both ways; the median counts")
    what = "configurations whose speed-up is estimated, at the run's acceptance"
    add("--estimate", type=Path, nargs="+", default=[], metavar="FILE", help=what)
    return result


def main() -> None:
    command_line = parser()
    arguments = command_line.parse_args()
    if (arguments.run is None) != (arguments.prompts is None):
        command_line.error("--run and --prompts go together")
    if arguments.run is None and (arguments.size is None or arguments.estimate):
        command_line.error("give --run and --prompts, or --size without --estimate: without a run nothing is accepted")
    from megassm.checkpoint.open import open_model, open_tokenizer
    from megassm.config.load import load_config
    from megassm.eval.sampling import Sampling
    from megassm.model import build_model
    from tools.bench.drafting import SIZES, acceptance_rates, bench_drafting, estimates

    rates: dict[int, float] = {}
    if arguments.run is not None:
        trained, tokenizer = open_model(arguments.run), open_tokenizer(arguments.run)
        ids = tokenizer.encode([arguments.prompts.read_text(encoding="utf-8")])[0].tolist()
        prompts = [ids[start : start + 64] for start in range(0, max(1, len(ids) - 64), max(64, len(ids) // 8))]
        budgets = smaller(arguments.draft_ks, trained)
        rates = acceptance_rates(trained, prompts, budgets, arguments.temperature, arguments.tokens)
        sampling = Sampling(arguments.tokens, arguments.temperature)
        title = f"{arguments.run}, {size_of(trained)}, both ways, {arguments.tokens} tokens"
        print_table(title, real_rows(trained, prompts, sampling, arguments))
    model = trained if arguments.size is None else build_model(SIZES[arguments.size]).eval()
    title = f"{arguments.size or arguments.run}, {size_of(model)}, parts of a round, batch 1"
    budgets = smaller(arguments.draft_ks, model)
    found = [asdict(row) for row in bench_drafting(model, budgets, arguments.lengths, rates, arguments.repeats)]
    print_table(title, found, arguments.json)
    for path in arguments.estimate:
        rows = estimates(load_config(path).model, rates, arguments.lengths)
        print_table(f"{path.stem}: bounded by the reading of weights, at the run's acceptance", rows)


def smaller(budgets: Sequence[int], model: LanguageModel) -> list[int]:
    """Those that a draft for this model can have."""
    return [k for k in budgets if k < model.config.num_channels]


def size_of(model: LanguageModel) -> str:
    return f"{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.1f}M parameters"


def real_rows(
    model: LanguageModel, prompts: Sequence[Sequence[int]], sampling: Sampling, arguments: Namespace
) -> list[TableRow]:
    """Texts decoded plainly and with drafts, in turn."""
    from megassm.eval.drafting import Drafting
    from tools.bench.drafting import real_speed_up

    rows: list[TableRow] = []
    fixed = [Drafting(k, m) for k in smaller(arguments.draft_ks, model) for m in arguments.lengths]
    for drafting in (*fixed, Drafting.auto(max(arguments.lengths))):
        speed_up, accepted = real_speed_up(model, prompts[: arguments.texts], sampling, drafting)
        rows.append({"draft_k": str(drafting.k), "drafts": drafting.tokens, "accepted": accepted, "speed_up": speed_up})
    return rows


if __name__ == "__main__":
    run_tool(main)
