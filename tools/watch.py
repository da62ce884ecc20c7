"""Watches a run in the terminal: loss, quality over K, throughput, health and events, until ctrl-C."""

from megassm.cli.arguments import run_tool
from megassm.commands.watch import main

if __name__ == "__main__":
    run_tool(main)
