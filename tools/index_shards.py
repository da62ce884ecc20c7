"""Indexes shards of token ids made elsewhere, so that training reads them as they are."""

from megassm.cli.arguments import run_tool
from megassm.commands.index import main

if __name__ == "__main__":
    run_tool(main)
