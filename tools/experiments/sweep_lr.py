"""Trains small models of several widths at several learning rates, with and without muP (model.base_width): where is
the best rate? Writes docs/results/lr_transfer.md, .json and .png.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from megassm.cli.arguments import Parser, path_argument, positive, run_tool
from megassm.config.source import ConfigError
from megassm.errors import UserError


def parser() -> Parser:
    result = Parser(__doc__ or "", "python tools/experiments/sweep_lr.py --widths 32,64,128 --lrs 0.004,0.008,0.016")
    add = result.add_argument
    add("--widths", type=width_list, default=[32, 64, 128], metavar="D,...", help="d_model, multiples of 16; muP takes "
        "over from the smallest (default: 32,64,128)")  # fmt: skip
    add("--lrs", type=rate_list, default=rate_list("0.001,0.002,0.004,0.008,0.016,0.032,0.064"), metavar="LR,...",
        help="peak learning rates (default: 0.001 to 0.064 by factors of 2)")  # fmt: skip
    add("--seeds", type=positive, default=1, metavar="N", help="trainings of each, seeds 0..N-1 (default: 1)")
    add("--runs", type=path_argument, default=Path("runs/experiments"), metavar="DIR", help="where trainings are kept")
    add("--output", type=path_argument, default=Path("docs/results"), metavar="DIR", help="(default: docs/results)")
    add("--set", nargs="+", default=[], metavar="section.key=value", help="replace values of the configuration")
    return result


def width_list(text: str) -> list[int]:
    """For argparse's `type`."""
    widths = sorted({int(part) if part.isdecimal() else 0 for part in text.split(",")})
    if any(width == 0 or width % 16 for width in widths):
        raise argparse.ArgumentTypeError(f"{text!r}: must be multiples of 16, as in 32,64,128")
    return widths


def rate_list(text: str) -> list[float]:
    """For argparse's `type`."""
    try:
        rates = sorted({float(part) for part in text.split(",")})
    except ValueError:
        rates = [0.0]
    if not all(0 < rate < float("inf") for rate in rates):
        raise argparse.ArgumentTypeError(f"{text!r}: must be numbers above 0, as in 0.004,0.008")
    return rates


def main() -> None:
    arguments = parser().parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(os.cpu_count() or 1))
    from tools.experiments.results import write
    from tools.experiments.transfer import RateSweep, best_rates, run_sweep

    sweep = RateSweep(arguments.widths, arguments.lrs, range(arguments.seeds), arguments.runs, tuple(arguments.set))
    try:
        results = run_sweep(sweep, shlex.join(["python", *sys.argv]))
    except ConfigError as error:
        raise UserError(str(error)) from None
    for arm, rate in best_rates(results).items():
        print(f"best learning rate, {arm}: {rate:g}")
    for path in write(results, arguments.output):
        print(path)


if __name__ == "__main__":
    run_tool(main)
