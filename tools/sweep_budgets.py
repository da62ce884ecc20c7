"""Measures checkpoints at several budgets K: parameters, bits per byte, perplexity, speed, memory."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from megassm.cli import Parser, Row, budget_list, image_file, positive, print_table, run_tool, tool_parser, write_json


def parser() -> Parser:
    result = tool_parser(__doc__ or "", "python tools/sweep_budgets.py runs/demo --budgets 1,2,4,8,16,32")
    what = "run directory, or one of its checkpoints/step-*; gets sweep.json, sweep.csv and sweep.png"
    result.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR", help=what)
    result.add_argument("--budgets", type=budget_list, metavar="LIST", help="K to measure (default: eval.budgets)")
    result.add_argument(
        "--sequences", type=positive, metavar="N", help="validation sequences (default: eval.sequences)"
    )
    result.add_argument("--data", metavar="DIR", help="data set to evaluate on (default: the run's own)")
    result.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    result.add_argument("--plot", type=image_file, metavar="FILE.png", help="draw the curves of all runs there")
    return result


def main() -> None:
    arguments = parser().parse_args()
    from megassm.eval.score import best_unigram
    from megassm.eval.session import open_session
    from megassm.eval.sweep import plot_sweeps, sweep, write_sweep

    table: list[Row] = []
    curves = {}
    for path in arguments.runs:
        session = open_session(path, arguments.data, arguments.device)
        name = f"{path}, step {session.checkpoint.manifest.step}"
        batches = session.validation(arguments.sequences or session.config.eval.sequences)
        budgets = arguments.budgets or session.config.eval.budgets
        tokens = (session.token_bytes, session.device, session.document_end)
        curves[name] = sweep(session.model, batches, budgets, *tokens)
        rows: list[Row] = [asdict(row) for row in curves[name]]
        print_table(name, rows)
        unigram = best_unigram(batches, session.token_bytes).bits_per_byte
        print(f"for comparison: the best unigram model of the same tokens has {unigram:.3f} bits per byte")
        for written in write_sweep(curves[name], session.run_dir, name):
            print(written)
        label = {"run": str(path)} if len(arguments.runs) > 1 else {}
        table += [{**label, **row} for row in rows]
    if arguments.plot:
        plot_sweeps(curves, arguments.plot)
        print(arguments.plot)
    write_json(table, arguments.json)


if __name__ == "__main__":
    run_tool(main)
