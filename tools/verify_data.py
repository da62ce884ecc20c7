"""Checks every byte and count of a data set and shows some of its text; see `megassm.data.prepare.verify`."""

from megassm.cli.arguments import run_tool
from megassm.commands.verify import main

if __name__ == "__main__":
    run_tool(main)
