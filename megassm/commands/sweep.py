"""Measures checkpoints over budgets K: bits per byte, perplexity, parameters, FLOPs, speed, memory.

Runs as one process, or under `torchrun --nproc-per-node N`, which divides the text. Figures and plots go to the run's
sweeps/, or to --output, as .json, .csv, .png and .html under a name of data set, length and checkpoint. Those of the
run's own data at its own length are sweep.json, .csv, .png and .html in its directory too. With --watch a sweep of each
checkpoint goes to sweeps/ as it comes; with --ema all of it below the run's ema/.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megassm.cli.arguments import (
    Parser,
    TableRow,
    add_beyond,
    add_ema,
    budget_list,
    image_file,
    output_file,
    path_argument,
    positive,
    print_table,
    tool_parser,
    write_json,
)
from megassm.cli.mixtures import layers_text, mixture
from megassm.errors import UserError

if TYPE_CHECKING:
    from megassm.eval.swept import BudgetCurve, BudgetRow, Sweep
    from megassm.eval.watch import SweepRequest
    from megassm.parallel.world import Peers


def parser() -> Parser:
    result = tool_parser(
        __doc__ or "",
        "python tools/sweep_budgets.py runs/demo --budgets 1-8,16,32\n"
        "  python tools/sweep_budgets.py runs/a runs/b --data data/wiki notes.txt --report both.html\n"
        "  torchrun --nproc-per-node 4 tools/sweep_budgets.py runs/demo --seq-lens 512,2048\n"
        "  python tools/sweep_budgets.py runs/live --watch",
    )
    add = result.add_argument
    what = "run directory (its newest complete checkpoint), or one of its checkpoints/step-*"
    add("runs", type=Path, nargs="+", metavar="RUN_DIR", help=what)
    add_ema(result)
    add("--budgets", type=budget_list, metavar="LIST", help="K: 2,4,8 or 1-32 or 2-32:2 (default: eval.budgets)")
    add("--seq-lens", type=budget_list, metavar="LIST", help="sequence lengths, tokens (default: the training length)")
    what = (
        "one K a layer to measure besides, such as 16/8/4/8; or limits to search one under: parameters=N, mflops=N "
        "(forward, a token), ms=N (a decoded token, here); the K of --budgets are what a layer may have"
    )
    add("--mix", type=mixture, nargs="+", default=[], metavar="K/K/..", help=what)
    add_beyond(result)
    how_many = "sequences of the training length to score, of each text (default: eval.sequences)"
    add("--sequences", type=positive, metavar="N", help=how_many)
    what = "prepared sets or their URLs (valid/ is scored), files or folders of text (default: the run's own set)"
    add("--data", nargs="+", default=[], metavar="PATH", help=what)
    add("--glob", metavar="PATTERN", help="files to take from folders of text (default: *.txt, *.jsonl, *.jsonl.gz)")
    what = "also how often each budget's next token is that of full K, and what both share of their probability"
    add("--agreement", action="store_true", help=what)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--plot", type=image_file, metavar="FILE.png", help="draw the curves of all runs there")
    add("--report", type=output_file, metavar="FILE.html", help="write the report of all runs there")
    add("--csv", type=output_file, metavar="FILE", help="write the rows of all runs there")
    add("--output", type=path_argument, metavar="DIR", help="write the files there, and nothing into the run")
    add("--watch", action="store_true", help="sweep each checkpoint of one live run as it is published")
    return result


def main() -> None:
    command_line = parser()
    arguments = command_line.parse_args()
    others = (arguments.plot, arguments.report, arguments.csv, arguments.output)
    if arguments.watch and (len(arguments.runs) > 1 or any(others)):
        command_line.error(
            "--watch takes one RUN_DIR and writes to its sweeps/; leave out --plot, --report, --csv and --output"
        )
    from megassm.eval.watch import SweepRequest
    from megassm.parallel.world import join_peers, leave_world

    options = vars(arguments)
    names = ("budgets", "seq_lens", "sequences", "data", "glob", "beyond", "agreement")
    asked = {name: options[name] for name in names}
    request = SweepRequest(**asked, averaged=arguments.ema, mixtures=arguments.mix)
    peers = join_peers(arguments.device)
    try:
        if arguments.watch:
            sweeps = follow(arguments.runs[0], request, peers)
        else:
            sweeps = [measure(path, request, peers, arguments.output) for path in arguments.runs]
    finally:
        leave_world()
    if peers.is_main:
        finish(sweeps, arguments.plot, arguments.report, arguments.csv, arguments.json)


def measure(path: Path, request: SweepRequest, peers: Peers, output: Path | None = None) -> Sweep:
    """Sweeps one run, prints its tables and leaves its files: in the run's directory, or in `output`."""
    from megassm.eval.watch import sweep_path
    from megassm.report.sweep_files import sweep_stem, write_sweep
    from megassm.run.directory import SWEEPS

    if output is None:
        check_writable(path)
    sweep, run_dir = sweep_path(path, request, peers)
    if peers.is_main:
        show(sweep)
        folder = output or run_dir / SWEEPS
        written = write_sweep(sweep, folder, sweep_stem(sweep, folder))
        if output is None and request.is_plain:
            written += write_sweep(sweep, run_dir)
        for file in written:
            print(os.path.relpath(file))
    return sweep


