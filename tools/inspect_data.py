"""Prints the exact text of any global batch of a run, past or to come."""

from megassm.cli.arguments import run_tool
from megassm.commands.inspect import main

if __name__ == "__main__":
    run_tool(main)
