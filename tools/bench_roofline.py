"""The least time of a micro-step on a GPU, from the FLOPs and bytes of its kernels; nothing is run on one."""

from __future__ import annotations

from pathlib import Path

from megassm.cli.arguments import Parser, budget_list, print_table, run_tool, tool_parser, write_json
from megassm.config.load import load_config_or_exit
from megassm.errors import UserError


def parser() -> Parser:
    result = tool_parser(__doc__ or "", "python tools/bench_roofline.py --config configs/1b_hybrid.yaml")
    result.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML, see configs/")
    result.add_argument("--budgets", type=budget_list, metavar="LIST", help="K (default: 2, 8 and all channels)")
    result.add_argument("--cards", default="A100,H100,H200,B200", metavar="LIST", help="cards, by name")
    result.add_argument("--kinds", metavar="CARD", help="also the kinds of kernels on one card")
    result.add_argument("--mixer", metavar="CARD", help="also one spectral mixer on one card, features written or not")
    result.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace values of the file")
    return result


def main() -> None:
    arguments = parser().parse_intermixed_args()
    config = load_config_or_exit(arguments.config, arguments.overrides, 1)
    from tools.bench.roofline import MEMORY_TB_S, kinds, mixer_ways, rows

    budgets, cards = arguments.budgets or sorted({2, 8, config.model.num_channels}), arguments.cards.split(",")
    for card in (*cards, *filter(None, (arguments.kinds, arguments.mixer))):
        if card not in MEMORY_TB_S:
            raise UserError(f"{card}: no such card is known here; there are {', '.join(MEMORY_TB_S)}")
    config.model.cut(budgets[-1])  # raises where it has not so many channels
    found = rows(config, budgets, cards)
    print_table("a micro-step, by budget and card", found)
    for k in budgets if arguments.kinds else ():
        print_table(f"kinds of kernels at K = {k} on one {arguments.kinds}", kinds(config, k, arguments.kinds))
    if arguments.mixer:
        print_table(f"a mixer on one {arguments.mixer}", mixer_ways(config, budgets, arguments.mixer))
    write_json(found, arguments.json)


if __name__ == "__main__":
    run_tool(main)
