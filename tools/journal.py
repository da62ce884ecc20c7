"""Writes a run's journal as CSV."""

from megassm.cli.arguments import run_tool
from megassm.commands.journal import main

if __name__ == "__main__":
    run_tool(main)
