"""Runs language-model tasks at several budgets K with one load, by the EleutherAI harness, and prints one table."""

from megassm.cli.arguments import run_tool
from megassm.commands.tasks import main

if __name__ == "__main__":
    run_tool(main)
