"""Runs experiments: trains their arms at several seeds, measures, and writes tables and plots to docs/results/."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

from megassm.cli.arguments import Parser, path_argument, positive, run_tool
from megassm.config.source import ConfigError
from megassm.errors import UserError


def parser() -> Parser:
    result = Parser(__doc__ or "", "python tools/experiments/run.py static_elastic --seeds 3 --jobs 2")
    add = result.add_argument
    add("names", nargs="+", metavar="NAME", help="experiments, or `all`; tools/experiments/README.md has the list")
    add("--seeds", type=positive, default=3, metavar="N", help="trainings of each arm, seeds 0..N-1 (default: 3)")
    add("--jobs", type=positive, default=1, metavar="N", help="trainings side by side (default: 1)")
    add("--arms", nargs="+", default=[], metavar="TEXT", help="only arms of these names, or with one in theirs")
    what = "peak learning rates to choose from by arm (default: the experiment's own)"
    add("--rates", type=float, nargs="*", metavar="LR", help=what)
    add(
        "--device",
        metavar="DEVICE",
        help="train in a plain loop there, such as cuda; small models",
    )
    add("--config", type=path_argument, metavar="FILE", help="instead of the experiment's own, for a larger model")
    add("--runs", type=path_argument, default=Path("runs/experiments"), metavar="DIR", help="where trainings are kept")
    add("--output", type=path_argument, default=Path("docs/results"), metavar="DIR", help="(default: docs/results)")
    add("--add", action="store_true", help="to what stands in the output directory, instead of in its place")
    add("--set", nargs="+", default=[], metavar="section.key=value", help="replace values of the configuration")
    return result


def main() -> None:
    command_line = parser()
    arguments = command_line.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // arguments.jobs)))
    from tools.experiments.definitions import EXPERIMENTS
    from tools.experiments.results import read, write
    from tools.experiments.runner import Options, run_experiment, workers

    names = list(EXPERIMENTS) if arguments.names == ["all"] else arguments.names
    unknown = [name for name in names if name not in EXPERIMENTS]
    if unknown:
        command_line.error(f"no experiment {unknown[0]!r}; there are {', '.join(EXPERIMENTS)}, or all")
    stored = {name: read(arguments.output / f"{name}.json") for name in names if arguments.add}
    rates = None if arguments.rates is None else tuple(arguments.rates)
    options = Options(
        range(arguments.seeds),
        arguments.runs,
        arguments.config,
        tuple(arguments.set),
        tuple(arguments.arms),
        rates,
        arguments.device,
    )
    with workers(arguments.jobs) as pool:
        for name in names:
            command = shlex.join(["python", *sys.argv[:1], name, *_flags(sys.argv[1:], arguments.names)])
            try:
                results = run_experiment(name, options, command, pool, stored.get(name))
            except ConfigError as error:
                raise UserError(f"experiment {name}: {error}") from None
            for path in write(results, arguments.output):
                print(path, flush=True)


def _flags(words: list[str], names: list[str]) -> list[str]:
    """The command line without the experiments' names."""
    return [word for word in words if word not in names]


if __name__ == "__main__":
    run_tool(main)
