"""Profiles the training of a configuration: a table of time by phase and by kind of layer, and torch's trace."""

from megassm.cli.arguments import run_tool
from megassm.commands.profile import main

if __name__ == "__main__":
    run_tool(main)
