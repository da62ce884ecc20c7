"""Turns text into the sharded data set that pretraining reads; see `megassm.data.prepare.pipeline`."""

from megassm.cli.arguments import run_tool
from megassm.commands.prepare import main

if __name__ == "__main__":
    run_tool(main)
