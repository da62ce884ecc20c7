"""Continues a prompt with a trained model, at one or several budgets K."""

from megassm.cli.arguments import run_tool
from megassm.commands.generate import main

if __name__ == "__main__":
    run_tool(main)
