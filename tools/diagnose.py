"""Looks inside a run: gate mass, updates and norm of every channel, and what its journal warns of."""

from megassm.cli.arguments import run_tool
from megassm.commands.diagnose import main

if __name__ == "__main__":
    run_tool(main)
