"""Pretrains a model: `deepspeed launch/pretrain.py --config configs/tiny.yaml [section.key=value ...]`.

Starts in the same way under `deepspeed`, under `torchrun`, and as plain `python` (one process). The configuration and
the data's index are checked before torch is imported: a refusal takes less than a second. Exit codes: 0 done, or
stopped by a signal after saving; 1 refused or failed; 2 the configuration or the command line is wrong.
"""

from __future__ import annotations

import argparse
import atexit
import os
import sys
from pathlib import Path
from typing import NoReturn

from megassm.cli import Parser, run_tool
from megassm.config import Config
from megassm.configfile import load_config_or_exit


def parse() -> Config:
    parser = Parser(
        "Pretrain an elastic spectral language model.",
        "deepspeed --num_gpus 2 launch/pretrain.py --config configs/tiny.yaml train.steps=100",
    )
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="YAML, see configs/")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # the deepspeed launcher passes it; LOCAL_RANK counts
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replace values of the file")
    arguments = parser.parse_intermixed_args()
    return load_config_or_exit(arguments.config, arguments.overrides)


def main() -> None:
    config = parse()
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # a lost rank is one message of ours, not pages of frames
    # imported one after another, so that what is wrong early is refused early
    from megassm.data.dataset import open_dataset
    from megassm.rundir import open_run_directory

    data = open_dataset(config)
    lock = open_run_directory(config)
    from megassm.train import pretrain

    pretrain(config, data)
    if lock is not None:
        lock.close()


def leave(code: int) -> NoReturn:
    """Ends the process without the interpreter's own end, where now and then a thread of torch's aborts a finished rank
    (2 of 40 starts of two ranks under torchrun)."""
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    try:
        run_tool(main)
    except SystemExit as end:
        leave(end.code if isinstance(end.code, int) else 1)
    leave(0)