def follow(run_dir: Path, request: SweepRequest, peers: Peers) -> list[Sweep]:
    """Sweeps a live run until its end."""
    from megassm.eval.watch import result_folder, sweep_file, watch
    from megassm.report.sweep_files import plot_steps, write_json_sweep
    from megassm.run.directory import SWEEPS

    sweeps, folder = [], result_folder(run_dir, request.averaged)
    for sweep in watch(run_dir, request, peers):
        sweeps.append(sweep)
        if peers.is_main:
            show(sweep)
            write_json_sweep(sweep, sweep_file(folder, sweep.step))
            print(sweep_file(folder, sweep.step), plot_steps(folder / SWEEPS) or "", sep="\n", flush=True)
    return sweeps


def check_writable(path: Path) -> None:
    """Checks before the work that its results can be written after it."""
    if path.is_dir() and not os.access(path, os.W_OK):
        raise UserError(f"{path}: cannot be written to, and the sweep's files go there; give --output DIR")


def show(sweep: Sweep) -> None:
    """Prints a table for each text and length, and what its curve says."""
    from megassm.eval.curve import describe

    for curve in sweep.curves:
        shape = curve.shape
        title = f"{sweep.name}: {curve.data}, {curve.seq_len} tokens"
        print_table(title, [table_row(row) for row in curve.rows])
        if curve.positions:
            print_table(f"{title}, by position: bits a token / agreement / overlap", position_rows(curve))
        print(
            f"area under the curve {shape.area:.4f} {curve.bits}, {shape.area_gap_percent:.2f}% above full K; "
            f"near full from K={shape.near_full_k}; best unigram {curve.best_unigram_bits_per_byte:.3f}; "
            f"{curve.predicted_tokens:,} tokens in {curve.sequences:,} sequences"
        )
        if (spread := widest_spread(curve.rows)) is not None:
            print(
                f"speeds are medians, whose runs differ by up to {spread:.0%}; the files have the slowest and fastest"
            )
        for step in shape.cliffs:
            share = f"{step.share_of_gap:.0%} of the gap"
            print(f"cliff: {describe(step)}, {step.per_doubling:.3f} a doubling, {share}")
        for step in shape.rises:
            print(f"rise: {describe(step)}")
        if curve.mixed:
            rows = [{"K a layer": _mixture_text(row), **_without_k(row)} for row in curve.mixed]
            print_table(f"{sweep.name}: {curve.data}, {curve.seq_len} tokens, one K a layer", rows)


def widest_spread(rows: Sequence[BudgetRow]) -> float | None:
    """Between the fastest and the slowest run of a speed, over its median; the largest of all speeds of `rows`."""
    shares = [
        (high - low) / median
        for row in rows
        for low, median, high in (
            (row.prefill_tokens_per_s_low, row.prefill_tokens_per_s, row.prefill_tokens_per_s_high),
            (row.decode_tokens_per_s_low, row.decode_tokens_per_s, row.decode_tokens_per_s_high),
        )
        if low is not None and high is not None and median
    ]
    return max(shares, default=None)


def table_row(row: BudgetRow) -> TableRow:
    """What of a row fits on a terminal (ppl: perplexity a token; speeds in tokens); the files have the rest."""
    return {
        "K": row.k,
        "params": row.parameters,
        **_quality(row),
        "gap %": row.gap_percent,
        "MFLOP/tok": row.forward_flops_per_token / 1e6,
        "prefill/s": row.prefill_tokens_per_s,
        "decode/s": row.decode_tokens_per_s,
        "MiB": row.peak_memory_mib,
        **({} if row.agreement is None else {"agree": row.agreement, "overlap": row.overlap}),
    }


def position_rows(curve: BudgetCurve) -> list[dict[str, Any]]:
    """A row for each range of positions, a column for each budget."""
    rows: dict[str, dict[str, Any]] = {}
    for found in curve.positions:
        name = f"{found.first}-{found.end - 1}"
        figures = f"{found.bits_per_token:.3f} / {found.agreement:.3f} / {found.overlap:.3f}"
        rows.setdefault(name, {"positions": name, "tokens": found.tokens})[f"K={found.k}"] = figures
    return list(rows.values())


def _mixture_text(row: BudgetRow) -> str:
    return layers_text(row.layers or ()) + (f" ({row.limit})" if row.limit else "")


def _without_k(row: BudgetRow) -> TableRow:
    return {name: value for name, value in table_row(row).items() if name != "K"}


def _quality(row: BudgetRow) -> TableRow:
    """Of a text, or of a task, whose bits are of an answer each."""
    if row.accuracy is None:
        spread = "" if row.perplexity_low is None else f"{row.perplexity_low:.4g}-{row.perplexity_high:.4g}"
        bits = {"bits/byte": row.bits_per_byte, "bits/tok": row.bits_per_token}
        return {**bits, "ppl": row.perplexity, "ppl 95%": spread}
    spread = "" if row.accuracy_low is None else f"{row.accuracy_low:.4f}-{row.accuracy_high:.4f}"
    return {"accuracy": row.accuracy, "accuracy 95%": spread, "bits/answer": row.bits_per_byte}


def finish(
    sweeps: Sequence[Sweep], plot: Path | None, report: Path | None, table: Path | None, as_json: Path | None
) -> None:
    """Writes what was asked for of all runs together."""
    from megassm.report.figures import save_charts
    from megassm.report.sweep_files import flat_rows, write_csv, write_page
    from megassm.report.sweep_plots import charts

    if plot:
        save_charts(charts(sweeps), plot)
        print(plot)
    if report:
        write_page(sweeps, report)
        print(report)
    if table:
        write_csv(sweeps, table)
    write_json([row for sweep in sweeps for row in flat_rows(sweep)], as_json)
