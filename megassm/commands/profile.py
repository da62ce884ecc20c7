"""Profiles the training of a configuration: a table of time by phase and by kind of layer, and torch's trace.

One process, on a CPU or on CUDA; needs no data set, for the tokens are random unless `--data` is given. Open the trace
in https://ui.perfetto.dev or chrome://tracing. Under the profiler all is slower, small operations most: the phases are
timed without it.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

from megassm.cli.arguments import Parser, path_argument, positive, print_table, tool_parser, write_json
from megassm.config.load import load_config_or_exit


def parser() -> Parser:
    result = tool_parser(__doc__ or "", "python tools/profile_training.py --config configs/tiny.yaml --steps 3 --k 8")
    result.add_argument("--config", type=path_argument, required=True, metavar="FILE", help="YAML, see configs/")
    what = "updates timed, and as many profiled (default: 3)"
    result.add_argument("--steps", type=positive, default=3, metavar="N", help=what)
    what = "budget of every update (default: drawn as in training, after its start)"
    result.add_argument("--k", type=positive, metavar="K", help=what)
    result.add_argument("--data", action="store_true", help="read the configuration's own data set")
    where = "folder of the trace (default: profile)"
    result.add_argument("--output", type=path_argument, default=Path("profile"), metavar="DIR", help=where)
    result.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace values of the file")
    return result


def main() -> None:
    command_line = parser()
    arguments = command_line.parse_intermixed_args()
    config = load_config_or_exit(arguments.config, arguments.overrides, 1)
    if arguments.k and arguments.k > config.model.num_channels:
        command_line.error(f"--k {arguments.k}: the model has {config.model.num_channels} channels")
    if config.train.compile:
        command_line.error("train.compile: a compiled block has no layers to be told apart; add train.compile=false")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages
    from megassm.data.dataset import open_dataset
    from megassm.parallel.engine import Engine
    from megassm.parallel.world import join_world, leave_world
    from megassm.run.journal import peak_flops
    from megassm.train.profiling import data_batches, kind_rows, phase_rows, profile_training, random_batches

    trace = arguments.output / "trace.json.gz"
    world = join_world(config)
    try:
        data = open_dataset(config) if arguments.data else None
        engine = Engine(config, world, data.document_end(config) if data else None)
        updates = 2 * arguments.steps + 1
        batches = data_batches(data, engine, updates) if data else random_batches(config, world.device)
        result = profile_training(engine, batches, arguments.k, arguments.steps, trace)
    finally:
        leave_world()
    tokens, rate = config.tokens_per_step(), config.tokens_per_step() / sum(result.phases.values())
    budget = f"at K={arguments.k}" if arguments.k else f"at the K that `{config.budget.strategy}` draws"
    print(f"{tokens:,} tokens an update, {budget}, on {world.device.type}: {rate:,.0f} tokens/s")
    print_table("by phase", phase_rows(result))
    print_table("by kind of layer: own time under the profiler; model FLOPs", kind_rows(result))
    peak, source = peak_flops(config.log.peak_tflops, world.device)
    known = f"peak rate {source}" if peak is None else f"peak rate {peak / 1e9:,.1f} GFLOP/s ({source})"
    print(f"{known}; without the filters' own products\ntrace: {trace}")
    write_json(
        [asdict(result) | {"kinds": [row._asdict() for row in result.kinds], "peak_flops": peak}], arguments.json
    )
