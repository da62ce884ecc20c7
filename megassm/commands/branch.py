"""Begins a new run where another one was after so many updates: with its weights, moments, and place in the data.

The new run's journal has the old one's updates up to there. The old run stays as it is, and may be training.
"""

from __future__ import annotations

from megassm.cli.arguments import Parser, path_argument, positive, print_line


def parser() -> Parser:
    result = Parser(__doc__ or "", "python tools/branch.py runs/mine --at 400 --to runs/longer")
    result.add_argument("run", type=path_argument, metavar="RUN_DIR", help="run directory; it is only read")
    result.add_argument("--at", type=positive, required=True, metavar="STEP", help="updates done at its checkpoint")
    result.add_argument("--to", type=path_argument, required=True, metavar="NEW", help="run directory to make")
    return result


def main() -> None:
    arguments = parser().parse_args()
    from megassm.checkpoint.branch import branch
    from megassm.run.directory import CONFIG

    config = branch(arguments.run, arguments.at, arguments.to)
    train = config.train
    print_line(
        f"{arguments.to}: {arguments.run} after step {arguments.at} of {train.steps}\n"
        f"next: python launch/pretrain.py --config {arguments.to / CONFIG} train.steps={2 * train.steps}"
    )
