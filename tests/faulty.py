"""What a launcher starts in place of launch/pretrain.py: the same, with a fault planted on one rank.

FAULT=sleep:RANK:STEP    the reading of that step's samples never ends
FAULT=raise:RANK:STEP    a bug: KeyError there
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from megassm.cli.arguments import run_tool
from megassm.commands import train as pretrain
from megassm.data.stream import MicroBatch, TokenStream


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


if __name__ == "__main__":
    kind, rank, step = os.environ["FAULT"].split(":")
    plant(kind, int(rank), int(step))
    try:
        run_tool(pretrain.main)
    except SystemExit as end:
        pretrain.leave(end.code if isinstance(end.code, int) else 1)
    pretrain.leave(0)
