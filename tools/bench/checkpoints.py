"""What it costs to start, to save and to resume a model: seconds, memory of each rank, bytes read. Under any launcher.

    python -m torch.distributed.run --standalone --nproc-per-node 4 -m tools.bench.checkpoints \\
        --config configs/125m.yaml --output /tmp/bench run.dir=x data.path=x

The first call starts from the seed and saves, once waiting for it and once beside other work; a second call with the
same output resumes. Nothing is trained. Memory is what the process has allocated (RssAnon), at its peak in each phase
and above what it had before: pages of files that are mapped can be dropped at any time, and are not counted.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megassm.cli.arguments import TableRow, is_rank_zero, print_table, run_tool, tool_parser
from megassm.config.load import load_config_or_exit
from megassm.config.schema import Config
from megassm.errors import UserError

SAMPLE_S = 0.005


def allocated_bytes() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    if found is None:
        raise UserError("/proc/self/status: has no RssAnon; this measurement needs Linux")
    return int(found[1]) * 1024


def bytes_read() -> int:
    """By read calls, wherever from."""
    found = re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())
    assert found is not None
    return int(found[1])


class Phases:
    """Measures one part of the work after another."""

    def __init__(self) -> None:
        self.rows: dict[str, list[float]] = {}

    @contextmanager
    def measured(self, phase: str) -> Iterator[None]:
        """Notes (seconds, peak bytes above the beginning's, bytes read) of what happens inside."""
        before, read, ended = allocated_bytes(), bytes_read(), threading.Event()
        peak = [before]

        def sample() -> None:
            while not ended.wait(SAMPLE_S):
                peak[0] = max(peak[0], allocated_bytes())

        thread = threading.Thread(target=sample, daemon=True)
        thread.start()
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            ended.set()
            thread.join()
            self.rows[phase] = [seconds, max(peak[0], allocated_bytes()) - before, bytes_read() - read]


def measure(config: Config, phases: Phases) -> None:
    """Starts and saves, or resumes what an earlier call has saved."""
    from megassm.checkpoint.save import Saver
    from megassm.parallel.engine import Engine
    from megassm.parallel.world import join_world
    from megassm.run.events import Events
    from megassm.train.resuming import checkpoint_to_continue, restore
    from megassm.train.setup import enter

    run_dir = Path(config.run.dir)
    world = join_world(config)
    fence, _ = enter(run_dir, world)
    with phases.measured("start"):
        engine = Engine(config, world)
    events = Events(run_dir, False, fence)
    with phases.measured("check"):
        checkpoint = checkpoint_to_continue(config, "", events, world)
    if checkpoint is not None:
        with phases.measured("resume"):
            restore(engine, checkpoint, events)
        return
    saver = Saver(engine, config, "", fence)
    for step in (1, 2):
        with phases.measured(f"save {step}, waiting"):
            saver.begin(step)
            saver.finish()
    with phases.measured("save 3, copy alone"):
        saver.begin(3)
    with phases.measured("save 3, the rest"):
        saver.finish()


def main() -> None:
    parser = tool_parser(__doc__ or "", "python -m tools.bench.checkpoints --config FILE --output DIR")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML, see configs/")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="run directory")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace values of the file")
    arguments = parser.parse_intermixed_args()
    overrides = (*arguments.overrides, f"run.dir={arguments.output}", "data.path=none")
    config = load_config_or_exit(arguments.config, overrides)
    arguments.output.mkdir(parents=True, exist_ok=True)

    from megassm.cost import parameters
    from megassm.parallel.world import gather_rows, leave_world

    phases = Phases()
    try:
        measure(config, phases)
        ranks = [gather_rows(mine) for mine in phases.rows.values()]
        rows: list[TableRow] = [
            {
                "phase": phase,
                "seconds": max(row[0] for row in found),
                "largest_rank_GB": max(row[1] for row in found) / 1e9,
                "all_ranks_GB": sum(row[1] for row in found) / 1e9,
                "read_GB": sum(row[2] for row in found) / 1e9,
            }
            for phase, found in zip(phases.rows, ranks, strict=True)
        ]
        if is_rank_zero():
            numbers = parameters(config.model, config.model.num_channels)
            size = f"{numbers:,} parameters, {4 * numbers / 1e9:.2f} GB in float32"
            print_table(f"{size}; {len(ranks[0])} ranks, ZeRO {config.parallel.zero_stage}", rows, arguments.json)
    finally:
        leave_world()


if __name__ == "__main__":
    run_tool(main)
