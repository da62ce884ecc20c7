"""Plans a run on a cluster: memory, FLOPs, bytes between ranks, time a step; and what fits where it does not."""

from megassm.cli.arguments import run_tool
from megassm.commands.plan import main

if __name__ == "__main__":
    run_tool(main)
