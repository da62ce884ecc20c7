"""What a launcher starts in place of launch/pretrain.py: the same, with a fault planted on one rank.

FAULT=sleep:RANK:STEP    the reading of that step's samples never ends
FAULT=raise:RANK:STEP    a bug: KeyError there
FAULT=hold:RANK:STEP     the disk takes half of that rank's file of the checkpoint after that step, and the rest when
                         there is a file $RELEASE
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from torch import Tensor

from megassm.checkpoint import tensor_file
from megassm.cli.arguments import run_tool
from megassm.commands import train as pretrain
from megassm.data.stream import MicroBatch, TokenStream
from megassm.run.directory import step_name


def plant(kind: str, rank: int, step: int) -> None:
    whole = TokenStream.batches

    def batches(self: TokenStream, start_step: int, stop_step: int) -> Iterator[MicroBatch]:
        for number, batch in enumerate(whole(self, start_step, stop_step)):
            at = start_step + number // self.micro_steps + 1
            if int(os.environ["RANK"]) == rank and at == step:
                if kind == "raise":
                    raise KeyError("planted")
                time.sleep(1000)
            yield batch

    TokenStream.batches = batches  # type: ignore[method-assign]


def hold(rank: int, step: int) -> None:
    whole, release = tensor_file.write_tensors, Path(os.environ["RELEASE"])

    def write(path: Path, tensors: Mapping[str, Tensor], wrote: Callable[[int], None]) -> tuple[int, int]:
        if int(os.environ["RANK"]) == rank and step_name(step) in path.parent.name and not release.exists():
            half = path.with_name("half")
            whole(half, dict(list(tensors.items())[::2]), wrote)
            while not release.exists():
                time.sleep(0.02)
            half.unlink()
        return whole(path, tensors, wrote)

    tensor_file.write_tensors = write


if __name__ == "__main__":
    kind, rank, step = os.environ["FAULT"].split(":")
    (hold if kind == "hold" else partial(plant, kind))(int(rank), int(step))
    try:
        run_tool(pretrain.main)
    except SystemExit as end:
        pretrain.leave(end.code if isinstance(end.code, int) else 1)
    pretrain.leave(0)
