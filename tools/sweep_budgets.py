"""Measures a checkpoint at several budgets K: parameters, bits per byte, perplexity, speed, memory."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from megassm.cli import Parser, budget_list, print_table, run_tool, tool_parser


def parser() -> Parser:
    result = tool_parser(__doc__ or "", "python tools/sweep_budgets.py runs/tiny --budgets 1,2,4,8,16,32")
    result.add_argument("run", type=Path, metavar="RUN_DIR", help="run directory, or one of its checkpoints/step-*")
    result.add_argument("--budgets", type=budget_list, metavar="LIST", help="K to measure (default: eval.budgets)")
    result.add_argument("--sequences", type=int, metavar="N", help="validation sequences (default: eval.sequences)")
    result.add_argument("--data", metavar="DIR", help="data set to evaluate on (default: the run's own)")
    result.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    return result


def main() -> None:
    arguments = parser().parse_args()
    from megassm.eval.score import best_unigram
    from megassm.eval.session import open_session
    from megassm.eval.sweep import sweep, write_sweep

    session = open_session(arguments.run, arguments.data, arguments.device)
    budgets = arguments.budgets or session.config.eval.budgets
    batches = session.validation(arguments.sequences or session.config.eval.sequences)
    rows = sweep(session.model, batches, budgets, session.token_bytes, session.device)
    step = session.checkpoint.manifest.step
    print_table(f"{arguments.run}, step {step}", [asdict(row) for row in rows], arguments.json)
    unigram = best_unigram(batches, session.token_bytes).bits_per_byte
    print(f"for comparison: the best unigram model of the same tokens has {unigram:.3f} bits per byte")
    for path in write_sweep(rows, session.run_dir, f"{session.run_dir.name}, step {step}"):
        print(path)


if __name__ == "__main__":
    run_tool(main)
