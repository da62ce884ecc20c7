"""Pretrains a model: `deepspeed launch/pretrain.py --config configs/tiny.yaml [section.key=value ...]`.

Starts in the same way under `deepspeed`, `torchrun`, `srun` (see launch/slurm.py), and as plain `python` (one process).
The configuration and the data's index are checked before torch is imported: a mistake is reported in less than a
second. Exit codes: 0 done; 75 told to stop (SIGTERM, SIGUSR1), and saved; 1 an error; 2 the configuration or the
command line is wrong.

`python launch/pretrain.py --config X.yaml --dry-run --world-size 512` checks a job of that size, and starts nothing;
`--print-config` prints the configuration with every knob in it.
"""

from __future__ import annotations

import argparse
import atexit
import contextlib
import os
import sys
from pathlib import Path
from typing import NoReturn

from megassm.cli.arguments import Parser, error_text, is_rank_zero, positive, run_tool
from megassm.cli.progress import LineProgress
from megassm.config.load import dump_config, world_size_from_environment
from megassm.errors import UserError
from megassm.run.directory import FAILURE
from megassm.run.opening import load_run_config, open_run_directory
from megassm.run.stop import leave_when_told
from megassm.slurm.ranks import rank_environment


def parse() -> argparse.Namespace:
    parser = Parser(
        "Pretrain an elastic spectral language model.",
        "deepspeed --num_gpus 2 launch/pretrain.py --config configs/tiny.yaml train.steps=100",
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML, see configs/")
    parser.add_argument("--dry-run", action="store_true", help="check the mesh and every rank's shards; start nothing")
    parser.add_argument("--print-config", action="store_true", help="print every knob as resolved; start nothing")
    parser.add_argument("--world-size", type=positive, metavar="N", help="ranks of the dry run")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it; LOCAL_RANK counts
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace values of the file")
    arguments = parser.parse_intermixed_args()
    if arguments.world_size and not arguments.dry_run:
        parser.error("--world-size goes with --dry-run; a real job's size is its launcher's")
    return arguments


def dry_run(arguments: argparse.Namespace) -> None:
    world_size = arguments.world_size or world_size_from_environment()
    config = load_run_config(arguments.config, arguments.overrides, world_size)
    from megassm.plan.dryrun import dry_run

    for name, value in dry_run(config, world_size).items():
        print(f"{name:<32} {value:,}" if isinstance(value, int) else f"{name:<32} {value}")
    print("every parameter is held exactly once; nothing was started or written")


def main() -> None:
    os.environ |= rank_environment(os.environ)
    arguments = parse()
    if arguments.dry_run:
        dry_run(arguments)
        return
    leave_when_told()
    config = load_run_config(arguments.config, arguments.overrides)
    if arguments.print_config:
        print(dump_config(config), end="")
        return
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost rank is one message of ours, not pages of frames
    # imported one after another, so that what is wrong early is reported early
    from megassm.data.dataset import open_dataset
    from megassm.data.mixture import check_repeats
    from megassm.run.events import append_event

    with LineProgress().busy("opening the data and loading torch") if is_rank_zero() else contextlib.nullcontext():
        data = open_dataset(config)
        check_repeats(data.train, config)
        lock = open_run_directory(config)
        run_dir = Path(config.run.dir)
        if lock is not None:
            leave_when_told(lambda text: append_event(run_dir, "stop", 0, text, {}))
        from megassm.train.loop import pretrain

    try:
        pretrain(config, data)
    except (UserError, OSError) as error:  # before there is a watchdog to say it
        with contextlib.suppress(OSError), open(run_dir / FAILURE, "x", encoding="utf-8") as file:
            file.write(f"{error_text(error)}\n")
        raise
    if lock is not None:
        lock.close()


def leave(code: int) -> NoReturn:
    """Ends the process without the interpreter's own end, where now and then a thread of torch's aborts a finished rank
    (2 of 40 starts of two ranks under torchrun)."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # a full disk behind a log does not fail the run
            stream.flush()
    os._exit(code)


def run() -> NoReturn:
    """`main` as a process of its own, which ends here."""
    try:
        run_tool(main)
    except SystemExit as end:
        leave(end.code if isinstance(end.code, int) else 1)
    leave(0)
