"""What a launcher starts in place of launch/pretrain.py: the same, with a fault planted on one rank.

FAULT=sleep:RANK:STEP    the reading of that step's samples never ends
FAULT=raise:RANK:STEP    a bug: KeyError there
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from launch import pretrain
from megassm.cli import run_tool
from megassm.data.stream import MicroBatch, TokenStream


def plant(kind: str, rank: int, step: int) -> None:
    whole = TokenStream.micro_batch

    def micro_batch(self: TokenStream, at: int, micro_step: int) -> MicroBatch:
        if int(os.environ["RANK"]) == rank and at + 1 == step:
            if kind == "raise":
                raise KeyError("planted")
            time.sleep(1000)
        return whole(self, at, micro_step)

    TokenStream.micro_batch = micro_batch  # type: ignore[method-assign]


if __name__ == "__main__":
    kind, rank, step = os.environ["FAULT"].split(":")
    plant(kind, int(rank), int(step))
    try:
        run_tool(pretrain.main)
    except SystemExit as end:
        pretrain.leave(end.code if isinstance(end.code, int) else 1)
    pretrain.leave(0)
