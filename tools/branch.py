"""Begins a new run where another one was after so many updates."""

from megassm.cli.arguments import run_tool
from megassm.commands.branch import main

if __name__ == "__main__":
    run_tool(main)
